"""What no recipe may be: keys that contradict each other, or have no effect. Each fault is one line. No torch."""

import itertools
import math
from collections.abc import Iterable, Sequence

from cola.errors import listed, quoted
from cola.recipe.arms import Arm, LinkSettings
from cola.recipe.ideas import OF_PAIRS, OF_WHOLE, TAKEN_OUT, Idea
from cola.recipe.methods import Lora, Prefix
from cola.recipe.recipe import Recipe
from cola.recipe.resolved import ResolvedArm, methods_of
from cola.recipe.schema import MOST_GENERATED, MOST_TRAININGS, MOST_TRIED, SPLITS, Search


def check_recipe(recipe: Recipe) -> None:
    """What its sections mean together, each being right by itself. Raises ValueError, of many faults with the first."""
    if len(set(recipe.seeds)) != len(recipe.seeds):
        raise ValueError("seeds: each seed once")
    _check_number(recipe)
    _check_folders(recipe)
    _check_comparison(recipe)
    _check_evaluation(recipe)
    for name in recipe.arms:
        _check_search(recipe, name)
        for choice in recipe.choices_of(name):
            _check_arm(recipe.with_choice(name, choice), name)
    _check_match(recipe)
    _check_same_trials(recipe)


def _check_number(recipe: Recipe) -> None:
    """How many trainings there are, counted before any of them is made."""
    number = len(recipe.arms) * len(recipe.seeds)
    for name in recipe.arms:
        searches = recipe.searches_of(name)
        tried = math.prod(len(search.search) for search in searches.values()) if searches else 0
        if tried > MOST_TRIED:
            raise ValueError(f"arms.{name}: its search has {tried} combinations; {MOST_TRIED} are the most")
        each = any(search.per == "seed" for search in searches.values())
        number += tried * len(recipe.seeds if each else recipe.search_seeds(name))
    if number > MOST_TRAININGS:
        raise ValueError(
            f"arms, seeds and searches make {number} trainings; {MOST_TRAININGS} are the most: give fewer seeds, "
            "arms or values"
        )
    for split in SPLITS if recipe.data.reasoning_gym is not None else ():
        if (getattr(recipe.data.rows, split) or 0) > MOST_GENERATED:
            raise ValueError(f"data.rows.{split}: a generator gives {MOST_GENERATED} rows at most")


def _check_folders(recipe: Recipe) -> None:
    """Each arm's files lie in a folder of its name."""
    seen: dict[str, str] = {}
    for arm in recipe.arms:
        if (other := seen.setdefault(arm.casefold(), arm)) != arm:
            raise ValueError(
                f"arms.{arm} and arms.{other} share a folder on a disk that tells no capitals apart; give one of them "
                "another name"
            )


def _check_comparison(recipe: Recipe) -> None:
    comparison = recipe.comparison
    named = [("primary", name) for name in comparison.primary or ()]
    named += [("secondary", name) for pair in comparison.secondary for name in pair]
    named += [(key, name) for key in ("full", "lora") if (name := getattr(comparison, key)) is not None]
    for key, name in named:
        if name not in recipe.arms:
            raise ValueError(f"comparison.{key} names the arm {quoted(name)}; the arms are {listed(recipe.arms)}")
    compared: list[set[str]] = []
    for first, second in [*([comparison.primary] if comparison.primary else []), *comparison.secondary]:
        if first == second:
            raise ValueError(f"comparison: {first} is compared with itself")
        if {first, second} in compared:
            raise ValueError(f"comparison: {first} and {second} are compared twice")
        compared.append({first, second})


def _check_evaluation(recipe: Recipe) -> None:
    if recipe.data.task == "text":
        rules = {"comparison.metric": recipe.comparison.metric, "evaluation.select_by": recipe.evaluation.select_by}
        rules |= {f"arms.{arm}: select_by": search.select_by for arm, search in recipe.search_rules.items()}
        if wrong := next((key for key, by in rules.items() if by == "score"), None):
            raise ValueError(f"{wrong}: a text has no score; say loss, or leave it out")
    if recipe.evaluation.checkpoint == "best" and recipe.evaluation.every == "never":
        raise ValueError("evaluation.every: never leaves nothing to choose the best checkpoint from")
    asked, there = recipe.evaluation.train_rows, recipe.data.rows.train
    if asked and there and asked > there and recipe.data.too_long != "split":  # of which a row may give several
        raise ValueError(
            f"evaluation.train_rows: {asked} training rows are to be scored and data.rows.train has {there}; lower it, "
            "or leave it out: all are scored then"
        )


