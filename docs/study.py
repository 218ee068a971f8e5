"""The blocks of experiments/001-does-chaining-pay/README.md, from committed results. docs/generate.py writes them."""

import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml
from scipy.stats import ttest_1samp

from cola.compare import statistics
from cola.compare.ablation_records import Ablation
from cola.compare.contrasts import paired
from cola.compare.records import ArmSpectra, Contrast, Interval, Summary, TaskContrast, TasksSummary
from cola.compare.spectra import summarized
from cola.compare.statistics import iqm
from cola.compare.tasks import summarize_tasks
from cola.recipe.read import read_recipe
from cola.report import numbers
from cola.report.numbers import count, size
from cola.report.table import Table
from cola.report.tables import (
    ablation_notes,
    ablation_table,
    contrasts_table,
    named_tables,
    overlap_table,
    spectra_table,
    task_tables,
)
from cola.report.verdict import contrast_sentence
from cola.tree.run_folder import RunFolder
from cola.tree.spectra import spectrum_of

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"
RESULTS = STUDY / "results"
QV_ARMS = ("lora", "chain3", "lora24", "reset3", "keep3", "gradient3")
CHAINS = ("chain3", "keep3", "gradient3")  # their links are fresh pairs
Estimated = Interval | Contrast | TaskContrast | statistics.Estimate
YES, NO, OPEN = "came true", "did not come true", "not decided"
WORK = tempfile.TemporaryDirectory()  # where archives are unpacked, until the process ends


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def over_tasks() -> TasksSummary:
    return TasksSummary.model_validate(read("over-tasks/summary.json"))


def by_task() -> dict[str, Summary]:
    """The summary of each task's run, in the order of the report over tasks."""
    tasks = [task.label.removeprefix("001-") for task in over_tasks().tasks]
    return {task: Summary.model_validate(read(f"{task}/summary.json")) for task in tasks}


def contrasts() -> dict[tuple[str, str], TaskContrast]:
    return {(one.first, one.second): one for one in over_tasks().contrasts}


def interval(estimate: Estimated | dict[str, Any] | str | None) -> str:
    """An estimate and its interval in words, as the tables have it."""
    return str(numbers.interval(Interval.model_validate(estimate) if isinstance(estimate, dict) else estimate))


def titled(table: Table) -> str:
    return f"**{table.title}**\n\n{table.markdown()}\n"


def in_order(summary: TasksSummary, later: bool) -> TasksSummary:
    """The summary over tasks with the contrasts that its recipes name, or with those that were thought of later."""
    contrasts = [one for one in summary.contrasts if (one.role == "later") == later]
    return summary.model_copy(update={"contrasts": contrasts})


def primary_of(summary: Summary | TasksSummary) -> Contrast | TaskContrast:
    return next(one for one in summary.contrasts if one.role == "primary")


def verdict() -> str:
    """The primary contrast as a sentence, then every contrast over the tasks that was named beforehand."""
    summary = in_order(over_tasks(), later=False)
    primary = primary_of(summary)
    scores = [
        [seed.test_score for task in by_task().values() for seed in task.arms[arm].seeds]
        for arm in (primary.first, primary.second)
    ]
    before = (
        "The estimate that was named before the runs was the interquartile mean of the paired differences: "
        f"{iqm(np.subtract(*scores)):+.3f}. It was given up after the results were seen."
    )
    return f"**{contrast_sentence(primary, summary.metric)}** {before}\n\n{titled(task_tables(summary)['contrasts'])}"


def scores() -> str:
    """Each arm and each contrast, task by task."""
    tables = task_tables(in_order(over_tasks(), later=False))
    return "\n".join(titled(tables[name]) for name in ("arms", "tasks"))


def later() -> str:
    """The contrasts that no recipe names, and how many parameters their arms train."""
    summary = in_order(over_tasks(), later=True)
    if not summary.contrasts:
        return "The committed summary holds no contrast that was thought of later.\n"
    names = dict.fromkeys(arm for one in summary.contrasts for arm in (one.first, one.second))
    arms = next(iter(by_task().values())).arms
    trained = ", ".join(f"{arm} {count(arms[arm].num_trainable_params)}" for arm in names)
    tables = "\n".join(titled(table) for name, table in task_tables(summary).items() if name != "arms")
    return f"{tables}\nParameters in training: {trained}.\n"


