"""What a knot does to weights, moments and learning rates, also after a kill. Run: pytest tests/link/test_knots.py"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ROUNDING, tiny_model
from peft import PeftModel
from runs import cola, go, open_run, outcome, quiet, read_jsonl, result
from test_methods import ADAMW, WIDE, batches, close, gradients, link, logits, outputs, what
from torch import Tensor
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from cola.chain import Chain, extend, tie_knot
from cola.errors import MomentsNotCleared
from cola.link import adapter_files, adapters
from cola.link.base import Base
from cola.link.moments import Moments, carried, check_cleared, read_moments
from cola.link.targets import target_names
from cola.link.train import tune
from cola.measure.cost import Meter
from cola.recipe.arms import Prune
from cola.recipe.methods import Lora
from cola.recipe.plan import Link, plan_arm
from cola.recipe.read import read_recipe
from cola.recipe.resolved import Rules
from cola.run.run import run
from cola.tree.run_folder import RunFolder
from cola.tree.segments import lineage, root_causes

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "model.layers.0.mlp.up_proj"


def magnitude(share: float) -> Rules:
    return Rules(optimizer=Prune(prune_magnitude=share))


def at_random(share: float) -> Rules:
    return Rules(optimizer=Prune(prune_random=share))


# ---------------------------------------------------------------------------------------------------------
# Moments


def some_moments(draw: Callable[..., Tensor] = torch.randn) -> Moments:
    shapes = {"a": (4, 32), "b": (48, 4), "odd": (7, 3), "row": (5,)}
    moments = {}
    for name, shape in shapes.items():
        first = draw(shape)
        moments |= {f"{name}.exp_avg": first, f"{name}.exp_avg_sq": first.abs() + 1, f"{name}.step": torch.tensor(9.0)}
    return moments


@pytest.mark.parametrize("optimizer", ["fresh", "zero"])
def test_a_fresh_optimizer_carries_nothing(optimizer: str) -> None:
    assert carried(some_moments(), Rules(optimizer=optimizer), 0) is None


def test_a_kept_optimizer_carries_all_of_it() -> None:
    moments = some_moments()
    kept = carried(moments, Rules(optimizer="keep"), 0)
    assert kept is not None
    assert kept.keys() == moments.keys()
    assert all(torch.equal(kept[key], moments[key]) for key in moments)


@pytest.mark.parametrize("draw", [torch.randn, torch.ones])  # all of one size: a quantile would clear none, or all
@pytest.mark.parametrize("rule", [magnitude, at_random])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9, 0.999])
def test_pruning_clears_an_exact_number_of_the_same_entries_of_both_moments(
    draw: Callable[..., Tensor], rule: Callable[[float], Rules], share: float
) -> None:
    moments = some_moments(draw)
    before = {key: value.clone() for key, value in moments.items()}
    pruned = carried(moments, rule(share), 3)
    assert pruned is not None
    assert all(torch.equal(moments[key], before[key]) for key in moments)  # what is in the store stays
    for name in ("a", "b", "odd", "row"):
        first, second = pruned[f"{name}.exp_avg"], pruned[f"{name}.exp_avg_sq"]
        assert int((first == 0).sum()) == math.ceil(share * first.numel())
        assert torch.equal(first == 0, second == 0)
        left = first != 0
        assert torch.equal(first[left], before[f"{name}.exp_avg"][left])
        assert torch.equal(second[left], before[f"{name}.exp_avg_sq"][left])
        assert pruned[f"{name}.step"] == 9
    again = carried(before, rule(share), 3)
    assert again is not None
    assert all(torch.equal(pruned[key], again[key]) for key in pruned)


def test_pruning_by_magnitude_clears_the_smallest_first_moments_and_at_random_others() -> None:
    moments = some_moments()
    by_size, one, other = (
        carried(moments, rule, seed) for rule, seed in ((magnitude(0.6), 1), (at_random(0.6), 1), (at_random(0.6), 2))
    )
    assert by_size is not None
    assert one is not None
    assert other is not None
    for name in ("a", "b"):
        key = f"{name}.exp_avg"
        expected = moments[key].abs() > moments[key].abs().flatten().kthvalue(math.ceil(0.6 * moments[key].numel()))[0]
        assert torch.equal(by_size[key] != 0, expected)
        assert not torch.equal(one[key], other[key])
        assert not torch.equal(one[key], by_size[key])


def test_a_knot_that_clears_too_little_is_an_error() -> None:
    check_cleared(0.9, magnitude(0.9))
    check_cleared(0.0, Rules(optimizer="keep"))
    check_cleared(1.0, None)
    for cleared, rule in ((0.89, magnitude(0.9)), (0.0, at_random(0.1)), (0.999, Rules()), (0.5, None)):
        with pytest.raises(MomentsNotCleared, match=rf"and {cleared:.1%} are zero"):
            check_cleared(cleared, rule)


def first_update(moments: Moments | None, rule: Rules) -> dict[str, Tensor]:
    """Of B at the first step of a link whose learning rate is 0.01."""
    model = tiny_model()
    chain = Chain(model, Base(model), rule)
    own = link(n_steps=1)
    extend(chain, own, gradients)
    settings = ADAMW | {"weight_decay": 0.0, "max_grad_norm": None}
    knotted = Link(settings=own.settings, knot=rule, first_step=0, learning_rates=(1e-2,), seed=own.seed)
    tune(model, knotted, batches(1), Accelerator(), lambda *_: None, **settings, moments=moments)
    return {name: pair.B_OR for name, pair in adapters.read_pair(model).items()}


def test_after_a_fresh_knot_an_entry_moves_by_the_learning_rate_and_with_a_kept_step_count_by_316_percent() -> None:
    fresh = first_update(None, Rules())
    # PyTorch's AdamW on one entry: moments at zero, and the step count as it was after 10,000 steps.
    entry = torch.zeros(1, requires_grad=True)
    adamw = torch.optim.AdamW([entry], lr=1e-2, weight_decay=0.0)
    zeros = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1), "step": torch.tensor(1e4)}
    adamw.state[entry].update(zeros)
    entry.grad = torch.ones(1)
    adamw.step()
    assert -entry.item() == pytest.approx(0.0316, abs=1e-4)
    model = tiny_model()
    adapters.attach(model, what(), 7)
    trap = {
        f"{name}.{key}": value.clone() if key == "step" else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in zeros.items()
    }
    trapped = first_update(trap, Rules(optimizer="keep"))
    for name, B_OR in fresh.items():
        assert (B_OR.abs().median() - 1e-2).abs() < 1e-5
        assert B_OR.abs().max() < 1.0001e-2
        assert (trapped[name].abs().median() + entry.item()).abs() < 1e-4


def test_kept_moments_go_on_as_one_adamw_does() -> None:
    # The pair is left where it is, so that a second "link" with kept moments is the first one's steps 4 to 6.
    own, pairs = link(n_steps=6), []
    for cut in (None, 3):
        model = tiny_model()
        extend(Chain(model, Base(model), Rules()), own, gradients)
        accelerator, moments = Accelerator(), None
        for first, last in ((0, cut), (cut, 6)) if cut else ((0, 6),):
            knot = Rules(optimizer="keep") if first else None
            rates = own.learning_rates[first:last]
            part = Link(settings=own.settings, knot=knot, first_step=first, learning_rates=rates, seed=7)
            optimizer = tune(
                model, part, batches(6)[first:last], accelerator, lambda *_: None, **ADAMW, moments=moments
            )
            moments = carried(read_moments(model, optimizer, accelerator), Rules(optimizer="keep"), 0)
        pairs.append(adapters.read_pair(model)[NAME])
    assert torch.equal(pairs[0].A_RI, pairs[1].A_RI)
    assert torch.equal(pairs[0].B_OR, pairs[1].B_OR)


SHORT = ["training.epochs=null", "training.batch_size=4", "evaluation.every=never", "comparison.primary=null"]
POLICIES = {
    "fresh": "{}",
    "zero": "{optimizer: zero}",
    "keep": "{optimizer: keep}",
    "magnitude": "{optimizer: {prune_magnitude: 0.9}}",
    "random": "{optimizer: {prune_random: 0.5}}",
}


def only(arms: dict[str, str]) -> list[str]:
    """Overrides that leave just these arms."""
    return [
        *(f"arms.{name}=null" for name in ("base", "lora", "chain3", "full")),
        *(f"arms.{n}={s}" for n, s in arms.items()),
    ]


def metrics(folder: RunFolder, arm: str) -> list[dict[str, Any]]:
    """An arm's optimizer steps."""
    return [row for row in read_jsonl(folder.path / f"arms/{arm}/seed-0/metrics.jsonl") if row["kind"] == "step"]


