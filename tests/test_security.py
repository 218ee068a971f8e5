"""What SECURITY.md promises of foreign recipes, models, data, run folders and records. Each row of its table names its
tests, here or beside what they are about. Run: pytest tests/test_security.py"""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import recipe_of
from runs import assert_one_line, cola, go

from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe
from cola.report.table import Table
from cola.tree.store import Store

ROOT = Path(__file__).parent.parent
SHORT = ["arms.full=null", "arms.chain3=null", "comparison.primary=null", "training.epochs=1"]
ASCII = "".join(map(chr, range(0x20, 0x7F)))
HOSTILE = [
    r"\input{/etc/passwd}",
    r"\write18{id}",
    "100% & 3_4 ^ ~ {x} $y$ #1",
    '"quoted" <b>',
    ASCII,
    "[a] − – ± × · → ‖Δσ‖ ≤≥ …",
]


def test_every_row_of_the_table_names_a_test_that_is_there() -> None:
    rows = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    told = [re.findall(r"`(tests/\S+\.py)::(test_\w+)`", row) for row in rows if "tests/" in row]
    assert len(told) >= 13
    for row in told:
        assert row
        for file, test in row:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!own {}"])
def test_a_tag_in_a_recipe_makes_no_object(recipe_text: str, tmp_path: Path, tag: str) -> None:
    recipe = tmp_path / "tagged.yaml"
    recipe.write_text(recipe_text.replace("name: tiny", f"name: {tag.format(tmp_path / 'ran')}"))
    told = cola("run", recipe)
    assert_one_line(told)
    assert "tagged.yaml:2:7: not valid YAML" in told.stderr
    assert not (tmp_path / "ran").exists()


NAMES = ["../up", "a/b", ".hidden", "-r", "=1+1", "@SUM(1)", "a b", "<b>x", r"\input{x}", "x\ny", "a" * 101]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name_of_a_folder_and_nothing_else(recipe_text: str, tmp_path: Path, name: str) -> None:
    tree = yaml.safe_load(recipe_text) | {"tracking": {"wandb": "off"}}
    recipe = tmp_path / "named.yaml"
    for changed, key in ((tree | {"name": name}, "name"), (tree | {"arms": {name: {"links": 1}}}, "arms.")):
        recipe.write_text(yaml.safe_dump(changed))
        told = cola("run", "--dry-run", recipe)
        assert told.exit_code == 2
        assert key in told.stderr
        assert "should" in told.stderr


def test_a_template_calls_nothing_and_reads_no_attribute(recipe_file: Path) -> None:
    for prompt in ("{question.__class__}", "{question!r}", "{question:>99}", "{question[0]}"):
        told = cola("run", recipe_file, f'data.prompt="{prompt}"', *SHORT)
        assert told.exit_code == 2
        assert "data.prompt" in told.stderr or "question" in told.stderr
        assert "Traceback" not in told.output


def test_a_chat_template_runs_in_a_sandbox(recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    ran = tmp_path / "ran"
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}{{ messages[0]['content'] }}".replace("RAN", str(ran))
    )
    told = cola("run", recipe_file, f"model.name_or_path={folder}", "data.chat=true", *SHORT)
    assert told.exit_code == 2
    assert "data.chat: the model's chat template says: access to attribute '__init__'" in told.stderr
    assert not ran.exists()


def test_a_tokenizer_that_comes_with_code_does_not_run_it(recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    cola("run", recipe_file, f"model.name_or_path={folder}", *SHORT)
    assert not ran.exists()


def test_no_record_names_a_key_a_user_or_a_host(
    recipe_text: str, tiny_folder: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "mrs-smith"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "mrs-smith")
    monkeypatch.setenv("LOGNAME", "mrs-smith")
    monkeypatch.setattr(socket, "gethostname", lambda: "her-machine")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"secret-of-{name}".ljust(40, "0"))
    shutil.copytree(tiny_folder, home / "model")
    shutil.copy(colours, home / "rows.jsonl")
    (home / "start.py").write_text(
        "import torch\n\ndef start(matrix):\n    return torch.ones(matrix.rank, matrix.weight_OI.shape[1])\n"
    )
    recipe = home / "mine.yaml"
    recipe.write_text(recipe_text.replace(str(tiny_folder), "./model").replace(str(colours), "~/rows.jsonl"))
    run = tmp_path / "run"
    mine = [*SHORT, "arms.lora.init=./start.py:start"]
    told = cola("run", recipe, "--run-folder", run, "--allow-code", *mine)
    assert told.exit_code == 0, told.output
    secrets = [b"mrs-smith", b"her-machine", b"secret-of-", socket.gethostname().encode()]
    found = {
        (file.name, word) for file in run.rglob("*") if file.is_file() for word in secrets if word in file.read_bytes()
    }
    assert not found
    # What is written is found again: by another command in the same folder, and from a home that has the same files.
    resolved = read_recipe(run / "recipe.yaml")
    assert dump_recipe(resolved) == (run / "recipe.yaml").read_text()
    assert cola("run", "--resume", run, "--allow-code").exit_code == 0
    home.rename(tmp_path / "mr-jones")
    monkeypatch.setenv("HOME", str(tmp_path / "mr-jones"))
    assert cola("run", "--resume", run, "--allow-code").exit_code == 0


