"""What a comparison found, in a sentence."""

from cola.compare.ablation_records import Ablation
from cola.compare.choice import SURE
from cola.compare.records import Contrast, Interval, Summary, TaskContrast, TasksSummary
from cola.compare.scope import scope_sentence
from cola.compare.statistics import FEWEST_RUNS
from cola.report.glossary import WORDS
from cola.report.numbers import p_value, values_text

# Beside every table of contrasts.
OF_P = "p, {}. p (Holm): {}. p, these rows: {}, and {}. Claims rest on the first two.".format(
    *(WORDS[word] for word in ("p", "p (Holm)", "p, these rows", "smallest, these rows"))
)
ONE_SEED = (
    "One seed: intervals are over test examples only and say nothing about another seed; "
    "give more seeds for a claim about a method."
)

# What a page begins with where the recipe names nothing to be judged, or one of the two is missing.
UNNAMED = "No contrast that was named before the run can be judged by these results: they describe, and claim nothing."
NOT_NAMED = "The points of an ablation are no contrasts that were named beforehand: they describe, and claim nothing."

Estimated = Contrast | TaskContrast | Interval


def contrast_sentence(one: Contrast | TaskContrast, metric: str) -> str:
    """What a contrast allows to be said: never a winner inside its interval, no claim that was not named before."""
    first, second = one.first, one.second
    seeds = "1 seed" if one.n_seeds == 1 else f"{one.n_seeds} seeds"
    if isinstance(one, TaskContrast):
        seeds = f"{one.n_seeds} pairs of runs on {len(one.tasks)} tasks"
    line = f"{first} − {second} = {one.value:+.3f} test {'-loss' if one.metric == 'loss' else metric} ({seeds})"
    if one.value is None or one.low is None or one.high is None:
        return f"{line}; these results give it no interval, so nothing is claimed."
    line += f", 95 % interval [{one.low:+.3f}, {one.high:+.3f}]"
    detectable = f"a difference below {one.minimum_detectable:.3f} would mostly be missed by this study"
    if one.low <= 0 <= one.high:
        return f"{line}: the two cannot be told apart; {detectable}."
    better = first if one.value > 0 else second
    if one.role == "later":
        return f"{line}: {better} does better here; the contrast was not named before the run, so nothing is claimed."
    said = f"p = {p_value(one.p)}" if one.p_holm is None else f"Holm-corrected p = {p_value(one.p_holm)}"
    said = said.replace("= <", "<")
    if one.claim:
        return f"{line}, {said}: {better} is the better one."
    why = f"{said}; no claim is made of fewer than {FEWEST_RUNS}" if one.n_seeds < FEWEST_RUNS else said
    return f"{line}: {better} does better here, but {seeds} cannot carry a claim about the methods ({why})."


def plain_sentence(first: str, second: str, found: Estimated, metric: str, by_loss: bool) -> str:
    """A difference as one would tell it: "chain3 scored 2.7 points lower than lora in test exact match (95 % interval:
    1.0 to 4.3 points lower)". Of a loss `found` has the negative, as every contrast."""
    if found.value is None:
        return f"{first} and {second} have no common number"
    less, more = ("higher", "lower") if by_loss else ("lower", "higher")
    unit = "nats per target token" if by_loss else "points"

    def size(number: float) -> str:
        return f"{abs(number):.3f}" if by_loss else f"{100 * abs(number):.1f}"

    side = more if found.value > 0 else less
    what = f"had a test loss {size(found.value)} {unit}" if by_loss else f"scored {size(found.value)} {unit}"
    said = f"{first} {what} {side} than {second}" + ("" if by_loss else f" in test {metric}")
    if found.low is None or found.high is None:
        return said
    if found.low <= 0 <= found.high:
        ends = f"from {size(found.low)} {less} to {size(found.high)} {more}"
        return f"{said} (95 % interval: {ends}), so the two cannot be told apart"
    near, far = sorted((abs(found.low), abs(found.high)))
    return f"{said} (95 % interval: {size(near)} to {size(far)} {unit} {side})"


def headline(summary: Summary | TasksSummary) -> str:
    """What the primary contrast allows to be said, for who reads nothing else."""
    one = next((one for one in summary.contrasts if one.role == "primary" and one.value is not None), None)
    if one is None:
        return UNNAMED
    of = f"these {len(one.tasks)} tasks" if isinstance(one, TaskContrast) else "this task"
    runs = "one seed" if one.n_seeds == 1 else f"{one.n_seeds} {'pairs of runs' if 'tasks' in of else 'seeds'}"
    said = f"On {of}, over {runs}, {plain_sentence(one.first, one.second, one, summary.metric, one.metric == 'loss')}"
    if one.low is None or one.high is None:
        return f"{said}; these results give it no interval, so nothing is claimed."
    if one.low <= 0 <= one.high or one.claim:
        return f"{said}."
    return f"{said}; {runs} cannot carry a claim about the methods."