def test_what_a_knot_clears_is_measured_and_recorded(recipe_file: Path) -> None:
    arms = {name: f"{{links: 3, knot: {knot}}}" for name, knot in POLICIES.items()}
    folder, summary = go(recipe_file, *SHORT, "training.steps=9", *only(arms))
    assert summary.same_outputs == []
    cleared = {name: [one["cleared"] for one in result(folder, name)["train_info"]["links"]] for name in POLICIES}
    assert {shares[0] for shares in cleared.values()} == {1.0}
    assert cleared["fresh"] == cleared["zero"] == [1.0, 1.0, 1.0]
    assert all(0.9 <= share < 0.95 for share in cleared["magnitude"][1:])
    assert all(0.5 <= share < 0.55 for share in cleared["random"][1:])
    assert all(share < 0.05 for share in cleared["keep"][1:])
    scores = {name: folder.scores(name, 0, "test") for name in POLICIES}
    assert scores["fresh"] == scores["zero"]
    assert len({str(rows) for rows in scores.values()}) == 4


# ---------------------------------------------------------------------------------------------------------
# Weights


def trained_chain(
    rule: Rules, n_links: int = 3, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Chain, list[Any], Tensor]:
    """A chain, the adapters that PEFT would have been given at each knot, and the outputs before the last knot."""
    model = tiny_model().to(dtype)
    chain, pairs, before = Chain(model, Base(model), rule), [], torch.empty(0)
    for n in range(n_links):
        own = link(first_step=6 * n, seed=n, **settings)
        start = outputs(chain.model)
        extend(chain, own, gradients)
        tune(chain.model, own, batches(6 * n + 6)[6 * n :], Accelerator(), lambda *_: None, **ADAMW)
        before = logits(chain.model)
        pairs.append(adapters.read_pair(chain.model))
        tie_knot(chain, start, outputs, more_to_come=n < n_links - 1)
    return chain, pairs, before


