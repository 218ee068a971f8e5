"""The command line: one clear line and exit code 2 for what is the user's to mend. Run: pytest tests/cli/test_cli.py"""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import tiny_model
from runs import cola, go
from safetensors.torch import load_file, save_file

from cola.measure import memory


def refused(*words: object) -> str:
    """The one line that a refused command says on stderr."""
    result = cola("run", *words)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def nothing_left(recipe_file: Path) -> bool:
    runs = recipe_file.parent / "runs"
    return not runs.exists() or not any(runs.iterdir())


def test_help_answers_at_once_and_loads_neither_torch_nor_wandb() -> None:
    code = (
        "import sys, runpy; sys.argv = ['cola', '--help']\n"
        "try: runpy.run_module('cola', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'wandb', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy import'"
    )

    def cpu_seconds() -> float:  # of processes that have ended; a busy machine makes none of it
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds, bare = [], []  # bare: what the libraries of any such command take on this machine
    for _ in range(3):
        for words, times in ((code, seconds), ("import typer, rich.console", bare)):
            started = cpu_seconds()
            done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
            times.append(cpu_seconds() - started)
            assert done.returncode == 0, done.stderr
            assert words != code or "run" in done.stdout
    assert min(seconds) < max(0.5, 3 * min(bare))


def test_the_version_is_the_packages() -> None:
    done = cola("--version")
    assert (done.exit_code, done.stdout) == (0, f"cola {version('chain-of-lora')}\n")


@pytest.mark.slow
def test_no_first_step_waits_for_what_reports_tracks_or_quantizes() -> None:
    code = "import sys, cola.cli.train, cola.run.run\n"
    code += "assert not {'wandb', 'matplotlib', 'fontTools', 'scipy.stats', 'bitsandbytes'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_cola_loads_neither_torch_nor_wandb() -> None:
    code = "import sys, cola; assert not {'torch', 'wandb'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.drawn
def test_a_run_prints_the_table_and_where_everything_is(recipe_file: Path) -> None:
    result = cola("run", recipe_file, "arms.full=null")
    assert result.exit_code == 0, result.output
    for word in ("gap_loss", "gap_acc", "chain3", "report.html", "summary.json"):
        assert word in result.output
    [folder] = (recipe_file.parent / "runs").iterdir()
    again = cola("report", folder)
    assert again.exit_code == 0
    assert "gap_loss" in again.output


