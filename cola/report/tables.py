"""The numbers of a summary as tables, the same in the terminal, on the page and in the README. No torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from cola.compare import ablation_records, records
from cola.compare.ablation import short
from cola.recipe.schema import SPLITS
from cola.report import numbers
from cola.report.curves import Curves, curve_of
from cola.report.table import NONE, Cell, Columns, Shown, Table
from cola.tree.records import ArmState
from cola.tree.spectra import Spectrum

T = TypeVar("T")
TO_FULL: Columns = {
    "ft_gap": lambda arm: numbers.interval(arm.ft_gap),
    "closed": lambda arm: numbers.interval(arm.closed),
}
COST: Columns = {
    "trained": lambda arm: numbers.count(arm.num_trainable_params),
    "steps": lambda arm: numbers.number(arm.steps, ".0f"),
}
RANKS: Columns = {
    "rank": lambda update: numbers.rounded(update.rank),
    "‖ΔW‖/‖W‖": lambda update: numbers.number(update.relative_size, ".2%"),
    "effective rank": lambda update: numbers.number(update.effective_rank, ".1f"),
    "rank at 90 %": lambda update: numbers.rounded(update.rank_90),
    "stable rank": lambda update: numbers.number(update.stable_rank, ".1f"),
}


def named_tables(summary: records.Summary) -> dict[str, Table]:
    """Loss and score on the three splits, each beside its gap, what each arm cost, and what its search tried: by name
    (loss, score, cost, trials), without those that have nothing to say."""
    arms, matched = summary.arms, numbers.matched_text(summary.matched)
    sample = numbers.sample_text(summary.train_sample)
    at = "at the last step" if summary.checkpoint == "last" else "at the step that was best on validation"
    loss = _by_split("loss") | {"gap_loss": lambda arm: numbers.gap(arm.gap_loss_interval, arm.gap_loss)}
    if any(arm.forgetting for arm in arms.values()):
        loss["forgetting"] = lambda arm: numbers.spread(arm.forgetting, signed=True)
    if perplexity := summary.metric == "perplexity":
        loss["test perplexity"] = lambda arm: numbers.number(math.exp(arm.test_loss.mean), ".2f")
        loss |= TO_FULL
    tables = {"loss": _of_arms(f"Loss {at}, nats per target token; {matched}{sample}", loss, arms)}
    if not perplexity:
        score = _by_split("score") | {"gap_acc": lambda arm: numbers.gap(arm.gap_acc_interval, arm.gap_acc)} | TO_FULL
        tables["score"] = _of_arms(f"{summary.metric.capitalize()} {at}; {matched}{sample}", score, arms)
    tables["cost"] = _of_arms(f"Cost; {matched}", _cost_columns(arms), arms)
    return tables | ({"trials": _trials_table(summary)} if summary.trials else {})


def _by_split(kind: str) -> Columns:
    return {split: lambda arm, key=f"{split}_{kind}": numbers.spread(getattr(arm, key)) for split in SPLITS}


def _cost_columns(arms: dict[str, records.ArmSummary]) -> Columns:
    bases = {arm.base.quantization or arm.base.dtype for arm in arms.values() if arm.base}
    columns: Columns = {"base": lambda arm: arm.base.quantization or arm.base.dtype} if len(bases) > 1 else {}
    columns |= {
        "links": lambda arm: numbers.number(arm.links, "d"),
        "trained": COST["trained"],
        "steps": COST["steps"],
        "tokens": lambda arm: numbers.count(arm.tokens),
        "FLOPs": lambda arm: numbers.count(arm.flops),
        **_work(arms.values()),
        "learning rate": lambda arm: numbers.value_range(arm.learning_rate),
        "scored at step": lambda arm: numbers.value_range(arm.scored_step),
        **_times(arms.values()),
    }
    if any(arm.peak_memory for arm in arms.values()):
        columns["memory"] = lambda arm: numbers.size(arm.peak_memory)
    return columns


def _work(arms: Iterable[records.ArmSummary]) -> Columns:
    """What optimizers and starts work and remember, where those of some arm are not AdamW and a plain draw."""
    told = [arm for arm in arms if arm.optimizer_bytes is not None]
    if all(arm.optimizer_flops == arm.start_flops == 0 for arm in told):
        return {}

    def flops(value: float | None) -> Shown:
        return "not counted" if value is None else numbers.count(value)

    return {
        "by optimizer": lambda arm: flops(arm.optimizer_flops),
        "by starts": lambda arm: flops(arm.start_flops),
        "optimizer state": lambda arm: numbers.size(arm.optimizer_bytes),
    }


def _times(arms: Iterable[records.ArmSummary | ablation_records.AblationRow]) -> Columns:
    """Wall clock, and beside it the CPU time where it was noted of any arm."""
    columns: Columns = {"wall clock": lambda arm: numbers.duration(arm.total_seconds)}
    if any(arm.total_cpu_seconds is not None for arm in arms):
        columns["CPU time"] = lambda arm: (
            "not recorded" if arm.total_cpu_seconds is None else numbers.duration(arm.total_cpu_seconds)
        )
    return columns


def _of_arms(title: str, columns: Columns, arms: dict[str, records.ArmSummary]) -> Table:
    return Table(title, ["arm", *columns], [_row([name], columns, arm) for name, arm in arms.items()])


def _row(head: list[Shown], columns: Columns, arm: ArmState) -> list[Shown]:
    """An arm's row; one without numbers says why."""
    if arm.n_seeds:
        return [*head, *(shown(arm) for shown in columns.values())]
    return [*head, ", ".join(sorted(set(arm.states.values()))) or "missing", *[NONE] * (len(columns) - 1)]


