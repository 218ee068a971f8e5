"""`data.redraw: per_seed`: each seed trains on rows of its own. Run: pytest tests/data/test_redraw.py"""

import collections
import itertools
import json
import statistics
from pathlib import Path

import pytest
from runs import cola, go, read_jsonl, result
from scipy import stats
from test_data import count, data_of, gym, refusal, write_rows
from transformers import PreTrainedTokenizerFast

from cola.compare.records import Summary
from cola.compare.tasks import summarize_tasks
from cola.data.splits import Splits, load_splits
from cola.errors import DataError
from cola.link.find import find_model
from cola.recipe.read import read_recipe
from cola.report.verdict import verdict

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------
# Drawing


def redrawn(path: Path, seeds: list[int], tokenizer: PreTrainedTokenizerFast, **more: object) -> Splits:
    return load_splits(data_of(path, redraw="per_seed", **more), tokenizer, seeds)


def test_each_seed_draws_its_own_training_rows_from_what_test_and_validation_have_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": f"question {i}", "a": "yes"} for i in range(60)])
    fixed = load_splits(data_of(path, rows=count(20, 8, 12)), tokenizer)
    splits = redrawn(path, [0, 1, 5], tokenizer, rows=count(20, 8, 12))
    assert (splits.validation, splits.test, splits.train) == (fixed.validation, fixed.test, [])
    held_out = {example.id for example in [*splits.validation, *splits.test]}
    drawn = {seed: [example.id for example in splits.train_of(seed)] for seed in (0, 1, 5)}
    for rows in drawn.values():
        assert len(set(rows)) == 20
        assert not held_out.intersection(rows)
    assert len({frozenset(rows) for rows in drawn.values()}) == 3
    assert splits.sizes == {"train": 20, "validation": 8, "test": 12}
    # Whichever other seeds there are, and however often: from data.seed and the seed.
    alone = redrawn(path, [5], tokenizer, rows=count(20, 8, 12))
    assert alone.train_of(5) == splits.train_of(5)
    assert alone.fingerprint == splits.fingerprint
    assert redrawn(path, [5], tokenizer, rows=count(20, 8, 12), seed=1).train_of(5) != alone.train_of(5)
    assert redrawn(path, [5], tokenizer, rows=count(8, 8, 12)).train_of(5) == alone.train_of(5)[:8]
    again = redrawn(path, [0, 1, 5], tokenizer, rows=count(20, 8, 12))  # from the cache
    assert again == splits


def test_the_rows_of_a_sample_stand_at_the_same_places_under_each_seed_and_a_larger_one_has_them_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": f"question {i}", "a": "yes"} for i in range(60)])
    splits = redrawn(path, [0, 1], tokenizer, rows=count(20, 8, 12))
    places = {}
    for seed, n in itertools.product((0, 1), (5, 12, 20)):
        train = splits.train_of(seed)
        places[seed, n] = [train.index(example) for example in splits.scored(seed, n)["train"]]
        assert len(set(places[seed, n])) == n
        assert places[seed, n] == sorted(places[seed, n])
    assert [places[0, n] for n in (5, 12, 20)] == [places[1, n] for n in (5, 12, 20)]
    assert set(places[0, 5]) < set(places[0, 12]) < set(range(20))
    assert places[0, 5] != list(range(5))
    assert splits.scored(0, None) == splits.scored(0, 20) == splits.of(0)
    with pytest.raises(DataError, match=r"^evaluation\.train_rows: 21 training rows .* train has 20; lower it"):
        splits.scored(0, 21)


