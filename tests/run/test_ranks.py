"""One run over two and three processes against the same in one. Run: pytest tests/run/test_ranks.py

The processes are real and meet over gloo, as under torchrun, which the slow tests start.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from children import KILLED, end, launched, start
from conftest import tiny_tokenizer
from runs import assert_one_line, cola, go, outcome, read_jsonl, result, wide_cola, write_recipe
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from cola.data.batches import training_shares
from cola.data.encode import Example
from cola.run.interrupt import RESUMABLE
from cola.tree.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
ARMS = ["arms.base=null", "arms.gradient={init: gradient, links: 2}", "training.steps=null", "training.epochs=1"]
ODD = ["data.rows={train: 17, validation: 4, test: 6}", "training.batch_size=8"]  # the last step has one row
ONE_ARM = ["arms.base=null", "arms.lora=null", "arms.full=null", "comparison.primary=null"]


def launch(
    n: int, words: Sequence[object], folder: Path, places: dict[int, tuple[str, int]] | None = None
) -> list[Any]:
    """The command in n processes that know of each other; what each says is in a file of its own."""
    told = [str(word) for word in words]
    places = places or {}
    return [
        start(told, folder / f"said-{rank}.txt", *places.get(rank, ("nothing", 0)), variables=variables)
        for rank, variables in enumerate(launched(n))
    ]


def over(n: int, words: Sequence[object], folder: Path, places: dict[int, tuple[str, int]] | None = None) -> list[int]:
    """Their exit codes."""
    return [end(process) for process in launch(n, words, folder, places)]


def said(folder: Path, rank: int) -> str:
    return (folder / f"said-{rank}.txt").read_text()


def rows_of(run: Path, arm: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run / f"arms/{arm}/seed-0/metrics.jsonl") if row["kind"] == kind]


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_what_one_trains_up_to_rounding(recipe_text: str, tmp_path: Path, n: int) -> None:
    """LoRA, a chain of three, one that starts along the gradient, and full fine-tuning."""
    recipe = write_recipe(tmp_path, recipe_text)
    alone, _ = go(recipe, *ARMS, *ODD, f"store={tmp_path / 'alone'}", folder=tmp_path / "one")
    run, store = tmp_path / "several", f"store={tmp_path / 'store'}"
    assert over(n, ["run", recipe, *ARMS, *ODD, store, "--run-folder", run], tmp_path) == [0] * n, said(tmp_path, 0)
    for arm in ("lora", "chain3", "gradient", "full"):
        mine, theirs = (rows_of(path, arm, "step") for path in (run, alone.path))
        for key in ("tokens", "target_tokens", "without_gradient", "cleared"):
            assert [row[key] for row in mine] == [row[key] for row in theirs], (arm, key)
        assert [sorted(row["rows"]) for row in mine] == [sorted(row["rows"]) for row in theirs]
        for key in ("loss", "grad_norm", *([] if arm == "full" else ["update_norm"])):
            assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], rel=1e-5), (arm, key)
        knots, theirs = (rows_of(path, arm, "knot") for path in (run, alone.path))
        sizes = [[row["relative_size_median"] for row in rows] for rows in (knots, theirs)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)
        assert all(row["drift_relative"] < 1e-5 for row in knots)
        infos = [result(RunFolder(path), arm)["train_info"] for path in (run, alone.path)]
        assert infos[0]["final_state"] != infos[1]["final_state"]  # the number of processes is a cause
        losses = [result(RunFolder(path), arm)["evaluation"]["test"]["loss"] for path in (run, alone.path)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert said(tmp_path, 0).count("results  ") == 1
    assert [said(tmp_path, rank) for rank in range(1, n)] == [""] * (n - 1)
    assert f"processes: {n}" in (run / "provenance.json").read_text()


OWN = Path(__file__).parents[1] / "own_ideas.py"
EVERY_KIND = {
    "kept": "{links: 3, knot: {pair: keep, optimizer: keep}}",
    "pruned": "{links: 2, knot: {optimizer: {prune_random: 0.5}}}",
    "prefix": "{method: prefix, num_virtual_tokens: 4}",
    "bottleneck": "{method: adapter, bottleneck: 8}",
    "dora": "{use_dora: true, links: 2}",
    "pissa": "{init: pissa, links: 2}",
    "until": "{links: 3, until: {update_stops: {tolerance: 0.9, every: 1}}}",
    "own": f"{{optimizer: {OWN}:heavy_ball, links: 2}}",
    "nf4": "{quantization: nf4, links: 2}",
    "bf16": "{dtype: bfloat16, links: 2}",
}


@pytest.mark.slow
def test_every_method_and_knot_and_code_of_ones_own_is_trained_by_two(recipe_text: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe, run = write_recipe(tmp_path, recipe_text), tmp_path / "several"
    words = [*ONE_ARM, "arms.chain3=null", "training.steps=6", "evaluation.every=2"]
    words += [f"arms.{name}={arm}" for name, arm in EVERY_KIND.items()]
    alone, _ = go(recipe, *words, f"store={tmp_path / 'alone'}", folder=tmp_path / "one")
    words += [f"store={tmp_path / 'store'}", "--run-folder", run, "--allow-code"]
    assert over(2, ["run", recipe, *words], tmp_path) == [0, 0], said(tmp_path, 0)
    for arm in EVERY_KIND:
        mine, theirs = ([row["loss"] for row in rows_of(path, arm, "step")] for path in (run, alone.path))
        assert mine == pytest.approx(theirs, rel=0.03 if arm in ("nf4", "bf16") else 1e-4), arm
        ends = [
            [link["last_step"] for link in result(RunFolder(p), arm)["train_info"]["links"]] for p in (run, alone.path)
        ]
        assert ends[0] == ends[1]
    assert said(tmp_path, 1) == ""


@pytest.mark.slow
def test_the_same_processes_again_give_the_same_bits_and_dropout_is_drawn_by_each_for_its_rows(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe, runs = write_recipe(tmp_path, recipe_text), [tmp_path / "first", tmp_path / "second"]
    words = ["run", recipe, *ONE_ARM, "training.steps=4", "link.dropout=0.3"]
    for run in runs:
        assert over(2, [*words, f"store={run}-store", "--run-folder", run], tmp_path) == [0, 0], said(tmp_path, 0)
    assert outcome(runs[0]).differences(outcome(runs[1])) == []


# ---------------------------------------------------------------------------------------------------------
# One of them ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "place", "number"),
    [(1, "AdamW", 2), (1, "logits", 3), (0, "AdamW", 3), (0, "knot", 2), (0, "half a knot", 4), (1, "half a knot", 2)],
)
def test_where_one_is_killed_the_others_end_and_the_same_command_ends_with_the_same_bits(
    recipe_text: str, tmp_path: Path, rank: int, place: str, number: int
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    words = ["run", recipe, *ONE_ARM, "training.steps=6", "link.dropout=0.1"]
    whole = [*words, f"store={tmp_path / 'whole-store'}", "--run-folder", tmp_path / "whole"]
    assert over(2, whole, tmp_path) == [0, 0]
    words += [f"store={tmp_path / 'store'}", "--run-folder", tmp_path / "killed"]
    other = 1 - rank
    before = len(said(tmp_path, other))
    codes = over(2, words, tmp_path, {rank: (place, number)})
    assert (codes[rank], codes[other]) == (KILLED, RESUMABLE), said(tmp_path, 0)
    last = said(tmp_path, other)[before:].splitlines()[-1]
    assert re.match("error: (another of the 2 processes|rank 0) of this launch has ended", last), last
    assert over(2, words, tmp_path) == [0, 0], said(tmp_path, 0)
    assert outcome(tmp_path / "killed").differences(outcome(tmp_path / "whole")) == []
    reused = result(RunFolder(tmp_path / "killed"), "chain3")["train_info"]["reused_steps"]
    assert reused > 0 or number < 3
    assert "Traceback" not in said(tmp_path, 0) + said(tmp_path, 1)


@pytest.mark.slow
def test_a_signal_stops_all_of_them_with_a_checkpoint_and_the_same_command_goes_on(
    recipe_text: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    words = ["run", recipe, *ONE_ARM, "training.steps=6", "checkpoint_seconds=1000", "--run-folder", tmp_path / "run"]
    codes = over(2, words, tmp_path, {0: ("AdamW, stopped", 3), 1: ("AdamW, stopped", 3)})
    assert codes == [RESUMABLE, 0], said(tmp_path, 0)
    assert "interrupted; all that was trained is kept" in said(tmp_path, 0)
    assert over(2, words, tmp_path) == [0, 0]
    assert result(RunFolder(tmp_path / "run"), "chain3")["train_info"]["reused_steps"] == 3
    assert said(tmp_path, 1) == ""


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_whose_passes_fail_fails_that_arm_and_the_others_go_on(
    recipe_text: str, tmp_path: Path, rank: int
) -> None:
    recipe, arms = write_recipe(tmp_path, recipe_text), ["arms.base=null", "arms.full=null", "training.steps=3"]
    words = ["run", recipe, *arms, "--run-folder", tmp_path / "run"]
    codes = over(2, words, tmp_path, {rank: ("logits, no memory", 2)})
    assert codes == [1, 0], said(tmp_path, 0)
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/arms").glob("*/seed-0/result.json"))]
    assert sorted(record["status"] for record in results) == ["failed", "ok"]
    why = "rank 0: a card is full" if rank == 0 else "another rank failed in its passes"
    assert why in said(tmp_path, 0)
    assert over(2, words, tmp_path) == [0, 0]


def test_weights_that_come_apart_are_refused(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    words = ["run", recipe, *ONE_ARM, "training.steps=6", "--run-folder", tmp_path / "run"]
    assert over(2, words, tmp_path, {1: ("AdamW, otherwise", 2)}) == [2, 0]
    assert "error: the weights are not the same on all ranks after a step" in said(tmp_path, 0)


# ---------------------------------------------------------------------------------------------------------
# The base in shards

SHARDED = ["arms.base=null", "arms.full=null", "arms.gradient={init: gradient, links: 2}", "model.shard=true"]
SHARDED += ["arms.pissa={init: pissa, links: 2}", "arms.beside={links: 2, knot: {merge: no}}", "training.steps=6"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_a_base_in_shards_trains_what_a_whole_one_trains_up_to_rounding(
    recipe_text: str, tmp_path: Path, n: int
) -> None:
    """And the adapters that are kept are whole: of every pair, every row."""
    recipe, run = write_recipe(tmp_path, recipe_text), tmp_path / "run"
    words = [*SHARDED, *ODD, "evaluation.every=2", f"store={tmp_path / 'store'}"]
    alone, _ = go(recipe, *words, "model.shard=false", f"store={tmp_path / 'alone'}", folder=tmp_path / "one")
    assert over(n, ["run", recipe, *words, "--run-folder", run], tmp_path) == [0] * n, said(tmp_path, 0)
    for arm in ("lora", "chain3", "gradient", "pissa", "beside"):
        for kind, keys in (("step", ("loss", "grad_norm")), ("validation", ("loss",)), ("knot", ("error_max",))):
            mine, theirs = (rows_of(path, arm, kind) for path in (run, alone.path))
            assert [[row[key] for key in keys] for row in mine] == [
                pytest.approx([row[key] for key in keys], rel=1e-4, abs=1e-7) for row in theirs
            ], (arm, kind)
        kept = sorted(path.relative_to(run) for path in run.glob(f"arms/{arm}/**/adapter_model.safetensors"))
        assert kept
        for path in kept:
            tensors, expected = (load_file(folder / path) for folder in (run, alone.path))
            assert tensors.keys() == expected.keys()
            assert all(torch.allclose(tensors[name], expected[name], atol=1e-4) for name in expected)
            assert all(tensor.any() for tensor in tensors.values())
        losses = [result(RunFolder(path), arm)["evaluation"]["test"]["loss"] for path in (run, alone.path)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    causes = [
        json.loads(path.read_text())["causes"]["link"] for path in tmp_path.glob("store/segments/*/*/segment.json")
    ]
    assert {(cause["dp"], cause["shard"]) for cause in causes} == {(n, True)}
    merged = cola("export", run, "--arm", "chain3", "--as", "merged", "--to", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "place", "number"), [(1, "half a knot", 3), (0, "half a knot", 3), (1, "logits", 4), (0, "score", 2)]
)
def test_a_run_on_shards_that_is_killed_ends_with_the_bits_of_one_that_is_not(
    recipe_text: str, tmp_path: Path, rank: int, place: str, number: int
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    words = ["run", recipe, *ONE_ARM, "training.steps=6", "model.shard=true"]
    assert over(2, [*words, f"store={tmp_path / 'ws'}", "--run-folder", tmp_path / "whole"], tmp_path) == [0, 0]
    words += [f"store={tmp_path / 'store'}", "--run-folder", tmp_path / "killed"]
    codes = over(2, words, tmp_path, {rank: (place, number)})
    assert (codes[rank], codes[1 - rank]) == (KILLED, RESUMABLE), said(tmp_path, 0)
    assert "of this launch has ended" in said(tmp_path, 1 - rank)
    assert over(2, words, tmp_path) == [0, 0], said(tmp_path, 0)
    assert outcome(tmp_path / "killed").differences(outcome(tmp_path / "whole")) == []


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_pass_through_shards_ends_all_ranks(recipe_text: str, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, recipe_text), tmp_path / "run"
    words = ["run", recipe, *ONE_ARM, "training.steps=6", "evaluation.every=1", "model.shard=true", "--run-folder", run]
    for number in (50, 101):
        codes = over(2, words, tmp_path, {0: ("attention, stopped", number)})
        assert codes[0] == RESUMABLE, said(tmp_path, 0)
        assert codes[1] in (0, RESUMABLE)
    assert over(2, words, tmp_path) == [0, 0], said(tmp_path, 0)
    assert "Traceback" not in said(tmp_path, 0) + said(tmp_path, 1)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["arms.f={method: full}"], "method full cannot be had with model.shard: true"),
        (["arms.d={use_dora: true}"], "use_dora cannot be had with model.shard: true"),
        (["arms.q={quantization: int8}"], "quantization cannot be had with model.shard: true"),
        (["arms.p={method: prefix}"], "method prefix cannot be had with model.shard: true"),
    ],
)
def test_what_a_base_in_shards_cannot_take_is_refused_in_one_line(
    recipe_text: str, tmp_path: Path, changes: list[str], what: str
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    told = wide_cola("run", recipe, *ONE_ARM, "model.shard=true", *changes)
    assert_one_line(told)
    assert what in told.output


def test_a_model_that_cannot_lie_in_shards_is_refused_once(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=403, n_positions=256)).save_pretrained(
        tmp_path / "gpt2"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    words = ["run", recipe, *ONE_ARM, "model.shard=true", f"model.name_or_path={tmp_path / 'gpt2'}"]
    assert over(2, words, tmp_path) == [2, 0], said(tmp_path, 0)
    assert said(tmp_path, 0).splitlines()[-1].startswith("error: model.shard: GPT2LMHeadModel keeps its weights")
    assert said(tmp_path, 1) == ""


def test_one_process_has_nothing_to_spread_a_base_over(recipe_text: str, tmp_path: Path) -> None:
    told = wide_cola("run", write_recipe(tmp_path, recipe_text), *ONE_ARM, "model.shard=true")
    assert told.exit_code == 2
    assert told.output.splitlines()[-1].startswith("error: model.shard: true spreads the base over the processes")
    assert not list(tmp_path.glob("runs/*"))


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("training.batch_size=1", "error: training.batch_size: 1: the rows of a step are dealt to the 2 processes"),
        ("training.stpes=6", "error: "),
        ("--workers=2", "error: --workers gives each process a job of its own, and torchrun"),
    ],
)
def test_what_cannot_be_split_is_said_once_and_nothing_is_trained(
    recipe_text: str, tmp_path: Path, change: str, line: str
) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    codes = over(2, ["run", recipe, *ONE_ARM, change, f"store={tmp_path / 'store'}"], tmp_path)
    assert codes == [2, 0]
    told = [words for words in said(tmp_path, 0).splitlines() if words.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(line)
    assert said(tmp_path, 1) == ""
    assert not list(tmp_path.glob("store/segments/*"))


def test_a_base_that_another_rank_finds_changed_is_refused(recipe_text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    codes = over(2, ["run", recipe, *ONE_ARM], tmp_path, {1: ("another base", 0)})
    assert codes == [2, 0], said(tmp_path, 0)
    assert "error: rank 1 of 2: the base that it finds in " in said(tmp_path, 0)


# ---------------------------------------------------------------------------------------------------------
# The launchers


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_a_launcher_starts_a_run_as_a_user_does(recipe_text: str, tmp_path: Path, launcher: list[str]) -> None:
    recipe = write_recipe(tmp_path, recipe_text)
    words = [sys.executable, "-m", *launcher, "-m", "cola", "run", recipe, *ONE_ARM, f"store={tmp_path / 'store'}"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("results  ") == 1
    segments = [json.loads(path.read_text()) for path in tmp_path.glob("**/segments/*/*/segment.json")]
    assert segments
    assert all(record["causes"]["link"]["dp"] == 2 for record in segments)


# ---------------------------------------------------------------------------------------------------------
# The split of rows


def test_each_row_is_read_by_one_rank_and_all_have_about_as_much_to_do() -> None:
    rng = random.Random(0)
    examples = [Example(str(i), [1] * rng.randint(1, 90), [[2]], 0, [], None) for i in range(64)]
    order = [list(range(40)), list(range(40, 64)), [3], [5, 9]]
    for n in (1, 2, 3):
        for rows, shares in zip(order, training_shares(examples, order, 200, n), strict=True):
            assert len(shares) == n
            read = [row[0] for share in shares for group in share for row in group]
            assert sorted(read) == sorted(str(row) for row in rows)
            tokens = [sum(len(row[1]) for group in share for row in group) for share in shares]
            assert max(tokens) - min(tokens) <= 90
