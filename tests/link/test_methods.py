"""Every method against PEFT, bitsandbytes' paper or a formula. Run: pytest tests/link/test_methods.py"""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ROUNDING, tiny_config, tiny_model, tiny_tokenizer
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from test_chain import INPUTS, batches, logits, outputs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, relu, silu
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from cola.chain import Chain, extend, run_chain, tie_knot
from cola.data.batches import MicroBatch, collate
from cola.data.encode import Example
from cola.errors import ModelError, NoGradient, NonFiniteLoss, RecipeError
from cola.link import adapter_files, adapters, starts
from cola.link.base import Base, shape_of
from cola.link.forward import logits_at
from cola.link.ideas.gradient import gradient_flops, top_right_vectors
from cola.link.ideas.work import Shape
from cola.link.model import Source
from cola.link.targets import target_names
from cola.link.train import full_gradients, tune
from cola.measure.cost import Meter
from cola.measure.evaluate import Evaluator
from cola.measure.likelihood import choice_nats
from cola.plan.tree import Budget
from cola.recipe.methods import Settings, settings_of
from cola.recipe.plan import Job, Link
from cola.recipe.read import read_recipe
from cola.recipe.resolved import Rules

ADAMW = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Gradients = starts.Gradients


def what(method: str = "lora", **settings: Any) -> Settings:
    small = {"rank": 4, "alpha": 8.0} if method == "lora" else {}
    return settings_of({"method": method, **small, **settings})


def link(method: str = "lora", n_steps: int = 6, first_step: int = 0, seed: int = 7, **settings: Any) -> Link:
    rates = tuple(1e-2 * (1 - i / (2 * n_steps)) for i in range(n_steps))
    return Link(settings=what(method, **settings), knot=None, first_step=first_step, learning_rates=rates, seed=seed)


def links(n: int, **settings: Any) -> list[Link]:
    return [link(first_step=6 * i, seed=7 + i, **settings) for i in range(n)]


def gradients(model: PreTrainedModel, own: Link, names: Sequence[str]) -> dict[str, Tensor]:
    return full_gradients(model, names, batches(own.last_step)[own.first_step :], Accelerator())


def chain_of(model: PreTrainedModel, base: Base | None = None) -> Chain:
    return Chain(model, base or Base(model), Rules())


def tuner(losses: list[float] | None = None, accelerator: Accelerator | None = None) -> Callable[[Chain, Link], None]:
    def tune_link(chain: Chain, own: Link) -> None:
        mine = batches(own.last_step)[own.first_step :]
        note = [] if losses is None else losses
        tune(chain.model, own, mine, accelerator or Accelerator(), lambda step, _: note.append(step.loss), **ADAMW)

    return tune_link


def loss_of(model: nn.Module, batch: MicroBatch) -> Tensor:
    """transformers' own mean loss over the target tokens."""
    labels = torch.full_like(batch.input_ids_BT, -100)
    labels[:, 1:][batch.predicts_BT[:, :-1]] = batch.targets_N
    return model(input_ids=batch.input_ids_BT, labels=labels).loss