def test_pairs_kept_beside_the_weights_are_the_function_of_pairs_merged_into_them() -> None:
    exact, _, _ = trained_chain(Rules())
    beside, _, before = trained_chain(Rules(merge="no"))
    assert close(logits(beside.model), logits(exact.model), 1e-4)
    assert close(logits(beside.model), before, ROUNDING)
    plain = tiny_model()
    for name, weight in beside.model.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])


def test_an_exact_merge_is_the_float32_sum_rounded_once() -> None:
    chain, pairs, _ = trained_chain(Rules(), dtype=torch.bfloat16)
    weight = tiny_model().to(torch.bfloat16).get_submodule(NAME).weight.double()
    expected = weight + sum(2.0 * pair[NAME].B_OR.double() @ pair[NAME].A_RI.double() for pair in pairs)
    found = chain.model.get_submodule(NAME).weight
    # But for the last bits of the float32 sum, which may turn a tie the other way.
    assert (found != expected.float().to(torch.bfloat16)).float().mean() < 0.002
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


def test_a_naive_merge_is_pefts_in_place_link_by_link(tmp_path: Path) -> None:
    chain, pairs, _ = trained_chain(Rules(merge="naive"), dtype=torch.bfloat16)
    exact, _, _ = trained_chain(Rules(), dtype=torch.bfloat16)
    model: Any = tiny_model().to(torch.bfloat16)
    for number, pair in enumerate(pairs):
        carrier = tiny_model()
        adapters.attach(carrier, what(), 0)
        adapters.set_pair(carrier, pair)
        adapter_files.save(tmp_path / str(number), carrier, what(), "some/base", tiny_model())
        model = PeftModel.from_pretrained(model, tmp_path / str(number)).merge_and_unload()
    for name, tensor in model.state_dict().items():
        assert torch.equal(chain.model.state_dict()[name], tensor), name
    assert not torch.equal(chain.model.get_submodule(NAME).weight, exact.model.get_submodule(NAME).weight)