@cache
def unpacked(name: str) -> Path:
    """The folder of a run that the study keeps."""
    to = Path(WORK.name) / name
    with tarfile.open(RESULTS / name / "run.tar.xz") as archive:
        archive.extractall(to, filter="data")
    return to


@cache
def of_primary(name: str) -> Path:
    """The folder of a kept run with a recipe of the primary contrast and its arms alone: no more is then computed."""
    folder = unpacked(name)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["comparison"]["secondary"] = []
    recipe["arms"] = {arm: recipe["arms"][arm] for arm in recipe["comparison"]["primary"]}
    to = Path(WORK.name) / f"{name}-primary"
    shutil.copytree(folder, to, copy_function=os.link)
    (to / "recipe.yaml").unlink()
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return to


def over(tasks: Sequence[str]) -> Contrast | TaskContrast:
    """The primary contrast over some of the study's tasks, as the report over all of them has it."""
    return primary_of(summarize_tasks([of_primary(task) for task in tasks]))


def without() -> str:
    """The primary contrast with each task left out in turn."""
    summary, tasks = over_tasks(), list(by_task())
    found = {"none": primary_of(summary)}
    found |= {task: over([one for one in tasks if one != task]) for task in tasks}
    of_all = [task_tables(summary.model_copy(update={"contrasts": [one]}))["contrasts"] for one in found.values()]
    rows = [[left_out, *table.rows[0][2:]] for left_out, table in zip(found, of_all, strict=True)]
    title = f"{found['none'].first} − {found['none'].second} over the tasks without one of them"
    return titled(Table(title, ["left out", *of_all[0].columns[2:]], rows))


def judged(found: Estimated | str | None, low: float, high: float) -> str:
    """The outcome of a prediction that a number lies in a range: by its interval, never by the estimate.

    A word in place of a number (of a share of a gap that cannot be told from none) decides nothing.
    """
    if found is None or isinstance(found, str) or found.low is None or found.high is None:
        return OPEN
    if low <= found.low and found.high <= high:
        return YES
    return NO if found.high < low or found.low > high else OPEN


def all_of(outcomes: Sequence[str]) -> str:
    """The outcome of a prediction that several things hold at once."""
    return NO if NO in outcomes else YES if set(outcomes) == {YES} else OPEN


def on_each(outcomes: Sequence[str]) -> str:
    """The outcome of what was predicted of every task: one word where the tasks agree, else how many have which."""
    counts = {outcome: list(outcomes).count(outcome) for outcome in (YES, NO, OPEN)}
    said = [f"{outcome} on {n}" for outcome, n in counts.items() if n]
    return outcomes[0] if len(said) == 1 else ", ".join(said)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's 95 % interval."""
    found = ttest_1samp(values, 0).confidence_interval(0.95)
    return Interval(value=mean(values), low=float(found.low), high=float(found.high))


def gap_difference(task: str, first: str, second: str) -> statistics.Estimate:
    """`gap_loss` of one arm minus another's, paired by seed and test example, with its interval over both."""
    folder = RunFolder.open(unpacked(task))
    recipe = read_recipe(folder.recipe_file)
    rows = [[{row.id: row for row in folder.scores(arm, s, "test")} for s in recipe.seeds] for arm in (first, second)]
    table = paired(rows, by_loss=True)  # minus the loss
    assert table is not None  # the report of the run has compared them
    arms = by_task()[task].arms
    train_AS = np.array([[seed.train_loss for seed in arms[arm].seeds] for arm in (first, second)])
    gaps = statistics.Table(-table.scores_ASN - train_AS[:, :, None], table.groups, table.weights)
    return statistics.estimate((1, -1), [gaps])