def train_plainly(model: nn.Module, own: Link, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The loop of a PEFT tutorial, over the same batches and learning rates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    ratios = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for rate, [batch] in zip(own.learning_rates, batches(len(own.learning_rates)), strict=True):
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = rate * ratio
        loss = loss_of(model.train(), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def close(ours: Tensor, reference: Tensor, relative: float = 1e-5) -> bool:
    return (ours - reference).abs().max().item() <= relative * reference.abs().max().item()


# ---------------------------------------------------------------------------------------------------------
# LoRA and its variants

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "gaussian": {"init": "gaussian"},
    "PiSSA": {"init": "pissa"},
    "LoRA+": {"loraplus_lr_ratio": 8.0},
    "LoRA+ and DoRA": {"loraplus_lr_ratio": 8.0, "use_dora": True},
    "DoRA, rsLoRA and PiSSA": {"use_dora": True, "use_rslora": True, "init": "pissa"},
    "q and v alone": {"target_modules": ["q_proj", "v_proj"]},
}


def plain_peft(settings: dict[str, Any], seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=settings.get("target_modules", "all-linear"),
        init_lora_weights=settings.get("init", True),
        use_rslora=settings.get("use_rslora", False),
        use_dora=settings.get("use_dora", False),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(tiny_model(), config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_pefts_step_for_step_and_tied_it_is_pefts_merge(variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    own, losses, model = link(**settings), [], tiny_model()
    chain = chain_of(model)
    extend(chain, own, gradients)
    tuner(losses)(chain, own)
    trained = logits(chain.model)
    adapter_files.save(tmp_path, chain.model, own.settings, "some/base", tiny_model())
    tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=False)

    reference = plain_peft(settings, own.seed)
    optimizer = None
    if ratio := settings.get("loraplus_lr_ratio"):
        decay = {"loraplus_weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
        optimizer = create_loraplus_optimizer(reference, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio, **decay)
    assert losses == pytest.approx(train_plainly(reference, own, optimizer), rel=1e-5)
    assert losses[-1] != losses[0]
    assert close(trained, logits(reference), 1e-4)
    assert close(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), trained)
    merged = reference.merge_and_unload()
    assert close(logits(chain.model), trained)
    for name, weight in merged.state_dict().items():
        assert close(chain.model.state_dict()[name], weight, 1e-4), name
    assert (trained - logits(tiny_model())).abs().max() > 1e-2


def test_the_variants_differ_from_each_other() -> None:
    found = []
    for settings in VARIANTS.values():
        chain, own = chain_of(tiny_model()), link(**settings)
        extend(chain, own, gradients)
        tuner()(chain, own)
        found.append(logits(chain.model))
    assert all(not close(a, b, 1e-3) for i, a in enumerate(found) for b in found[:i])


CHAINS = {name: VARIANTS[name] for name in ("DoRA", "PiSSA", "DoRA, rsLoRA and PiSSA")} | {
    "orthogonal": {"init": "orthogonal"},
    "gradient": {"init": "gradient", "init_batches": 2},
}


@pytest.mark.parametrize("variant", CHAINS)
def test_a_chain_of_three_moves_no_output_where_a_link_begins_or_ends(variant: str) -> None:
    model = tiny_model()
    chain = chain_of(model)
    for own in links(3, **CHAINS[variant]):
        start = outputs(chain.model)
        extend(chain, own, gradients)
        begun = outputs(chain.model)
        assert close(begun.logits_NV, start.logits_NV, ROUNDING)
        tuner()(chain, own)
        knot = tie_knot(chain, start, outputs, more_to_come=True)
        assert knot.drift.relative < ROUNDING
        assert knot.drift.of_learned < 2e-5
    assert adapters.pair_layers(model) == {}


@pytest.mark.parametrize("variant", ["DoRA", "PiSSA", "DoRA, rsLoRA and PiSSA"])
def test_a_chain_of_a_variant_is_pefts_merge_repeated(variant: str, tmp_path: Path) -> None:
    chain, folders = chain_of(tiny_model()), []

    def tune_and_save(chain: Chain, own: Link) -> None:
        tuner()(chain, own)
        folders.append(tmp_path / str(own.first_step))
        adapter_files.save(folders[-1], chain.model, own.settings, "some/base", tiny_model())

    knots = list(run_chain(chain, links(3, **VARIANTS[variant]), tune_and_save, outputs, gradients))
    model: Any = tiny_model()
    for folder, knot in zip(folders, knots, strict=True):
        before = copy.deepcopy(model)
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        name = "model.layers.1.mlp.down_proj"
        old, new = (m.get_submodule(name).weight for m in (before, model))
        size = ((new - old).norm() / tiny_model().get_submodule(name).weight.norm()).item()
        assert knot.applied[name].relative_size == pytest.approx(size, rel=1e-3)
    for name, weight in model.state_dict().items():
        assert close(chain.model.state_dict()[name], weight, 1e-5), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_pissa_takes_out_the_top_of_the_weight(use_dora: bool) -> None:
    chain = chain_of(tiny_model())
    extend(chain, link(init="pissa", use_dora=use_dora), gradients)
    name = "model.layers.0.mlp.up_proj"
    frozen = chain.model.get_submodule(name).base_layer.weight
    expected = torch.linalg.svdvals(tiny_model().get_submodule(name).weight.double())
    assert torch.linalg.svdvals(frozen.double())[0].item() == pytest.approx(expected[4].item(), rel=1e-4)


def test_a_pissa_link_that_is_put_back_is_the_one_that_was_kept(tmp_path: Path) -> None:
    chain, own = chain_of(tiny_model()), links(2, init="pissa")
    list(run_chain(chain, own[:1], tuner(), outputs, gradients))
    extend(chain, own[1], gradients)
    tuner()(chain, own[1])
    adapter_files.save(tmp_path, chain.model, own[1].settings, "some/base", tiny_model())
    again = chain_of(tiny_model())
    list(run_chain(again, own[:1], tuner(), outputs, gradients))
    extend(again, own[1], gradients)
    adapter_files.put_back(tmp_path, again.model, own[1].settings)
    starts.hold_out(again.model, again.base, again.learned)
    assert torch.equal(logits(again.model), logits(chain.model))


# ---------------------------------------------------------------------------------------------------------
# Starts


def test_orthogonal_rows_have_nothing_in_common_with_the_rows_of_earlier_links() -> None:
    chain, seen = chain_of(tiny_model()), []

    def watch(chain: Chain, own: Link) -> None:
        seen.append({name: pair.A_RI.double() for name, pair in adapters.read_pair(chain.model).items()})
        tuner()(chain, own)

    list(run_chain(chain, links(3, init="orthogonal"), watch, outputs, gradients))
    default = chain_of(tiny_model())
    extend(default, links(1)[0], gradients)
    for name, first in seen[0].items():
        assert torch.equal(first.float(), adapters.read_pair(default.model)[name].A_RI)  # nothing is before it
        for number in (1, 2):
            fresh = seen[number][name]
            for earlier in chain.learned[:number]:
                assert (fresh @ earlier[name].A_RI.double().T).abs().max() < 1e-6
            # Orthonormal but for the length of PEFT's rows: E|a|^2 = I * (1 / I) / 3 for entries of U(-I^-1/2, I^-1/2).
            assert torch.allclose(fresh @ fresh.T, torch.eye(4, dtype=torch.float64) / 3, atol=1e-6)


def true_gradients(model: PreTrainedModel, names: Sequence[str], data: list[list[MicroBatch]]) -> dict[str, Tensor]:
    """autograd's, of the unfrozen base weights with everything that is attached."""
    weights = {name: getattr(m := model.get_submodule(name), "base_layer", m).weight for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = sum(batch.n_targets for group in data for batch in group)
    loss = sum(loss_of(model.eval(), batch) * batch.n_targets for group in data for batch in group) / total
    found = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_gradients_are_autograds(trained_before: bool, checkpointing: bool) -> None:
    chain, own = chain_of(tiny_model()), link()
    if checkpointing:
        chain.model.activation_checkpointing_enable({"use_reentrant": False})
    extend(chain, own, gradients)
    if trained_before:  # a pair that adds something of its own
        tuner()(chain, own)
    names = list(adapters.pair_layers(chain.model))
    data = [group[0:1] for group in batches(3)]
    before = {name: p.clone() for name, p in chain.model.named_parameters()}
    found = full_gradients(chain.model, names, data, Accelerator())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in chain.model.named_parameters())
    expected = true_gradients(chain.model, names, data)
    assert len(expected) == 14
    assert found.keys() == expected.keys()
    assert all(close(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])
def test_full_gradients_in_float16_are_those_of_float32_however_small_or_large_they_are(size: float) -> None:
    """The head's size is that of what goes back into a float16 model: 1e-6 of it, of which float16 keeps little, or so
    much that a loss which is scaled for small ones overflows."""
    model = tiny_model()
    model.lm_head.weight.mul_(size)
    model = adapters.attach(model.half(), what(), 0)
    names = list(adapters.pair_layers(model))
    expected = true_gradients(copy.deepcopy(model).float(), names, batches(2))
    found = full_gradients(model, names, batches(2), Accelerator())
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert close(found[name], gradient, 0.02), name


def test_a_full_gradient_that_is_not_finite_is_an_error_that_says_so() -> None:
    model = tiny_model()
    model.lm_head.weight.mul_(1e9)
    model = adapters.attach(model.half(), what(), 0)
    with pytest.raises(NonFiniteLoss, match="init: gradient: the full gradient of the link's first batches"):
        full_gradients(model, list(adapters.pair_layers(model)), batches(2), Accelerator())


def test_a_gradient_start_reads_along_the_top_of_the_full_gradient() -> None:
    chain = chain_of(tiny_model())
    list(run_chain(chain, links(1), tuner(), outputs, gradients))
    before = logits(chain.model)
    names = target_names(chain.model, what().target_modules)
    expected = true_gradients(chain.model, names, batches(12)[6:8])

    def two(model: PreTrainedModel, _own: Link, names: Sequence[str]) -> dict[str, Tensor]:
        return full_gradients(model, names, batches(12)[6:8], Accelerator())

    extend(chain, link(init="gradient", init_batches=2, first_step=6), two)
    assert torch.equal(logits(chain.model), before)
    for name, pair in adapters.read_pair(chain.model).items():
        rows = math.sqrt(3) * pair.A_RI.double()
        top = torch.linalg.svd(expected[name].double()).Vh[:4]
        assert not pair.B_OR.any()
        assert torch.allclose(rows.T @ rows, top.T @ top, atol=1e-4), name
    # The first gradient of B is s G A^T: with s = 2, its singular values are 2 / sqrt 3 of the gradient's first four.
    loss = loss_of(chain.model, batches(12)[6][0])
    loss.backward()
    assert all(p.grad is not None for p in adapters.trainable(chain.model))


@pytest.mark.parametrize("shape", [(40, 30), (30, 400), (500, 200)])
def test_top_right_vectors_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 25, generator=generator, dtype=torch.float64)).Q for n in shape)
    matrix = (left * 0.8 ** torch.arange(25)) @ right.T + 1e-3 * torch.randn(shape, generator=generator)
    rows = top_right_vectors(matrix.float(), 4, torch.Generator().manual_seed(1)).double()
    top = torch.linalg.svd(matrix).Vh[:4]
    assert torch.allclose((rows @ top.T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-4)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()  # one sign, whatever the library gives


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": "orthogonal", "rank": 12}, r"link 3 has rank 12 and the links before it take 24 of the 32"),
        ({"init": "pissa", "rank": 20}, r"k_proj is 16 x 32 and has 16 singular vectors"),
        ({"init": "gradient", "rank": 17}, r"k_proj is 16 x 32 and has 16 singular vectors"),
    ],
)
def test_a_start_that_has_no_room_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        starts.check_room(tiny_model(), [what(**settings)] * 3)
    starts.check_room(tiny_model(), [what(**{**settings, "rank": 8})] * 3)