def _check_match(recipe: Recipe) -> None:
    """The arm to whose cost the others are matched must have one cost."""
    reference = recipe.reference_arm
    if recipe.training.match == "steps" or reference is None:
        return
    if costly := set(recipe.searches_of(reference)) - {"learning_rate", "alpha", "dropout", "loraplus_lr_ratio"}:
        raise ValueError(
            f"training.match: {recipe.training.match}: the other arms are matched to {reference}, whose "
            f"{min(costly)} is searched, so what it costs is not known: name another arm with comparison.lora, "
            "or match steps"
        )


def _check_same_trials(recipe: Recipe) -> None:
    """Every arm is searched by the same rules, as often."""
    if told := _unlike(recipe.search_rules.items()):
        raise ValueError(f"every arm's search must have the same per and select_by; there are {told}")
    counts: dict[int, list[str]] = {}
    for name in recipe.trained_arms:
        counts.setdefault(len(recipe.choices_of(name)) * len(recipe.search_seeds(name)), []).append(name)
    if len(counts) > 1:
        told = "; ".join(f"{n} for {', '.join(names)}" for n, names in sorted(counts.items()))
        raise ValueError(
            f"every arm must have the same number of trials, or the one with more is luckier; there are {told}: "
            "give each a search of as many values and seeds"
        )


def _check_search(recipe: Recipe, name: str) -> None:
    searches = recipe.searches_of(name)
    if told := _unlike(searches.items()):
        raise ValueError(f"arms.{name}: all its keys are searched with the same per and select_by; there are {told}")
    if "links" in searches and searches["links"].per == "seed":
        raise ValueError(f"arms.{name}.links: an arm has one number of links, so it is searched per: arm")
    for key in searches:
        if any(getattr(entry, key, None) is not None for entry in recipe.arms[name].entries):
            raise ValueError(f"arms.{name}: a link's own {key} and a search exclude each other")


def _unlike(searches: Iterable[tuple[str, Search]]) -> str:
    """The rules of searches in words, by what is searched; empty where they are the same."""
    rules = {key: f"per {search.per}, by {search.select_by}" for key, search in searches}
    return "; ".join(f"{key}: {rule}" for key, rule in rules.items()) if len(set(rules.values())) > 1 else ""


def _check_arm(recipe: Recipe, name: str) -> None:
    """What the settings of one arm rule out together, none of them being searched any more."""
    arm, resolved = recipe.arms[name], recipe.resolved(name)
    _check_methods(name, arm, resolved, recipe.training.gradient_checkpointing)
    said = arm.quantization or recipe.model.quantization
    if said in ("int8", "none") and "qlora" in methods_of(arm, recipe.link):
        raise ValueError(f"arms.{name}: qlora is LoRA on an nf4 base; for {said} write method: lora")
    _check_base(name, resolved)
    if recipe.model.shard:
        _check_sharded(name, resolved)
    _check_merge_fraction(name, resolved)
    _check_handed_on(name, resolved)
    if any(resolved.untils[:-1]) and resolved.rules.schedule != "run":
        raise ValueError(
            f"arms.{name}.until: a link that ends early leaves its steps to those after it, so there must be one "
            "schedule over all of them: say knot.schedule: run"
        )
    if arm.until and len(resolved.links) == 1:
        raise ValueError(f"arms.{name}.until has no effect on one link, which makes all the steps: remove it")


def _check_methods(name: str, arm: Arm, resolved: ResolvedArm, gradient_checkpointing: bool) -> None:
    """Keys that a link's method does not take, or not beside the others."""
    links = resolved.links
    own = links if isinstance(arm.links, list) else links[:1]  # else all are the same
    for entry, link in zip(arm.entries, own, strict=False):
        for key in LinkSettings.model_fields:
            given = getattr(arm, key) is not None or getattr(entry, key) is not None
            known = (*type(link).model_fields, "method", "learning_rate", *(["until"] if link.is_pair else []))
            if given and key not in known:
                raise ValueError(f"arms.{name}.{key} has no effect with method {link.method}: remove it")
        if isinstance(link, Lora) and link.init_batches and not link.takes_gradient:
            raise ValueError(f"arms.{name}.init_batches has no effect with init: {link.init}: remove it")
        if link.optimizer.name in OF_WHOLE and not link.is_whole:
            raise ValueError(
                f"arms.{name}.optimizer: {link.optimizer.name} is about the gradients of whole weights, and "
                f"method {link.method} trains none: use it with method: full"
            )
        if link.optimizer.name in OF_PAIRS and not link.is_pair:
            raise ValueError(
                f"arms.{name}.optimizer: {link.optimizer.name} trains the two factors of a pair together, and method "
                f"{link.method} has none: use it with method: lora"
            )
        if isinstance(link, Prefix):
            if link.encoder_hidden_size and not link.prefix_projection:
                raise ValueError(f"arms.{name}.encoder_hidden_size has no effect without prefix_projection: true")
            if gradient_checkpointing:
                raise ValueError(
                    f"arms.{name}: method prefix lies in the cache of keys and values, which "
                    "training.gradient_checkpointing does without: set that to false, or use p_tuning"
                )
    if len(links) > 1 and (odd := next((link for link in links if not link.is_pair), None)):
        why = "full fine-tuning" if odd.is_whole else f"method {odd.method}"
        raise ValueError(f"arms.{name}.links: {why} has no knot to tie, so it takes links: 1, not {len(links)}")
    if links and not links[0].is_pair and (idle := sorted(arm.knot.model_fields_set)):
        raise ValueError(f"arms.{name}.knot.{idle[0]}: method {links[0].method} has no knot to tie: remove it")