@pytest.mark.slow
def test_each_row_is_as_likely_as_any_other_to_be_drawn_by_a_seed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": f"question {i}", "a": "yes"} for i in range(26)])
    splits = redrawn(path, list(range(600)), tokenizer, rows=count(6, 3, 3))
    counts = collections.Counter(example.id for seed in range(600) for example in splits.train_of(seed))
    assert len(counts) == 20
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3  # 180 each; without replacement, so rather too even
    (note,) = [note for note in splits.notes if "each seed draws" in note]
    assert note == "train: each seed draws 6 of 20 rows, so that two seeds share 30% of theirs on average"
    pairs = itertools.pairwise({e.id for e in splits.train_of(seed)} for seed in range(600))
    assert statistics.mean(len(one & other) / 6 for one, other in pairs) == pytest.approx(0.3, abs=0.03)


def test_a_group_that_test_or_validation_has_is_in_no_seeds_training_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"q": f"question {i}", "a": "yes", "g": str(i // 3)} for i in range(90)]
    splits = redrawn(write_rows(tmp_path / "t.jsonl", rows), [0, 1, 2], tokenizer, rows=count(20, 5, 5), group="g")
    held_out = {example.group for example in [*splits.validation, *splits.test]}
    for seed in (0, 1, 2):
        assert not held_out & {example.group for example in splits.train_of(seed)}


def test_a_generator_makes_other_training_rows_for_each_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    data = gym().model_copy(update={"redraw": "per_seed"})
    splits = load_splits(data, tokenizer, [0, 1])
    prompts = [{tuple(example.prompt) for example in rows} for rows in (splits.train_of(0), splits.train_of(1))]
    assert len(prompts[0]) == len(prompts[1]) == data.rows.train
    assert len(prompts[0] & prompts[1]) <= 1
    assert not any("each seed draws" in note for note in splits.notes)


def test_a_pool_that_leaves_nothing_to_be_drawn_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": f"question {i}", "a": "yes"} for i in range(30)])
    for n, left in ((20, 20), (21, 20)):
        said = refusal(load_splits, data_of(path, redraw="per_seed", rows=count(n, 5, 5)), tokenizer, [0])
        assert f"data.redraw: per_seed: {n} of the {left} rows that t.jsonl has left for train are no draw" in said
    long = [{"text": "one two three " * (1 + 9 * (i % 2))} for i in range(40)]
    texts = data_of(
        write_rows(tmp_path / "x.jsonl", long), task="text", redraw="per_seed", rows=count(9, 3, 3), max_length=16
    )
    said = refusal(load_splits, texts.model_copy(update={"overlap": "allow"}), tokenizer, [0, 1, 2])
    assert "the pieces of split texts are not equally many for all seeds" in said


# ---------------------------------------------------------------------------------------------------------
# Runs

REDRAW = ["data.redraw=per_seed", "arms.base=null", "training.epochs=1"]


@pytest.mark.slow
def test_all_arms_of_a_seed_train_on_the_rows_that_it_draws_and_are_scored_on_them(recipe_file: Path) -> None:
    grid = "training.learning_rate={search: [1e-3, 1e-2]}"
    folder, summary = go(recipe_file, *REDRAW, grid, "arms.full=null", "seeds=[0, 1]")
    recipe = read_recipe(folder.path / "recipe.yaml")
    splits = load_splits(recipe.data, find_model(recipe.model).tokenizer(), [0, 1, 1000])
    rows = {}
    for where, seed in [
        *itertools.product(("arms/lora", "arms/chain3"), (0, 1)),
        ("trials/lora/learning_rate=0.01", 1000),
    ]:
        path = folder.path / where / f"seed-{seed}"
        steps = [row for row in read_jsonl(path / "metrics.jsonl") if row["kind"] == "step"]
        rows[where, seed] = [name for step in steps for name in step["rows"]]
        mine = splits.train_of(seed)
        assert sorted(rows[where, seed]) == sorted(example.id for example in mine)  # one epoch of them
        assert sum(step["tokens"] for step in steps) == sum(example.n_tokens for example in mine)
        if seed != 1000:
            scored = read_jsonl(path / "scores/train.jsonl")
            assert [row["id"] for row in scored] == [example.id for example in mine]
            info = json.loads((path / "result.json").read_text())["train_info"]
            assert info["positions"] == sum(example.n_tokens for example in mine)
    assert rows["arms/lora", 0] == rows["arms/chain3", 0]
    assert set(rows["arms/lora", 0]) != set(rows["arms/lora", 1])
    tests = [folder.scores("lora", seed, "test") for seed in (0, 1)]
    assert [row.id for row in tests[0]] == [row.id for row in tests[1]]
    assert any("other training sets of 24 rows from the same source" in line for line in verdict(summary))
    assert any("each seed draws 24 of 176 rows" in note for note in summary.notes)


@pytest.mark.slow
def test_the_flops_of_a_seed_are_those_of_its_own_rows(recipe_file: Path) -> None:
    # By tokens every arm gets as many steps as cost no more than lora's under the same seed.
    settings = ["training.match=tokens", "arms.chain3.links=1", "arms.chain3.rank=2", "arms.full=null", "seeds=[0, 1]"]
    folder, _ = go(recipe_file, *REDRAW, *settings)
    infos = {(arm, seed): result(folder, arm, seed)["train_info"] for arm in ("lora", "chain3") for seed in (0, 1)}
    for seed in (0, 1):
        assert infos["lora", seed]["positions"] == infos["chain3", seed]["positions"]
    per_token = [infos["lora", seed]["flops"] / infos["lora", seed]["tokens"] for seed in (0, 1)]
    assert infos["lora", 0]["tokens"] != infos["lora", 1]["tokens"]
    assert per_token[0] == pytest.approx(per_token[1], rel=0.05)  # but for attention and the answers' lengths


def test_eval_scores_a_seed_on_the_rows_that_it_was_trained_on(recipe_file: Path) -> None:
    folder, _ = go(
        recipe_file, *REDRAW, "arms.full=null", "arms.chain3=null", "comparison.primary=null", "seeds=[0, 1]"
    )
    out = folder.path.parent / "scored"
    told = cola("eval", folder.path, "--data", folder.path, "--split", "train", "--out", out)
    assert told.exit_code == 0, told.output
    found = json.loads((out / "eval.json").read_text())
    for seed in (0, 1):
        reported = result(folder, "lora", seed)["evaluation"]["train"]
        assert found[f"lora seed {seed}"]["train"]["loss"] == pytest.approx(reported["loss"], rel=1e-4)
    assert "that seed 1 draws" in " ".join(told.output.split())
    losses = [result(folder, "lora", seed)["evaluation"]["train"]["loss"] for seed in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]  # so that the wrong rows would show


@pytest.mark.slow
def test_runs_that_draw_for_other_seeds_are_more_seeds_of_one_task(recipe_file: Path) -> None:
    few = [*REDRAW, "arms.full=null", "evaluation.every=never"]
    folders = [go(recipe_file, *few, f"seeds={seeds}")[0].path for seeds in ([0, 1], [2])]
    summary = summarize_tasks(folders)
    (task,) = summary.tasks
    assert task.seeds == {"lora": 3, "chain3": 3}
    other, _ = go(recipe_file, *few, "seeds=[3]", "data.rows.train=32")
    assert len(summarize_tasks([*folders, other.path]).tasks) == 2


def test_a_run_goes_on_where_each_seed_draws_its_own_rows(recipe_file: Path) -> None:
    few = [*REDRAW, "arms.full=null", "evaluation.every=never", "seeds=[0, 1]"]
    folder, first = go(recipe_file, *few)
    (folder.path / "arms/chain3/seed-1/result.json").unlink()
    done = cola("run", "--resume", folder.path)
    assert done.exit_code == 0, done.output
    again = Summary.model_validate_json((folder.path / "summary.json").read_text())
    assert again.arms["chain3"].test_loss == first.arms["chain3"].test_loss
    assert result(folder, "chain3", 1)["train_info"]["reused_steps"] == 3
