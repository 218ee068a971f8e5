"""Several runs in one report, and two runs side by side. Run: pytest tests/compare/test_tasks.py"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import cola, open_run
from scipy import stats
from test_statistics import rng
from test_summary import ByHand, first_right, recipe

from cola.compare.records import Contrast, Difference
from cola.compare.summary import summarize
from cola.compare.tasks import summarize_tasks
from cola.recipe.write import dump_recipe
from cola.report.differences import compare_runs
from cola.report.tables import contrasts_table, task_tables
from cola.report.verdict import contrast_sentence
from cola.tree.run_folder import FORMAT


def task(
    folder: Path,
    name: str,
    right: dict[str, list[int]],
    data: str | None = None,
    n: int = 100,
    first_seed: int = 0,
    kind: str = "answer",
    **settings: Any,
) -> Path:
    """A run on a task of its own: of each arm, how many examples are right under each seed."""
    run = ByHand(folder)
    seeds = range(first_seed, first_seed + max(map(len, right.values())))
    run.folder.write_text(
        "recipe.yaml", dump_recipe(recipe(kind, seeds=seeds, arms=list(right), name=name, **settings))
    )
    made = {"recipe": {"sha256": "r"}, "model": {"sha256": "m", "name": "m"}, "rows": {"test": n}}
    made |= {"format": FORMAT, "data": {"sha256": data or name, "notes": []}, "packages": {"torch": "2.13.0"}}
    made |= {"started": "2026-11-28", "cola": "0.1.0", "python": "3.11", "device": "cpu", "machine": {"cpu": "any"}}
    made |= {"commit": {"hash": None, "dirty": None}, "general_text": {"name": None, "sha256": "g"}}
    run.folder.write_text("provenance.json", json.dumps(made))
    for arm, numbers in right.items():
        for seed, hits in zip(seeds, numbers, strict=False):
            scores = rng(seed).permutation(first_right(hits, n)).tolist()
            if kind == "text":
                run.ok(arm, seed, test_loss=[2.0 - score for score in scores])
            else:
                run.ok(arm, seed, scores)
    return folder


def three_tasks(tmp_path: Path) -> list[Path]:
    ahead = {"one": 10, "two": 14, "three": 40}
    return [
        task(tmp_path / name, name, {"lora": [50, 52, 51, 49], "chain3": [50 + by + s for s in range(4)]})
        for name, by in ahead.items()
    ]


def test_over_tasks_a_contrast_is_the_mean_of_the_tasks_means_of_paired_differences(tmp_path: Path) -> None:
    summary = summarize_tasks(three_tasks(tmp_path))
    [one] = summary.contrasts
    lora = [50, 52, 51, 49]
    means = [np.mean([(50 + by + s - lora[s]) / 100 for s in range(4)]) for by in (10, 14, 40)]
    assert one.value == pytest.approx(np.mean(means))
    assert one.low < one.value < one.high
    assert (one.role, one.n_seeds, one.n_examples) == ("primary", 12, 300)
    assert one.iqm is None  # of three tasks it would be near the middle one
    assert one.p < 0.05
    # All twelve differences have one sign: no pattern but their own and its mirror is as far from 0.
    assert one.p_rows == one.p_rows_smallest == 2 / 2**12
    assert one.claim
    said = contrast_sentence(one, summary.metric)
    assert "(12 pairs of runs on 3 tasks)" in said
    assert "chain3 is the better one" in said
    assert {label: found.value for label, found in one.tasks.items()} == pytest.approx(
        dict(zip(("one", "two", "three"), means, strict=True))
    )
    tables = task_tables(summary)
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.texts)
    assert tables["contrasts"].texts[0][2].startswith(f"{np.mean(means):+.3f} [+0.")
    # Scores of tasks of different difficulty are never averaged: an arm has one column for each task.
    assert tables["arms"].columns == ["arm", "one", "two", "three"]


def test_a_task_where_one_arm_is_far_better_counts_as_much_as_two_where_it_is_worse(tmp_path: Path) -> None:
    ahead = {"one": 30, "two": -10, "three": -10}
    runs = [
        task(tmp_path / name, name, {"lora": [50, 52, 51, 49], "chain3": [50 + by + s for s in range(4)]})
        for name, by in ahead.items()
    ]
    [one] = summarize_tasks(runs).contrasts
    differences = [(50 + by + s - lora) / 100 for by in ahead.values() for s, lora in enumerate((50, 52, 51, 49))]
    assert one.value == pytest.approx(np.mean(differences)) == pytest.approx(0.0433, abs=1e-4)
    assert stats.trim_mean(differences, 0.25) < 0  # the interquartile mean said the opposite


def test_from_eight_tasks_on_the_interquartile_mean_stands_beside_the_mean(tmp_path: Path) -> None:
    lora, leads = [50, 52, 51, 49], (2, 4, 6, 8, 10, 12, 14, 40)
    runs = [
        task(tmp_path / f"t{by}", f"t{by}", {"lora": lora, "chain3": [50 + by + s for s in range(4)]}) for by in leads
    ]
    summary = summarize_tasks(runs)
    [one] = summary.contrasts
    differences = [(50 + by + s - lora[s]) / 100 for by in leads for s in range(4)]
    assert one.value == pytest.approx(np.mean(differences))
    assert one.iqm.value == pytest.approx(stats.trim_mean(differences, 0.25))
    assert one.iqm.low < one.iqm.value < one.iqm.high
    assert task_tables(summary)["contrasts"].columns[-1] == "interquartile mean [95 %]"
    assert task_tables(summary)["contrasts"].texts[0][-1].startswith(f"{one.iqm.value:+.3f} [")


def digits(one: Difference) -> list[str]:
    return [f"{getattr(one, key):.9f}" for key in ("value", "low", "high", "se", "p", "p_rows", "minimum_detectable")]


def test_one_contrast_has_the_same_digits_wherever_it_is_shown(tmp_path: Path) -> None:
    """Alone, among more arms and contrasts, beside other tasks in any order, and with its two halves in two runs."""
    right = {"lora": [50, 52, 51, 49], "chain3": [60, 61, 55, 58]}
    more = {"base": [10] * 4, **right, "full": [70, 71, 66, 68]}
    pair, comparison = ["chain3", "lora"], {"primary": ["full", "lora"], "secondary": [["chain3", "lora"]]}
    alone = task(tmp_path / "alone", "alone", right, data="d")
    among = task(tmp_path / "among", "among", more, data="d", comparison=comparison)
    first = task(tmp_path / "first", "halves", {arm: n[:2] for arm, n in right.items()}, data="d")
    second = task(tmp_path / "second", "halves", {arm: n[2:] for arm, n in right.items()}, data="d", first_seed=2)
    others = three_tasks(tmp_path)

    def of_run(folder: Path) -> Contrast:
        opened, plan = open_run(folder)
        contrasts = summarize(plan, opened).contrasts
        return next(one for one in contrasts if [one.first, one.second] == pair)

    def of_tasks(*folders: Path, label: str) -> Difference:
        contrasts = summarize_tasks(folders).contrasts
        return next(one for one in contrasts if [one.first, one.second] == pair).tasks[label]

    ours = digits(of_run(alone))
    assert digits(of_run(among)) == ours
    assert digits(of_tasks(alone, *others, label="alone")) == ours
    assert digits(of_tasks(*others[::-1], among, label="among")) == ours
    assert digits(of_tasks(first, second, label="halves")) == ours == digits(of_tasks(second, first, label="halves"))
    over = [summarize_tasks(folders).contrasts[0] for folders in (others, others[::-1])]
    assert digits(over[0]) == digits(over[1])
    shown = f"{float(ours[0]):+.3f} [{float(ours[1]):+.3f}, {float(ours[2]):+.3f}]"
    table = contrasts_table(summarize_tasks(others).model_copy(update={"contrasts": [of_run(alone)]}))
    assert table.texts[0][2] == shown
    for folders in ([alone, others[0]], [others[0], alone]):
        assert task_tables(summarize_tasks(folders))["tasks"].texts[0][2 + folders.index(alone)] == shown


def test_a_contrast_that_is_asked_for_later_is_shown_and_never_claimed(tmp_path: Path) -> None:
    runs = [
        task(tmp_path / name, name, {"lora": [50 + s for s in range(6)], "chain3": [60] * 6, "base": [90] * 6})
        for name in ("one", "two")
    ]
    named, later = summarize_tasks(runs, [("base", "lora"), ("lora", "chain3")]).contrasts
    assert (named.first, named.role, later.first, later.role) == ("chain3", "primary", "base", "later")
    assert later.low > 0
    assert not later.claim
    assert "was not named before the run, so nothing is claimed" in contrast_sentence(later, "exact match")
    done = cola("report", *runs, "--contrast", "base,lora")
    assert done.exit_code == 0, done.output
    assert "not named before" in done.output
    opened, plan = open_run(runs[0])
    [*_, alone] = summarize(plan, opened, [("base", "lora")]).contrasts
    assert (alone.first, alone.role, digits(alone)) == ("base", "later", digits(later.tasks["one"]))


def test_runs_on_the_same_data_are_more_seeds_of_one_task(tmp_path: Path) -> None:
    first = task(tmp_path / "a", "one", {"lora": [50, 51], "chain3": [60, 61]}, data="d")
    second = task(tmp_path / "b", "one", {"lora": [52, 53], "chain3": [60, 61]}, data="d", first_seed=2)
    summary = summarize_tasks([first, second])
    assert [one.label for one in summary.tasks] == ["one"]
    assert summary.contrasts[0].n_seeds == 4
    assert summary.contrasts[0].tasks["one"].value == pytest.approx((10 + 10 + 8 + 8) / 400)


def test_a_seed_that_two_runs_have_counts_once_and_is_told(tmp_path: Path) -> None:
    runs = [task(tmp_path / name, "one", {"lora": [50, 51], "chain3": [60, 61]}, data="d") for name in "ab"]
    summary = summarize_tasks(runs)
    assert summary.contrasts[0].n_seeds == 2
    assert any("b: lora seed 0, 1 is in an earlier run on the same data" in note for note in summary.notes)


def test_an_arm_that_a_task_lacks_is_left_out_there_and_told(tmp_path: Path) -> None:
    runs = three_tasks(tmp_path)
    alone = task(tmp_path / "four", "four", {"lora": [50, 50]}, comparison={})
    summary = summarize_tasks([*runs, alone])
    assert "chain3 − lora: not both are there, under one seed, for four" in summary.notes
    assert any("do not name the same primary contrast" in note for note in summary.notes)
    assert summary.contrasts[0].role == "secondary"
    assert summary.arms["chain3"].tasks.keys() == {"one", "two", "three"}


def test_metrics_that_are_not_the_same_are_not_averaged_and_it_is_said(tmp_path: Path) -> None:
    runs = [
        task(tmp_path / "a", "answers", {"lora": [50, 51], "chain3": [60, 61]}),
        task(tmp_path / "b", "texts", {"lora": [50, 51], "chain3": [60, 61]}, kind="text"),
    ]
    summary = summarize_tasks(runs)
    assert not summary.averaged
    [one] = summary.contrasts
    assert one.value is None
    assert one.tasks.keys() == {"answers", "texts"}
    [scope], [note] = summary.holds, summary.notes
    assert scope.startswith("Intervals speak of other seeds and other test examples; held fixed: the training")
    assert note.startswith("the runs are not about the same metric (a: exact match, score, b: perplexity, loss)")
    assert [table.title for table in task_tables(summary).values()] == [
        "Arms: test score",
        "Contrasts, task by task [95 %]",
    ]


def test_the_command_prints_the_tables_and_writes_a_page_beside_the_first_run(tmp_path: Path) -> None:
    runs = three_tasks(tmp_path)
    done = cola("report", *runs)
    assert done.exit_code == 0, done.output
    [made] = tmp_path.glob("report-*")
    assert {"report.html", "summary.json"} <= {path.name for path in made.iterdir()}
    assert json.loads((made / "summary.json").read_text())["contrasts"][0]["n_seeds"] == 12
    assert "chain3 is the better one" in " ".join(done.output.split())
    page = (made / "report.html").read_text()
    assert "mean over tasks of each task&#39;s mean of paired differences" in page
    assert "<svg" in page


def test_bad_input_to_a_report_of_several_runs_is_one_line(tmp_path: Path) -> None:
    runs = three_tasks(tmp_path)
    (tmp_path / "there").mkdir()
    for words, says in (
        ([*runs, tmp_path / "gone"], "gone is no run folder: it has no recipe.yaml"),
        ([runs[0], runs[0]], "is given twice"),
        ([*runs, "--to", tmp_path / "there"], "there exists and is kept as it is; name another folder by --to"),
        ([runs[0], "--to", tmp_path / "new"], "--to is for the report of several runs"),
        ([*runs, "--contrast", "chain,lora"], "no arm is called 'chain'; did you mean 'chain3'?"),
        ([runs[0], "--contrast", "zero,lora"], "no arm is called 'zero'; there are lora, chain3"),
        ([runs[0], "--contrast", "lora"], "--contrast lora: name two arms with a comma between them"),
        ([runs[0], "--contrast", "lora,lora"], "an arm is not compared with itself"),
    ):
        done = cola("report", *words)
        assert done.exit_code == 2, done.output
        [line] = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert says in line


# ---------------------------------------------------------------------------------------------------------
# Two runs


def test_two_runs_are_paired_where_their_data_is_the_same(tmp_path: Path) -> None:
    first = task(tmp_path / "a", "one", {"lora": [50, 51], "chain3": [60, 61]}, data="d")
    second = task(
        tmp_path / "b", "one", {"lora": [57, 58], "full": [60, 61]}, data="d", link={"rank": 16}, comparison={}
    )
    tables, notes = compare_runs(first, second)
    recipes, numbers = tables[0], tables[-1]
    rows = {row[0]: row[1:] for row in recipes.texts}
    assert rows["arms.lora.rank"] == ["8", "16"]
    assert rows["arms.full.method"] == ["–", "full"]
    assert rows["arms.chain3.links"] == ["3", "–"]
    assert "seeds" not in rows
    by_arm = {row[0]: row for row in numbers.texts}
    assert by_arm["lora"][-1].startswith("+0.070 [")
    assert by_arm["chain3"][-1] == by_arm["full"][-1] == "–"
    assert by_arm["chain3"][1:3] == ["0.605 ± 0.007", "–"]
    assert "How they were made: nothing differs" in notes
    assert "chain3 is in one of the two alone" in notes


def test_runs_on_other_data_are_set_side_by_side_and_not_paired(tmp_path: Path) -> None:
    first = task(tmp_path / "a", "one", {"lora": [50, 51]}, comparison={})
    second = task(tmp_path / "b", "two", {"lora": [57, 58]}, comparison={})
    tables, notes = compare_runs(first, second)
    assert "the data is not the same, so the two are set beside each other and not paired" in notes
    assert tables[-1].texts[0][-1] == "–"
    assert ["data.sha256", "one", "two"] in tables[1].texts


def test_metrics_that_differ_leave_the_losses_to_look_at(tmp_path: Path) -> None:
    first = task(tmp_path / "a", "one", {"lora": [50, 51]}, comparison={})
    second = task(tmp_path / "b", "two", {"lora": [57, 58]}, comparison={}, kind="text")
    tables, notes = compare_runs(first, second)
    assert "the metrics are not the same (exact match and perplexity), so no scores are compared" in notes
    assert tables[-1].columns[1] == "test loss, a"


def test_the_command_compares_two_folders(tmp_path: Path) -> None:
    runs = three_tasks(tmp_path)
    done = cola("compare", *runs[:2])
    assert done.exit_code == 0, done.output
    assert "Recipes: what differs" in done.output
    done = cola("compare", runs[0], tmp_path / "gone")
    assert done.exit_code == 2
    assert done.stderr.strip() == f"error: {tmp_path / 'gone'} is no run folder: it has no recipe.yaml"