def _check_sharded(name: str, resolved: ResolvedArm) -> None:
    """What a base in shards cannot take."""
    other = next((link.method for link in resolved.links if not isinstance(link, Lora)), None)
    dora = any(isinstance(link, Lora) and link.use_dora for link in resolved.links)
    faults = {f"method {other}": other, "use_dora": dora, "quantization": resolved.base.quantization}
    if what := next((fault for fault, there in faults.items() if there), None):
        raise ValueError(
            f"arms.{name}: {what} cannot be had with model.shard: true, which spreads a dense frozen base for low-rank "
            "pairs: leave the arm out, or say model.shard: false, where each process holds all weights"
        )


def _check_base(name: str, resolved: ResolvedArm) -> None:
    """What a quantized base, or weights that a knot may not write, cannot take."""
    merge, (dtype, quantization) = resolved.rules.merge, resolved.base
    if quantization and any(link.is_whole for link in resolved.links):
        raise ValueError(
            f"arms.{name}: full fine-tuning has no use for {quantization} codes, which cannot be trained: say "
            "quantization: none, or train a pair beside them (method: lora)"
        )
    if quantization == "nf4" and dtype == "float16":
        raise ValueError(f"arms.{name}: nf4 computes in float32 or bfloat16 here; set dtype")
    if quantization and merge == "naive":
        raise ValueError(
            f"arms.{name}.knot.merge: naive would quantize the base anew at each knot, which loses nearly all that "
            "was learned; a quantized base keeps its pairs beside the codes: leave merge out"
        )
    if merge == "exact" and quantization is None:
        return
    for link in resolved.links:
        if isinstance(link, Lora) and link.use_dora:
            why = f"on an {quantization} base" if quantization else f"with knot.merge: {merge}"
            raise ValueError(
                f"arms.{name}.use_dora: DoRA rescales the rows of the weight, so it cannot be kept {why}; use a "
                "dense base and merge: exact, or leave use_dora out"
            )
        if isinstance(link, Lora) and link.init.name in TAKEN_OUT:
            why = f"with {quantization} codes" if quantization else f"with knot.merge: {merge}"
            raise ValueError(
                f"arms.{name}.init: {link.init} takes the pair out of the frozen weight, which cannot be done {why}; "
                "use init: default"
            )


def _check_merge_fraction(name: str, resolved: ResolvedArm) -> None:
    lets_go = resolved.rules.merge_fraction != 1 and len(resolved.links) > 1
    if lets_go and resolved.rules.keeps_pair:
        raise ValueError(
            f"arms.{name}.knot.merge_fraction: with pair: keep nothing is let go of between links: remove it"
        )
    if lets_go and any(isinstance(link, Lora) and link.use_dora for link in resolved.links):
        raise ValueError(f"arms.{name}.knot.merge_fraction: a part of DoRA's row lengths means nothing: remove")


def _check_handed_on(name: str, resolved: ResolvedArm) -> None:
    """What one link hands on to the next must fit it."""
    shape, rules = ("rank", "target_modules"), resolved.rules
    hands_on: list[tuple[bool, str, str, Sequence[str]]] = [
        (rules.hands_on, "optimizer", "the moments do", (*shape, "use_dora")),
        # Under another scale the same pair would be another update.
        (rules.keeps_pair, "pair", "the pair before does", (*shape, "use_dora", "alpha", "use_rslora")),
        (isinstance(rules.pair, Idea), "pair", "the pair before does", shape),
    ]
    for does, rule, goes_on, keys in hands_on:
        for n, (before, after) in enumerate(itertools.pairwise(resolved.links if does else ()), 2):
            settings = before.record(), after.record()  # all of them pairs, see `_check_methods`
            for key in keys:
                old, new = (values[key] for values in settings)
                if old != new:
                    raise ValueError(
                        f"arms.{name}.knot.{rule}: link {n} has {key} {new} after {old}, so {goes_on} not fit it: "
                        "use fresh"
                    )
