"""The numbers of a summary as text, the same in the terminal, on the page and in the README. No torch."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cola.choice import SURE
from cola.compare import FEWEST_RUNS
from cola.recipe import SPLITS, KnotRules, OneLink, Prune, Recipe, Search
from cola.scope import scope_sentence
from cola.terminal import duration

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table for a README."""
        lines = [self.columns, [":--", *["--:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def csv(self) -> str:
        """The table for another program: the same texts, the title left out."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.columns, *self.rows])
        return buffer.getvalue()

    def latex(self, label: str) -> str:
        """The table for a paper that loads booktabs; the title is its caption."""
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows)]
        return "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\label{{tab:{label}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "[": "{[}", "]": "{]}", "−": "$-$", "–": "--", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "→": r"$\to$",
    "‖": r"$\|$", "Δ": r"$\Delta$", "σ": r"$\sigma$", "≤": r"$\le$", "≥": r"$\ge$", "…": r"\dots{}", "\n": " ",
}  # fmt: skip


def _latex(text: str) -> str:
    """A text that LaTeX sets as it stands; a minus before a number is a minus and no hyphen."""
    text = re.sub(r"(?<![\w.)])-(?=\.?\d)", "−", text)
    return "".join(LATEX.get(sign, sign) for sign in text)


SIZES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21, "%": 0.01}
SIZES |= {"s": 1, "min": 60, "h": 3600, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
NUMBER = re.compile(r"([+−-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?: ?([A-Za-z%]+))?(?=$|[\s,;–])", re.IGNORECASE)


def sort_key(cell: str) -> float | None:
    """The number that a cell begins with, in units of one, by which its column is sorted; None where it is a text."""
    found = NUMBER.match(cell)
    if found is None or (found[2] and found[2] not in SIZES):
        return None
    number = float(found[1].replace("−", "-")) * SIZES.get(found[2], 1)
    # A time in two units; the second never stands alone.
    rest = re.match(r" (\d+) (min|s)$", cell[found.end() :]) if found[2] in ("h", "min") else None
    return number + (int(rest[1]) * SIZES[rest[2]] if rest else 0)


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
        loss.rows.append([name, *row, _gap(arm, "gap_loss")])
        if forgets:
            loss.rows[-1].append(spread(arm["forgetting"], signed=True))
        if summary["metric"] == "perplexity":
            perplexity = f"{math.exp(arm['test_loss']['mean']):.2f}"
            loss.rows[-1] += [perplexity, interval(arm.get("ft_gap")), interval(arm.get("closed"))]
        row = [spread(arm[f"{split}_score"]) for split in SPLITS]
        row += [_gap(arm, "gap_acc"), interval(arm.get("ft_gap")), interval(arm.get("closed"))]
        score.rows.append([name, *row])
        trained, steps, time = cost_cells(arm)
        rate, scored = _range(arm["learning_rate"]), _range(arm["scored_step"])
        tokens, flops = _count(arm["tokens"]), _count(arm["flops"])
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


def states_text(arm: dict[str, Any]) -> str:
    """How an arm's seeds ended: ok, or how many did not."""
    states = list(arm["states"].values())
    counts = {state: states.count(state) for state in sorted(set(states), key=lambda s: (s != "ok", s))}
    if len(counts) == 1:
        return states[0]
    return ", ".join(f"{n} {state}" for state, n in counts.items())


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


def matched_text(matched: dict[str, Any]) -> str:
    """What all trained arms were given the same of."""
    what = {"steps": "optimizer steps", "tokens": "positions", "flops": "training FLOPs"}[matched["by"]]
    if matched["per_link"]:
        return f"matched: {what} of each link"
    if not matched.get("used"):
        return f"matched: {what}"
    low, high = (f"{n:.0f}" if matched["by"] == "steps" else _count(n) for n in matched["used"])
    return f"matched: {what} ({low if low == high else f'{low} to {high}'})"


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
            row["error"] = _small(knot["error_max"])
            row["cosine"] = NONE if knot["cosine_min"] is None else f"{knot['cosine_min']:.3f}"
            row["logits"] = _small(knot["drift_max_logit_change"])
            if not short:
                row["of learned"] = _small(knot["drift_of_learned"])
            row |= {"KL": _small(knot["drift_kl"]), "loss": _small(knot["drift_loss_change"], signed=True)}
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
                "rank": _number(number["rank"]),
                "‖ΔW‖/‖W‖": NONE if number["relative_size"] is None else f"{number['relative_size']:.2%}",
                "effective rank": _number(number["effective_rank"], 1),
                "rank at 90 %": _number(number["rank_90"]),
                "stable rank": _number(number["stable_rank"], 1),
            }
            rows.append(row | ({"intruders": _number(number["intruders"], 2)} if counted else {}))
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
            cells = [_number(value, 3) for value in mine] + [NONE] * (len(links) - len(mine))
            if links:
                cells.append(_number(own["random"] if own and mine else None, 3))
            if full:
                cells += [_number(shared.get(what), 3), _number(with_full["random"] if with_full else None, 3)]
            table.rows.append([name, what, *cells])
    return table


def matrices_table(record: dict[str, Any]) -> Table:
    """The spectra of one arm and seed, matrix by matrix, from its spectrum.json."""
    columns = ["matrix", "update", "rank", "‖ΔW‖/‖W‖", "effective rank", "rank at 90 %", "stable rank"]
    table = Table("Matrix by matrix", columns, [])
    for name, matrix in record["matrices"].items():
        updates = matrix["updates"]
        for what in list(updates)[:1] if len(updates) == 2 else updates:
            one = updates[what]
            size = NONE if one["relative_size"] is None else f"{one['relative_size']:.2%}"
            ranks = [_number(one["effective_rank"], 1), _number(one["rank_90"]), _number(one["stable_rank"], 1)]
            table.rows.append([name, what, _number(one["rank"]), size, *ranks])
    return table


def _number(number: float | None, digits: int = 0) -> str:
    """Rounded; a whole number that a median or mean has made fractional keeps one digit."""
    if number is None:
        return NONE
    if digits == 0 and number != int(number):
        digits = 1
    return f"{number:.{digits}f}"


def _small(number: float | None, signed: bool = False) -> str:
    if number is None:
        return NONE
    return "0" if number == 0 else f"{number:+.0e}" if signed else f"{number:.0e}"


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
            cells = [_over_choices([one[key] for one in tried]) for key in ("loss", "score")][: 1 + len(score)]
            cells = ["failed" if all(one["failed"] for one in tried) else cell for cell in cells]
            by = [choice["seed"] for choice in choices if choice["chosen"] == number]
            said = "" if not by else "chosen" if by == [None] else f"by seed {', '.join(map(str, by))}"
            share = _mean(one["share"] for one in tried)
            resampled = NONE if share is None else f"{share:.0%}"
            table.rows.append([arm, values_text(tried[0]["values"]), *cells, said, resampled])
    return table


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def choice_share(search: dict[str, Any]) -> float | None:
    """In which share of resampled trials the choice is the same; mean over the seeds that choose for themselves."""
    return _mean(choice["trials"][choice["chosen"]]["share"] for choice in search["choices"])


def _over_choices(values: list[float | None]) -> str:
    mean = _mean(values)
    return NONE if mean is None else f"{mean:.3f}"


def values_text(values: dict[str, Any]) -> str:
    """Searched keys and their values: `learning_rate=0.001, rank=8`."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in values.items())


def _uncertain(summary: dict[str, Any]) -> list[str]:
    """Of each arm whose value resampled trials would often not choose, what else they would."""
    lines = []
    for arm, search in summary["trials"].items():
        if search["per"] == "seed":
            continue  # the choice is in the intervals
        (choice,) = search["choices"]
        shares = [trial["share"] for trial in choice["trials"]]
        if shares[choice["chosen"]] is None or shares[choice["chosen"]] >= SURE:
            continue
        others = sorted((n for n in range(len(shares)) if n != choice["chosen"]), key=lambda n: -(shares[n] or 0))
        first, second = (choice["trials"][n] for n in (choice["chosen"], others[0]))
        lines.append(
            f"{arm}: {values_text(first['values'])} is chosen in {first['share']:.0%} of resampled trials and "
            f"{values_text(second['values'])} in {second['share'] or 0:.0%}: the choice is uncertain, and no interval "
            "carries that; a search per: seed would."
        )
    return lines


def value_text(value: Any) -> str:
    """A searched value."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float | int) else str(value)


# Beside every table of contrasts.
OF_P = (
    "p, as the interval: for other seeds and other test examples, with one seed for other examples alone (the level at "
    "which the interval ends at 0). "
    "p (Holm): of the secondary contrasts, corrected for their number. p, these rows: sign flips over runs, for other "
    "seeds on these test rows, and the smallest that so many runs can reach. Claims rest on the first two."
)


def contrasts_table(summary: dict[str, Any]) -> Table:
    """Every contrast with its interval and tests; those named before the run first."""
    table = Table(
        f"Contrasts on test: {_of_contrasts(summary)}, more is better",
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
                _p(one["p"]),
                _p(one["p_holm"]),
                _p(one["p_rows"]) + ("" if one["p_rows_error"] is None else f" ± {one['p_rows_error']:.1g}"),
                _p(one["p_rows_smallest"]),
                NONE if one["minimum_detectable"] is None else f"{one['minimum_detectable']:.3f}",
                str(one["n_seeds"]),
                str(one["n_examples"]) + ("" if one["n_groups"] == one["n_examples"] else f" in {one['n_groups']}"),
            ]
        )
    return table


def role_text(one: dict[str, Any]) -> str:
    """A contrast's role in words."""
    return "not named before" if one["role"] == "later" else one["role"]


def _of_contrasts(summary: dict[str, Any]) -> str:
    by_loss = any(one["metric"] == "loss" for one in summary["contrasts"])
    return "−loss, nats per target token" if by_loss else summary["metric"]


def _p(value: float | None) -> str:
    if value is None or value < 1e-4:
        return NONE if value is None else "< 0.0001"
    # In two digits, or as many as it takes not to round across the level of a claim.
    texts = (f"{value:.{digits}g}" for digits in range(2, 18))
    return next(text for text in texts if (float(text) < 0.05) == (value < 0.05))


def contrast_sentence(one: dict[str, Any], metric: str) -> str:
    """What a contrast allows to be said: never a winner inside its interval, no claim that was not named before."""
    first, second = one["first"], one["second"]
    seeds = "1 seed" if one["n_seeds"] == 1 else f"{one['n_seeds']} seeds"
    if "tasks" in one:
        seeds = f"{one['n_seeds']} pairs of runs on {len(one['tasks'])} tasks"
    line = f"{first} − {second} = {one['value']:+.3f} test {'-loss' if one['metric'] == 'loss' else metric} ({seeds})"
    if one["low"] is None:
        return f"{line}; these results give it no interval, so nothing is claimed."
    line += f", 95 % interval [{one['low']:+.3f}, {one['high']:+.3f}]"
    detectable = f"a difference below {one['minimum_detectable']:.3f} would mostly be missed by this study"
    if one["low"] <= 0 <= one["high"]:
        return f"{line}: the two cannot be told apart; {detectable}."
    better = first if one["value"] > 0 else second
    if one["role"] == "later":
        return f"{line}: {better} does better here; the contrast was not named before the run, so nothing is claimed."
    corrected = one["p_holm"] is not None
    p = one["p_holm"] if corrected else one["p"]
    said = f"{'Holm-corrected ' if corrected else ''}p = {_p(p)}".replace("= <", "<")
    if one["claim"]:
        return f"{line}, {said}: {better} is the better one."
    why = f"{said}; no claim is made of fewer than {FEWEST_RUNS}" if one["n_seeds"] < FEWEST_RUNS else said
    return f"{line}: {better} does better here, but {seeds} cannot carry a claim about the methods ({why})."


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the numbers allow to be said, in plain sentences; never a winner inside its interval."""
    named = [one for one in summary["contrasts"] if one["role"] != "later"]
    lines = [contrast_sentence(one, summary["metric"]) for one in sorted(named, key=lambda one: one["role"])]
    lines += summary["unpaired"]
    n_seeds = len(summary["seeds"])
    if n_seeds == 1:
        lines.append(
            "One seed: intervals are over test examples only and say nothing about another seed; "
            "give more seeds for a claim about a method."
        )
    else:
        lines.append(f"± is the standard deviation over {n_seeds} seeds.")
    lines.append(scope_sentence(summary["intervals"]))
    if summary["contrasts"]:
        lines.append(OF_P)
    rule = (
        "the last step"
        if summary["checkpoint"] == "last"
        else f"the step that was best on validation ({summary['select_by']})"
    )
    lines.append(f"Scored checkpoint: {rule}. Test was read for that checkpoint only.")
    rows = summary.get("rows")
    if rows:
        lines.append("Rows: " + ", ".join(f"{n} {name}" for name, n in rows.items()) + ".")
    for first, second, seed in summary["same_outputs"]:
        lines.append(
            f"{first} and {second} give the same test losses to the bit under seed {seed}, though not trained "
            "alike: what one of them does differently has done nothing, so their comparison says nothing."
        )
    steps = sorted({round(arm["steps"]) for arm in summary["arms"].values() if arm.get("steps")})
    if len(steps) > 1 and summary["matched"]["by"] == "steps":
        lines.append(
            f"The arms were trained for {steps[0]} to {steps[-1]} optimizer steps: what differs between them may be "
            "due to that alone."
        )
    lines += _uncertain(summary)
    for name, arm in summary["arms"].items():
        if (arm.get("max_lost") or 0) > 0.2:
            lines.append(
                f"{name}: rounding at a knot moved the outputs by {arm['max_lost']:.0%} of what its link had learned; "
                "model.dtype: float32 keeps knots exact."
            )
        if arm.get("without_gradient"):
            lines.append(
                f"{name}: at every step {arm['without_gradient']} of its trained tensors got no gradient or more."
            )
        for key, seeds in arm.get("at_grid_edge", {}).items():
            what = key.replace("_", " ")
            if len(seeds) < arm["n_seeds"]:
                what += f" of seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            lines.append(f"{name}: the chosen {what} is at the edge of its grid; a better one may lie outside.")
        for seed, error in arm["errors"].items():
            lines.append(f"{name} seed {seed} failed: {error}")
        if 0 < arm["n_seeds"] < n_seeds:
            lines.append(f"{name}: {arm['n_seeds']} of {n_seeds} seeds are there; its means are over those.")
    return lines


def plan_table(recipe: Recipe, steps: dict[str, list[int] | None], parameters: dict[str, int] | None) -> Table:
    """What a run will do, before it does it.

    Args:
        recipe: The resolved recipe.
        steps: Optimizer steps of each arm's links; None where the number of rows is not known yet.
        parameters: Trainable parameters of each arm's largest link; None where the model is not on this disk.
    """
    rows = []
    for name in recipe.arms:
        links = recipe.links_of(name)
        rate, searches = recipe.learning_rate_of(name), recipe.searches_of(name)
        rates = f"best of {len(rate.search)}" if isinstance(rate, Search) else f"{rate:g}"
        rates += "".join(f", {key} of {len(s.search)}" for key, s in searches.items() if key != "learning_rate")
        rates += " for each seed" if any(search.per == "seed" for search in searches.values()) else ""
        lengths, many = steps[name], len(links) > 1
        rows.append(
            [
                name,
                str(len(links)),
                ", ".join([*_base(recipe, name), _trains(links)])
                + (f"; {_knots(recipe.knot_of(name))}" if many else ""),
                ("+".join(map(str, lengths)) or "0") if lengths is not None else "by epochs",
                rates if links else NONE,
                _count(parameters[name]) if parameters else "?",
            ]
        )
    return Table("Plan", ["arm", "links", "each link trains", "steps", "learning rate", "parameters"], rows)


def _base(recipe: Recipe, arm: str) -> list[str]:
    """The base's format, where it is not what it is by default."""
    dtype, quantization = recipe.base_of(arm)
    return [what for what in (quantization, dtype) if what not in (None, "float32")]


def _trains(links: list[OneLink]) -> str:
    """What an arm's links train, in words; settings that change along the chain are written with an arrow."""
    if not links:
        return NONE

    def along(values: list[Any]) -> str:
        texts = [", ".join(v) if isinstance(v, list) else f"{v:g}" if isinstance(v, float | int) else v for v in values]
        return texts[0] if len(set(texts)) == 1 else " → ".join(texts)

    one = links[0]
    match one.method:
        case "full":
            return "all weights" + (f" but the {' and '.join(one.freeze)}" if one.freeze else "")
        case "adapter":
            return f"bottlenecks of {one.bottleneck}, {one.placement}"
        case "prefix" | "p_tuning" | "prompt_tuning":
            return f"{one.num_virtual_tokens} virtual tokens, {one.method}"
    rank, alpha, modules = (
        along([getattr(link, key) for link in links]) for key in ("rank", "alpha", "target_modules")
    )
    kinds = [kind for key, kind in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if getattr(one, key)]
    kinds += [f"LoRA+ {one.loraplus_lr_ratio:g}"] if one.loraplus_lr_ratio != 1 else []
    inits = along([link.init for link in links])
    kinds += [f"init {inits}"] if inits != "default" else []
    return ", ".join([f"a pair of rank {rank}, alpha {alpha}, on {modules}", *kinds])


def _knots(rules: KnotRules) -> str:
    """What an arm's knots do; a fresh optimizer and one schedule over the run go without saying."""
    parts = [{"exact": "merged", "naive": "merged in place", "no": "not merged"}[rules.merge or "exact"]]
    if rules.pair == "keep":
        parts = ["the same pair goes on"]
    if rules.merge_fraction not in (None, 1):
        parts.append(f"{rules.merge_fraction:.0%} kept")
    if isinstance(rules.optimizer, Prune):
        share = rules.optimizer.prune_magnitude or rules.optimizer.prune_random or 0
        how = "by magnitude" if rules.optimizer.prune_magnitude else "at random"
        parts.append(f"{share:.1%} of the moments pruned {how}")
    elif rules.optimizer not in ("fresh", "zero"):
        parts.append("optimizer kept")
    if rules.schedule == "link":
        parts.append("schedule restarted")
    return ", ".join(parts)


def cost_cells(arm: dict[str, Any]) -> list[str]:
    """Trained parameters, optimizer steps and time of an arm."""
    return [_count(arm["num_trainable_params"]), f"{arm['steps']:.0f}", duration(arm["total_seconds"])]


def spread(number: dict[str, Any] | None, signed: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    if number is None:
        return NONE
    mean = f"{number['mean']:+.3f}" if signed else f"{number['mean']:.3f}"
    return mean if number["sd"] is None else f"{mean} ± {number['sd']:.3f}"


def _gap(arm: dict[str, Any], key: str) -> str:
    """A gap with its interval; where it has none, with its spread over seeds."""
    found = arm.get(f"{key}_interval")
    return interval(found) if found and found["low"] is not None else spread(arm[key], signed=True)


def interval(number: dict[str, Any] | str | None, signed: bool = True) -> str:
    """Estimate [low, high], or why there is none; a sign before what is a difference."""
    if number is None:
        return NONE
    if isinstance(number, str):
        return number
    form = "+.3f" if signed else ".3f"
    value = f"{number['value']:{form}}"
    return value if number["low"] is None else f"{value} [{number['low']:{form}}, {number['high']:{form}}]"


def size(n_bytes: float | None) -> str:
    """Bytes in three digits: 412 MB, 2.31 GB."""
    return NONE if n_bytes is None else _three_digits(n_bytes, ("TB", "GB", "MB", "kB")) or f"{n_bytes:.0f} B"


def _count(number: float) -> str:
    return (
        _three_digits(number, ("Z", "E", "P", "T", "B", "M", "k")) or f"{number:.0f}" if math.isfinite(number) else NONE
    )


def _three_digits(number: float, units: Sequence[str]) -> str | None:
    """In the largest unit that the number, once it is rounded, has one of; None below all."""
    unit = next((unit for unit in units if float(f"{number:.3g}") >= SIZES[unit]), None)
    return None if unit is None else f"{number / SIZES[unit]:#.3g} {unit}".replace(". ", " ")


def _range(values: list[Any]) -> str:
    """One number where all seeds agree, else the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    low, high = f"{min(known):.6g}", f"{max(known):.6g}"
    return low if low == high else f"{low}–{high}"