def page_tables(summary: records.Summary, curves: Curves) -> dict[str, Table]:
    """Every table of a run's page that has rows, by the name of its files."""
    tables = named_tables(summary)
    judged = tables.pop("score" if "score" in tables else "loss")  # is in the first table, with the arms' states
    states = [numbers.states_text(arm) for arm in summary.arms.values()]
    if set(states) != {"ok"}:
        rows = [
            [name, state, *(row[1:] if arm.n_seeds else [NONE] * (len(row) - 1))]
            for (name, arm), state, row in zip(summary.arms.items(), states, judged.rows, strict=True)
        ]
        judged = Table(judged.title, ["arm", "state", *judged.columns[1:]], rows)
    tables = {
        "arms": judged,
        **tables,
        "contrasts": contrasts_table(summary),
        "seeds": seeds_table(summary),
        "curves": curves_table(curves),
        "knots": knots_table(summary),
        "spectra": spectra_table(summary.spectra),
        "overlap": overlap_table(summary.spectra),
    }
    return {name: table.without_empty() for name, table in tables.items() if table.rows}


def curves_table(curves: Curves) -> Table:
    """The validation losses of the learning curves, means over seeds."""
    columns = ["arm", "step", "validation loss", "seeds"]
    table = Table("Validation loss at each evaluation point, nats per target token", columns, [])
    for name, seeds in curves.items():
        curve = curve_of(seeds)
        for step, loss in curve.validation:
            n = sum(step in dict(points) for points in curve.seeds)
            table.rows.append([name, numbers.number(step, "d"), numbers.number(loss, ".4f"), numbers.number(n, "d")])
    return table


def seeds_table(summary: records.Summary) -> Table:
    """The numbers of each seed, which the figures show as dots."""
    kinds = {"loss": "gap_loss"} | ({} if summary.metric == "perplexity" else {"score": "gap_acc"})
    forms = {f"{split}_{kind}": ".4f" for kind in kinds for split in SPLITS} | dict.fromkeys(kinds.values(), "+.4f")
    seeds = [(name, seed) for name, arm in summary.arms.items() for seed in arm.seeds]
    if any(seed.forgetting is not None for _, seed in seeds):
        forms["forgetting"] = "+.4f"
    columns: Columns = {"seed": lambda seed: numbers.number(seed.seed, "d")}
    for key, form in forms.items():
        name = key if key.startswith("gap") else key.replace("_", " ")
        columns[name] = lambda seed, key=key, form=form: numbers.number(getattr(seed, key), form)
    return Table.of(f"Each seed{numbers.sample_text(summary.train_sample)}", ["arm"], columns, seeds)


