"""Loss on a general text before and after training, and peak memory. Run: pytest tests/measure/test_forgetting.py"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end, start
from conftest import PROSE, run_once, tiny_tokenizer
from peft import PeftModel
from runs import fresh, go, outcome, result, write_recipe
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cola.compare.records import Summary
from cola.data.passages import PASSAGE_TOKENS, load_passages
from cola.errors import DataError, RecipeError, RunChanged
from cola.link.model import Source
from cola.measure import memory
from cola.measure.evaluate import Evaluator
from cola.plan.checks import check
from cola.recipe.read import read_recipe
from cola.recipe.schema import SAMPLE
from cola.recipe.write import dump_recipe
from cola.report.tables import named_tables
from cola.tree.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

ARMS = """
  base: {links: 0}
  lora: {links: 1}
  chain3: {links: 3}
  nf4: {quantization: nf4, links: 2}
  bf16: {dtype: bfloat16, links: 2}
  full: {method: full, learning_rate: 2e-3}
  prefix: {method: prefix, num_virtual_tokens: 4}
  prompt: {method: prompt_tuning, num_virtual_tokens: 4}
  bottleneck: {method: adapter, bottleneck: 8}
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, colours: Path) -> Path:
    """A run with every kind of arm, on the sample that comes with cola."""
    return run_once(
        tmp_path_factory.mktemp("forgetting"),
        f"""
name: many
model: {{name_or_path: {tiny_folder}}}
data:
  files: {colours}
  rows: {{train: 24, validation: 8, test: 16}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{epochs: 2, batch_size: 8, learning_rate: 2e-2}}
arms: {ARMS}
seeds: [0, 1]
tracking: {{wandb: off}}
output: {tmp_path_factory.mktemp("runs")}
""",
    )


def general(run: Path, arm: str, seed: int = 0) -> dict[str, Any]:
    return result(RunFolder(run), arm, seed)["evaluation"]["general"]


def loss_by_transformers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, longest: int = 256) -> float:
    """Nats per token of the sample, one passage at a time, by a model's own logits."""
    nats, tokens = 0.0, 0
    for line in files("cola.data").joinpath("general.jsonl").read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"]).input_ids
        for start_at in range(0, len(ids), longest):
            piece = torch.tensor([ids[start_at : start_at + longest]])
            with torch.no_grad():
                logits = model(input_ids=piece).logits[0, -piece.shape[1] :].double()
            nats -= logits[:-1].log_softmax(-1).gather(1, piece[0, 1:, None]).sum().item()
            tokens += piece.shape[1] - 1
    return nats / tokens


# ---------------------------------------------------------------------------------------------------------
# The text