# ---------------------------------------------------------------------------------------------------------
# Bottleneck adapters


def llama() -> PreTrainedModel:
    config = tiny_config()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    torch.manual_seed(0)
    settings = {key: getattr(config, key) for key in keys}
    model = LlamaForCausalLM(LlamaConfig(**settings, num_key_value_heads=2, initializer_range=0.2))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("make", [tiny_model, llama])
@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_bottleneck_is_the_formula(make: Callable[[], PreTrainedModel], placement: str, activation: str) -> None:
    own = link("adapter", bottleneck=5, placement=placement, activation=activation)
    chain, before = chain_of(make()), logits(make())
    extend(chain, own, gradients)
    assert torch.equal(logits(chain.model), before)
    tuner()(chain, own)
    tuned = logits(chain.model)
    assert not close(tuned, before, 1e-2)

    f = {"relu": relu, "gelu": gelu, "silu": silu}[activation]
    weights = {name: p.detach() for name, p in chain.model.named_parameters()}
    reference, n_places = make(), 0
    for number, layer in enumerate(reference.model.layers):
        for kind in ("self_attn", "mlp") if placement == "houlsby" else ("mlp",):
            parts = [f"model.layers.{number}.{kind}.bottleneck.{part}" for part in ("down", "up")]
            D, d, U, u = (weights[f"{part}.{key}"] for part in parts for key in ("weight", "bias"))
            assert (D.shape, U.shape) == ((5, 32), (32, 5))
            n_places += 1

            def apply(_module: Any, _args: Any, out: Any, D=D, d=d, U=U, u=u) -> Any:
                h = out[0] if isinstance(out, tuple) else out
                h = h + f(h @ D.T + d) @ U.T + u
                return (h, *out[1:]) if isinstance(out, tuple) else h

            getattr(layer, kind).register_forward_hook(apply)
    assert close(tuned, logits(reference))
    moved = [name for name, p in make().named_parameters() if not torch.equal(p, weights[name])]
    assert moved == []
    n_each = 32 * 5 + 5 + 5 * 32 + 32
    assert (
        adapters.count_parameters(make(), own.settings)
        == n_places * n_each
        == (4 if placement == "houlsby" else 2) * n_each
    )