def test_naive_merging_loses_small_updates_that_an_exact_merge_keeps() -> None:
    losses = {}
    for merge in ("exact", "naive"):
        model = tiny_model().to(torch.bfloat16)
        chain = Chain(model, Base(model), Rules(merge=merge))
        chain.base.remember([NAME])
        start = chain.base.weight(NAME).float()
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros_like(start)
        for _ in range(16):
            extend(chain, link(target_modules=[NAME]), gradients)
            A_RI, B_OR = adapters.factors_of(adapters.pair_layers(model)[NAME])
            B_OR.copy_(torch.randn(B_OR.shape, generator=generator))
            B_OR *= 1e-3 * start.norm() / (2 * B_OR @ A_RI).norm()
            total += 2 * B_OR @ A_RI
            tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=True)
        off = model.get_submodule(NAME).weight.float() - start - total
        losses[merge] = (off.norm() / total.norm()).item()
    assert losses["naive"] > 1.5 * losses["exact"]


@pytest.mark.parametrize("merge", ["exact", "no"])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_fraction_of_each_pair_is_kept_and_all_of_the_last(merge: str, init: str) -> None:
    if (merge, init) == ("no", "pissa"):
        pytest.skip("nothing can be taken out of weights that are not written")
    chain, pairs, before = trained_chain(Rules(merge=merge, merge_fraction=0.25), init=init)
    after = logits(chain.model)
    assert close(after, before, ROUNDING)  # the last knot lets nothing go
    deltas = [2.0 * (pair[NAME].B_OR @ pair[NAME].A_RI) for pair in pairs]
    W = tiny_model().get_submodule(NAME).weight
    expected = W + 0.25 * deltas[0] + 0.25 * deltas[1] + deltas[2]
    if merge == "exact":
        assert close(chain.model.get_submodule(NAME).weight, expected, 1e-6)
    else:
        x = torch.randn(5, 32)
        assert close(chain.model.get_submodule(NAME)(x), x @ expected.T, 1e-5)


# ---------------------------------------------------------------------------------------------------------
# Learning rates


def rates(recipe_file: Path, *overrides: str) -> list[float]:
    recipe = read_recipe(recipe_file, ["training.epochs=null", "training.steps=12", *overrides])
    return [rate for one in plan_arm(recipe, "chain3", 0, 24) for rate in one.learning_rates]


def transformers_rates(kind: Callable[..., Any], warmup: int, n_steps: int) -> list[float]:
    adamw = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-2)
    scheduler, found = kind(adamw, warmup, n_steps), []
    for _ in range(n_steps):
        found.append(adamw.param_groups[0]["lr"])
        adamw.step()
        scheduler.step()
    return found