def _trials_table(summary: records.Summary) -> Table:
    """Every value that a search tried, with what validation said of it, and how often resampled trials choose it; where
    each seed chooses for itself, means over seeds."""

    keys = ["loss"] if summary.metric == "perplexity" else ["loss", "score"]
    rules = sorted({search.select_by for search in summary.trials.values()})
    title = f"Trials of the search, on validation, by {' or '.join(rules)}; {numbers.matched_text(summary.matched)}"
    names = ["validation loss", f"validation {summary.metric}"][: len(keys)]
    table = Table(title, ["arm", "values", *names, "chosen", "resampled"], [])
    for arm, search in summary.trials.items():
        for n, tried in enumerate(zip(*(choice.trials for choice in search.choices), strict=True)):
            failed = all(trial.failed for trial in tried)
            means = [numbers.mean_known(getattr(trial, key) for trial in tried) for key in (*keys, "share")]
            scores = ["failed" if failed else numbers.number(mean, ".3f") for mean in means[:-1]]
            seeds = [choice.seed for choice in search.choices if choice.chosen == n]
            chosen = "" if not seeds else "chosen" if seeds == [None] else f"by seed {', '.join(map(str, seeds))}"
            values, share = numbers.values_text(tried[0].values), numbers.number(means[-1], ".0%")
            table.rows.append([arm, values, *scores, chosen, share])
    return table


def scored_table(scored: list[tuple[str, dict[str, Any], dict[str, Any] | None]], metric: str) -> Table:
    """What `cola eval` found: label, evaluation, and what a run reported of the same rows."""
    known = any(reported for _, _, reported in scored)
    table = Table("Scores", ["model", "split", "rows", "loss", metric, *(["in the run", ""] if known else [])], [])

    def cells(scores: dict[str, Any]) -> list[Shown]:
        score = math.exp(scores["loss"]) if metric == "perplexity" else scores["score"]
        return [numbers.number(scores["loss"], ".4f"), numbers.number(score, ".4f")]

    for label, evaluation, reported in scored:
        for split in (split for split in SPLITS if split in evaluation):
            row: list[Shown] = [label, split, numbers.number(evaluation[split]["n"], "d"), *cells(evaluation[split])]
            row += (cells(reported[split]) if reported and split in reported else [NONE, NONE]) if known else []
            table.rows.append(row)
    return table


def knots_table(summary: records.Summary, short: bool = False) -> Table:
    """The knot ledger: what each link added, and what tying it lost. `short`: what a terminal has room for."""

    def merge(knot: records.KnotLedger) -> str:
        merge = "beside" if knot.merge == "no" else knot.merge
        return merge if knot.fraction == 1 else f"{merge}, {knot.fraction:.0%}"

    columns: Columns = {
        "link": lambda knot: numbers.number(knot.link, "d"),
        "merge": merge,
        "cleared": lambda knot: numbers.number(knot.cleared, ".1%"),
        "‖ΔW‖/‖W‖": lambda knot: numbers.number(knot.relative_size_median, ".2%"),
        "max": lambda knot: numbers.number(knot.relative_size_max, ".2%"),
        "unchanged": lambda knot: numbers.number(knot.unchanged_median, ".1%"),
        "error": lambda knot: numbers.small(knot.error_max),
        "cosine": lambda knot: numbers.number(knot.cosine_min, ".3f"),
        "logits": lambda knot: numbers.small(knot.drift_max_logit_change),
        "of learned": lambda knot: numbers.small(knot.drift_of_learned),
        "KL": lambda knot: numbers.small(knot.drift_kl),
        "loss": lambda knot: numbers.small(knot.drift_loss_change, signed=True),
    }
    for column in ("merge", "cleared", "max", "of learned") if short else ():
        del columns[column]
    knots = [(name, knot) for name, arm in summary.arms.items() for knot in arm.knots]
    title = "Knots: sizes are means over seeds, losses the worst of any seed and matrix"
    return Table.of(title, ["arm"], columns, knots)