def ablation_headlines(summary: Ablation) -> list[str]:
    """What became of each arm from the first value to the last, and that nothing is claimed of it."""
    by_loss, lines = summary.metric == "perplexity", []
    for arm in dict.fromkeys(row.arm for row in summary.rows if row.values is not None):
        rows = [row for row in summary.rows if row.arm == arm and row.values is not None and row.n_seeds]
        if len(rows) < 2:
            continue
        first, last = rows[0], rows[-1]
        means = [getattr(row, "test_loss" if by_loss else "test_score").mean for row in (first, last)]
        change = (means[0] - means[1]) if by_loss else (means[1] - means[0])
        found = last.difference or Interval(value=change, low=None, high=None)
        names = f"{arm} with {last.label}", f"with {first.label}"
        lines.append(f"{plain_sentence(*names, found, summary.metric, by_loss)}.")
    return lines or ["No two points of this ablation have numbers yet."]


def verdict(summary: Summary) -> list[str]:
    """What the numbers allow to be said, in plain sentences; never a winner inside its interval."""
    named = [contrast_sentence(one, summary.metric) for one in summary.contrasts if one.role != "later"]
    n_seeds = len(summary.seeds)
    spread = ONE_SEED if n_seeds == 1 else f"± is the standard deviation over {n_seeds} seeds."
    general = [spread, scope_sentence(summary.intervals), *([OF_P] if summary.contrasts else [])]
    return [*named, *summary.unpaired, *general, *remarks(summary)]


def remarks(summary: Summary) -> list[str]:
    """What else is to be known of this run."""
    lines, n_seeds = [], len(summary.seeds)
    best = f"the step that was best on validation ({summary.select_by})"
    rule = "the last step" if summary.checkpoint == "last" else best
    lines.append(f"Scored checkpoint: {rule}. Test was read for that checkpoint only.")
    if summary.rows:
        lines.append("Rows: " + ", ".join(f"{n} {name}" for name, n in summary.rows.items()) + ".")
    if summary.train_sample:
        lines.append(f"Train is scored on a sample of {summary.train_sample} rows, on which the gaps stand.")
    for first, second, seed in summary.same_outputs:
        lines.append(
            f"{first} and {second} give the same test losses to the bit under seed {seed}, though not trained "
            "alike: what one of them does differently has done nothing, so their comparison says nothing."
        )
    steps = sorted({round(arm.steps) for arm in summary.arms.values() if arm.steps})
    if len(steps) > 1 and summary.matched.by == "steps":
        lines.append(
            f"The arms were trained for {steps[0]} to {steps[-1]} optimizer steps: what differs between them may be "
            "due to that alone."
        )
    lines += _uncertain(summary)
    for name, arm in summary.arms.items():
        if (arm.max_lost or 0) > 0.2:
            lines.append(
                f"{name}: rounding at a knot moved the outputs by {arm.max_lost:.0%} of what its link had learned; "
                "model.dtype: float32 keeps knots exact."
            )
        if lacking := arm.without_gradient:
            lines.append(f"{name}: at every step at least {lacking} of its trained tensors got no gradient.")
        for key, seeds in arm.at_grid_edge.items():
            chosen = key.replace("_", " ")
            if len(seeds) < arm.n_seeds:
                chosen += f" of seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            lines.append(f"{name}: the chosen {chosen} is at the edge of its grid; a better one may lie outside.")
        lines += [f"{name} seed {seed} failed: {error}" for seed, error in arm.errors.items()]
        if 0 < arm.n_seeds < n_seeds:
            lines.append(f"{name}: {arm.n_seeds} of {n_seeds} seeds are there; its means are over those.")
    return lines


def _uncertain(summary: Summary) -> list[str]:
    """Of each arm whose value resampled trials would often not choose, what else they would."""
    lines = []
    for arm, search in summary.trials.items():
        if search.per == "seed":
            continue  # the choice is in the intervals
        (choice,) = search.choices
        first = choice.trials[choice.chosen]
        if first.share is None or first.share >= SURE:
            continue
        second = max((trial for trial in choice.trials if trial is not first), key=lambda trial: trial.share or 0)
        lines.append(
            f"{arm}: {values_text(first.values)} is chosen in {first.share:.0%} of resampled trials and "
            f"{values_text(second.values)} in {second.share or 0:.0%}: the choice is uncertain, and no interval "
            "carries that; a search per: seed would."
        )
    return lines