def test_the_schedule_runs_over_the_knots_or_is_restarted_at_each(recipe_file: Path) -> None:
    linear, cosine = get_linear_schedule_with_warmup, get_cosine_schedule_with_warmup
    whole, part = transformers_rates(linear, 0, 12), transformers_rates(linear, 0, 4)
    assert rates(recipe_file) == pytest.approx(whole)
    assert rates(recipe_file, "knot.schedule=link") == pytest.approx(3 * part)
    # The run's warm-up is the first link's; a knot has its own where it is given one, and the run's where not.
    warm = ["training.warmup_steps=2", "knot.schedule=link", "training.schedule=cosine"]
    two, one = transformers_rates(cosine, 2, 4), transformers_rates(cosine, 1, 4)
    assert rates(recipe_file, *warm) == pytest.approx(3 * two)
    assert rates(recipe_file, *warm, "knot.warmup_steps=1") == pytest.approx(two + 2 * one)
    assert rates(recipe_file, *warm, "arms.chain3.knot={warmup_steps: 0.25}") == pytest.approx(two + 2 * one)
    assert rates(recipe_file, *warm, "knot.warmup_steps=0") == pytest.approx(two + 2 * transformers_rates(cosine, 0, 4))


def test_a_warm_up_after_a_knot_leads_up_to_the_runs_schedule(recipe_file: Path) -> None:
    whole = transformers_rates(get_linear_schedule_with_warmup, 0, 12)
    for said in ("2", "0.5"):
        expected = [rate * (1 if step < 4 else min(1, step % 4 / 2)) for step, rate in enumerate(whole)]
        assert rates(recipe_file, f"knot.warmup_steps={said}") == pytest.approx(expected)
    assert rates(recipe_file, "knot.warmup_steps=0") == pytest.approx(whole)


# ---------------------------------------------------------------------------------------------------------
# Names


def end_name(recipe_file: Path, *overrides: str) -> str:
    """The name of the last state of the arm chain3."""
    recipe = read_recipe(recipe_file, list(overrides))
    dtype, quantization = recipe.resolved("chain3").base
    links = plan_arm(recipe, "chain3", 0, 24)
    root = root_causes("base", dtype, "cpu", quantization)

    def modules_of(one: Link) -> list[str] | None:
        pair = one.settings
        return target_names(tiny_model(), pair.target_modules) if isinstance(pair, Lora) else None

    return lineage(root, links, recipe.training, modules_of, [str(n) for n in range(6)]).names[-1]


NEW_SETTINGS = [
    "link.use_dora=true",
    "link.use_rslora=true",
    "link.loraplus_lr_ratio=2",
    "link.init=gaussian",
    "link.init=pissa",
    "link.init=orthogonal",
    "link.init=gradient",
    "link={init: gradient, init_batches: 1}",
    "arms.chain3={method: full}",
    "arms.chain3={method: full, freeze: embeddings}",
    "arms.chain3={method: full, freeze: head}",
    "arms.chain3={method: adapter}",
    "arms.chain3={method: adapter, bottleneck: 8}",
    "arms.chain3={method: adapter, placement: houlsby}",
    "arms.chain3={method: adapter, activation: gelu}",
    "arms.chain3={method: prefix}",
    "arms.chain3={method: prefix, num_virtual_tokens: 8}",
    "arms.chain3={method: prefix, prefix_projection: true}",
    "arms.chain3={method: prefix, prefix_projection: true, encoder_hidden_size: 8}",
    "arms.chain3={method: p_tuning}",
    "arms.chain3={method: p_tuning, num_virtual_tokens: 8}",
    "arms.chain3={method: p_tuning, encoder_hidden_size: 8}",
    "arms.chain3={method: prompt_tuning}",
    "arms.chain3={method: prompt_tuning, num_virtual_tokens: 8}",
    "knot.merge=naive",
    "knot.merge=no",
    "knot.merge_fraction=0.5",
    "knot.pair=keep",
    "knot.optimizer=keep",
    "knot.optimizer={prune_magnitude: 0.5}",
    "knot.optimizer={prune_magnitude: 0.6}",
    "knot.optimizer={prune_random: 0.5}",
    "knot.schedule=link",
    "knot.warmup_steps=1",
    "arms.chain3.quantization=nf4",
    "arms.chain3.quantization=int8",
    "arms.chain3.dtype=bfloat16",
]