def test_bottlenecks_are_put_back_as_they_were_kept(tmp_path: Path) -> None:
    own, chain = link("adapter", bottleneck=5), chain_of(tiny_model())
    extend(chain, own, gradients)
    tuner()(chain, own)
    adapter_files.save(tmp_path, chain.model, own.settings, "some/base", tiny_model())
    again = chain_of(tiny_model())
    extend(again, own, gradients)
    adapter_files.put_back(tmp_path, again.model, own.settings)
    assert torch.equal(logits(again.model), logits(chain.model))
    assert json.loads((tmp_path / "bottleneck.json").read_text())["bottleneck"] == 5


def test_a_model_without_self_attn_and_mlp_takes_no_bottlenecks() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    with pytest.raises(ModelError, match="no self_attn and mlp"):
        adapters.attach(model, what("adapter"), 0)


# ---------------------------------------------------------------------------------------------------------
# Virtual tokens

VIRTUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("prefix", {"num_virtual_tokens": 5}),
    "projected prefix": ("prefix", {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 24}),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 5, "encoder_hidden_size": 24}),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 5}),
}
CONFIGS = {"prefix": PrefixTuningConfig, "p_tuning": PromptEncoderConfig, "prompt_tuning": PromptTuningConfig}


def plain_virtual(name: str, seed: int) -> PeftModel:
    method, settings = VIRTUAL[name]
    torch.manual_seed(seed)
    return get_peft_model(tiny_model(), CONFIGS[method](task_type="CAUSAL_LM", **settings))


def examples(n: int, n_choices: int = 3, prompt: int | None = None) -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 400, (length,), generator=generator).tolist()

    return [
        Example(
            id=str(i),
            prompt=tokens(prompt or 3 + 2 * i),
            answers=[tokens(1 + (i + c) % 3) for c in range(n_choices)],
            gold=0,
            texts=["no such text"] * n_choices,
            group=None,
        )
        for i in range(n)
    ]


@torch.no_grad()
def row_logits(model: nn.Module, tokens: list[int]) -> Tensor:
    """The logits of one row's own positions, without cache or padding."""
    return model.eval()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -len(tokens) :].float()


@pytest.fixture(scope="module", params=VIRTUAL)
def virtual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Any]:
    """A trained model with virtual tokens; the same trained by PEFT; the saved one loaded by PEFT."""
    method, settings = VIRTUAL[request.param]
    own, losses, chain = link(method, **settings), [], chain_of(tiny_model())
    extend(chain, own, gradients)
    tuner(losses)(chain, own)
    folder = tmp_path_factory.mktemp("virtual")
    adapter_files.save(folder, chain.model, own.settings, "some/base", tiny_model())
    reference = plain_virtual(request.param, own.seed)
    assert losses == pytest.approx(train_plainly(reference, own), rel=1e-5)
    return request.param, chain.model, reference, PeftModel.from_pretrained(tiny_model(), folder)