def test_an_existing_run_folder_is_kept_as_it_is(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    line = refused("--run-folder", folder, recipe_file)
    assert f"{folder} exists and is no run of exactly this recipe; it is kept as it is: name another folder" in line
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_resume_of_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is no run folder" in refused("--resume", tmp_path)


def test_resume_with_other_data_is_refused(recipe_file: Path, colours: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(colours, own)
    arms = ("arms.full=null", "arms.chain3=null", "comparison.primary=null")
    assert cola("run", recipe_file, f"data.files={own}", "--run-folder", tmp_path / "run", *arms).exit_code == 0
    own.write_text("".join(reversed(own.read_text().splitlines(keepends=True))))
    assert "the data is not the one this run began with" in refused("--resume", tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["link.rnk=4"], "link.rnk: unknown key; did you mean rank?"),
        (["model.name_or_path=./nowhere"], "model.name_or_path: "),
        (["link.target_modules=[q_prj]"], "'q_prj' matches no linear layer; did you mean q_proj?"),
        (
            ["data.prompt={qestion}"],
            "has no field 'qestion'; it has id, question, answer, label, passage; did you mean",
        ),
        (["data.rows.train=500"], "data.rows.train: 500 rows are wanted and colours.jsonl has 176 left for train"),
        (["data.max_length=4", "data.too_long=error"], "are longer than 4 tokens"),
        (["data.files=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["data.chat=true", "data.system=null", "arms.lora.links=[{steps: 99}]"], "take 99 of the run's 6 steps"),
        (["arms.chain3.links=-1"], "arms.chain3.links: input should be greater than or equal to 0"),
        (["evaluation.every=0"], "evaluation.every"),
        (["seeds=[]"], "seeds"),
        (["arms.nosuch=null"], "there is no such arm; the arms are base, lora, chain3, full"),
        (["nonsense"], "write dotted.key=value"),
        (["arms.chain3.links=9"], "9 links need 9 steps or more and the run has 6; raise training.epochs or"),
        (["link.learning_rate={search: [1e-3, 1e-3]}"], "a search names each value, and each seed, once"),
        (["data.rows=20"], "data.rows: a mapping of keys is expected here"),
        (["training.warmup_steps=6"], "training.warmup_steps: 6 of 6 steps leave none for the rest of the schedule"),
        (["comparison.full=nosuch"], "comparison.full names the arm 'nosuch'; the arms are base, lora, chain3, full"),
        (["evaluation.checkpoint=best", "evaluation.every=never"], "never leaves nothing to choose the best"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(recipe_file: Path, overrides: list[str], says: str) -> None:
    assert says in refused(recipe_file, *overrides)
    assert nothing_left(recipe_file)


def test_an_override_that_every_arm_says_otherwise_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    arms = ("arms.full=null", "arms.chain3=null", "comparison.primary=null")
    assert cola("run", recipe_file, "--run-folder", tmp_path / "run", *arms).exit_code == 0
    resolved = tmp_path / "run" / "recipe.yaml"
    for override in ("link.rank=64", "training.learning_rate=0.5"):
        line = refused(resolved, override)
        key = override.partition(".")[2].partition("=")[0]
        assert f"has no effect, since every arm says its own; write arms.lora.{key}=..." in line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere.gguf", "no such file"),
        ("./nowhere", "no such folder"),
        ("package://no_such_package/model.gguf", "the package no_such_package is not installed"),
        ("package://pytest/model.gguf", "pytest has no file model.gguf"),
    ],
)
def test_a_dry_run_knows_a_local_model_that_is_missing(recipe_file: Path, name: str, says: str) -> None:
    assert says in refused("--dry-run", recipe_file, f"model.name_or_path={name}")


def test_a_label_outside_the_choices_names_the_row(recipe_file: Path) -> None:
    choice = ["data.task=multiple_choice", "data.answer=null", "data.choices=[pink, grey]", "data.label=answer"]
    for command, place in (([], "colours.jsonl:"), (["--dry-run"], "colours.jsonl row 1: ")):
        line = refused(*command, recipe_file, *choice)
        assert "is none of the choices: pink, grey" in line
        assert place in line


def test_a_folder_without_safetensors_is_not_unpickled(recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights (.bin, .pt) can run code" in refused(recipe_file, f"model.name_or_path={folder}")


def test_a_folder_with_code_of_its_own_needs_consent(recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('foreign code ran')")
    line = refused(recipe_file, f"model.name_or_path={folder}")
    assert "trust_remote_code" in line


def changed_copy(folder: Path, to: Path, change: Callable[[dict, dict], None]) -> Path:
    """The tiny model with other tensors or another config."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    config = json.loads((to / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # transformers would fill the head with random numbers, other ones in every arm.
        (lambda tensors, config: tensors.pop("lm_head.weight"), "1 missing keys, the first is lm_head.weight"),
        (lambda tensors, config: config.update(intermediate_size=64), "6 mismatched keys, the first is"),
        (lambda tensors, config: config.update(max_position_embeddings=8), "and the model has 8 positions; lower it"),
        (lambda tensors, config: config.update(model_type="t5"), "(t5) is no causal language model"),
        (lambda tensors, config: config.update(model_type="bert", is_decoder=False), "(bert) reads in both directions"),
        (
            lambda tensors, config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}),
            "is quantized",
        ),
    ],
)
def test_a_base_that_cannot_serve_is_refused_before_anything_is_trained(
    recipe_file: Path, tiny_folder: Path, tmp_path: Path, change: Callable, says: str
) -> None:
    folder = changed_copy(tiny_folder, tmp_path / "model", change)
    assert says in refused(recipe_file, f"model.name_or_path={folder}")
    assert nothing_left(recipe_file)


def test_a_tokenizer_of_another_model_is_refused(recipe_file: Path, tmp_path: Path, tokenizer: object) -> None:
    folder = tmp_path / "small-vocabulary"
    tiny_model(vocab_size=100).save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    assert "the folder's tokenizer belongs to another model" in refused(recipe_file, f"model.name_or_path={folder}")


def test_cut_off_weights_are_refused(recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_folder, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"{folder} does not load" in refused(recipe_file, f"model.name_or_path={folder}")
    assert nothing_left(recipe_file)


@pytest.mark.slow
@pytest.mark.drawn
def test_a_damaged_file_of_a_run_is_named_and_only_where_all_needs_it_the_report_is_refused(
    recipe_file: Path, tmp_path: Path
) -> None:
    arms = ("arms.full=null", "arms.base=null")
    go(recipe_file, *arms, folder=tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    assert cola("report", tmp_path / "run").exit_code == 0  # the summary is rebuilt from the results
    seed = tmp_path / "run/arms/chain3/seed-0"
    damages = {"scores/test.jsonl": '{"id": "test-1"}\n', "metrics.jsonl": "not json\n", "result.json": "{"}
    for name, text in damages.items():
        whole = (seed / name).read_text()
        (seed / name).write_text(text)
        result = cola("report", tmp_path / "run")
        assert result.exit_code == 0, result.output
        says = f"chain3/seed-0/{name} is damaged ("
        assert says in (tmp_path / "run/report.html").read_text()
        if name != "metrics.jsonl":  # which is only drawn
            assert says in "".join(result.output.split("\n")).replace("  ", " ")
        assert json.loads((tmp_path / "run/summary.json").read_text())["arms"]["lora"]["n_seeds"] == 1, name
        (seed / name).write_text(whole)
    (tmp_path / "run/provenance.json").write_text("[]")
    result = cola("report", tmp_path / "run")
    assert result.exit_code == 2
    assert "damaged" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_hub_model_without_a_network_says_what_to_do(recipe_file: Path) -> None:
    line = refused(recipe_file, "model.name_or_path=Qwen/Qwen1.5-1.8B")
    assert "without a network, run `hf download Qwen/Qwen1.5-1.8B --local-dir DIR`" in line


def test_a_hub_data_set_without_a_network_says_what_to_do(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    line = refused(recipe_file, "data.hub=google/boolq")
    assert "fetch it elsewhere and name the files under data.files" in line


def test_a_hub_data_set_is_read_by_datasets(recipe_file: Path, tmp_path: Path) -> None:
    # A folder is a data set to `datasets`, which then takes the same way as for one from the hub.
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"q": f"what colour is number {i}", "a": "red" if i % 2 else "blue"} for i in range(60)]
    for split, part in (("train", rows[:40]), ("test", rows[40:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    hub = f"data.hub={{name: {folder}, train: train, validation: train, test: test}}"
    names = ["data.prompt={q}", "data.answer={a}", "arms.full=null", "data.rows={train: 16, validation: 8, test: 8}"]
    result = cola("run", recipe_file, hub, *names)
    assert result.exit_code == 0, result.output
    assert "no_such" in refused(recipe_file, hub.replace("test: test", "test: no_such"), *names)


@pytest.mark.slow
def test_half_precision_without_the_instructions_for_it_is_warned_about(recipe_file: Path) -> None:
    result = cola("run", recipe_file, "model.dtype=float16", "arms.full=null")
    assert result.exit_code == 0, result.output
    assert "is about 10 times slower than float32" in " ".join(result.output.split())
    line = refused(recipe_file, "model.dtype=float16")
    assert "arms.full: full fine-tuning in float16 needs a GPU" in line


def test_a_dry_run_loads_no_weights_and_shows_the_plan(recipe_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    shutil.copy(tiny_folder / "config.json", config_only)
    (config_only / "model.safetensors").write_bytes(b"not weights")
    result = cola("run", "--dry-run", recipe_file, f"model.name_or_path={config_only}", "link.rank=[]")
    assert result.exit_code == 2
    result = cola("run", "--dry-run", recipe_file, f"model.name_or_path={config_only}")
    assert result.exit_code == 0, result.output
    assert "2+2+2" in result.output
    assert "train is scored on" not in result.output
    words = [f"model.name_or_path={config_only}", "evaluation.train_rows=7"]
    assert "train is scored on 7 rows" in cola("run", "--dry-run", recipe_file, *words).output
    # rank 8 on q, k, v, o, gate, up, down of two layers: 8 * sum(in + out)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert f"{8 * 2 * sum(a + b for a, b in shapes) / 1e3:.2f} k" in result.output
    assert nothing_left(recipe_file)


@pytest.mark.parametrize(
    "recipe",
    [
        # A generator of rows takes seconds.
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if "\n  reasoning_gym" in path.read_text() else ())
        for path in sorted(Path("recipes").glob("*.yaml"))
    ],
)
def test_every_shipped_recipe_passes_its_dry_run(recipe: Path) -> None:
    result = cola("run", "--dry-run", recipe)
    assert result.exit_code == 0, result.output
    text = recipe.read_text()
    assert text.startswith("# ")
    assert f"cola run {recipe}" in text or f"cola ablate {recipe}" in text


@pytest.mark.slow
@pytest.mark.drawn
def test_the_flagship_runs_end_to_end_by_overrides_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "boolq.jsonl"
    lines = [
        {"passage": f"the sky is blue {i}", "question": f"is the sky {c}", "answer": c == "blue"}
        for i in range(120)
        for c in ("blue", "red")
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ["data.rows={train: 32, validation: 16, test: 16}", "training.epochs=1", "seeds=[0, 1]"]
    result = cola(
        "run",
        "recipes/qwen1_8b_chain3.yaml",
        f"model.name_or_path={tiny_folder}",
        "model.dtype=float32",
        f"data.files={rows}",
        "tracking.wandb=off",
        f"output={tmp_path}",
        *small,
    )
    assert result.exit_code == 0, result.output
    [folder] = tmp_path.glob("qwen1_8b_chain3-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert {name: arm["n_seeds"] for name, arm in summary["arms"].items()} == dict.fromkeys(
        ("base", "lora", "chain3", "full"), 2
    )
    assert len(list(folder.glob("trials/*/learning_rate=*/seed-1000/result.json"))) == 3 * 5
    assert "± is the standard deviation over 2 seeds" in result.output


def test_a_dry_run_reads_the_first_rows_of_local_files(recipe_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q {n}", "a:b": "x"}) + "\n" for n in range(60)))
    said = {
        "data.answer={anwser}": "data.answer: own.jsonl row 1 has no field 'anwser'",
        "data.answer={question}": "and 20 for validation and 1 for test are wanted and own.jsonl has 60 rows",
        'data.answer="{a:b}"': "data.answer: '{a:b}': between braces stands a field's name, as in",
        f"data.files={tmp_path / 'nowhere.csv'}": "nowhere.csv does not exist",
        "evaluation.general_text=own.jsonl": "own.jsonl row 1 has no field 'text'",
    }
    more = ["data.rows={train: 40, validation: 20, test: 1}", f"output={tmp_path}"]
    for override, says in said.items():
        files = [f"data.files={rows}"] if "general" not in override else ["data.answer={question}"]
        override = override.replace("own.jsonl", str(rows))
        assert says in refused("--dry-run", recipe_file, *files, *more, override)


def test_a_dry_run_counts_the_parameters_of_a_gguf_file_and_loads_no_weight(recipe_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(100)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((100, 32), np.float32))  # the metadata is enough
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = cola("run", "--dry-run", recipe_file, f"model.name_or_path={file}")
    assert result.exit_code == 0, result.output
    # rank 8 on q, k, v, o, gate, up, down of two layers: 8 * sum(in + out)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert f"{8 * 2 * sum(a + b for a, b in shapes) / 1e3:.2f} k" in result.output
    file.write_bytes(file.read_bytes()[:40])
    assert "not a GGUF file that can be read" in refused("--dry-run", recipe_file, f"model.name_or_path={file}")


def test_what_a_link_trains_has_to_fit_into_memory(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 16 * 70_000)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    trained = 80 * 2 * sum(a + b for a, b in shapes)
    assert trained > 70_000
    only = ["arms.full=null", "arms.base=null"]
    for command in ([], ["--dry-run"]):
        line = refused(*command, recipe_file, "link.rank=80", *only)
        assert f"arms.lora: {trained} trained parameters take 0.0 GB with their gradients and AdamW's moments" in line