def test_each_setting_that_changes_the_training_changes_the_name(recipe_file: Path) -> None:
    names = {setting: end_name(recipe_file, setting) for setting in NEW_SETTINGS} | {"": end_name(recipe_file)}
    twins = [(a, b) for a in names for b in names if a < b and names[a] == names[b]]
    assert twins == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["knot.optimizer=zero"], ["knot.optimizer=fresh"]),
        (["link.init=orthogonal", "arms.chain3.links=1"], ["arms.chain3.links=1"]),
        (["link.init=gradient"], ["link={init: gradient, init_batches: 8}"]),
        (["link={init: gradient, init_batches: 2}"], ["link={init: gradient, init_batches: 8}"]),  # of two steps each
        (["knot.merge=true"], ["knot.merge=exact"]),
        (["knot.max_drift=0.5"], []),
        (["knot={pair: keep, merge: no}"], ["knot.pair=keep"]),  # untied again where the next link begins
        (["arms.chain3.links=1", "knot={optimizer: keep, merge: no}"], ["arms.chain3.links=1"]),
        (["arms.chain3.quantization=nf4", "arms.chain3.knot={merge: no}"], ["arms.chain3.quantization=nf4"]),
        (["arms.chain3={method: qlora, links: 3}"], ["arms.chain3.quantization=nf4"]),
        (["training.gradient_checkpointing=true"], []),
    ],
)
def test_what_changes_no_training_changes_no_name(recipe_file: Path, one: list[str], other: list[str]) -> None:
    assert end_name(recipe_file, *one) == end_name(recipe_file, *other)


# ---------------------------------------------------------------------------------------------------------
# Stopped and gone on with

ARMS = {
    "dora": "{links: 2, use_dora: true, knot: {optimizer: keep}}",
    "pissa": "{links: 2, init: pissa, knot: {optimizer: {prune_random: 0.5}}}",
    "orthogonal": "{links: 2, init: orthogonal, loraplus_lr_ratio: 4, dropout: 0.1, knot: {merge: no}}",
    "same": "{links: 2, use_dora: true, init: gaussian, knot: {pair: keep}}",
    "part": "{links: 2, knot: {merge_fraction: 0.5, optimizer: {prune_magnitude: 0.5}, schedule: link}}",
    "naive": "{links: 2, dtype: bfloat16, knot: {merge: naive}}",
    "nf4": "{links: 2, method: qlora, init: gradient, init_batches: 2}",
    "adapter": "{method: adapter, bottleneck: 4}",
    "prefix": "{method: prefix, num_virtual_tokens: 4, prefix_projection: true}",
    "p_tuning": "{method: p_tuning, num_virtual_tokens: 4}",
    "frozen": "{method: full, freeze: [embeddings, head], learning_rate: 1e-3}",
}


