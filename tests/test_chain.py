"""The laws of the chain, with PEFT as the reference. Run: pytest tests/test_chain.py"""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2ForCausalLM

from cola.chain import Chain, extend, run_chain, tie_knot
from cola.data.batches import MicroBatch, collate
from cola.errors import KnotDrift, ModelError
from cola.link import adapter_files, adapters, residual
from cola.link.base import Base
from cola.link.drift import Drift, Outputs
from cola.link.targets import target_names
from cola.link.train import tune
from cola.recipe.methods import settings_of
from cola.recipe.plan import Link
from cola.recipe.resolved import Rules

INPUTS = torch.randint(1, 400, (4, 12), generator=torch.Generator().manual_seed(1))
ADAMW = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}


def link(**settings: object) -> Link:
    """A low-rank pair unless the settings say otherwise; those of a link's place and steps are told from the others."""
    place = {"knot": None, "first_step": 0, "learning_rates": (1e-2,) * 5, "seed": 7}
    place |= {key: settings.pop(key) for key in list(settings) if key in place}
    pair = {"method": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
    return Link(settings=settings_of(settings if "method" in settings else pair | settings), **place)


def chain_of(model: PreTrainedModel) -> Chain:
    return Chain(model, Base(model), Rules())


def no_gradients(*_: object) -> dict[str, Tensor]:
    raise AssertionError("only a start along the gradient asks for one")


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=INPUTS.to(next(model.parameters()).device)).logits.float().cpu()


def outputs(model: torch.nn.Module) -> Outputs:
    """What a model says on INPUTS, at every position; the token after a row's last is its first."""
    return Outputs(logits(model).flatten(0, 1), INPUTS.roll(-1, 1).flatten())


def batches(n: int) -> list[list[MicroBatch]]:
    generator = torch.Generator().manual_seed(3)

    def row(i: int) -> tuple[str, list[int], list[int]]:
        tokens = torch.randint(1, 400, (9 + i,), generator=generator).tolist()
        return f"row-{i}", tokens[:6], tokens[6:]

    return [[collate([row(i) for i in range(4)])] for _ in range(n)]


def tune_with(batches: list[list[MicroBatch]]) -> Callable[[Chain, Link], None]:
    def tune_link(chain: Chain, link: Link) -> None:
        mine = batches[link.first_step : link.last_step]
        tune(chain.model, link, mine, Accelerator(), lambda step, _: None, **ADAMW)

    return tune_link


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_extend_changes_no_output() -> None:
    model = tiny_model()
    before = logits(model)
    extend(chain_of(model), link(), no_gradients)
    assert torch.equal(logits(model), before)


def test_a_fresh_pair_receives_gradient() -> None:
    # Guitaricet/relora issue 18: with A = 0 beside B = 0 nothing would ever train.
    model = tiny_model()
    extend(chain_of(model), link(), no_gradients)
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 7  # A and B on seven linear layers of two blocks
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "lora_B" in name)


def test_the_frozen_weights_do_not_move_while_tuning() -> None:
    model = tiny_model()
    before = weights(model)
    chain = chain_of(model)
    extend(chain, link(), no_gradients)
    tune_with(batches(5))(chain, link())
    after = {name.replace(".base_layer", ""): t for name, t in weights(model).items() if "lora_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_knot_changes_no_output_beyond_rounding() -> None:
    model = tiny_model()
    chain = chain_of(model)
    extend(chain, link(), no_gradients)
    tune_with(batches(5))(chain, link())
    before = logits(model)
    start = logits(tiny_model())
    drift = tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=False).drift
    after = logits(model)
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * before.abs().max())
    assert drift.max_logit_change == pytest.approx((after - before).abs().max().item())
    assert 0 < drift.relative < 1e-5
    assert drift.of_learned == pytest.approx(((after - before).norm() / (before - start).norm()).item())
    assert drift.of_learned < 1e-4
    assert (before - logits(tiny_model())).abs().max() > 1e-2  # something was learned at all


def test_after_a_knot_the_model_is_plain_again() -> None:
    model = tiny_model()
    names = list(model.state_dict())
    for _ in run_chain(chain_of(model), [link()], tune_with(batches(5)), outputs, no_gradients):
        pass
    assert list(model.state_dict()) == names
    assert not hasattr(model, "peft_config")
    assert adapters.trainable(model) == []


def test_the_rank_of_the_total_update_is_the_sum_of_the_links_ranks() -> None:
    model = tiny_model()
    links = [link(rank=r, first_step=5 * i, seed=i) for i, r in enumerate((2, 3, 1))]
    for _ in run_chain(chain_of(model), links, tune_with(batches(15)), outputs, no_gradients):
        pass
    name = "model.layers.0.mlp.up_proj.weight"
    delta = (model.state_dict()[name] - tiny_model().state_dict()[name]).double()
    singular = torch.linalg.svdvals(delta)
    assert int((singular > 1e-5 * singular[0]).sum()) == 2 + 3 + 1


