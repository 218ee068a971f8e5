"""The numbers of a summary as text, the same in the terminal, on the page and in the README. No torch."""

import math
from typing import Any

from cola.compare.ablation import short
from cola.recipe.bounds import SPLITS
from cola.report.numbers import (
    NONE,
    cost_cells,
    count_text,
    gap_text,
    interval,
    matched_text,
    mean_text,
    number_text,
    over_choices,
    p_value_text,
    range_text,
    role_text,
    size,
    small_text,
    spread,
    states_text,
    values_text,
)
from cola.report.table import SIZES, Table
from cola.report.verdict import of_contrasts
from cola.tree.spectra import Spectrum


def ablation_table(summary: dict[str, Any]) -> Table:
    """Score, gap and cost of every point."""
    perplexity = summary["metric"] == "perplexity"
    keys = [short(key) for key in summary["keys"]]
    score = [] if perplexity else [f"test {summary['metric']}", "gap_acc"]
    columns = ["arm", *keys, "test loss", "gap_loss", *score, "ft_gap", "closed", "trained", "steps", "time"]
    table = Table(f"{summary['name']}: {' × '.join(keys)}, {matched_text(summary['matched'])}", columns, [])
    for row in summary["rows"]:
        values = list(row["values"].values()) if row["values"] else [NONE] * len(keys)
        if not row["n_seeds"]:
            state = ", ".join(sorted(set(row["states"].values()))) or "missing"
            table.rows.append([row["arm"], *values, state, *[NONE] * (len(columns) - len(values) - 2)])
            continue
        cells = [spread(row["test_loss"]), spread(row["gap_loss"], signed=True)]
        if not perplexity:
            cells += [spread(row["test_score"]), spread(row["gap_acc"], signed=True)]
        cells += [interval(row.get("ft_gap")), interval(row.get("closed"))]
        table.rows.append([row["arm"], *values, *cells, *cost_cells(row)])
    return table


def ablation_notes(summary: dict[str, Any]) -> list[str]:
    """What belongs beside the table."""
    lines = []
    if summary["matched"]["by"] != "steps":
        lines.append(f"Within each point all arms have the same {summary['matched']['by']} in all.")
    elif summary["protocol"] == "fixed":
        lines.append("Protocol fixed: every point has the same optimizer steps in all.")
    else:
        lines.append("Protocol grow: every link has the same optimizer steps, so longer chains are trained longer.")
    total = summary["trained_steps"] + summary["recalled_steps"]
    if total:
        lines.append(
            f"Optimizer steps: {total} over all points, of which {summary['trained_steps']} were made and "
            f"{summary['recalled_steps']} were shared between points or found in the store."
        )
    lines += [f"{folder} was not run: {error}" for folder, error in summary["errors"].items()]
    for row in summary["rows"]:
        lines += [f"{row['label']}: {row['arm']} seed {seed} failed: {error}" for seed, error in row["errors"].items()]
    lines += summary["damaged"]
    n_seeds = max((row["n_seeds"] for row in summary["rows"]), default=0)
    if n_seeds == 1:
        lines.append("One seed: nothing here says how another seed would fall out.")
    return lines