def predictions() -> Iterator[tuple[str, str, str]]:
    """What was predicted (in brief), what was found, and the outcome."""
    for number, first, second, low, high, text in (
        (1, "chain3", "lora", -0.03, 0.03, "within ±.03"),
        (2, "chain3", "lora24", -0.03, 0.03, "within ±.03"),
        (2, "chain3", "reset3", -0.03, 0.03, "within ±.03"),
        (3, "gradient3", "chain3", 0.0, 0.05, "from 0 to +.05"),
        (4, "all_linear", "chain3", 0.05, 1.0, "above +.05"),
    ):
        one = contrasts()[first, second]
        found = interval(one)
        if low < 0:  # with it, it was predicted what the study would see
            apart = one.low > 0 or one.high < 0
            yield f"{number}. {first} − {second}: cannot be told apart here", found, NO if apart else YES
        yield f"{number}. {first} − {second}: {text}", found, judged(one, low, high)
    against = [contrasts()[arm, "full"] for arm in QV_ARMS]
    outcomes = [judged(one, -1.0, 0.0) for one in against]
    yield "5. Every q,v arm is below full", f"{outcomes.count(YES)} of {len(outcomes)} intervals are", all_of(outcomes)
    tasks = by_task()
    for arm, text, low, high in (
        ("chain3", "The chain closes less than a quarter of the gap", -np.inf, 0.25),
        ("all_linear", "All-linear closes most of it", 0.5, np.inf),
    ):
        shares = [one.arms[arm].closed for one in tasks.values()]
        found = "; ".join(map(interval, shares))
        yield f"5. {text}", f"closed: {found}", on_each([judged(share, low, high) for share in shares])
    steps = [("full", "all_linear"), *(("all_linear", arm) for arm in QV_ARMS)]
    gaps = {task: [gap_difference(task, *pair) for pair in steps] for task in tasks}
    found = [
        f"{sum(one.low > 0 for one in gaps[task])} above 0, {sum(one.high < 0 for one in gaps[task])} below"
        for task in tasks
    ]
    yield (
        "6. gap_loss: full > all_linear > every q,v arm",
        f"of {len(steps)} differences: {'; '.join(found)}",
        on_each([all_of([judged(one, 0.0, np.inf) for one in gaps[task]]) for task in tasks]),
    )
    found = [gap_difference(task, "chain3", "lora") for task in tasks]
    yield (
        "6. gap_loss: chain3 no smaller than lora",
        f"chain3 − lora: {'; '.join(map(interval, found))}",
        on_each([judged(one, 0.0, np.inf) for one in found]),
    )
    spectra = {task: spectra_by_seed(task, "chain3") for task in tasks}
    above = [over_seeds([mean(overlaps_of(one)) - one.overlap.random for one in seeds]) for seeds in spectra.values()]
    yield (
        "7. Links overlap more than random subspaces do",
        f"overlap − random: {'; '.join(map(interval, above))}",
        on_each([judged(one, 0.0, 1.0) for one in above]),
    )
    ranks = [over_seeds([one.rows[-1].effective_rank for one in seeds]) for seeds in spectra.values()]
    found = [f"{one.value:.1f} [{one.low:.1f}, {one.high:.1f}]" for one in ranks]
    outcome = on_each([judged(one, 0.0, 24.0) for one in ranks])
    yield "7. Three links add fewer than 24 directions", f"effective rank: {'; '.join(found)}", outcome


def spectra_by_seed(task: str, arm: str) -> list[ArmSpectra]:
    """What a run's summary says of an arm's spectra, of one seed at a time."""
    files = sorted((unpacked(task) / "arms" / arm).glob("seed-*/spectrum.json"))
    return [summarized({arm: [spectrum_of(json.loads(file.read_text()))]})[arm] for file in files]


def listed(numbers: list[float], form: str) -> str:
    return ", ".join(f"{number:{form}}" for number in numbers)


def overlaps_of(spectra: ArmSpectra) -> list[float]:
    """The overlap of each two of a chain's links."""
    matrix = spectra.overlap.matrix
    return [matrix[i][j] for i in range(len(matrix)) for j in range(i)]


def predicted() -> str:
    table = Table("", ["predicted", "found", ""], [list(row) for row in predictions()])
    return f"{table.markdown()}\n"