def _distinct(updates: Sequence[T]) -> Sequence[T]:
    """Of a link and its chain the link alone: a chain of one link is that link."""
    return updates[:1] if len(updates) == 2 else updates


def spectra_table(spectra: Mapping[str, records.ArmSpectra]) -> Table:
    """What each link, the whole chain and full fine-tuning added to the base's matrices."""
    columns: Columns = {"update": lambda update: update.what, **RANKS}
    if any(update.intruders is not None for arm in spectra.values() for update in arm.rows):
        columns["intruders"] = lambda update: numbers.number(update.intruders, ".2f")
    rows = [(name, update) for name, arm in spectra.items() for update in _distinct(arm.rows)]
    return Table.of("Spectra: medians over matrices, means over seeds", ["arm"], columns, rows)


def overlap_table(spectra: Mapping[str, records.ArmSpectra]) -> Table:
    """Which share of their directions the links have in common, and with full fine-tuning, beside random ones'."""
    spectra = {name: arm for name, arm in spectra.items() if arm.overlap or arm.with_full}
    links = max((arm.overlap.labels for arm in spectra.values() if arm.overlap), key=len, default=[])
    full = any(arm.with_full for arm in spectra.values())
    columns = ["arm", "update", *links, *(["random"] if links else []), *(["full", "random of full"] if full else [])]
    table = Table("Overlap of directions: 1 the same, 0 orthogonal", columns, [])
    for name, arm in spectra.items():
        own, with_full = arm.overlap, arm.with_full
        shared = dict(zip(with_full.labels, with_full.values, strict=True)) if with_full else {}
        for update in _distinct([row.what for row in arm.rows]):
            values = {"full": shared.get(update), "random of full": with_full and with_full.random}
            if own and update in own.labels:
                values |= zip(own.labels, own.matrix[own.labels.index(update)], strict=True)
                values["random"] = own.random
            table.rows.append([name, update, *(numbers.number(values.get(column), ".3f") for column in columns[2:])])
    return table


def matrices_table(record: Spectrum) -> Table:
    """The spectra of one arm and seed, matrix by matrix, from its spectrum.json."""
    rows = [(name, *one) for name, matrix in record.matrices.items() for one in _distinct([*matrix.updates.items()])]
    return Table.of("Matrix by matrix", ["matrix", "update"], RANKS, rows)


def _p_rows(contrast: records.Contrast | records.TaskContrast) -> Cell:
    p, error = numbers.p_value(contrast.p_rows), contrast.p_rows_error
    return p if error is None else Cell(f"{p} ± {error:.1g}", p.value)


def _rows_of(contrast: records.Contrast | records.TaskContrast) -> Shown:
    examples, groups = contrast.n_examples, contrast.n_groups
    return numbers.number(examples, "d") if groups == examples else f"{examples} in {groups}"


CONTRAST: Columns = {
    "first − second": lambda contrast: f"{contrast.first} − {contrast.second}",
    "role": lambda contrast: "not named before" if contrast.role == "later" else contrast.role,
    "difference [95 %]": numbers.interval,
    "p": lambda contrast: numbers.p_value(contrast.p),
    "p (Holm)": lambda contrast: numbers.p_value(contrast.p_holm),
    "p, these rows": _p_rows,
    "smallest, these rows": lambda contrast: numbers.p_value(contrast.p_rows_smallest),
    "detectable": lambda contrast: numbers.number(contrast.minimum_detectable, ".3f"),
    "seeds": lambda contrast: numbers.number(contrast.n_seeds, "d"),
    "rows": _rows_of,
}


def contrasts_table(summary: records.Summary | records.TasksSummary) -> Table:
    """Every contrast with its interval and tests; those named before the run first."""
    by_loss = any(one.metric == "loss" for one in summary.contrasts)
    title = f"Contrasts on test: {'−loss, nats per target token' if by_loss else summary.metric}, more is better"
    return Table.of(title, [], CONTRAST, [(contrast,) for contrast in summary.contrasts])