def test_a_chain_of_one_link_is_pefts_lora_step_for_step() -> None:
    rates = tuple(1e-2 * (1 - i / 8) for i in range(8))
    data = batches(8)
    losses: list[float] = []
    model = tiny_model()
    chain = chain_of(model)
    own = link(learning_rates=rates)
    extend(chain, own, no_gradients)
    tune(model, own, data, Accelerator(), lambda step, _: losses.append(step.loss), **ADAMW)

    torch.manual_seed(own.seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = get_peft_model(tiny_model(), config)
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    expected = []
    for rate, [batch] in zip(rates, data, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        labels = torch.full_like(batch.input_ids_BT, -100)
        labels[:, 1:][batch.predicts_BT[:, :-1]] = batch.targets_N
        loss = reference(input_ids=batch.input_ids_BT, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(logits(model), logits(reference), atol=1e-4)

    tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=False)
    merged = reference.merge_and_unload()
    assert torch.allclose(logits(model), logits(merged), atol=1e-4)


def test_a_chain_of_three_gives_the_losses_of_the_flat_loop_in_plain_peft() -> None:
    data = batches(12)
    links = [link(first_step=4 * i, learning_rates=(1e-2,) * 4, seed=i + 1) for i in range(3)]
    losses: list[float] = []

    def tune_link(chain: Chain, own: Link) -> None:
        mine = data[own.first_step : own.last_step]
        settings = {**ADAMW, "weight_decay": 0.0}
        tune(chain.model, own, mine, Accelerator(), lambda step, _: losses.append(step.loss), **settings)

    model = tiny_model()
    knots = list(run_chain(chain_of(model), links, tune_link, outputs, no_gradients))
    assert len(knots) == 3

    flat = runpy.run_path(str(Path(__file__).parent.parent / "recipes/flat_loop.py"))["chain_of_loras"]
    labelled = []
    for [batch] in data:
        labels = torch.full_like(batch.input_ids_BT, -100)
        labels[:, 1:][batch.predicts_BT[:, :-1]] = batch.targets_N
        labelled.append((batch.input_ids_BT, labels))
    parts = [labelled[0:4], labelled[4:8], labelled[8:12]]
    reference, expected = flat(tiny_model(), parts, seeds=[1, 2, 3], rank=4, alpha=8, learning_rate=1e-2)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(logits(model), logits(reference), atol=1e-3)


def test_a_knot_adds_to_the_pristine_base_and_not_to_the_rounded_sum() -> None:
    # Sixteen knots of 0.1 % of ||W|| in bfloat16: adding each to the rounded sum loses most of the update
    # (a naive loop is run beside it), from the pristine base it is rounded once.
    model = tiny_model().to(torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj"
    chain = chain_of(model)
    chain.base.remember([name])
    start = chain.base.weight(name).float()
    naive = start.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        A = torch.randn(4, 32, generator=generator)
        B = torch.randn(32, 4, generator=generator)
        scale = (1e-3 * start.norm() / (B @ A).norm()).item()
        chain.learned.append({name: residual.Pair(A, B, scale)})
        residual.write(model, chain.base, chain.learned, [name])
        naive = (naive.float() + scale * B @ A).to(torch.bfloat16)
    B_OK, A_KI, _ = residual.factors(chain.learned, name)
    total = B_OK @ A_KI
    exact = (start + total).to(torch.bfloat16)
    assert torch.equal(model.get_submodule(name).weight, exact)
    assert (naive.float() - start - total).norm() > 1.5 * (exact.float() - start - total).norm()


def test_the_base_is_read_from_its_file_and_copied_only_where_it_differs(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base = Base(model, [tmp_path / "model.safetensors"])
    changed, kept = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(changed).weight.add_(1.0)
    base.remember([changed, kept])
    assert list(base._copies) == [changed]
    assert torch.equal(base.weight(changed), model.get_submodule(changed).weight)
    assert torch.equal(base.weight(kept), load_file(tmp_path / "model.safetensors")[f"{kept}.weight"])


def test_a_knot_that_drifts_is_an_error() -> None:
    model = tiny_model()
    chain = chain_of(model)

    def tune_and_spoil(chain: Chain, own: Link) -> None:
        tune_with(batches(5))(chain, own)
        chain.base._copies["model.layers.0.mlp.up_proj"] += 0.01  # as if the base were not the one trained on

    [knot] = run_chain(chain, [link()], tune_and_spoil, outputs, no_gradients)
    with pytest.raises(KnotDrift, match=r"a knot moved a logit by .* where 0\.0001 is allowed \(knot\.max_drift\)"):
        knot.drift.check(1e-4)


def test_a_knot_that_gives_no_number_is_an_error() -> None:
    start, before, nan = (Outputs(torch.full((2, 2), n), torch.zeros(2).long()) for n in (0.0, 1.0, torch.nan))
    with pytest.raises(KnotDrift):
        Drift.between(start, before, nan).check(0.1)


def test_the_scale_alpha_over_rank_is_merged() -> None:
    # Yu-val-weiss/relora-pico merges B A without it and throws half of each link away.
    model = tiny_model()
    chain = chain_of(model)
    extend(chain, link(rank=2, alpha=32.0, target_modules=["q_proj"]), no_gradients)
    tune_with(batches(5))(chain, link())
    pair = adapters.read_pair(model)["model.layers.0.self_attn.q_proj"]
    tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = model.state_dict()[name] - tiny_model().state_dict()[name]
    assert torch.allclose(delta, 16 * pair.B_OR @ pair.A_RI, atol=1e-6)


def test_conv1d_weights_of_gpt2_are_merged_in_their_own_layout() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    before = logits(model)
    knots = list(run_chain(chain_of(model), [link()], tune_with(batches(5)), outputs, no_gradients))
    assert len(knots[0].weights) == 2 * 4  # c_attn, c_proj, c_fc, c_proj of two blocks; never the tied head
    assert (logits(model) - before).abs().max() > 1e-2


def test_the_first_draw_does_not_depend_on_the_global_generator() -> None:
    pairs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        torch.rand(noise)
        model = tiny_model()
        adapters.attach(model, link().settings, link().seed)
        state = torch.random.get_rng_state()
        pairs.append(adapters.read_pair(model)["model.layers.0.mlp.up_proj"].A_RI)
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(*pairs)
    other = tiny_model()
    adapters.attach(other, link().settings, seed=8)
    assert not torch.equal(pairs[0], adapters.read_pair(other)["model.layers.0.mlp.up_proj"].A_RI)


def test_a_saved_knot_is_a_peft_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    chain = chain_of(model)
    extend(chain, link(), no_gradients)
    tune_with(batches(5))(chain, link())
    expected = logits(model)
    adapter_files.save(tmp_path, model, link().settings, "some/base", tiny_model())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.allclose(logits(loaded), expected, atol=1e-6)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_a_knot_on_some_of_the_layers_is_saved_for_those_alone(tmp_path: Path) -> None:
    model = tiny_model()
    chain = chain_of(model)
    one = "model.layers.1.mlp.up_proj"
    extend(chain, link(target_modules=[one]), no_gradients)
    tune_with(batches(5))(chain, link())
    expected = logits(model)
    adapter_files.save(tmp_path, model, link().settings, "some/base", tiny_model())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [one]
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected, atol=1e-6)


def test_target_modules_that_match_nothing_are_named_with_what_there_is() -> None:
    with pytest.raises(
        ModelError, match=r"'q_prj' matches no linear layer; did you mean q_proj\? the model has .*v_proj"
    ):
        target_names(tiny_model(), link(target_modules=["v_proj", "q_prj"]).settings.target_modules)


def test_a_tied_head_cannot_be_a_target() -> None:
    model = Qwen2ForCausalLM(tiny_config(tie_word_embeddings=True))
    with pytest.raises(ModelError, match="shares its matrix with the input embeddings"):
        target_names(model, link(target_modules=["lm_head"]).settings.target_modules)


def test_full_fine_tuning_is_a_link_that_leaves_no_pair() -> None:
    model = tiny_model()
    before = weights(model)
    full = link(method="full", learning_rates=(1e-3,) * 5)
    [knot] = run_chain(chain_of(model), [full], tune_with(batches(5)), outputs, no_gradients)
    assert knot.weights == {}
    assert knot.drift.relative == 0.0
    assert all(not torch.equal(before[name], after) for name, after in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pair_on_a_half_precision_base_is_trained_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    chain = chain_of(model)
    extend(chain, link(), no_gradients)
    assert {p.dtype for p in adapters.trainable(model)} == {torch.float32}
    tune_with(batches(5))(chain, link())
    knot = tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert 0 < knot.drift.relative < 0.1


def test_the_loss_gradient_does_not_depend_on_the_micro_batches() -> None:
    rows = [(f"r{i}", [1, 2, 3], [4] * (1 + i)) for i in range(4)]
    whole = [[collate(rows)]]
    pieces = [[collate([row]) for row in rows]]
    results = []
    for data in (whole, pieces):
        model = tiny_model()
        extend(chain_of(model), link(), no_gradients)
        steps: list[float] = []
        tune(
            model,
            link(learning_rates=(1e-2,)),
            data,
            Accelerator(),
            lambda s, _, steps=steps: steps.append(s.loss),
            **ADAMW,
        )
        results.append((steps[0], adapters.read_pair(model)["model.layers.1.mlp.down_proj"].B_OR))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)
    # and it is transformers' own mean over target tokens
    [[batch]] = whole
    model = tiny_model()
    every = model(input_ids=batch.input_ids_BT).logits[:, :-1]
    expected = cross_entropy(every[batch.predicts_BT[:, :-1]], batch.targets_N).item()
    assert results[0][0] == pytest.approx(expected, rel=1e-5)