def test_a_prompt_that_looks_like_a_path_stays_as_it_is(
    recipe_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = tmp_path / "path.yaml"
    recipe.write_text(recipe_text.replace('"{question}?"', '"/home/me/{question}?"'))
    assert "prompt: /home/me/{question}?" in dump_recipe(read_recipe(recipe))


@pytest.mark.drawn
def test_a_cell_of_a_csv_that_begins_like_a_formula_is_a_number(recipe_file: Path, tmp_path: Path) -> None:
    assert cola("run", recipe_file, *SHORT, "--run-folder", tmp_path / "run").exit_code == 0
    tables = list((tmp_path / "run/tables").glob("*.csv"))
    assert tables
    for table in tables:
        for cell in (cell for row in csv.reader(table.open()) for cell in row if cell[:1] in tuple("=+-@\t\r")):
            assert re.match(r"[+-]\.?\d", cell), f"{table.name}: {cell}"


def test_a_table_for_a_paper_compiles_whatever_stands_in_it(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("needs pdflatex")
    table = Table("; ".join(HOSTILE[:3]), ["arm", "what"], [[text, text] for text in HOSTILE])
    whole = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + table.latex("all") + r"\end{document}"
    (tmp_path / "table.tex").write_text(whole)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", "table.pdf", "-"], cwd=tmp_path, capture_output=True, text=True).stdout
        assert "/etc/passwd" in text  # the words, and not the file
        assert "root:" not in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, colours: Path, prose: Path) -> Path:
    """A folder with a finished run of a chain, `run`, its `store` and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe_of(tiny_folder, colours, prose, folder / "runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola.report.page.figures_of", lambda *_: {})
        short = ["arms.full=null", "arms.base=null", "arms.chain3={links: 2}", "training={epochs: 1, batch_size: 8}"]
        _, summary = go(recipe, *short, f"store={folder / 'store'}", folder=folder / "run")
    assert not any(arm.errors for arm in summary.arms.values())
    return folder


@pytest.fixture
def foreign(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, for links to be put into."""
    return Path(shutil.copytree(finished, tmp_path / "foreign"))


def led_out(path: Path, to: Path) -> Path:
    """The path as a link to what it was, which lies elsewhere now."""
    to.parent.mkdir(exist_ok=True)
    path.rename(to)
    path.symlink_to(to)
    return path


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LINKS = ["recipe.yaml", "summary.json", "arms/lora/seed-0/scores/test.jsonl", "arms/chain3/seed-0/knots/link-1", "arms"]


@pytest.mark.parametrize("name", LINKS)
def test_no_command_follows_a_link_out_of_a_run(foreign: Path, tmp_path: Path, name: str) -> None:
    run, outside = foreign / "run", tmp_path / "outside"
    link = led_out(run / name, outside / "kept")
    (run / "notes").symlink_to(outside)  # of which cola reads nothing
    before = everything_in(outside)
    commands = [("report",), ("inspect",), ("verify",), ("run", "--resume"), ("export", "--arm", "chain3")]
    for words in (*commands, ("compare", run), ("eval", "--data", run)):
        told = cola(*words, run)
        assert_one_line(told)
        assert f"{link} leads out of {run} by a link" in told.stderr, words
    assert everything_in(outside) == before
    link.unlink()
    (outside / "kept").rename(link)
    (tmp_path / "runs").symlink_to(foreign)  # the folder itself may be reached by one
    for words in (("verify",), ("report",)):
        assert cola(*words, tmp_path / "runs/run").exit_code == 0, words


def test_no_command_waits_for_a_pipe_in_a_run_or_holds_it_by_a_link(foreign: Path, tmp_path: Path) -> None:
    run = foreign / "run"
    shutil.rmtree(run / ".lease")
    (run / ".lease").symlink_to(tmp_path)
    told = cola("run", "--resume", run)
    assert_one_line(told)
    assert ".lease is a link" in told.stderr
    scores = run / "arms/lora/seed-0/scores/test.jsonl"
    scores.unlink()
    os.mkfifo(scores)
    told = cola("report", run)
    assert_one_line(told)
    assert f"{scores} is neither a file nor a folder" in told.stderr


@pytest.mark.parametrize("within", ["", "segment.json", "adapter_model.safetensors"])
def test_a_segment_that_is_a_link_out_of_the_store_is_set_aside(foreign: Path, tmp_path: Path, within: str) -> None:
    store, outside = Store(foreign / "store", lambda _: None), tmp_path / "outside"
    segment = next(path for path in store.segments() if store.record(path)["kind"] == "segment")
    led_out(segment / within, outside / "kept")
    before = everything_in(outside)
    told = cola("store", "verify", "--store", store.path)
    assert told.exit_code == 1
    assert "leads out of the store by a link); it is set aside" in " ".join(told.output.split())
    assert cola("store", "prune", "--yes", "--store", store.path).exit_code == 0
    assert not list((store.path / "damaged").iterdir())
    assert everything_in(outside) == before


def test_a_shelf_of_a_store_that_is_a_link_out_is_refused(foreign: Path, tmp_path: Path) -> None:
    store = foreign / "store"
    shelf = led_out(next((store / "segments").iterdir()), tmp_path / "kept")
    for command in ("verify", "ls", "prune"):
        told = cola("store", command, "--store", store)
        assert_one_line(told)
        assert f"{shelf} leads out of the store by a link" in told.stderr
    shelf.unlink()
    (tmp_path / "kept").rename(shelf)
    led_out(store / "segments", tmp_path / "another-disk")  # who keeps them elsewhere says so by a link of all
    assert cola("store", "verify", "--store", store).exit_code == 0
