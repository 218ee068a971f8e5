"""What the committed runs say beside their scores, looked at after the study: results/minibatches.json and two figures.

python experiments/001-does-chaining-pay/minibatches.py

Reads results/*/run.tar.xz and nothing else; takes seconds, and gives the same numbers each time.

    paired      training loss of a chain minus LoRA's on the same minibatch, in every arm that ties knots and has chosen
                LoRA's learning rate; six seeds
    trials      the same of the trials of the searches, where both arms have every rate of one grid; two seeds
    residuals   test loss against train loss of every run with pairs on q and v, and each arm's distance from their line
    choice      which learning rate each of the two seeds of a search would have chosen alone
    norms       the largest gradient norm of the exploratory arm and of those beside it

A step's loss is taken before its update. The first step of a link therefore still shows the weights from before the
knot, and the first loss that a knot can move is that of the second step: bins begin there.

Axes: A arms, S seeds, K steps, X train and test loss.
"""

import itertools
import json
import tarfile
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import linregress, ttest_1samp
from scipy.stats import t as student

from cola.report.drawing import GREY, INK, STYLE, Look, arm_legend, looks, new_figure, save, settle

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TASKS = ("trec", "chain_sum", "simple_equations")
QV_ARMS = ("lora", "chain3", "lora24", "reset3", "keep3", "gradient3")
TIED = ("chain3", "reset3", "keep3")  # they begin as LoRA does and differ from it by their knots alone
SEEDS = range(6)
WINDOW = 10  # steps
BIN = 10  # steps, about: whole bins make up a link

Texts = dict[str, str]  # what an archive holds, by path
Array = NDArray[np.float64]


def kept(name: str) -> Texts:
    """The results and metrics of a run or ablation that the study keeps."""
    with tarfile.open(RESULTS / name / "run.tar.xz") as archive:
        wanted = [member for member in archive if member.name.endswith(("/result.json", "/metrics.jsonl"))]
        return {
            member.name.removeprefix("./"): file.read().decode()
            for member in wanted
            if (file := archive.extractfile(member))
        }


def steps_of(texts: Texts, folder: str) -> list[dict[str, Any]]:
    """The optimizer steps of one training."""
    rows = map(json.loads, texts[f"{folder}/metrics.jsonl"].splitlines())
    return [row for row in rows if row["kind"] == "step"]


def result_of(texts: Texts, folder: str) -> dict[str, Any]:
    return json.loads(texts[f"{folder}/result.json"])


def differences(texts: Texts, first: str, second: str) -> Array:
    """Training loss (K) of one training minus another's, of which each step has the same rows and learning rate."""
    ours, theirs = steps_of(texts, first), steps_of(texts, second)
    for one, other in zip(ours, theirs, strict=True):
        if any(one[key] != other[key] for key in ("step", "rows", "learning_rate")):
            raise SystemExit(f"{first} and {second} differ in the rows or the rate of step {one['step']}: not paired")
    return np.array([one["loss"] for one in ours]) - np.array([other["loss"] for other in theirs])


def interval(values_S: Any) -> dict[str, float]:
    """Mean over seeds, with Student's 95 % interval."""
    found = ttest_1samp(values_S, 0).confidence_interval(0.95)
    return {"value": float(np.mean(values_S)), "low": float(found.low), "high": float(found.high)}


def bins_of(knots: list[int], last: int) -> list[tuple[int, int]]:
    """First and last step of each bin; none holds losses from both sides of a knot."""
    ends = [0, *(knot + 1 for knot in knots), last]
    links = [np.arange(begin + 1, end + 1) for begin, end in itertools.pairwise(ends)]
    parts = [part for link in links for part in np.array_split(link, round(len(link) / BIN))]
    return [(int(part[0]), int(part[-1])) for part in parts]


def windows_of(knots: list[int], last: int) -> list[tuple[str, int, int]]:
    """The first steps that each knot can move, and the last ones of the training."""
    after = [(f"first {WINDOW} after knot {n}", knot + 2, knot + 1 + WINDOW) for n, knot in enumerate(knots, 1)]
    return [*after, (f"last {WINDOW}", last - WINDOW + 1, last)]


def over_seeds(differences_SK: Array, first: int, last: int) -> dict[str, Any]:
    of_seeds = differences_SK[:, first - 1 : last].mean(axis=1)
    return {"first": first, "last": last, **interval(of_seeds), "seeds": of_seeds.tolist()}