def test_virtual_tokens_are_trained_saved_and_read_as_pefts(virtual: tuple[str, Any, Any, Any]) -> None:
    _, model, trained_by_peft, loaded_by_peft = virtual
    rows = [e.prompt for e in examples(4)]
    batch = collate([(str(i), row[:1], row[1:]) for i, row in enumerate(rows)])
    with torch.no_grad():
        ours = logits_at(model, batch.input_ids_BT, batch.predicts_BT)
    for reference in (loaded_by_peft, trained_by_peft):
        expected = torch.cat([row_logits(reference, row)[:-1] for row in rows])
        assert close(ours, expected, 1e-4 if reference is trained_by_peft else 1e-5)
    plain = torch.cat([row_logits(tiny_model(), row)[:-1] for row in rows])
    assert not close(ours, plain, 1e-2)


@pytest.mark.parametrize("longest", [1, 3])
def test_choices_after_virtual_tokens_are_what_whole_rows_give(virtual: tuple, longest: int) -> None:
    _, model, _, reference = virtual
    rows = examples(4, prompt=6 if longest > 1 else None)
    if longest == 1:
        for example in rows:
            example.answers[:] = [answer[:1] for answer in example.answers]
    with torch.no_grad():
        ours = choice_nats(model.eval(), rows)
    for example, nats in zip(rows, ours, strict=True):
        for answer, found in zip(example.answers, nats, strict=True):
            own = row_logits(reference, [*example.prompt, *answer])[len(example.prompt) - 1 : -1]
            assert found == pytest.approx(cross_entropy(own, torch.tensor(answer), reduction="sum").item(), rel=1e-5)


