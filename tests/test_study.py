"""The recipes of the studies in experiments/. Run: pytest tests/test_study.py"""

import importlib.util
import itertools
import json
import runpy
import shutil
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from runs import assert_one_line, cola, open_run
from scipy.stats import pearsonr, permutation_test, sem
from scipy.stats import t as student
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from cola.compare.contrasts import Comparer, across, interval_of
from cola.compare.records import Interval
from cola.compare.statistics import estimate
from cola.compare.summary import summarize
from cola.recipe.read import read_recipe

pytestmark = pytest.mark.slow

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"
TASKS = sorted(path.stem for path in STUDY.glob("*.yaml"))


def without_task(name: str) -> dict[str, Any]:
    """A recipe of the study without what makes it that task's."""
    values = yaml.safe_load((STUDY / f"{name}.yaml").read_text())
    assert values.pop("name") == f"001-{name}"
    values["data"] = {"task": values["data"]["task"]}
    for part in [values["training"], *values["arms"].values()]:
        if "learning_rate" in part:
            part["learning_rate"].pop("search")
    return values


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_of_a_study_searches_equally_many_learning_rates_on_the_same_seeds(task: str) -> None:
    values = yaml.safe_load((STUDY / f"{task}.yaml").read_text())
    parts = [values["training"], *values["arms"].values()]
    searches = [part["learning_rate"] for part in parts if "learning_rate" in part]
    assert len({(len(one["search"]), *one["seeds"]) for one in searches}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_recipes_of_the_study_differ_in_name_data_and_learning_rate_grids_alone(task: str) -> None:
    assert without_task(task) == without_task(TASKS[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_of_the_study_names_a_contrast_for_every_trained_arm_and_spares_the_seeds_of_the_scout(
    task: str,
) -> None:
    recipe = read_recipe(STUDY / f"{task}.yaml")
    named = {arm for pair in recipe.comparison.secondary for arm in pair}
    assert named == {name for name, arm in recipe.arms.items() if arm.links != 0}
    assert not {100, 101} & set(recipe.seeds)


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Every number and word in a record, by where it is."""
    if not isinstance(value, dict | list):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, one in items for path, leaf in leaves(one, f"{at}/{key}").items()}


def unpacked(name: str, to: Path) -> Path:
    """The folder of a run or ablation that the study keeps."""
    with tarfile.open(STUDY / "results" / name / "run.tar.xz") as archive:
        archive.extractall(to, filter="data")
    return to


@pytest.mark.parametrize("name", sorted(path.parent.name for path in STUDY.glob("results/*/run.tar.xz")))
def test_the_committed_numbers_come_from_the_scores_that_are_packed_beside_them(name: str, tmp_path: Path) -> None:
    kept = STUDY / "results" / name
    folder = unpacked(name, tmp_path)
    if (kept / "summary.json").exists():
        committed, packed = (json.loads((place / "summary.json").read_text()) for place in (kept, folder))
        # Where the run was tracked has another spelling since.
        del committed["tracking"], packed["wandb"]
        assert committed == packed
    else:  # the differences were added later, from the packed scores
        ablation, packed = (json.loads((place / "ablation.json").read_text()) for place in (kept, folder))
        points = (open_run(folder / "points" / point["folder"]) for point in ablation["points"])
        runs = [Comparer(recipe, opened, []) for opened, recipe in points]
        made = [interval_of(estimate((1, -1), [across([run, runs[0]], "chain3", by_loss=False)])) for run in runs[1:]]
        added = [row.pop("difference") for row in ablation["rows"] if "difference" in row]
        assert added == [pytest.approx(one.content()) for one in made]
        assert ablation == packed
    for run in sorted(path.parent for path in folder.rglob("recipe.yaml")):
        opened, recipe = open_run(run)
        made = json.loads(json.dumps(summarize(recipe, opened).content()))
        committed = json.loads((run / "summary.json").read_text())
        for key in ("arms", "contrasts", "spectra", "trials", "rows", "seeds"):
            ours, theirs = leaves(made[key]), leaves(committed[key])
            numbers = [at for at, value in theirs.items() if isinstance(value, float)]
            # Sums over threads differ in their last bits.
            assert [ours.pop(at) for at in numbers] == pytest.approx([theirs.pop(at) for at in numbers], abs=1e-7), key
            assert ours == theirs, key


def test_every_difference_over_the_tasks_is_the_mean_of_the_tasks_means_of_paired_differences() -> None:
    tasks = [json.loads((STUDY / "results" / task / "summary.json").read_text())["arms"] for task in TASKS]
    for contrast in json.loads((STUDY / "results/over-tasks/summary.json").read_text())["contrasts"]:
        first, second = (
            [seed["test_score"] for arms in tasks for seed in arms[contrast[one]]["seeds"]]
            for one in ("first", "second")
        )
        assert len(first) == len(second) == 3 * 6
        # Six seeds on each task, so that the mean of the means is the mean of all.
        assert contrast["value"] == pytest.approx(np.mean(np.subtract(first, second)))
        if contrast["role"] == "primary":
            flips = {"permutation_type": "samples", "n_resamples": np.inf, "batch": 2**14}
            reference = permutation_test((np.subtract(first, second),), np.mean, **flips)
            assert contrast["p_rows"] == pytest.approx(reference.pvalue)


def test_the_rows_of_the_ablation_are_those_of_its_points(tmp_path: Path) -> None:
    folder = unpacked("length", tmp_path)
    record = json.loads((folder / "ablation.json").read_text())
    summaries = {
        point["label"]: json.loads((folder / "points" / point["folder"] / "summary.json").read_text())
        for point in record["points"]
    }
    for row in record["rows"]:
        arm = summaries[row["label"]]["arms"][row["arm"]]
        assert {key: row[key] for key in arm if key != "seeds"} == {key: arm[key] for key in arm if key != "seeds"}
        assert [seed["test_score"] for seed in row["seeds"]] == [seed["test_score"] for seed in arm["seeds"]]


def test_a_report_of_a_folder_whose_results_have_gone_leaves_what_is_there(tmp_path: Path) -> None:
    kept = next(STUDY.glob("results/*/run.tar.xz")).parent
    folder = shutil.copytree(kept, tmp_path / "kept")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for runs in ([folder], [folder, kept]):
        told = cola("report", *map(str, runs))
        assert_one_line(told)
        assert "tells of results that have gone" in told.output.replace("\n", " ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_cell_that_was_trained_again_is_held_against_every_number_but_those_of_the_occasion(tmp_path: Path) -> None:
    cell = runpy.run_path(str(STUDY / "cell.py"))
    kept, made = tmp_path / "kept", tmp_path / "made"
    run = unpacked("trec", tmp_path / "run")
    for folder in (kept, made):
        shutil.copytree(run / "arms/chain3/seed-3", folder)
    result = json.loads((made / "result.json").read_text())
    result["train_info"]["train_seconds"] += 1
    result["meta_info"]["machine"]["cpu"] = "another"
    (made / "result.json").write_text(json.dumps(result))
    seen, differ = cell["compared"](kept, made)
    assert not differ
    assert {".train_info.segments.0", ".evaluation.test.loss", "scores/test.jsonl"} <= set(seen)
    result["evaluation"]["test"]["loss"] += 1e-9
    (made / "result.json").write_text(json.dumps(result))
    (made / "scores/train.jsonl").write_text("")
    assert cell["compared"](kept, made)[1] == [".evaluation.test.loss", "scores/train.jsonl"]


# ---------------------------------------------------------------------------------------------------------
# results/minibatches.json, recomputed from the archives in other words

KEPT = json.loads((STUDY / "results/minibatches.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every archive that minibatches.py reads is unpacked under its name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in (*TASKS, "length", "schedule"):
        unpacked(name, folder / name)
    return folder


def steps(training: Path) -> pandas.DataFrame:
    rows = pandas.read_json(training / "metrics.jsonl", lines=True, precise_float=True)
    return rows[rows["kind"] == "step"].set_index("step")


def loss_difference(first: Path, second: Path) -> pandas.Series:
    """By step, of two trainings whose every step has the same rows and rate."""
    one, other = steps(first), steps(second)
    assert one["rows"].tolist() == other["rows"].tolist()
    assert one["learning_rate"].tolist() == other["learning_rate"].tolist()
    return one["loss"] - other["loss"]


def mean_and_ends(values: Any) -> list[float]:
    """Student's 95 % interval of a mean."""
    half = student.ppf(0.975, len(values) - 1) * sem(values)
    return [np.mean(values), np.mean(values) - half, np.mean(values) + half]


def numbers(record: Any) -> list[float]:
    return [record[key] if isinstance(record, dict) else getattr(record, key) for key in ("value", "low", "high")]


def test_the_losses_of_a_chain_and_of_lora_on_the_same_minibatches_are_those_of_the_archives(runs: Path) -> None:
    places = {("trec", 2): runs / "length/points/02-chain3.links=2/arms", ("chain_sum", 3): runs / "chain_sum/arms"}
    assert [(one["task"], one["links"]) for one in KEPT["paired"]] == list(places)
    for one, arms in zip(KEPT["paired"], places.values(), strict=True):
        by_seed = [loss_difference(arms / f"chain3/seed-{s}", arms / f"lora/seed-{s}") for s in range(6)]
        knot = one["knots"][0]
        before = max(line.loc[: knot + 1].abs().max() for line in by_seed)
        assert one["largest_before"] == pytest.approx(before)
        assert before < 1e-5
        for part in [*one["bins"], *one["windows"].values()]:
            of_seeds = [line.loc[part["first"] : part["last"]].mean() for line in by_seed]
            assert numbers(part) == pytest.approx(mean_and_ends(of_seeds))
            assert part["seeds"] == pytest.approx(of_seeds)
        assert [part["first"] for part in one["windows"].values()] == [*(k + 2 for k in one["knots"]), 151]
        edges = [edge for part in one["bins"] for edge in (part["first"], part["last"])]
        assert edges[::2] == [1, *(last + 1 for last in edges[1:-1:2])]  # no step is left out or counted twice
        assert {k + 1 for k in one["knots"]} <= set(edges[1::2])  # and no bin has a knot within
        assert edges[-1] == 160


def test_no_other_arm_with_knots_was_trained_at_the_rate_of_lora(runs: Path) -> None:
    found = set()
    for arms in [*(runs / task / "arms" for task in TASKS), *runs.glob("length/points/*/arms")]:
        for arm in {"chain3", "reset3", "keep3"} & {path.name for path in arms.iterdir()}:
            of_arm, of_lora = (json.loads((arms / a / "seed-0/result.json").read_text()) for a in (arm, "lora"))
            if (
                len(of_arm["train_info"]["links"]) > 1
                and of_arm["train_info"]["choice"] == of_lora["train_info"]["choice"]
            ):
                found.add((arms.relative_to(runs).parts[0], arm))
    assert found == {("length", "chain3"), ("chain_sum", "chain3")}


def test_up_to_the_fourth_epoch_every_row_of_trecs_chain_of_two_was_last_trained_on_before_its_knot(runs: Path) -> None:
    for seed in range(6):
        rows = steps(runs / f"length/points/02-chain3.links=2/arms/chain3/seed-{seed}")["rows"]
        for first in range(1, 160, 40):
            epoch = [row for batch in rows.loc[first : first + 39] for row in batch]
            assert len(epoch) == len(set(epoch)) == 320
    assert KEPT["paired"][0]["knots"] == [80]


@pytest.mark.parametrize("arm", ["chain3", "reset3", "keep3"])
def test_the_medians_and_counts_over_the_trials_are_those_of_the_archives(arm: str, runs: Path) -> None:
    cells = [path for task in TASKS for path in (runs / task / "trials/lora").glob("learning_rate=*")]
    lines = {}
    for of_lora in cells:
        of_arm = of_lora.parent.parent / arm / of_lora.name
        by_seed = [loss_difference(of_arm / f"seed-{s}", of_lora / f"seed-{s}") for s in (0, 1)]
        lines[of_lora] = sum(by_seed) / 2
    assert len(lines) == len(KEPT["trials"]["cells"]) == 5 + 5 + 6
    about = KEPT["trials"]["arms"][arm]
    for part in [*about["bins"], *about["windows"].values()]:
        means = [line.loc[part["first"] : part["last"]].mean() for line in lines.values()]
        assert part["lower"] == np.count_nonzero(np.array(means) < 0)
        assert sorted(part["cells"]) == pytest.approx(sorted(means))
        assert [part["quartiles"][0], part["median"], part["quartiles"][1]] == pytest.approx(
            np.percentile(means, [25, 50, 75])
        )


@pytest.mark.parametrize("task", TASKS)
def test_the_line_of_test_loss_on_train_loss_and_the_distances_from_it_are_those_of_the_archives(
    task: str, runs: Path
) -> None:
    def loss(arm: str, seed: int, split: str) -> float:
        scores = pandas.read_json(runs / task / f"arms/{arm}/seed-{seed}/scores/{split}.jsonl", lines=True)
        return scores["nats"].sum() / scores["tokens"].sum()

    arms = ["lora", "chain3", "lora24", "reset3", "keep3", "gradient3"]
    rows = [(a, s, loss(a, s, "train"), loss(a, s, "test")) for a in arms for s in range(6)]
    frame = pandas.DataFrame(rows, columns=["arm", "seed", "train", "test"])

    def means(of: pandas.DataFrame) -> pandas.Series:
        return (of["test"] - np.polyval(np.polyfit(of["train"], of["test"], 1), of["train"])).groupby(of["arm"]).mean()

    kept = KEPT["residuals"][task]
    assert kept["r"] == pytest.approx(pearsonr(frame["train"], frame["test"]).statistic)
    assert [kept["slope"], kept["intercept"]] == pytest.approx(np.polyfit(frame["train"], frame["test"], 1))
    whole = means(frame)
    without = [means(frame[frame["seed"] != seed]) for seed in range(6)]
    lora = frame[frame["arm"] == "lora"].set_index("seed")
    for arm in arms:
        pseudo = np.array([6 * whole[arm] - 5 * one[arm] for one in without])
        _, low, high = mean_and_ends(pseudo)
        about = kept["arms"][arm]
        points = frame[frame["arm"] == arm].sort_values("seed")[["train", "test"]]
        assert np.array(about["seeds"]) == pytest.approx(points.to_numpy())
        half = (high - low) / 2
        assert numbers(about["residual"]) == pytest.approx([whole[arm], whole[arm] - half, whole[arm] + half], abs=1e-9)
        if arm == "lora":
            continue
        _, low, high = mean_and_ends(pseudo - [6 * whole["lora"] - 5 * one["lora"] for one in without])
        value, half = whole[arm] - whole["lora"], (high - low) / 2
        assert numbers(about["minus_lora"]) == pytest.approx([value, value - half, value + half], abs=1e-9)
        for split in ("train", "test"):
            differences = frame[frame["arm"] == arm].set_index("seed")[split] - lora[split]
            assert numbers(about[f"{split}_minus_lora"]) == pytest.approx(mean_and_ends(differences))


def test_how_the_seeds_of_a_search_agree_is_counted_from_the_validation_scores_of_its_trials(runs: Path) -> None:
    kept = {(one["task"], one["arm"]): one for one in KEPT["choice"]["cells"]}
    agree, short = 0, []
    for search in [path for task in TASKS for path in (runs / task / "trials").iterdir()]:
        scores = pandas.DataFrame(
            {
                float(trial.name.split("=")[1]): [
                    pandas.read_json(trial / f"seed-{seed}/scores/validation.jsonl", lines=True)["score"].mean()
                    for seed in (0, 1)
                ]
                for trial in search.glob("learning_rate=*")
            }
        ).sort_index(axis=1)
        best = scores.idxmax(axis=1)
        agree += best[0] == best[1]
        short += [scores.loc[1].max() - scores.loc[1, best[0]], scores.loc[0].max() - scores.loc[0, best[1]]]
        one = kept.pop((search.parent.parent.name, search.name))
        assert (one["best"], one["short_on_the_other"]) == (best.tolist(), pytest.approx(short[-2:]))
    assert not kept
    assert (agree, len(short)) == (KEPT["choice"]["agree"], 2 * KEPT["choice"]["of"])
    assert KEPT["choice"]["short_on_the_other"] == pytest.approx(np.mean(short))


def test_the_largest_gradient_norms_are_those_of_the_archive(runs: Path) -> None:
    for arm, of_seeds in KEPT["norms"].items():
        for one in of_seeds:
            norms = steps(runs / f"schedule/arms/{arm}/seed-{one['seed']}")["grad_norm"]
            assert (one["step"], one["norm"]) == (norms.idxmax(), pytest.approx(norms.max()))
            scores = pandas.read_json(
                runs / f"schedule/arms/{arm}/seed-{one['seed']}/scores/test.jsonl", lines=True, precise_float=True
            )
            assert one["test_score"] == pytest.approx(scores["score"].mean())
    failed = min(KEPT["norms"]["chain3_link"], key=lambda one: one["test_score"])
    assert failed["norm"] == max(one["norm"] for of_seeds in KEPT["norms"].values() for one in of_seeds)


# ---------------------------------------------------------------------------------------------------------
# What the page says of them


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """docs/study.py."""
    spec = importlib.util.spec_from_file_location("study", STUDY.parent.parent / "docs/study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.02, 0.03, "came true"),
        (-0.054, -0.010, "not decided"),
        (-0.01, 0.04, "not decided"),
        (-0.05, 0.05, "not decided"),
        (-0.06, -0.04, "did not come true"),
        (0.031, 0.09, "did not come true"),
    ],
)
def test_a_prediction_is_judged_by_whether_its_interval_lies_within_what_was_predicted(
    low: float, high: float, outcome: str, pages: ModuleType
) -> None:
    for value in (low, (low + high) / 2, high):  # wherever the estimate is
        assert pages.judged(Interval(value=value, low=low, high=high), -0.03, 0.03) == outcome


def test_a_share_of_a_gap_that_cannot_be_had_decides_no_prediction(pages: ModuleType) -> None:
    for share in (None, "undefined", "no gap", Interval(value=0.1, low=None, high=None)):
        assert pages.judged(share, -np.inf, 0.25) == "not decided"


def test_what_several_things_must_hold_for_comes_true_by_all_and_fails_by_one(pages: ModuleType) -> None:
    yes, no, undecided = "came true", "did not come true", "not decided"
    for outcomes in itertools.product((yes, no, undecided), repeat=3):
        expected = yes if set(outcomes) == {yes} else no if no in outcomes else undecided
        assert pages.all_of(outcomes) == expected
    assert pages.on_each([yes, yes, undecided]) == "came true on 2, not decided on 1"
    assert pages.on_each([undecided] * 3) == undecided


def test_no_prediction_of_the_page_came_true_whose_interval_reaches_out_of_it(pages: ModuleType) -> None:
    outcomes = {text: outcome for text, _, outcome in pages.predictions()}
    for first, second, low, high in (("chain3", "lora", -0.03, 0.03), ("all_linear", "chain3", 0.05, np.inf)):
        one = pages.contrasts()[first, second]
        text = next(text for text in outcomes if f"{first} − {second}" in text and "told" not in text)
        inside, outside = low <= one.low <= one.high <= high, one.high < low or one.low > high
        assert outcomes[text] == ("came true" if inside else "did not come true" if outside else "not decided")


def test_the_interval_of_a_difference_of_gaps_has_the_variance_of_the_two_way_table(
    pages: ModuleType, runs: Path
) -> None:
    """Against statsmodels' ANOVA; simple_equations has no two test examples of one group."""

    def sums(arm: str) -> pandas.DataFrame:
        folders = [runs / f"simple_equations/arms/{arm}/seed-{seed}/scores" for seed in range(6)]
        tests = [pandas.read_json(folder / "test.jsonl", lines=True).assign(seed=s) for s, folder in enumerate(folders)]
        trains = [pandas.read_json(folder / "train.jsonl", lines=True) for folder in folders]
        table = pandas.concat(tests, ignore_index=True)
        train = [one["nats"].sum() / one["tokens"].sum() for one in trains]
        return table.assign(gap=table["nats"] - table["tokens"] * table["seed"].map(dict(enumerate(train))))

    first, second = sums("chain3"), sums("lora")
    assert first["id"].tolist() == second["id"].tolist()
    tokens = first["tokens"]
    value = (first["gap"] - second["gap"]).sum() / tokens.sum()
    moved = (first["gap"] - second["gap"] - value * tokens) / tokens.mean()
    table = anova_lm(ols("moved ~ C(seed) + C(id)", first.assign(moved=moved)).fit())
    squares = table["sum_sq"] / table["df"] / len(first)  # of the mean: each part's share beside the rest's
    of_seeds = max(squares["C(seed)"] - squares["Residual"], 0)
    variance = of_seeds + squares["C(id)"]
    seen = squares["C(seed)"] if of_seeds else 0
    df = variance**2 / (seen**2 / 5 + squares["C(id)"] ** 2 / 499)
    found = pages.gap_difference("simple_equations", "chain3", "lora")
    assert [found.value, found.se, found.df] == pytest.approx([value, variance**0.5, df], rel=1e-6)
    half = student.ppf(0.975, df) * variance**0.5
    assert numbers(found) == pytest.approx([value, value - half, value + half], abs=0.15 * half)  # but for skewness


def test_the_contrast_without_a_task_is_over_the_others_and_with_all_of_them_the_reports(pages: ModuleType) -> None:
    whole = pages.contrasts()["chain3", "lora"]
    again = pages.over(list(pages.by_task()))
    assert numbers(again) == pytest.approx(numbers(whole), abs=1e-9)
    less = pages.over(["trec", "simple_equations"])
    assert list(less.tasks) == ["001-trec", "001-simple_equations"]
    assert less.n_seeds == 12
    for label, one in less.tasks.items():
        assert one.value == pytest.approx(whole.tasks[label].value)


def test_a_contrast_thought_of_later_stands_in_its_own_block_alone(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = pages.over_tasks()
    contrasts = [
        one.model_copy(update={"role": "later"}) if (one.first, one.second) == ("all_linear", "chain3") else one
        for one in summary.contrasts
    ]
    summary = summary.model_copy(update={"contrasts": contrasts})
    monkeypatch.setattr(pages, "over_tasks", lambda: summary)
    assert "all_linear − chain3" in pages.later()
    assert "all_linear 2.44 M, chain3 461 k" in pages.later()
    assert "chain3 − lora" not in pages.later()
    assert "all_linear − chain3" not in pages.verdict() + pages.scores()
    assert "chain3 − lora24" in pages.verdict()