def beside() -> str:
    """What an arm costs and does beside its score: means over the tasks."""
    tasks = by_task()
    arms = next(iter(tasks.values())).arms
    table = Table(
        f"Means over {len(tasks)} tasks and all seeds; FLOPs, time and memory by those of lora",
        [
            "arm",
            "train loss",
            "test loss",
            "gap_loss",
            "gap_acc",
            "forgetting",
            "effective rank",
            "overlap with full",
            "trained",
            "FLOPs",
            "time",
            "memory",
        ],
        [],
    )

    def averaged(arm: str, key: str) -> float:
        return mean(getattr(one.arms[arm], key).mean for one in tasks.values())

    for arm in arms:
        losses = [averaged(arm, key) for key in ("train_loss", "test_loss")]
        gaps = [averaged(arm, key) for key in ("gap_loss", "gap_acc", "forgetting")]
        row = [arm, *(f"{number:.3f}" for number in losses), *(f"{number:+.3f}" for number in gaps)]
        if arm == "base":
            table.rows.append([*row, *["–"] * 6])
            continue
        rank = mean(one.spectra[arm].rows[-1].effective_rank for one in tasks.values())
        shared = [one.spectra[arm].with_full for one in tasks.values()]
        with_full = f"{mean(one.values[-1] for one in shared):.2f}" if all(shared) else "–"
        ratios = [
            mean(getattr(one.arms[arm], key) / getattr(one.arms["lora"], key) for one in tasks.values())
            for key in ("flops", "train_seconds", "peak_memory")
        ]
        trained = count(arms[arm].num_trainable_params)
        table.rows.append([*row, f"{rank:.1f}", with_full, trained, *(f"{ratio:.2f}" for ratio in ratios)])
    of_lora = [
        size(max(one.arms["lora"].peak_memory for one in tasks.values())),
        listed([one.arms["lora"].train_seconds for one in tasks.values()], ".0f") + " s",
    ]
    return f"{titled(table)}\nlora takes {of_lora[1]} of training ({', '.join(tasks)}) and {of_lora[0]} of memory.\n"


def learned() -> str:
    """What each of a chain's links adds, and what tying it loses."""
    table = Table(
        "Links of the chains: size, effective rank and overlap of the first, second and third",
        ["task", "arm", "‖ΔW‖/‖W‖", "effective rank", "of the chain", "overlap", "random", "largest drift"],
        [],
    )
    for task, summary in by_task().items():
        for arm in CHAINS:
            spectra = summary.spectra[arm]
            rows = spectra.rows[:-1]
            table.rows.append(
                [
                    task,
                    arm,
                    listed([100 * row.relative_size for row in rows], ".1f") + " %",
                    listed([row.effective_rank for row in rows], ".1f"),
                    f"{spectra.rows[-1].effective_rank:.1f}",
                    listed(overlaps_of(spectra), ".2f"),
                    f"{spectra.overlap.random:.2f}",
                    f"{summary.arms[arm].max_drift:.0e}",
                ]
            )
    return titled(table)


def details() -> str:
    """All tables of each task's run, folded."""
    parts = []
    for task, summary in by_task().items():
        tables = [
            *named_tables(summary).values(),
            contrasts_table(summary),
            spectra_table(summary.spectra),
            overlap_table(summary.spectra),
        ]
        texts = "\n".join(titled(table) for table in tables)
        parts.append(f"<details><summary>{task}: every table of its run</summary>\n\n{texts}\n</details>\n")
    return "\n".join(parts)