def task_tables(summary: records.TasksSummary) -> dict[str, Table]:
    """The tables of the report of several runs, by name: contrasts averaged over tasks, where they are; each arm's test
    score on each task; each contrast on each task, paired by seed and example."""
    labels, contrasts = [task.label for task in summary.tasks], summary.contrasts
    tables = {}
    if contrasts and summary.averaged:
        over = contrasts_table(summary)
        heads, rows = [*over.columns[:-2], "runs", "rows"], over.rows
        if any(contrast.iqm for contrast in contrasts):
            heads.append("interquartile mean [95 %]")
            rows = [[*row, numbers.interval(contrast.iqm)] for row, contrast in zip(rows, contrasts, strict=True)]
        title = f"{over.title}; mean over tasks of each task's mean of paired differences"
        tables["contrasts"] = Table(title, heads, rows)
    arms = [[name, *(numbers.spread(arm.tasks.get(label)) for label in labels)] for name, arm in summary.arms.items()]
    metric = "−loss, nats per target token" if summary.by_loss else f"test {summary.metric}"
    tables["arms"] = Table(f"Arms: {metric}", ["arm", *labels], arms)
    if contrasts:
        columns = {key: CONTRAST[key] for key in ("first − second", "role")}
        columns |= {label: lambda one, label=label: numbers.interval(one.tasks.get(label)) for label in labels}
        rows = [(contrast,) for contrast in contrasts]
        tables["tasks"] = Table.of("Contrasts, task by task [95 %]", [], columns, rows)
    return tables


def ablation_table(summary: ablation_records.Ablation) -> Table:
    """Score, gap and cost of every point."""
    keys = [short(key) for key in summary.keys]
    columns: Columns = {
        "test loss": lambda row: numbers.spread(row.test_loss),
        "gap_loss": lambda row: numbers.spread(row.gap_loss, signed=True),
    }
    if summary.metric != "perplexity":
        columns[f"test {summary.metric}"] = lambda row: numbers.spread(row.test_score)
        columns["gap_acc"] = lambda row: numbers.spread(row.gap_acc, signed=True)
    columns |= {"difference": lambda row: numbers.interval(row.difference), **TO_FULL, **COST, **_times(summary.rows)}
    title = f"{summary.name}: {' × '.join(keys)}, {numbers.matched_text(summary.matched)}"
    title += numbers.sample_text(summary.train_sample)
    table = Table(title, ["arm", *keys, *columns], [])
    for row in summary.rows:
        values: list[Shown] = [numbers.given(v) for v in row.values.values()] if row.values else [NONE] * len(keys)
        table.rows.append(_row([row.arm, *values], columns, row))
    return table.without_empty()


def ablation_notes(summary: ablation_records.Ablation) -> list[str]:
    """What belongs beside the table."""
    if len(summary.points) == 1:
        lines = ["One point: nothing here says what another value would change."]
    elif summary.matched.by != "steps":
        lines = [f"Within each point all arms have the same {summary.matched.by} in all."]
    elif summary.protocol == "fixed":
        lines = ["Protocol fixed: every point has the same optimizer steps in all."]
    else:
        lines = ["Protocol grow: every link has the same optimizer steps, so longer chains are trained longer."]
    if total := summary.trained_steps + summary.recalled_steps:
        over, shared = ("over all points", "shared between points or ") if len(summary.points) > 1 else ("in all", "")
        lines.append(
            f"Optimizer steps: {total} {over}, of which {summary.trained_steps} were made and "
            f"{summary.recalled_steps} were {shared}found in the store."
        )
    lines += [f"{folder} was not run: {error}" for folder, error in summary.errors.items()]
    for row in summary.rows:
        lines += [f"{row.label}: {row.arm} seed {seed} failed: {error}" for seed, error in row.errors.items()]
    lines += summary.damaged
    if max((row.n_seeds for row in summary.rows), default=0) == 1:
        lines.append("One seed: nothing here says how another seed would fall out.")
    return lines