def test_the_sample_is_the_story_alone_and_lies_in_the_package() -> None:
    rows = [json.loads(row) for row in files("cola.data").joinpath("general.jsonl").read_text("utf-8").splitlines()]
    told = " ".join(files("reasoning_gym").joinpath("data/in_the_year_2889.txt").read_text("utf-8").split())
    assert all(" ".join(row["text"].split()) in told for row in rows)
    assert not any(word in row["text"] for row in rows for word in ("Gutenberg", "eBook", "Redactor", "Produced by"))
    assert all("The Forum, February 1889; in the public domain" in row["source"] for row in rows)
    assert 7000 < sum(len(row["text"]) for row in rows) < 8000
    assert '"general.jsonl"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_a_long_text_is_cut_into_passages_and_none_of_it_is_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(PROSE * 30))
    passages = load_passages(str(path), tokenizer, 100)
    ids = tokenizer(path.read_text()).input_ids
    assert [token for p in passages for token in [*p.prompt, *p.answers[0]]] == ids
    assert [p.n_tokens for p in passages] == [100] * (len(ids) // 100) + [len(ids) % 100]
    assert all(len(p.prompt) == 1 for p in passages)
    assert [p.id for p in passages[:2]] == ["own.txt:1.1", "own.txt:1.2"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows_of_a_file_are_passages_of_their_own(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text} for text in PROSE]
    text = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "csv": "text\n" + "".join(f'"{row}"\n' for row in PROSE),
    }
    (tmp_path / f"own.{suffix}").write_text(text[suffix])
    tokenizer = tiny_tokenizer()
    passages = load_passages(str(tmp_path / f"own.{suffix}"), tokenizer, 256)
    assert [[*p.prompt, *p.answers[0]] for p in passages] == [tokenizer(row).input_ids for row in PROSE]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("gone.txt", None, "evaluation.general_text: {path} does not exist"),
        ("gone.parquet", None, "evaluation.general_text: {path} does not exist"),
        ("own.doc", "x", "evaluation.general_text: own.doc: unknown kind '.doc'; known are .jsonl"),
        ("own.txt", " \n", "evaluation.general_text: own.txt holds no rows"),
        ("own.txt", "a", "evaluation.general_text: own.txt holds no text of two tokens or more"),
        ("own.txt", b"\xffa", "evaluation.general_text: own.txt:1: not UTF-8 text at byte 0"),
        ("own.jsonl", '{"text": "a b"}\n{', "evaluation.general_text: own.jsonl:2: not valid JSON"),
        ("own.jsonl", '{"body": "a b"}', "evaluation.general_text: own.jsonl:1 has no field 'text'; it has body"),
        ("own.jsonl", '{"text": null}', "evaluation.general_text: own.jsonl:1: field 'text' is empty"),
        ("own.jsonl", '{"text": ["a"]}', "evaluation.general_text: own.jsonl:1: field 'text' is a list"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_with_its_key(
    tmp_path: Path, name: str, text: str | bytes | None, why: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(why.format(path=path))):
        load_passages(str(path), tiny_tokenizer(), 256)


def test_a_text_of_ones_own_is_found_beside_the_recipe_and_off_stays_off(recipe_text: str, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a text of one's own")
    path = tmp_path / "recipe.yaml"
    named = re.sub(r"general_text: [^}]*", "general_text: own.txt", recipe_text)
    for text, value in (
        (named, str(tmp_path / "own.txt")),
        (named.replace("own.txt", "off"), None),
        (named.replace("own.txt", "null"), None),
        (named.replace("own.txt", "false"), None),
        (named.replace("evaluation: {general_text: own.txt}", ""), SAMPLE),
    ):
        path.write_text(text)
        recipe = read_recipe(path)
        assert recipe.evaluation.general_text == value
        again = tmp_path / "elsewhere" / "recipe.yaml"
        again.parent.mkdir(exist_ok=True)
        again.write_text(dump_recipe(recipe))
        assert read_recipe(again) == recipe
    path.write_text(named.replace("own.txt", "[a]"))
    with pytest.raises(RecipeError, match=r"evaluation\.general_text"):
        read_recipe(path)


def test_a_dry_run_says_that_the_text_is_missing(recipe_file: Path) -> None:
    from runs import quiet

    with pytest.raises(DataError, match=r"evaluation\.general_text: .*/gone\.txt does not exist"):
        check(read_recipe(recipe_file, ["evaluation.general_text=gone.txt"]), quiet())


# ---------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.slow
def test_the_loss_is_that_of_transformers_on_the_base_and_on_the_merged_weights(
    many: Path, tiny_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_folder)

    before = loss_by_transformers(base(), tokenizer, 252)  # four positions are the virtual tokens'
    for arm, n_links in (("lora", 1), ("chain3", 3)):
        model = base()
        for number in range(1, n_links + 1):
            model = PeftModel.from_pretrained(model, many / f"arms/{arm}/seed-0/knots/link-{number}").merge_and_unload()
        found = general(many, arm)
        assert found["loss"] == pytest.approx(loss_by_transformers(model, tokenizer, 252), rel=1e-5)
        assert found["before"] == pytest.approx(before, rel=1e-6)
        assert found["forgetting"] == found["loss"] - found["before"]
    full = AutoModelForCausalLM.from_pretrained(many / "arms/full/seed-0/model")
    assert general(many, "full")["loss"] == pytest.approx(loss_by_transformers(full, tokenizer, 252), rel=1e-5)
    for arm in ("prefix", "prompt"):
        model = PeftModel.from_pretrained(base(), many / f"arms/{arm}/seed-0/adapter").eval()
        assert general(many, arm)["loss"] == pytest.approx(loss_by_transformers(model, tokenizer, 252), rel=1e-5)


@pytest.mark.slow
def test_an_arm_without_links_has_forgotten_nothing_and_every_other_kind_has_changed(many: Path) -> None:
    assert general(many, "base")["forgetting"] == 0
    for arm in ("lora", "chain3", "nf4", "bf16", "full", "prefix", "prompt", "bottleneck"):
        found = general(many, arm)
        assert abs(found["forgetting"]) > 1e-4, arm
        rows = RunFolder(many).scores(arm, 0, "general")
        assert len(rows) == found["n"]
        assert found["tokens"] == sum(row.tokens for row in rows)
        assert found["loss"] == pytest.approx(sum(row.nats for row in rows) / found["tokens"])


@pytest.mark.slow
def test_before_is_measured_once_for_each_base_and_shared_by_arms_and_seeds(many: Path) -> None:
    before = {
        (arm, seed): general(many, arm, seed)["before"]
        for arm in ("base", "lora", "chain3", "full", "prefix", "prompt", "bottleneck", "nf4", "bf16")
        for seed in (0, 1)
    }
    float32 = {value for (arm, _), value in before.items() if arm not in ("nf4", "bf16")}
    assert len(float32) == 1
    # Codes are another base, and so is another number format.
    assert len({before["nf4", 0], before["bf16", 0], *float32}) == 3
    assert before["nf4", 0] == before["nf4", 1]
    measured = [json.loads(path.read_text())["what"] for path in (many.parent / "cache/store/measured").glob("*/*")]
    of_base = [what for what in measured if what.get("form") == "attached" and what["task"] == "text"]
    assert len(of_base) == 3


@pytest.mark.slow
def test_passages_leave_room_for_virtual_tokens_and_the_record_says_how_long_they_are(many: Path) -> None:
    about = result(RunFolder(many), "lora")["meta_info"]["general_text"]
    assert about["name"] == SAMPLE
    assert about["longest"] == 256 - 4  # the tiny model has 256 positions
    assert about["passages"] == general(many, "lora")["n"]


def test_a_model_of_many_positions_reads_passages_of_256_tokens() -> None:
    assert PASSAGE_TOKENS == 256


@pytest.mark.slow
def test_the_table_and_the_summary_say_what_was_forgotten(many: Path) -> None:
    summary = Summary.model_validate_json((many / "summary.json").read_text())
    one = [general(many, "chain3", seed)["forgetting"] for seed in (0, 1)]
    arm = summary.arms["chain3"].forgetting
    assert arm.mean == pytest.approx(sum(one) / 2)
    assert arm.sd == pytest.approx(abs(one[0] - one[1]) / 2**0.5)
    tables = named_tables(summary)
    loss, cost = tables["loss"], tables["cost"]
    place = loss.columns.index("forgetting")
    cells = {row[0]: row[place] for row in loss.texts}
    assert cells["base"] == "+0.000 ± 0.000"
    assert cells["chain3"] == f"{arm.mean:+.3f} ± {arm.sd:.3f}"
    assert all(len(row) == len(table.columns) for table in (loss, cost) for row in table.texts)


# ---------------------------------------------------------------------------------------------------------
# The store


@pytest.mark.slow
def test_a_run_that_is_stopped_in_the_middle_has_the_forgetting_of_an_undisturbed_one(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe, said = write_recipe(tmp_path, recipe_text), tmp_path / "said.txt"
    overrides = ["arms.base=null", "arms.lora=null", "comparison.primary=null", "evaluation.every=never"]
    command = ["run", str(recipe), *overrides, f"output={tmp_path / 'stopped'}"]
    # Inside the chain's second link; while its general text is scored, the last of four; inside full fine-tuning.
    for place, number in (("AdamW, stopped", 5), ("score, stopped", 4), ("AdamW, stopped", 3)):
        assert end(start(command, said, place, number)) == 75, said.read_text()
    assert end(start(command, said)) == 0, said.read_text()
    [folder] = (tmp_path / "stopped").iterdir()
    assert outcome(folder).differences(fresh(recipe, overrides, tmp_path)) == []
    assert general(folder, "chain3")["before"] == general(folder, "full")["before"]


def no_step(*_: Any, **__: Any) -> None:
    raise AssertionError("a step is trained though only a text is to be scored")


@pytest.mark.slow
def test_another_text_is_scored_on_what_the_store_has_and_nothing_is_trained(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.txt").write_text("what colour is the question")
    other = f"evaluation.general_text={tmp_path / 'other.txt'}"
    whole, _ = go(recipe_file, other, f"store={tmp_path / 'undisturbed'}")
    first, _ = go(recipe_file)
    monkeypatch.setattr(torch.optim.AdamW, "step", no_step)
    second, _ = go(recipe_file, other)
    for arm in ("base", "lora", "chain3", "full"):
        assert general(second.path, arm) == general(whole.path, arm)
        assert general(second.path, arm) != general(first.path, arm)
        info = result(second, arm)["train_info"]
        assert info["reused_steps"] == info["steps"]
    assert outcome(second.path).differences(outcome(whole.path)) == []


@pytest.mark.slow
def test_weights_that_were_let_go_are_trained_again_for_another_text(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("what colour is the question")
    words = ["keep_full_weights=false", "arms.base=null", "arms.lora=null", "arms.chain3=null"]
    words += ["comparison.primary=null"]
    other = f"evaluation.general_text={tmp_path / 'other.txt'}"
    go(recipe_file, *words)
    whole, _ = go(recipe_file, *words, other, f"store={tmp_path / 'undisturbed'}")
    second, _ = go(recipe_file, *words, other)
    assert general(second.path, "full") == general(whole.path, "full")
    assert result(second, "full")["train_info"]["reused_steps"] == 0


def measured_of_base(store: Path) -> list[Path]:
    found = []
    for path in store.glob("measured/*/*.json"):
        what = json.loads(path.read_text())["what"]
        if what.get("form") == "attached" and what["task"] == "text":
            found.append(path)
    return found


@pytest.mark.slow
def test_only_the_untouched_base_is_loaded_where_its_loss_alone_is_missing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    first, _ = go(recipe_file, f"store={store}")
    [path] = measured_of_base(store)
    path.unlink()
    loads: list[str] = []
    load = Source.load
    monkeypatch.setattr(Source, "load", lambda source, *words: (loads.append(source.name), load(source, *words))[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", no_step)
    second, _ = go(recipe_file, f"store={store}")
    assert len(loads) == 1
    assert outcome(second.path).differences(outcome(first.path)) == []
    go(recipe_file, f"store={store}")
    assert len(loads) == 1


@pytest.mark.parametrize("arm", ["chain3", "full"])
def test_the_general_text_waits_for_the_first_step_and_is_scored_by_the_base_as_it_was_loaded(
    arm: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    score, step = Evaluator.__call__, torch.optim.AdamW.step
    monkeypatch.setattr(Evaluator, "__call__", lambda self, *words: (done.append(self.task), score(self, *words))[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *words: (done.append("step"), step(*words))[1])
    others = {"base", "lora", "chain3", "full"} - {arm}
    folder, _ = go(recipe_file, *(f"arms.{name}=null" for name in others), "comparison.primary=null")
    assert done[0] == "step"
    assert done[-2:] == ["text", "text"]
    others = [f"arms.{name}=null" for name in ("lora", "chain3", "full")]
    base, _ = go(recipe_file, *others, "comparison.primary=null", f"store={tmp_path / 'other'}")
    assert general(folder.path, arm)["before"] == general(base.path, "base")["before"]


def test_a_resumed_run_must_have_the_text_it_began_with(recipe_file: Path, tmp_path: Path) -> None:
    from runs import quiet

    from cola.run.run import run

    own = tmp_path / "own.txt"
    own.write_text("one two three")
    folder, _ = go(recipe_file, f"evaluation.general_text={own}", "arms.full=null")
    own.write_text("one two blue")
    with pytest.raises(RunChanged, match="the general text is not the one this run began with"):
        run(read_recipe(folder.path / "recipe.yaml"), folder, quiet())


@pytest.mark.slow
def test_what_one_recipe_measured_of_the_base_serves_another_of_another_task(recipe_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    go(recipe_file, f"store={store}", "arms.full=null")
    go(recipe_file, f"store={store}", "arms.full=null", "data.normalize=[lowercase]", "evaluation.batch_tokens=512")
    assert len(measured_of_base(store)) == 1


@pytest.mark.slow
def test_a_recipe_that_leaves_it_out_measures_none_and_shows_no_column(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, "evaluation.general_text=off", "arms.full=null")
    assert general(folder.path, "lora") is None
    assert summary.arms["lora"].forgetting is None
    assert not (folder.path / "arms/lora/seed-0/scores/general.jsonl").exists()
    assert "forgetting" not in named_tables(summary)["loss"].columns


@pytest.mark.slow
def test_trials_of_a_search_do_without(recipe_file: Path) -> None:
    folder, _ = go(
        recipe_file, "arms.full=null", "arms.chain3=null", "comparison.primary=null", "link.rank=2",
        "training.learning_rate={search: [1e-3, 1e-2]}",
    )  # fmt: skip
    for path in (folder.path / "trials").rglob("result.json"):
        assert "general" not in json.loads(path.read_text())["evaluation"]
    assert not list((folder.path / "trials").rglob("general.jsonl"))
    assert general(folder.path, "lora")["n"] == len(PROSE)


# ---------------------------------------------------------------------------------------------------------
# Peak memory

LINUX = Path("/proc/self/clear_refs").exists()


@pytest.mark.skipif(not LINUX, reason="the kernel's peak can be reset under Linux only")
def test_the_peak_of_the_process_is_what_was_touched_since_it_was_reset() -> None:
    cpu = torch.device("cpu")
    big = torch.ones(50_000_000)  # 200 MB
    assert memory.restart_peaks(cpu)
    there = memory.peaks(cpu, True)["process"]
    del big
    assert memory.restart_peaks(cpu)
    without = memory.peaks(cpu, True)["process"]
    assert there is not None
    assert without is not None
    assert there - without == pytest.approx(200e6, rel=0.1)
    torch.ones(50_000_000).sum()
    again = memory.peaks(cpu, True)["process"]
    assert again is not None
    assert again - without == pytest.approx(200e6, rel=0.1)


def test_where_the_peak_cannot_be_reset_none_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "no-proc")
    assert memory.restart_peaks(torch.device("cpu")) is False
    assert memory.peaks(torch.device("cpu"), False) == {"accelerator": None, "process": None}


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="the kernel's peak can be reset under Linux only")
def test_a_run_all_from_the_store_tells_the_memory_that_training_took(recipe_file: Path) -> None:
    first, summary = go(recipe_file)
    second, again = go(recipe_file)
    for arm in ("lora", "chain3", "full"):
        one = result(first, arm)["train_info"]
        assert one["process_memory_max"] > 50e6
        assert one["accelerator_memory_max"] is None or torch.cuda.is_available()
        assert result(second, arm)["train_info"]["process_memory_max"] == one["process_memory_max"]
        assert again.arms[arm].peak_memory == summary.arms[arm].peak_memory is not None
    assert summary.arms["base"].peak_memory is None
    cost = named_tables(summary)["cost"]
    cells = {row[0]: row[cost.columns.index("memory")] for row in cost.texts}
    assert cells["base"] == "–"
    assert re.fullmatch(r"\d+ MB|\d+\.\d\d GB", cells["full"])