def knots_of(result: dict[str, Any]) -> list[int]:
    """Steps at which a link ends and another begins."""
    return [link["last_step"] for link in result["train_info"]["links"][:-1]]


def paired(archives: dict[str, Texts]) -> list[dict[str, Any]]:
    """Every arm that ties knots and was trained at LoRA's rate, against LoRA."""
    points = sorted({path.split("/arms/")[0] for path in archives["length"] if "/arms/chain3/" in path})
    places = [("trec", "length", f"{point}/", "chain3") for point in points]
    places += [(task, task, "", arm) for task in TASKS for arm in TIED]
    found = []
    for task, name, at, arm in places:
        texts = archives[name]
        results = [[result_of(texts, f"{at}arms/{one}/seed-{s}") for s in SEEDS] for one in (arm, "lora")]
        rates = {result["train_info"]["learning_rate"] for of_arm in results for result in of_arm}
        knots = knots_of(results[0][0])
        if len(rates) > 1 or not knots:
            continue
        lines_SK = np.array([differences(texts, f"{at}arms/{arm}/seed-{s}", f"{at}arms/lora/seed-{s}") for s in SEEDS])
        n_steps = lines_SK.shape[1]
        found.append(
            {
                "task": task,
                "arm": arm,
                "links": len(knots) + 1,
                "learning_rate": rates.pop(),
                "knots": knots,
                "largest_before": float(np.abs(lines_SK[:, : knots[0] + 1]).max()),
                "bins": [over_seeds(lines_SK, *one) for one in bins_of(knots, n_steps)],
                "windows": {what: over_seeds(lines_SK, *one) for what, *one in windows_of(knots, n_steps)},
            }
        )
    return found


def trials(archives: dict[str, Texts]) -> dict[str, Any]:
    """Each rate of each task is a cell: the mean over the search's two seeds of an arm's loss minus LoRA's there."""
    cells, lines = [], {arm: [] for arm in TIED}
    knots: list[int] = []
    for task in TASKS:
        texts = archives[task]
        rates = sorted({float(path.split("=")[1].split("/")[0]) for path in texts if path.startswith("trials/lora/")})
        for rate in rates:
            cells.append({"task": task, "learning_rate": rate})
            for arm in TIED:
                both_SK = [
                    differences(texts, *(f"trials/{one}/learning_rate={rate:g}/seed-{seed}" for one in (arm, "lora")))
                    for seed in (0, 1)
                ]
                lines[arm].append(np.mean(both_SK, axis=0))
                knots = knots_of(result_of(texts, f"trials/{arm}/learning_rate={rate:g}/seed-0"))
    n_steps = len(lines["chain3"][0])

    def of_cells(arm: str, first: int, last: int) -> dict[str, Any]:
        values = [float(line[first - 1 : last].mean()) for line in lines[arm]]
        low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
        lower = sum(value < 0 for value in values)
        return {
            "first": first,
            "last": last,
            "median": median,
            "quartiles": [low, high],
            "lower": lower,
            "cells": values,
        }

    arms = {
        arm: {
            "bins": [of_cells(arm, *one) for one in bins_of(knots, n_steps)],
            "windows": {what: of_cells(arm, *one) for what, *one in windows_of(knots, n_steps)},
        }
        for arm in TIED
    }
    return {"cells": cells, "knots": knots, "arms": arms}