def test_greedy_decoding_after_virtual_tokens_is_the_argmax_of_whole_rows(virtual: tuple) -> None:
    # Left padding would lie between the virtual tokens and a shorter prompt.
    _, model, _, reference = virtual
    tokenizer, rows = tiny_tokenizer(), examples(6, n_choices=1)
    ours = Evaluator("answer", tokenizer, [], 4096, nullcontext, 4)(model, rows)
    for example, score in zip(rows, ours, strict=True):
        tokens = list(example.prompt)
        for _ in range(4 + 4):
            tokens.append(int(row_logits(reference, tokens)[-1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert score.prediction == tokenizer.decode(tokens[len(example.prompt) :], skip_special_tokens=True)
    assert len({score.prediction for score in ours}) > 1


def test_what_an_evaluator_says_of_choices_and_losses_after_virtual_tokens(virtual: tuple) -> None:
    _, model, _, reference = virtual
    rows = examples(5)
    for task in ("multiple_choice", "text"):
        for example, score in zip(
            rows, Evaluator(task, tiny_tokenizer(), [], 64, nullcontext, 4)(model, rows), strict=True
        ):
            answer = example.answers[0]
            own = row_logits(reference, [*example.prompt, *answer])[len(example.prompt) - 1 : -1]
            assert score.nats == pytest.approx(
                cross_entropy(own, torch.tensor(answer), reduction="sum").item(), rel=1e-5
            )


# ---------------------------------------------------------------------------------------------------------
# Full fine-tuning


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("freeze", [[], ["embeddings"], ["head"], ["embeddings", "head"]])
def test_what_full_fine_tuning_freezes_stays(tied: bool, freeze: list[str]) -> None:
    chain = chain_of(tiny_model(tie_word_embeddings=tied))
    own = link("full", freeze=freeze)
    extend(chain, own, gradients)
    assert adapters.count_parameters(tiny_model(tie_word_embeddings=tied), own.settings) == sum(
        p.numel() for p in chain.model.parameters() if p.requires_grad
    )
    tuner()(chain, own)
    before = tiny_model(tie_word_embeddings=tied).state_dict()
    names = {"embeddings": "model.embed_tokens.weight", "head": "lm_head.weight"}
    still = {names[part] for part in freeze} | (set(names.values()) if tied and freeze else set())
    moved = {name for name, weight in chain.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == set(before) - still


# ---------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainable_parameters_are_counted_as_peft_does(variant: str) -> None:
    with torch.device("meta"):
        skeleton = Qwen2ForCausalLM(tiny_config())
    expected = plain_peft(VARIANTS[variant], 0).get_nb_trainable_parameters()[0]
    assert adapters.count_parameters(skeleton, what(**VARIANTS[variant])) == expected
    for name, (method, settings) in VIRTUAL.items():
        expected = plain_virtual(name, 0).get_nb_trainable_parameters()[0]
        assert adapters.count_parameters(skeleton, what(method, **settings)) == expected


@pytest.mark.parametrize("variant", ["default", "DoRA"])
def test_pairs_beside_a_transposed_matrix_are_counted_as_they_are_put_there(variant: str) -> None:
    settings = what(**VARIANTS[variant])
    with torch.device("meta"):
        skeleton = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    counted = adapters.count_parameters(skeleton, settings)
    assert counted == sum(p.numel() for p in adapters.trainable(adapters.attach(skeleton, settings, 0)))


@pytest.mark.slow
def test_bitsandbytes_is_loaded_for_codes_alone_and_peft_sees_it_then() -> None:
    code = (
        "import sys\n"
        "from conftest import tiny_model\n"
        "from cola.link import adapters\n"
        "from cola.recipe.methods import settings_of\n"
        "lora = settings_of({'method': 'lora', 'rank': 2, 'alpha': 4})\n"
        "assert adapters.pair_layers(adapters.attach(tiny_model(), lora, 0))\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "from transformers.utils import is_bitsandbytes_available\n"
        "assert is_bitsandbytes_available()\n"
        "import bitsandbytes, torch\n"  # as what loads codes does
        "model = tiny_model()\n"
        "attention = model.model.layers[0].self_attn\n"
        "attention.q_proj = bitsandbytes.nn.Linear4bit(32, 32)\n"
        "model.is_loaded_in_4bit = True\n"
        "lora = settings_of({'method': 'lora', 'rank': 2, 'alpha': 4, 'target_modules': ['q_proj']})\n"
        "adapters.attach(model, lora, 0)\n"
        "assert type(attention.q_proj).__module__ == 'peft.tuners.lora.bnb', type(attention.q_proj)\n"
    )
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tests)
    assert done.returncode == 0, done.stderr


COSTED: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("lora", {}),
    "q and v": ("lora", {"target_modules": ["q_proj", "v_proj"]}),
    "down_proj of the last layer": ("lora", {"target_modules": ["model.layers.1.mlp.down_proj"]}),
    "head": ("lora", {"target_modules": ["lm_head"]}),
    "full": ("full", {}),
    "full without head": ("full", {"freeze": ["head"]}),
    "full without embeddings": ("full", {"freeze": ["embeddings"]}),
    "adapter": ("adapter", {"bottleneck": 6, "placement": "houlsby"}),
    "prefix": ("prefix", {"num_virtual_tokens": 5}),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 5}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", COSTED)
def test_flops_are_those_that_pytorch_counts_on_the_real_model(case: str, tied: bool) -> None:
    method, settings = COSTED[case]
    if tied and case == "head":
        pytest.skip("a tied head takes no pair")
    own = link(method, **settings)
    with torch.device("meta"):
        skeleton = Qwen2ForCausalLM(tiny_config(tie_word_embeddings=tied))
    rows = [(7, 2), (19, 5), (30, 1)]
    costs = Meter(skeleton, rows, False).steps(own, [[0], [1, 2]], 0)
    model = adapters.attach(tiny_model(tie_word_embeddings=tied), own.settings, 0)
    counted = []
    for n_tokens, n_targets in rows:
        where = torch.zeros(1, n_tokens, dtype=torch.bool)
        where[0, n_tokens - n_targets - 1 : n_tokens - 1] = True
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            logits_at(model, torch.ones(1, n_tokens, dtype=torch.long), where).sum().backward()
        counted.append(counter.get_total_flops())
    assert [cost.flops for cost in costs] == [counted[0], counted[1] + counted[2]]
    virtual = settings.get("num_virtual_tokens", 0)
    assert [cost.positions for cost in costs] == [7 + virtual, 49 + 2 * virtual]


def test_recomputed_activations_cost_one_more_forward_pass() -> None:
    with torch.device("meta"):
        skeleton = Qwen2ForCausalLM(tiny_config())
    own, rows = link("full"), [(20, 4)]
    meter = Meter(skeleton, rows, False)
    [plain] = meter.steps(own, [[0]], 0)
    [again] = replace(meter, checkpointing=True).steps(own, [[0]], 0)  # as a run does for an ablation's other point
    model = tiny_model()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=torch.ones(1, 20, dtype=torch.long))
    assert again.flops - plain.flops == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"], ["down_proj", "lm_head"]])
def test_the_flops_of_a_gradient_start_are_those_that_pytorch_counts_as_it_is_taken(
    modules: str | list[str], checkpointing: bool
) -> None:
    with torch.device("meta"):
        skeleton = Qwen2ForCausalLM(tiny_config())
    rows = [(7, 2), (19, 5), (30, 1), (11, 3)]
    order = [[0, 3], [1], [2]]
    settings = {"target_modules": modules}
    plain, own = link(n_steps=3, **settings), link(n_steps=3, init="gradient", init_batches=2, **settings)
    meter = Meter(skeleton, rows, checkpointing)
    before, after = meter.steps(plain, order, 0), meter.steps(own, order, 0)
    assert after[1:] == before[1:]
    model = adapters.attach(tiny_model(), own.settings, 0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    # Each row in a pass of its own, so that nothing is padded.
    data = [[collate([("", [1] * (rows[i][0] - rows[i][1]), [1] * rows[i][1])]) for i in step] for step in order[:2]]
    names = list(adapters.pair_layers(model))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        full_gradients(model, names, data, Accelerator())
    # And what is then done to each gradient, which tests/link/ideas/test_work.py holds against a count of its own.
    shapes = [Shape(*shape_of(skeleton, name), own.settings.rank) for name in names]  # pyright: ignore
    assert after[0].start - sum(map(gradient_flops, shapes)) == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert after[0].flops - before[0].flops == pytest.approx(after[0].start, rel=1e-12)
    assert after[0].positions - before[0].positions == 7 + 11 + 19


@pytest.mark.parametrize("match", ["tokens", "flops"])
def test_a_matched_arm_gets_the_most_steps_that_cost_no_more(recipe_file: Path, match: str) -> None:
    arms = ["arms.prefix={method: prefix, num_virtual_tokens: 5}", "arms.short={target_modules: [q_proj]}"]
    recipe = read_recipe(recipe_file, [*arms, f"training.match={match}", "training.schedule=constant"])
    with torch.device("meta"):
        skeleton = Qwen2ForCausalLM(tiny_config())
    rows = [(10 + i % 7, 2 + i % 3) for i in range(24)]
    meter = Meter(skeleton, rows, False)

    def order_of(seed: int, n_steps: int) -> list[list[int]]:
        return [[(8 * step + i) % 24 for i in range(8)] for step in range(n_steps)]

    budget = Budget(recipe, meter, order_of)
    assert budget.steps(Job(arm="lora", seed=0)) == 6

    def cost(method: str, n_steps: int, **settings: Any) -> float:
        steps = meter.steps(link(method, n_steps=n_steps, **settings), order_of(0, n_steps), 0)
        return sum(step.of(match) for step in steps)

    allowed = cost("lora", 6, rank=8, alpha=16.0)
    for arm, method, settings in (
        ("prefix", "prefix", {"num_virtual_tokens": 5}),
        ("short", "lora", {"target_modules": ["q_proj"], "rank": 8, "alpha": 16.0}),
        ("full", "full", {}),
    ):
        steps = budget.steps(Job(arm=arm, seed=0))
        assert steps is not None
        assert cost(method, steps, **settings) <= allowed < cost(method, steps + 1, **settings)
    assert budget.steps(Job(arm="base", seed=0)) is None


def test_a_matched_budget_takes_warm_ups_and_links_that_say_their_lengths(recipe_file: Path) -> None:
    def read(arm: str) -> Budget:
        overrides = ["training.match=flops", "training.warmup_steps=2", "knot.warmup_steps=1", f"arms.other={arm}"]
        recipe = read_recipe(recipe_file, overrides)
        meter = Meter(tiny_model(), [(10, 2)] * 24, False)
        return Budget(recipe, meter, lambda seed, n: [list(range(8))] * n)

    other = Job(arm="other", seed=0)
    lora = read("{links: 1}").steps(other)
    assert lora == 6
    assert read("{links: 3}").steps(other) == lora
    assert read("{links: [{steps: 2}, {steps: 3}]}").steps(other) == 5
    assert read("{links: [{steps: 2}, {}]}").steps(other) == lora
    with pytest.raises(RecipeError, match=r"arms\.other: 8 steps of it cost more than training\.match: flops allows"):
        read("{links: [{steps: 4}, {steps: 4}]}").steps(other)


# ---------------------------------------------------------------------------------------------------------
# Quantized bases

# The 16 values of NF4 as bitsandbytes and the paper's appendix E give them (Dettmers et al., arXiv 2305.14314).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float64,
)
EXACT = {"nf4": 1e-5, "int8": 1e-3}  # some int8 codes, at a tie to the last bits of float16, go the other way
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are as long as NF4's blocks."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(**WIDE).save_pretrained(folder)
    return folder


def quantized(folder: Path, how: str, dtype: str = "float32", device: str = "cpu") -> tuple[PreTrainedModel, Base]:
    source = Source("wide", folder, False)
    model = source.load(dtype, torch.device(device), how)
    return model, Base(model, source.files, quantized=True)


def codes_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a quantized base is: codes and their scales, and whatever is dense."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            found |= {f"{name} scales": state.absmax.clone(), f"{name} offset": state.offset.clone()}
            found |= {f"{name} scales of scales": state.state2.absmax.clone()}
        elif weight is not None and weight.dtype == torch.int8:
            state = module.state  # which the codes move to as they are first used
            codes, scales = (weight, weight.SCB) if state.CB is None else (state.CB, state.SCB)
            found |= {f"{name} codes": codes.clone(), f"{name} scales": scales.clone()}
    return {name.replace(".base_layer", ""): tensor for name, tensor in found.items()}


def dequantized(folder: Path, how: str) -> PreTrainedModel:
    """A dense model with the weights that the codes stand for, by the papers' formulas."""
    model, reference = quantized(folder, how)[0], tiny_model(**WIDE)
    for name in target_names(reference, what().target_modules):
        weight = reference.get_submodule(name).weight
        if how == "int8":
            weight.copy_(weight.half())  # which bitsandbytes makes of it first
            scale = weight.abs().amax(dim=1, keepdim=True)
            weight.copy_((weight * 127 / scale).round() * scale / 127)
            continue
        packed = model.get_submodule(name).weight
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(-1, 64).long()
        blocks = weight.view(-1, 64).double()
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        distance = (blocks / absmax)[..., None].sub(NF4).abs()
        nearest = distance.argmin(-1)
        # A tie to the last bits of float32 may go either way.
        gap = distance.gather(-1, codes[..., None]) - distance.gather(-1, nearest[..., None])
        assert gap.max() < 1e-6, name
        state = packed.quant_state
        assert state.nested
        assert state.blocksize == 64
        # Double quantization: the scales less their mean, as 8-bit codes in blocks of 256, at most 1.41 % apart.
        scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(absmax)]
        scales = (scales + state.offset).double()
        off = absmax.flatten() - absmax.mean()
        assert (scales - absmax.flatten()).abs().max() <= 0.0075 * off.abs().max()
        weight.copy_((NF4[codes] * scales[:, None]).view_as(weight))
    return reference


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_codes_are_the_papers_and_their_product_is_that_of_the_weights_they_stand_for(
    wide_folder: Path, how: str
) -> None:
    model, _ = quantized(wide_folder, how)
    expected = logits(dequantized(wide_folder, how))
    assert close(logits(model), expected, EXACT[how])
    assert not close(logits(tiny_model(**WIDE)), expected, 3 * EXACT[how])
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=INPUTS).logits, logits(model))  # one function to train and to score


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_chain_on_codes_learns_and_leaves_them_as_they_are(wide_folder: Path, how: str) -> None:
    model, base = quantized(wide_folder, how)
    chain, losses, before = chain_of(model, base), [], codes_of(model)
    untrained = logits(model)
    assert len([name for name in before if name.endswith("_proj scales")]) == 14
    dense, dense_losses = chain_of(dequantized(wide_folder, how)), []
    for own in links(3):
        start = outputs(chain.model)
        extend(chain, own, gradients)
        extend(dense, own, gradients)
        assert close(logits(chain.model).flatten(0, 1), start.logits_NV, ROUNDING)
        tuner(losses)(chain, own)
        tuner(dense_losses)(dense, own)
        drift = tie_knot(chain, start, outputs, more_to_come=True).drift
        tie_knot(dense, start, outputs, more_to_come=True)
        assert drift.relative < ROUNDING
    # The same chain on a dense base with the weights that the codes stand for.
    allowed = 1e-4 if how == "nf4" else 2e-2
    assert losses == pytest.approx(dense_losses, rel=allowed)
    assert close(logits(model), logits(dense.model), 10 * allowed)
    assert not close(logits(model), untrained, 0.05)
    after = codes_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # One low-rank product beside each matrix, however many links it has.
    assert all(len(model.get_submodule(name)._forward_hooks) == 1 for name in chain.learned[0])
    calls = []
    one = model.get_submodule("model.layers.0.mlp.up_proj")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        calls.append(one(torch.ones(1, 64)))
    beside = 2 * 12 * (64 + 128)
    assert counter.get_total_flops() in (beside, beside + 2 * 64 * 128)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_full_gradients_can_be_had_of_codes(wide_folder: Path, how: str) -> None:
    model, base = quantized(wide_folder, how)
    chain, own = chain_of(model, base), link(init="gradient", init_batches=2)
    start = logits(model)
    extend(chain, own, gradients)
    assert torch.equal(logits(model), start)
    names = list(adapters.pair_layers(model))
    found = full_gradients(model, names, batches(2), Accelerator())
    expected = true_gradients(dequantized(wide_folder, how), names, batches(2))
    assert all(close(found[name], gradient, 1e-4 if how == "nf4" else 0.05) for name, gradient in expected.items())


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantized_base_may_have_files_without_the_bodys_prefix(tmp_path: Path, how: str) -> None:
    # The hub's GPT-2 has h.0.attn.c_attn.weight, and its layers keep their matrices as (I, O).
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(stripped, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, base = quantized(tmp_path, how)
    chain = chain_of(model, base)
    knots = list(run_chain(chain, links(2), tuner(), outputs, gradients))
    assert all(knot.drift.relative < 1e-5 for knot in knots)
    name = "transformer.h.0.mlp.c_fc"
    change = 2.0 * knots[0].weights[name].B_OR @ knots[0].weights[name].A_RI
    expected = (change.norm() / weights[f"{name}.weight"].norm()).item()
    assert knots[0].applied[name].relative_size == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["adapter", "prefix", "p_tuning", "prompt_tuning"])