SIZES |= {"s": 1, "min": 60, "h": 3600, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def result_tables(summary: dict[str, Any]) -> list[Table]:
    """Loss and score on the three splits, each beside its gap, what each arm cost, and what its search tried."""
    return list(named_tables(summary).values())


def named_tables(summary: dict[str, Any]) -> dict[str, Table]:
    """The same by name: loss, score, cost, trials; without those that have nothing to say."""
    arms, matched = summary["arms"], matched_text(summary["matched"])
    at = "at the last step" if summary["checkpoint"] == "last" else "at the step that was best on validation"
    loss = Table(f"Loss {at}, nats per target token; {matched}", ["arm", "train", "validation", "test", "gap_loss"], [])
    score = Table(
        f"{summary['metric'].capitalize()} {at}; {matched}",
        ["arm", "train", "validation", "test", "gap_acc", "ft_gap", "closed"],
        [],
    )
    columns = ["arm", "links", "trained", "steps", "tokens", "FLOPs", "learning rate", "scored at step", "time"]
    bases = {name: arm["base"]["quantization"] or arm["base"]["dtype"] for name, arm in arms.items() if "base" in arm}
    if several := len(set(bases.values())) > 1:
        columns.insert(1, "base")
    cost = Table(f"Cost; {matched}", columns, [])
    tables = [loss, cost] if summary["metric"] == "perplexity" else [loss, score, cost]
    if forgets := any(arm.get("forgetting") for arm in arms.values()):
        loss.columns.append("forgetting")
    if measured := any(arm.get("peak_memory") for arm in arms.values()):
        cost.columns.append("memory")
    if summary["metric"] == "perplexity":
        loss.columns.extend(["test perplexity", "ft_gap", "closed"])
    for name, arm in arms.items():
        if not arm["n_seeds"]:
            state = ", ".join(sorted(set(arm["states"].values())))
            for table in tables:
                table.rows.append([name, state, *[NONE] * (len(table.columns) - 2)])
            continue
        row = [spread(arm[f"{split}_loss"]) for split in SPLITS]
        loss.rows.append([name, *row, gap_text(arm, "gap_loss")])
        if forgets:
            loss.rows[-1].append(spread(arm["forgetting"], signed=True))
        if summary["metric"] == "perplexity":
            perplexity = f"{math.exp(arm['test_loss']['mean']):.2f}"
            loss.rows[-1] += [perplexity, interval(arm.get("ft_gap")), interval(arm.get("closed"))]
        row = [spread(arm[f"{split}_score"]) for split in SPLITS]
        row += [gap_text(arm, "gap_acc"), interval(arm.get("ft_gap")), interval(arm.get("closed"))]
        score.rows.append([name, *row])
        trained, steps, time = cost_cells(arm)
        rate, scored = range_text(arm["learning_rate"]), range_text(arm["scored_step"])
        tokens, flops = count_text(arm["tokens"]), count_text(arm["flops"])
        base = [bases[name]] if several else []
        memory = [size(arm["peak_memory"])] if measured else []
        cost.rows.append([name, *base, str(arm["links"]), trained, steps, tokens, flops, rate, scored, time, *memory])
    names = ["loss", "cost"] if summary["metric"] == "perplexity" else ["loss", "score", "cost"]
    found = dict(zip(names, tables, strict=True))
    return found | ({"trials": _trials_table(summary)} if summary["trials"] else {})


def arms_table(summary: dict[str, Any]) -> Table:
    """The key table of a page: each arm's state and what it is judged by, the score or the loss of a text."""
    tables = named_tables(summary)
    table = tables.get("score", tables["loss"])
    rows = []
    for row in table.rows:
        arm = summary["arms"][row[0]]
        rows.append([row[0], states_text(arm), *(row[1:] if arm["n_seeds"] else [NONE] * (len(row) - 1))])
    return Table(table.title, ["arm", "state", *table.columns[1:]], rows)


def seeds_table(summary: dict[str, Any]) -> Table:
    """The numbers of each seed, which the figures show as dots."""
    scored = summary["metric"] != "perplexity"
    keys = [f"{split}_{kind}" for kind in ("loss", *(["score"] if scored else [])) for split in SPLITS]
    keys += ["gap_loss", *(["gap_acc"] if scored else [])]
    if any(seed.get("forgetting") is not None for arm in summary["arms"].values() for seed in arm.get("seeds", ())):
        keys.append("forgetting")
    table = Table(
        "Each seed", ["arm", "seed", *[key.replace("_", " ") if "gap" not in key else key for key in keys]], []
    )
    for name, arm in summary["arms"].items():
        for seed in arm.get("seeds", ()):
            numbers = [seed.get(key) for key in keys]
            forms = ["+.4f" if key.startswith(("gap", "forgetting")) else ".4f" for key in keys]
            cells = [
                NONE if number is None else f"{number:{form}}" for number, form in zip(numbers, forms, strict=True)
            ]
            table.rows.append([name, str(seed["seed"]), *cells])
    return table


def scored_table(scored: list[tuple[str, dict[str, Any], dict[str, Any] | None]], metric: str) -> Table:
    """What `cola eval` found: label, evaluation, and what a run reported of the same rows."""
    known = any(reported for _, _, reported in scored)
    table = Table("Scores", ["model", "split", "rows", "loss", metric, *(["in the run", ""] if known else [])], [])

    def cells(numbers: dict[str, Any]) -> list[str]:
        score = math.exp(numbers["loss"]) if metric == "perplexity" else numbers["score"]
        return [f"{numbers['loss']:.4f}", f"{score:.4f}"]

    for label, evaluation, reported in scored:
        for split in (split for split in SPLITS if split in evaluation):
            row = [label, split, str(evaluation[split]["n"]), *cells(evaluation[split])]
            if known:
                row += cells(reported[split]) if reported else [NONE, NONE]
            table.rows.append(row)
    return table


def knots_table(summary: dict[str, Any], short: bool = False) -> Table:
    """The knot ledger: what each link added, and what tying it lost. `short`: what a terminal has room for."""
    title = "Knots: sizes are means over seeds, losses the worst of any seed and matrix"
    rows: list[dict[str, str]] = []
    for name, arm in summary["arms"].items():
        for knot in arm.get("knots") or ():
            merge = "beside" if knot["merge"] == "no" else knot["merge"]
            row = {"arm": name, "link": str(knot["link"])}
            if not short:
                row["merge"] = merge if knot["fraction"] == 1 else f"{merge}, {knot['fraction']:.0%}"
                row["cleared"] = f"{knot['cleared']:.1%}"
            row["‖ΔW‖/‖W‖"] = f"{knot['relative_size_median']:.2%}"
            if not short:
                row["max"] = f"{knot['relative_size_max']:.2%}"
            row["unchanged"] = f"{knot['unchanged_median']:.1%}"
            row["error"] = small_text(knot["error_max"])
            row["cosine"] = NONE if knot["cosine_min"] is None else f"{knot['cosine_min']:.3f}"
            row["logits"] = small_text(knot["drift_max_logit_change"])
            if not short:
                row["of learned"] = small_text(knot["drift_of_learned"])
            row |= {"KL": small_text(knot["drift_kl"]), "loss": small_text(knot["drift_loss_change"], signed=True)}
            rows.append(row)
    return Table(title, list(rows[0]) if rows else [], [list(row.values()) for row in rows])


def spectra_table(summary: dict[str, Any]) -> Table:
    """What each link, the whole chain and full fine-tuning added to the base's matrices."""
    rows: list[dict[str, str]] = []
    spectra = summary.get("spectra") or {}
    counted = any(row["intruders"] is not None for arm in spectra.values() for row in arm["rows"])
    for name, arm in spectra.items():
        alone = len(arm["rows"]) == 2  # a chain of one link is that link
        for number in arm["rows"][:1] if alone else arm["rows"]:
            row = {
                "arm": name,
                "update": number["what"],
                "rank": number_text(number["rank"]),
                "‖ΔW‖/‖W‖": NONE if number["relative_size"] is None else f"{number['relative_size']:.2%}",
                "effective rank": number_text(number["effective_rank"], 1),
                "rank at 90 %": number_text(number["rank_90"]),
                "stable rank": number_text(number["stable_rank"], 1),
            }
            rows.append(row | ({"intruders": number_text(number["intruders"], 2)} if counted else {}))
    title = "Spectra: medians over matrices, means over seeds"
    return Table(title, list(rows[0]) if rows else [], [list(row.values()) for row in rows])


def overlap_table(summary: dict[str, Any]) -> Table:
    """Which share of their directions the links have in common, and with full fine-tuning, beside random ones'."""
    spectra = summary.get("spectra") or {}
    links = max(
        (arm["overlap"]["labels"] for arm in spectra.values() if arm["overlap"]),
        key=lambda labels: len(labels),
        default=[],
    )
    full = any(arm["with_full"] for arm in spectra.values())
    columns = ["arm", "update", *links, *(["random"] if links else []), *(["full", "random of full"] if full else [])]
    table = Table("Overlap of directions: 1 the same, 0 orthogonal", columns, [])
    for name, arm in spectra.items():
        own, with_full = arm["overlap"], arm["with_full"]
        if own is None and with_full is None:
            continue
        shared = dict(zip(with_full["labels"], with_full["values"], strict=True)) if with_full else {}
        whats = [row["what"] for row in arm["rows"]]
        for what in whats[:1] if len(whats) == 2 else whats:
            mine = own["matrix"][own["labels"].index(what)] if own and what in own["labels"] else []
            cells = [number_text(value, 3) for value in mine] + [NONE] * (len(links) - len(mine))
            if links:
                cells.append(number_text(own["random"] if own and mine else None, 3))
            if full:
                cells += [number_text(shared.get(what), 3), number_text(with_full["random"] if with_full else None, 3)]
            table.rows.append([name, what, *cells])
    return table


def matrices_table(spectrum: Spectrum) -> Table:
    """The spectra of one arm and seed, matrix by matrix, from its spectrum.json."""
    columns = ["matrix", "update", "rank", "‖ΔW‖/‖W‖", "effective rank", "rank at 90 %", "stable rank"]
    table = Table("Matrix by matrix", columns, [])
    for name, matrix in spectrum.matrices.items():
        updates = matrix.updates
        for what in list(updates)[:1] if len(updates) == 2 else updates:
            one = updates[what]
            size = NONE if one.relative_size is None else f"{one.relative_size:.2%}"
            ranks = [number_text(one.effective_rank, 1), number_text(one.rank_90), number_text(one.stable_rank, 1)]
            table.rows.append([name, what, number_text(one.rank), size, *ranks])
    return table


def _trials_table(summary: dict[str, Any]) -> Table:
    """Every value that a search tried, with what validation said of it, and how often resampled trials choose it; where
    each seed chooses for itself, means over seeds."""
    score = [] if summary["metric"] == "perplexity" else [f"validation {summary['metric']}"]
    rules = sorted({search["select_by"] for search in summary["trials"].values()})
    title = f"Trials of the search, on validation, by {' or '.join(rules)}; {matched_text(summary['matched'])}"
    table = Table(title, ["arm", "values", "validation loss", *score, "chosen", "resampled"], [])
    for arm, search in summary["trials"].items():
        choices = search["choices"]
        for number in range(len(choices[0]["trials"])):
            tried = [choice["trials"][number] for choice in choices]
            cells = [over_choices([one[key] for one in tried]) for key in ("loss", "score")][: 1 + len(score)]
            cells = ["failed" if all(one["failed"] for one in tried) else cell for cell in cells]
            by = [choice["seed"] for choice in choices if choice["chosen"] == number]
            said = "" if not by else "chosen" if by == [None] else f"by seed {', '.join(map(str, by))}"
            share = mean_text(one["share"] for one in tried)
            resampled = NONE if share is None else f"{share:.0%}"
            table.rows.append([arm, values_text(tried[0]["values"]), *cells, said, resampled])
    return table


def contrasts_table(summary: dict[str, Any]) -> Table:
    """Every contrast with its interval and tests; those named before the run first."""
    table = Table(
        f"Contrasts on test: {of_contrasts(summary)}, more is better",
        [
            "first − second",
            "role",
            "difference [95 %]",
            "p",
            "p (Holm)",
            "p, these rows",
            "smallest, these rows",
            "detectable",
            "seeds",
            "rows",
        ],
        [],
    )
    for one in summary["contrasts"]:
        table.rows.append(
            [
                f"{one['first']} − {one['second']}",
                role_text(one),
                interval(one),
                p_value_text(one["p"]),
                p_value_text(one["p_holm"]),
                p_value_text(one["p_rows"]) + ("" if one["p_rows_error"] is None else f" ± {one['p_rows_error']:.1g}"),
                p_value_text(one["p_rows_smallest"]),
                NONE if one["minimum_detectable"] is None else f"{one['minimum_detectable']:.3f}",
                str(one["n_seeds"]),
                str(one["n_examples"]) + ("" if one["n_groups"] == one["n_examples"] else f" in {one['n_groups']}"),
            ]
        )
    return table


def arms_by_task(summary: dict[str, Any]) -> Table:
    """Each arm's test score on each task."""
    labels = [task["label"] for task in summary["tasks"]]
    what = "−loss, nats per target token" if summary["by_loss"] else f"test {summary['metric']}"
    table = Table(f"Arms: {what}", ["arm", *labels], [])
    for name, arm in summary["arms"].items():
        table.rows.append([name, *(spread(arm["tasks"].get(label)) for label in labels)])
    return table


def contrasts_by_task(summary: dict[str, Any]) -> Table:
    """Each contrast on each task, paired by seed and example."""
    labels = [task["label"] for task in summary["tasks"]]
    table = Table("Contrasts, task by task [95 %]", ["first − second", "role", *labels], [])
    for one in summary["contrasts"]:
        cells = [interval(one["tasks"][label]) if label in one["tasks"] else NONE for label in labels]
        table.rows.append([f"{one['first']} − {one['second']}", role_text(one), *cells])
    return table


def task_tables(summary: dict[str, Any]) -> list[Table]:
    """All tables of the report of several runs, the averages over tasks first."""
    tables = [arms_by_task(summary)]
    if summary["contrasts"]:
        if summary["averaged"]:
            over = contrasts_table(summary)
            title = f"{over.title}; mean over tasks of each task's mean of paired differences"
            columns, rows = [*over.columns[:-2], "runs", "rows"], over.rows
            if any(one["iqm"] for one in summary["contrasts"]):
                columns.append("interquartile mean [95 %]")
                rows = [[*row, interval(one["iqm"])] for row, one in zip(rows, summary["contrasts"], strict=True)]
            tables.insert(0, Table(title, columns, rows))
        tables.append(contrasts_by_task(summary))
    return tables