class Stop:
    """Ctrl-C before the n-th optimizer step from now, for the next n of a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: list[int]) -> None:
        self.after, self.done = after, 0
        step = torch.optim.AdamW.step

        def stopping(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
            if self.after and self.done == self.after[0]:
                self.after, self.done = self.after[1:], 0
                raise KeyboardInterrupt
            self.done += 1
            return step(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", stopping)


@pytest.mark.slow
def test_every_method_and_knot_that_is_stopped_ends_with_the_bits_of_an_undisturbed_run(
    recipe_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "_count", lambda *_: (1.0, 1.0))  # which takes longer here than training
    base = tmp_path / "wide"
    tiny_model(**WIDE, num_hidden_layers=1).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = ["data.rows={train: 16, validation: 2, test: 4}", "training.steps=4", "checkpoint_seconds=0"]
    settings = [f"model.name_or_path={base}", *rows, *SHORT, *only(ARMS), "link.rank=4"]
    whole, summary = go(recipe_file, *settings, f"store={tmp_path / 'undisturbed'}")
    assert {name: arm.states[0] for name, arm in summary.arms.items()} == dict.fromkeys(ARMS, "ok")
    assert summary.same_outputs == []

    # Each arm once: in its first link, as the second begins, or in the second; in turn.
    places = [1 + number % 3 for number in range(len(ARMS))]
    left = [4 - place for place in places[:-1]]  # of the arm before
    Stop(monkeypatch, [place + before for place, before in zip(places, [0, *left], strict=True)])
    stopped, summary = go(recipe_file, *settings, f"store={tmp_path / 'stopped'}")
    sessions = 1
    while summary.interrupted:
        sessions += 1
        folder, recipe = open_run(stopped.path)
        summary = run(recipe, folder, quiet())
    assert sessions == 1 + len(ARMS)
    for name in ARMS:
        assert result(stopped, name)["train_info"]["reused_steps"] > 0
    assert outcome(stopped.path).differences(outcome(whole.path)) == []


@pytest.mark.slow
def test_moments_are_kept_across_a_knot_whoever_trained_the_first_link(recipe_file: Path, tmp_path: Path) -> None:
    # LoRA's best checkpoint is kept without its optimizer, under the name of the end of a chain's first link.
    settings = [*SHORT, "training.steps=6", "training.schedule=constant", "training.learning_rate=5e-2"]
    chain = only({"keep": "{links: 2, knot: {optimizer: keep}}"})
    best = [*only({"one": "{links: 1}"}), "evaluation.checkpoint=best", "evaluation.every=3"]
    alone, _ = go(recipe_file, *settings, *chain, f"store={tmp_path / 'alone'}")
    lora, _ = go(recipe_file, *settings, *best, f"store={tmp_path / 'shared'}")
    assert result(lora, "one")["train_info"]["scored_step"] == 3
    after, _ = go(recipe_file, *settings, *chain, f"store={tmp_path / 'shared'}")
    segment = result(after, "keep")["train_info"]["segments"][0]
    assert segment == result(lora, "one")["train_info"]["scored_state"]
    assert result(after, "keep")["train_info"]["links"][1]["cleared"] < 0.05
    assert after.scores("keep", 0, "test") == alone.scores("keep", 0, "test")


@pytest.mark.parametrize("kind", ["default", "pissa", "dora"])
def test_a_chain_that_keeps_its_pair_and_optimizer_is_lora_to_the_bit(recipe_file: Path, kind: str) -> None:
    settings = {"default": "", "pissa": "init: pissa, ", "dora": "use_dora: true, "}[kind]
    kept = "links: 3, knot: {pair: keep, optimizer: keep}"
    arms = {"lora": f"{{{settings}links: 1}}", "same": f"{{{settings}{kept}}}"}
    arms |= {"reset": f"{{{settings}links: 3, knot: {{pair: keep}}}}"}
    folder, summary = go(recipe_file, *SHORT, "training.steps=6", *only(arms))
    assert summary.same_outputs == [("lora", "same", 0)]  # the two that must be; a reset changes what is learned
    rows = [[step["loss"] for step in metrics(folder, arm)] for arm in arms]
    assert rows[0] == rows[1]
    assert rows[0][:3] == rows[2][:3]  # the first link, and the step whose gradient is still the same
    assert rows[0] != rows[2]


# ---------------------------------------------------------------------------------------------------------
# Nothing happens, and it is said


def test_arms_that_come_to_the_same_outputs_by_other_causes_are_reported(recipe_file: Path) -> None:
    arms = {"base": "{links: 0}", "idle": "{links: 1, learning_rate: 1e-30}", "lora": "{links: 1}"}
    settings = [*SHORT, "training.steps=2", "arms.full=null", "arms.chain3=null"]
    settings += [f"arms.{name}={said}" for name, said in arms.items()]
    _, summary = go(recipe_file, *settings)
    assert summary.same_outputs == [("base", "idle", 0)]
    told = cola("run", recipe_file, *settings)
    assert told.exit_code == 1
    assert cola("run", recipe_file, *settings, "arms.idle=null").exit_code == 0
