"""The blocks of experiments/001-does-chaining-pay/README.md, from committed results. docs/generate.py writes them."""

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from cola.ablation import ablation_notes, ablation_table
from cola.tables import (
    Table,
    contrast_sentence,
    contrasts_table,
    cost_cells,
    interval,
    named_tables,
    overlap_table,
    size,
    spectra_table,
)
from cola.tasks import task_tables

STUDY = Path(__file__).parent.parent / "experiments/001-does-chaining-pay"
RESULTS = STUDY / "results"
QV_ARMS = ("lora", "chain3", "lora24", "reset3", "keep3", "gradient3")
CHAINS = ("chain3", "keep3", "gradient3")  # their links are fresh pairs
YES, NO = "came true", "did not come true"


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def over_tasks() -> dict[str, Any]:
    return read("over-tasks/summary.json")


def by_task() -> dict[str, dict[str, Any]]:
    """The summary of each task's run, in the order of the report over tasks."""
    labels = [task["label"] for task in over_tasks()["tasks"]]
    return {label.removeprefix("001-"): read(f"{label.removeprefix('001-')}/summary.json") for label in labels}


def contrasts() -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["first"], one["second"]): one for one in over_tasks()["contrasts"]}


def titled(table: Table) -> str:
    return f"**{table.title}**\n\n{table.markdown()}\n"


def verdict() -> str:
    """The primary contrast as a sentence, then every contrast over the tasks."""
    summary = over_tasks()
    primary = next(one for one in summary["contrasts"] if one["role"] == "primary")
    return f"**{contrast_sentence(primary, summary['metric'])}**\n\n{titled(task_tables(summary)[0])}"


def scores() -> str:
    """Each arm and each contrast, task by task."""
    return "\n".join(titled(table) for table in task_tables(over_tasks())[1:])


def within(first: str, second: str, low: float, high: float, told_apart: bool) -> str:
    """Whether a predicted range came true: by the estimate, and by whether the interval leaves 0 out as predicted."""
    one = contrasts()[first, second]
    if told_apart != (one["low"] > 0 or one["high"] < 0) or one["low"] > high or one["high"] < low:
        return NO
    return YES if low <= one["value"] <= high else "the estimate lies outside, its interval reaches in"


def on_each(holds: list[bool]) -> str:
    """The outcome of what was predicted of every task."""
    return YES if all(holds) else NO if not any(holds) else f"on {sum(holds)} of {len(holds)} tasks"


def predictions() -> Iterator[tuple[str, str, str]]:
    """What was predicted (in brief), what was found, and whether the one is the other."""
    for number, first, second, text, low, high, told_apart in (
        (1, "chain3", "lora", "cannot be told apart, within ±.03", -0.03, 0.03, False),
        (2, "chain3", "lora24", "cannot be told apart, within ±.03", -0.03, 0.03, False),
        (2, "chain3", "reset3", "cannot be told apart, within ±.03", -0.03, 0.03, False),
        (3, "gradient3", "chain3", "up to +.05", 0.0, 0.05, True),
        (4, "all_linear", "chain3", "above +.05", 0.05, 1.0, True),
    ):
        found = interval(contrasts()[first, second])
        yield f"{number}. {first} − {second}: {text}", found, within(first, second, low, high, told_apart)
    below = [contrasts()[arm, "full"]["high"] < 0 for arm in QV_ARMS]
    yield "5. Every q,v arm is below full", f"{sum(below)} of {len(below)} are", YES if all(below) else NO
    tasks = by_task()
    for arm, text, holds in (
        ("chain3", "The chain closes less than a quarter of the gap", lambda share: share < 0.25),
        ("all_linear", "All-linear closes most of it", lambda share: share > 0.5),
    ):
        closed = [one["arms"][arm]["closed"] for one in tasks.values()]
        # Where the intervals cannot tell LoRA from full there is a word in place of the share, and nothing came true.
        told = [not isinstance(share, str) and holds(share["value"]) for share in closed]
        shares = [share if isinstance(share, str) else f"{share['value']:+.2f}" for share in closed]
        yield f"5. {text}", f"closed: {', '.join(shares)}", on_each(told)
    gaps = [{arm: number["gap_loss"]["mean"] for arm, number in one["arms"].items()} for one in tasks.values()]
    qv = [max(gap[arm] for arm in QV_ARMS) for gap in gaps]
    yield (
        "6. gap_loss: full > all_linear > every q,v arm",
        "; ".join(
            f"{gap['full']:+.3f}, {gap['all_linear']:+.3f}, {most:+.3f}" for gap, most in zip(gaps, qv, strict=True)
        ),
        on_each([gap["full"] > gap["all_linear"] > most for gap, most in zip(gaps, qv, strict=True)]),
    )
    yield (
        "6. gap_loss: chain3 no smaller than lora",
        "; ".join(f"{gap['chain3']:+.3f}, {gap['lora']:+.3f}" for gap in gaps),
        on_each([gap["chain3"] >= gap["lora"] for gap in gaps]),
    )
    overlaps = [mean(links_overlaps(one, "chain3")) for one in tasks.values()]
    chances = [one["spectra"]["chain3"]["overlap"]["random"] for one in tasks.values()]
    yield (
        "7. Links overlap more than random subspaces do",
        f"{listed(overlaps, '.3f')}; random {listed(chances, '.3f')}",
        on_each([overlap > chance for overlap, chance in zip(overlaps, chances, strict=True)]),
    )
    ranks = [learned_by(one, "chain3")["effective_rank"] for one in tasks.values()]
    yield "7. Three links add fewer than 24 directions", f"{listed(ranks, '.1f')}", on_each([r < 24 for r in ranks])