def residuals(archives: dict[str, Texts]) -> dict[str, Any]:
    """By task: the line of test loss on train loss through all runs, and how far from it each arm's mean lies.

    Intervals are Student's of the jackknife's pseudo-values over seeds: a seed leaves all arms at once and the line is
    fitted anew without it, so that they hold the line's own uncertainty over seeds. The test rows are the same in all.
    """
    found = {}
    for task in TASKS:
        of_arms = [
            [result_of(archives[task], f"arms/{arm}/seed-{seed}")["evaluation"] for seed in SEEDS] for arm in QV_ARMS
        ]
        losses_ASX = np.array(
            [[[one[key]["loss"] for key in ("train", "test")] for one in of_arm] for of_arm in of_arms]
        )
        line = line_of(losses_ASX)
        whole_A = distances(losses_ASX)
        without_SA = np.array([distances(np.delete(losses_ASX, seed, axis=1)) for seed in SEEDS])
        pseudo_SA = len(SEEDS) * whole_A - (len(SEEDS) - 1) * without_SA
        of_lora = QV_ARMS.index("lora")
        arms = {}
        for a, arm in enumerate(QV_ARMS):
            arms[arm] = {
                "residual": around(whole_A[a], pseudo_SA[:, a]),
                "minus_lora": around(whole_A[a] - whole_A[of_lora], pseudo_SA[:, a] - pseudo_SA[:, of_lora]),
                "train_minus_lora": interval(losses_ASX[a, :, 0] - losses_ASX[of_lora, :, 0]),
                "test_minus_lora": interval(losses_ASX[a, :, 1] - losses_ASX[of_lora, :, 1]),
                "seeds": losses_ASX[a].tolist(),
            }
            if arm == "lora":
                arms[arm] = {key: arms[arm][key] for key in ("residual", "seeds")}
        slope, intercept, r = (float(number) for number in (line.slope, line.intercept, line.rvalue))
        found[task] = {"r": r, "slope": slope, "intercept": intercept, "arms": arms}
    return found


def line_of(losses_ASX: Array) -> Any:
    """Test loss on train loss, through all runs."""
    return linregress(losses_ASX[..., 0].ravel(), losses_ASX[..., 1].ravel())


def distances(losses_ASX: Array) -> Array:
    """Mean residual of each arm."""
    line = line_of(losses_ASX)
    return (losses_ASX[..., 1] - line.intercept - line.slope * losses_ASX[..., 0]).mean(axis=1)


def around(value: float, pseudo_S: Array) -> dict[str, float]:
    half = student.ppf(0.975, len(pseudo_S) - 1) * pseudo_S.std(ddof=1) / len(pseudo_S) ** 0.5
    return {"value": float(value), "low": float(value - half), "high": float(value + half)}


def choice(archives: dict[str, Texts]) -> dict[str, Any]:
    """What each of a search's two seeds would have chosen alone, by validation score (of equal ones the first), and how
    far that is on the other seed below its best."""
    cells = []
    for task in TASKS:
        texts = archives[task]
        for arm in sorted({path.split("/")[1] for path in texts if path.startswith("trials/")}):
            folders = {path.split("/")[2] for path in texts if path.startswith(f"trials/{arm}/learning_rate=")}
            rates = sorted(float(folder.partition("=")[2]) for folder in folders)
            scores = [
                [score_of(texts, f"trials/{arm}/learning_rate={r:g}/seed-{seed}") for r in rates] for seed in (0, 1)
            ]
            best = [of_seed.index(max(of_seed)) for of_seed in scores]
            short = [max(scores[1]) - scores[1][best[0]], max(scores[0]) - scores[0][best[1]]]
            cells.append({"task": task, "arm": arm, "best": [rates[one] for one in best], "short_on_the_other": short})
    agree = sum(one["best"][0] == one["best"][1] for one in cells)
    short = mean(short for one in cells for short in one["short_on_the_other"])
    return {"agree": agree, "of": len(cells), "short_on_the_other": short, "cells": cells}


def score_of(texts: Texts, folder: str) -> float:
    """On validation."""
    return result_of(texts, folder)["evaluation"]["validation"]["score"]


def norms(texts: Texts) -> dict[str, Any]:
    """By arm and seed: the largest gradient norm, before it was clipped, and what that training scored."""
    found = {}
    for arm in ("lora", "chain3", "chain3_link"):
        found[arm] = []
        for seed in SEEDS:
            largest = max(steps_of(texts, f"arms/{arm}/seed-{seed}"), key=lambda step: step["grad_norm"])
            evaluation = result_of(texts, f"arms/{arm}/seed-{seed}")["evaluation"]
            found[arm].append(
                {
                    "seed": seed,
                    "norm": largest["grad_norm"],
                    "step": largest["step"],
                    "test_score": evaluation["test"]["score"],
                }
            )
    return found