def test_other_methods_train_on_codes_too(wide_folder: Path, how: str, method: str) -> None:
    model, base = quantized(wide_folder, how)
    before, own = codes_of(model), link(method)
    dense, losses, dense_losses = chain_of(dequantized(wide_folder, how)), [], []
    for chain, note in ((chain_of(model, base), losses), (dense, dense_losses)):
        extend(chain, own, gradients)
        tuner(note)(chain, own)
    assert losses == pytest.approx(dense_losses, rel=1e-4 if how == "nf4" else 2e-2)
    after = codes_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "p_tuning", "prompt_tuning"])
def test_each_method_trains_in_float32_on_a_bfloat16_base(method: str) -> None:
    chain, own, losses = chain_of(tiny_model().to(torch.bfloat16)), link(method), []
    extend(chain, own, gradients)
    assert {p.dtype for p in adapters.trainable(chain.model)} == {torch.float32}
    tuner(losses)(chain, own)
    full, expected = chain_of(tiny_model()), []
    extend(full, own, gradients)
    tuner(expected)(full, own)
    assert losses == pytest.approx(expected, rel=0.03)


# ---------------------------------------------------------------------------------------------------------
# Nothing happens, and it is said


def test_weights_that_get_no_gradient_are_an_error() -> None:
    chain, own = chain_of(tiny_model()), link()
    extend(chain, own, gradients)
    for name, parameter in chain.model.named_parameters():
        if "lora_A" in name:  # beside B = 0 nothing would ever be learned
            parameter.data.zero_()
    with pytest.raises(NoGradient, match=r"step 1: none of the 28 trained tensors got a gradient"):
        tuner()(chain, own)