def listed(numbers: list[float], form: str) -> str:
    return ", ".join(f"{number:{form}}" for number in numbers)


def learned_by(summary: dict[str, Any], arm: str) -> dict[str, Any]:
    """The spectrum of all that an arm has learned."""
    return summary["spectra"][arm]["rows"][-1]


def links_overlaps(summary: dict[str, Any], arm: str) -> list[float]:
    """The overlap of each two of a chain's links."""
    matrix = summary["spectra"][arm]["overlap"]["matrix"]
    return [matrix[i][j] for i in range(len(matrix)) for j in range(i)]


def predicted() -> str:
    table = Table("", ["predicted", "found", ""], [list(row) for row in predictions()])
    return f"{table.markdown()}\n"


def beside() -> str:
    """What an arm costs and does beside its score: means over the tasks."""
    tasks = by_task()
    arms = next(iter(tasks.values()))["arms"]
    table = Table(
        f"Means over {len(tasks)} tasks and all seeds; time and memory by those of lora",
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
            "time",
            "memory",
        ],
        [],
    )

    def over(arm: str, number: Callable[[dict[str, Any]], float]) -> float:
        return mean(number(one["arms"][arm]) for one in tasks.values())

    for arm in arms:
        losses = [over(arm, lambda one, key=key: one[key]["mean"]) for key in ("train_loss", "test_loss")]
        gaps = [over(arm, lambda one, key=key: one[key]["mean"]) for key in ("gap_loss", "gap_acc", "forgetting")]
        row = [arm, *(f"{number:.3f}" for number in losses), *(f"{number:+.3f}" for number in gaps)]
        if arm == "base":
            table.rows.append([*row, *["–"] * 5])
            continue
        rank = mean(learned_by(one, arm)["effective_rank"] for one in tasks.values())
        shared = [one["spectra"][arm]["with_full"] for one in tasks.values()]
        with_full = f"{mean(one['values'][-1] for one in shared):.2f}" if all(shared) else "–"
        ratios = [
            mean(one["arms"][arm][key] / one["arms"]["lora"][key] for one in tasks.values())
            for key in ("train_seconds", "peak_memory")
        ]
        trained = cost_cells(arms[arm])[0]
        table.rows.append([*row, f"{rank:.1f}", with_full, trained, *(f"{ratio:.2f}" for ratio in ratios)])
    of_lora = [
        size(max(one["arms"]["lora"]["peak_memory"] for one in tasks.values())),
        listed([one["arms"]["lora"]["train_seconds"] for one in tasks.values()], ".0f") + " s",
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
            spectra = summary["spectra"][arm]
            rows = spectra["rows"][:-1]
            table.rows.append(
                [
                    task,
                    arm,
                    listed([100 * row["relative_size"] for row in rows], ".1f") + " %",
                    listed([row["effective_rank"] for row in rows], ".1f"),
                    f"{spectra['rows'][-1]['effective_rank']:.1f}",
                    listed(links_overlaps(summary, arm), ".2f"),
                    f"{spectra['overlap']['random']:.2f}",
                    f"{summary['arms'][arm]['max_drift']:.0e}",
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
            spectra_table(summary),
            overlap_table(summary),
        ]
        texts = "\n".join(titled(table) for table in tables)
        parts.append(f"<details><summary>{task}: every table of its run</summary>\n\n{texts}\n</details>\n")
    return "\n".join(parts)


def length() -> str:
    """Score, gap and cost against the number of links, and how far its runs are those of trec's own."""
    summary = read("length/ablation.json")
    arms = read("trec/summary.json")["arms"]
    same = []
    for links, twin in (("1", "lora"), ("3", "chain3")):
        again = next(row["seeds"] for row in summary["rows"] if row["values"] == {"arms.chain3.links": links})
        pairs = zip(again, arms[twin]["seeds"], strict=True)
        same += [second["test_loss"] == first["test_loss"] for second, first in pairs]
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


def length_by_links(summary: dict[str, Any]) -> Table:
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
    points = {name.split("/")[-2]: one for name, one in packed("length", "/summary.json")}
    for point in summary["points"]:
        one = points[point["folder"]]
        links = one["arms"]["chain3"]["links"]
        primary = next(contrast for contrast in one["contrasts"] if contrast["role"] == "primary")
        rows = one["spectra"]["chain3"]["rows"]
        table.rows.append(
            [
                str(links),
                "–" if links == 1 else interval(primary),
                ", ".join(f"{rate:g}" for rate in dict.fromkeys(one["arms"]["chain3"]["learning_rate"])),
                f"{rows[-1]['effective_rank']:.1f}",
                listed([100 * row["relative_size"] for row in rows[:links]], ".1f") + " %",
                f"{one['arms']['chain3']['forgetting']['mean']:+.2f}",
            ]
        )
    return table


def schedule() -> str:
    """The exploratory arm: its contrasts, on one task."""
    summary = read("schedule/summary.json")
    return titled(contrasts_table(summary))


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


def headline() -> str:
    """For the project's README: the primary contrast, and each arm's score by task."""
    summary = over_tasks()
    primary = next(one for one in summary["contrasts"] if one["role"] == "primary")
    arms = task_tables(summary)[1]
    return f"**{contrast_sentence(primary, summary['metric'])}**\n\n{arms.markdown()}\n"


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
    "predicted": predicted,
    "scores": scores,
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