def minibatches_figure(record: dict[str, Any], look: dict[str, Look]) -> Figure:
    """Difference in training loss along the step: one panel for each pair of six seeds, and one of the trials."""
    pairs, searched = record["paired"], record["trials"]
    figure = new_figure(3.4, 9)
    panels = figure.subplots(1, len(pairs) + 1, sharey=True)
    for axes, one in zip(panels, pairs, strict=False):
        bins = one["bins"]
        ends = [(part["low"], part["high"]) for part in bins]
        curve(axes, bins, [part["value"] for part in bins], ends, look[one["arm"]])
        for seed in SEEDS:
            marks = [part["seeds"][seed] for part in bins]
            axes.plot(middles(bins), marks, ".", color=look[one["arm"]].colour, ms=3, alpha=0.5, mew=0)
        n = len(one["knots"]) + 1
        axes.set_title(f"{one['task']}: chain of {n} − lora, rate {one['learning_rate']:g}\nmean of 6 seeds, 95 %")
        knot_lines(axes, one["knots"])
    axes = panels[-1]
    for arm, about in searched["arms"].items():
        bins = about["bins"]
        curve(axes, bins, [part["median"] for part in bins], [part["quartiles"] for part in bins], look[arm])
    cells = len(searched["cells"])
    axes.set_title(f"trials: {cells} rates of {len(TASKS)} tasks, 2 seeds\nmedian and middle half of the {cells}")
    knot_lines(axes, searched["knots"])
    for axes in panels:
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        axes.set_xticks(range(0, 161, 40))
        axes.set_xlabel("optimizer step; a tick ends an epoch")
        axes.grid(alpha=0.15)
    panels[0].set_ylabel("training loss − LoRA's, nats per token")
    arm_legend(figure, {"chain": look["chain3"], "reset3": look["reset3"], "keep3": look["keep3"]})
    return settle(figure)


def middles(bins: list[dict[str, Any]]) -> list[float]:
    return [(part["first"] + part["last"]) / 2 for part in bins]


def curve(axes: Axes, bins: list[dict[str, Any]], line: list[float], ends: list[Any], look: Look) -> None:
    axes.fill_between(middles(bins), *zip(*ends, strict=True), color=look.colour, alpha=0.18, linewidth=0)
    axes.plot(middles(bins), line, color=look.colour, marker=look.marker, ms=4, linewidth=1.5)


def knot_lines(axes: Axes, knots: list[int]) -> None:
    for knot in knots:
        axes.axvline(knot, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))


def test_on_train_figure(record: dict[str, Any], look: dict[str, Look]) -> Figure:
    """Test loss against train loss, a panel for each task, with the line through all runs."""
    figure = new_figure(3.3, 9)
    for axes, (task, one) in zip(figure.subplots(1, len(TASKS)), record["residuals"].items(), strict=True):
        for arm, about in one["arms"].items():
            seeds_SX, own = np.array(about["seeds"]), look[arm]
            axes.plot(seeds_SX[:, 0], seeds_SX[:, 1], own.marker, color=own.colour, ms=3.5, alpha=0.55, mew=0)
            axes.plot(*seeds_SX.mean(axis=0), own.marker, color=own.colour, ms=7, mec=INK, mew=0.6, zorder=3)
        trained = [x for about in one["arms"].values() for x, _ in about["seeds"]]
        ends = np.array([min(trained), max(trained)])
        axes.plot(ends, one["intercept"] + one["slope"] * ends, color=INK, linewidth=1, alpha=0.7, zorder=1)
        axes.set_title(f"{task}: r = {one['r']:.2f}, slope {one['slope']:.2f}")
        axes.set_xlabel("train loss, nats per token")
        axes.grid(alpha=0.15)
    figure.axes[0].set_ylabel("test loss, nats per token")
    arm_legend(figure, {arm: look[arm] for arm in QV_ARMS})
    return settle(figure)


def made() -> dict[str, Any]:
    """Every number, from the archives."""
    archives = {name: kept(name) for name in (*TASKS, "length", "schedule")}
    return {
        "command": "python experiments/001-does-chaining-pay/minibatches.py",
        "paired": paired(archives),
        "trials": trials(archives),
        "residuals": residuals(archives),
        "choice": choice(archives),
        "norms": norms(archives["schedule"]),
    }


def main() -> None:
    record = made()
    (RESULTS / "minibatches.json").write_text(json.dumps(record, indent=1) + "\n")
    arms = json.loads((RESULTS / "trec/summary.json").read_text())["arms"]
    look = looks(arms)  # as in the figures of the runs
    (RESULTS / "figures").mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        drawn = {"minibatches": minibatches_figure(record, look), "test-on-train": test_on_train_figure(record, look)}
    for name, figure in drawn.items():
        save(figure, RESULTS / "figures" / f"{name}.svg")


if __name__ == "__main__":
    main()