def length() -> str:
    """Score, gap and cost against the number of links, and how far its runs are those of trec's own."""
    summary = Ablation.model_validate(read("length/ablation.json"))
    arms = by_task()["trec"].arms
    same = []
    for links, twin in (("1", "lora"), ("3", "chain3")):
        again = next(row.seeds for row in summary.rows if row.values == {"arms.chain3.links": links})
        pairs = zip(again, arms[twin].seeds, strict=True)
        same += [second.test_loss == first.test_loss for second, first in pairs]
    notes = [
        *ablation_notes(summary),
        f"One link is trec's lora and three links are its chain3, trained again on another machine: {sum(same)} of "
        f"these {len(same)} runs have the same test loss to the last bit.",
    ]
    parts = [
        titled(ablation_table(summary)),
        "\n".join(f"- {line}" for line in notes),
        titled(length_by_links(summary)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def length_by_links(summary: Ablation) -> Table:
    """What each number of links gains on one link, and what it has learned."""
    table = Table(
        "The same runs: what is gained on one link, and what the chain is made of",
        [
            "links",
            "difference to lora [95 %]",
            "learning rate",
            "effective rank",
            "‖ΔW‖/‖W‖ of the links",
            "forgetting",
        ],
        [],
    )
    points = {name.split("/")[-2]: Summary.model_validate(one) for name, one in packed("length", "/summary.json")}
    for point in summary.points:
        one = points[point.folder]
        chain, rows = one.arms["chain3"], one.spectra["chain3"].rows
        table.rows.append(
            [
                str(chain.links),
                "–" if chain.links == 1 else interval(primary_of(one)),
                ", ".join(f"{rate:g}" for rate in dict.fromkeys(chain.learning_rate)),
                f"{rows[-1].effective_rank:.1f}",
                listed([100 * row.relative_size for row in rows[: chain.links]], ".1f") + " %",
                f"{chain.forgetting.mean:+.2f}",
            ]
        )
    return table


def schedule() -> str:
    """The exploratory arm: its contrasts, on one task, and how far its gradients went."""
    norms = read("minibatches.json")["norms"]
    seeds = [str(one["seed"]) for one in norms["lora"]]
    table = Table("Largest gradient norm before clipping (its step), test exact match; by seed", ["arm", *seeds], [])
    for arm, of_seeds in norms.items():
        table.rows.append([arm, *(f"{one['norm']:.0f} ({one['step']}), {one['test_score']:.3f}" for one in of_seeds)])
    return f"{titled(contrasts_table(Summary.model_validate(read('schedule/summary.json'))))}\n{titled(table)}"


def minibatches() -> str:
    """Training loss against LoRA's on the same minibatches, right after a knot and at the end."""
    found = read("minibatches.json")
    seeds = Table(
        "Chain − LoRA at LoRA's learning rate, nats per token: mean of six seeds [95 %], and how many are lower",
        ["task", "links", "learning rate", "steps", "", "difference", "lower"],
        [],
    )
    for one in found["paired"]:
        for what, window in one["windows"].items():
            steps, lower = f"{window['first']} to {window['last']}", sum(value < 0 for value in window["seeds"])
            rate, of = f"{one['learning_rate']:g}", len(window["seeds"])
            cells = [str(one["links"]), rate, steps, what, interval(window), f"{lower} of {of}"]
            seeds.rows.append([one["task"], *cells])
    cells = found["trials"]["cells"]
    searched = Table(
        f"Arm − LoRA in the trials, {len(cells)} rates of {len(by_task())} tasks: median, middle half, and how many "
        "are lower",
        ["arm", "steps", "", "median", "middle half", "lower"],
        [],
    )
    for arm, about in found["trials"]["arms"].items():
        for what, window in about["windows"].items():
            low, high = window["quartiles"]
            numbers = [f"{window['median']:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{window['lower']} of {len(cells)}"]
            searched.rows.append([arm, f"{window['first']} to {window['last']}", what, *numbers])
    largest = max(one["largest_before"] for one in found["paired"])
    return (
        f"{titled(seeds)}\n{titled(searched)}\nUp to the first step after the first knot, no loss of the six seeds' "
        f"pairs differs by more than {largest:.0e}.\n"
    )


def residuals() -> str:
    """How far each arm is from the line of test loss on train loss, and the chain against LoRA."""
    found = read("minibatches.json")["residuals"]
    tasks = list(found)
    lines = Table("Test loss on train loss, over the runs of six arms and six seeds", ["", *tasks], [])
    lines.rows.append(["r", *(f"{one['r']:.2f}" for one in found.values())])
    lines.rows.append(["slope", *(f"{one['slope']:.2f}" for one in found.values())])
    for key, text in (
        ("train_minus_lora", "train loss, chain3 − lora"),
        ("test_minus_lora", "test loss, chain3 − lora"),
        ("minus_lora", "distance from the line, chain3 − lora"),
    ):
        lines.rows.append([text, *(interval(one["arms"]["chain3"][key]) for one in found.values())])
    arms = Table("Mean distance of each arm from that line, nats per token [95 %]", ["arm", *tasks], [])
    for arm in QV_ARMS:
        arms.rows.append([arm, *(interval(one["arms"][arm]["residual"]) for one in found.values())])
    return f"{titled(lines)}\n{titled(arms)}"


def choice() -> str:
    """How much the choice of a learning rate hung on the seed."""
    found = read("minibatches.json")["choice"]
    agree, of, short = (found[key] for key in ("agree", "of", "short_on_the_other"))
    return (
        f"Seeds 0 and 1 agree on the best learning rate in {agree} of {of} searches. The rate that one of them would "
        f"choose scores {short:.3f} less on validation under the other seed than that seed's best, in the mean over "
        "all searches.\n"
    )


def packed(name: str, ending: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a run or ablation that the study keeps, by file."""
    with tarfile.open(RESULTS / name / "run.tar.xz") as archive:
        for member in archive:
            if member.name.endswith(ending) and (file := archive.extractfile(member)):
                yield member.name, json.load(file)


def hours() -> str:
    """How long what is kept was trained and scored; a state in which two results end was trained once."""
    trained, scored, parts, total = set(), set(), [], 0.0
    for name, task in [*((task, task) for task in by_task()), ("length", "trec"), ("schedule", "trec")]:
        seconds = 0.0
        for _, result in packed(name, "/result.json"):
            info = result["train_info"]
            state, job = info["final_state"], (task, info["final_state"], result["run_info"]["trial"])
            if state not in trained:
                seconds += info["train_seconds"]
            if job not in scored:
                seconds += info["total_seconds"] - info["train_seconds"]
            trained.add(state)
            scored.add(job)
        parts.append(f"{name} {seconds / 3600:.1f}")
        total += seconds / 3600
    parts.append(f"in all {total:.0f}")
    return (
        "Hours of one process, of which two ran at a time, a state that two runs end in counted once: "
        f"{', '.join(parts)}.\n"
    )


def sentence() -> str:
    """The primary contrast."""
    summary = in_order(over_tasks(), later=False)
    return f"**{contrast_sentence(primary_of(summary), summary.metric)}**\n"


def headline() -> str:
    """For the project's README: the primary contrast, and each arm's score by task."""
    return f"{sentence()}\n{task_tables(in_order(over_tasks(), later=False))['arms'].markdown()}\n"


def scout() -> str:
    """What the scout found on each candidate."""
    record: dict[str, Any] = json.loads((STUDY / "scout/results/candidates.json").read_text())
    found = record["candidates"]
    table = Table(
        "",
        ["candidate", "base", "LoRA r 8 (learning rate)", "full (learning rate)", "full − LoRA", "mean", "detectable"],
        [],
    )
    for name, one in sorted(found.items(), key=lambda item: -sum(item[1]["gain"])):
        cells = [f"{one['arms']['base']['seeds'][0]['test_score']:.3f}"]
        for arm in ("lora", "full"):
            of_seeds = ", ".join(f"{seed['test_score']:.3f}" for seed in one["arms"][arm]["seeds"])
            cells.append(f"{of_seeds} ({one['arms'][arm]['learning_rate'][0]:g})")
        gains = ", ".join(f"{gain:+.3f}" for gain in one["gain"])
        mean_gain = sum(one["gain"]) / len(one["gain"])
        table.rows.append([name, *cells, gains, f"{mean_gain:+.3f}", f"{one['detectable']:.3f}"])
    return (
        "Exact match on test, one number per seed ([candidates.json](scout/results/candidates.json)); *detectable* is "
        "the smallest true difference that six seeds and 500 rows of one task would mostly tell from 0, by the scout's "
        f"variances.\n\n{table.markdown()}\n\nSo the tasks are {', '.join(record['chosen'])}. The mean over the three "
        f"could detect a gain of {record['detectable']:.3f}.\n"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "verdict": verdict,
    "without": without,
    "scores": scores,
    "later": later,
    "minibatches": minibatches,
    "residuals": residuals,
    "choice": choice,
    "predicted": predicted,
    "beside": beside,
    "learned": learned,
    "length": length,
    "schedule": schedule,
    "hours": hours,
    "details": details,
    "scout": scout,
}


def page(fill: Callable[[str, str, str], str]) -> str:
    """The study's README with its blocks; `fill(text, name, block)` puts one in."""
    text = (STUDY / "README.md").read_text()
    for name in re.findall(r"<!-- study-(\w+): generated", text):
        text = fill(text, f"study-{name}", BLOCKS[name]())
    return text
