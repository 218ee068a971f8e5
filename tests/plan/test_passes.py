"""A pass on shapes alone against the same pass on tensors with values.

Run: pytest tests/plan/test_passes.py
"""

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from cola.data.batches import MicroBatch
from cola.link import adapters
from cola.link.accelerator import make_accelerator
from cola.link.layers import few_layers
from cola.link.model import Source
from cola.link.train import _loss_sum
from cola.measure.cost import Meter
from cola.plan.memory import weights_of
from cola.plan.passes import Shape, scoring_pass, training_pass
from cola.recipe.methods import Adapter, Full, Lora, Prefix, PromptTuning, PTuning, Settings
from cola.recipe.plan import Link

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, N = 3, 48, 40
SIZE = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96}


def on_meta(settings: Settings, **size: object) -> PreTrainedModel:
    with torch.device("meta"):
        return adapters.attach(AutoModelForCausalLM.from_config(tiny_config(**{**SIZE, **size})), settings, 0)


def batch() -> MicroBatch:
    predicts_BT = torch.zeros(B, T, dtype=torch.bool)
    predicts_BT.view(-1)[:N] = True
    return MicroBatch(torch.zeros(B, T, dtype=torch.long), predicts_BT, torch.zeros(N, dtype=torch.long), [], B * T)


def really(settings: Settings, checkpointing: bool, accumulating: bool, dtype: str = "float32") -> int:
    """The most that PyTorch's allocator gave out in a training pass at once, by its own profiler."""
    accelerator = make_accelerator(dtype)
    model = adapters.attach(tiny_model(**SIZE).to(getattr(torch, dtype)), settings, 0)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    before = 0
    if accumulating:
        for parameter in adapters.trainable(model):
            parameter.grad = torch.zeros_like(parameter)
            before += parameter.grad.nbytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = _loss_sum(model, batch(), accelerator)
        accelerator.backward(loss / N)
    changes, nodes = [], [*profiler.profiler.kineto_results.experimental_event_tree()]
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if str(node.typed[0]) == "_EventType.Allocation":
            changes.append((node.start_time_ns, node.typed[1].alloc_size))
    now = most = before
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [Lora(alpha=16), Full()], ids=["lora", "full"])
def test_a_training_pass_takes_the_memory_that_it_takes_with_values(
    settings: Settings, checkpointing: bool, accumulating: bool
) -> None:
    how = {"dtype": torch.float32, "checkpointing": checkpointing, "accumulating": accumulating}
    seen = training_pass(on_meta(settings), Shape(B, T, N), **how)
    # Besides tensors the allocator has a kernel's own workspace, and a few numbers.
    assert sum(seen.largest.values()) == pytest.approx(really(settings, checkpointing, accumulating), rel=0.04)


@pytest.mark.parametrize(
    "settings",
    [Lora(alpha=16, dropout=0.1, target_modules=("q_proj", "v_proj")), Adapter(), PTuning(), PromptTuning(), Prefix()],
    ids=["dropout", "adapter", "p_tuning", "prompt_tuning", "prefix"],
)
def test_every_method_does(settings: Settings) -> None:
    seen = training_pass(
        on_meta(settings), Shape(B, T, N), dtype=torch.float32, checkpointing=False, accumulating=False
    )
    assert sum(seen.largest.values()) == pytest.approx(really(settings, False, False), rel=0.05)


def test_half_precision_computes_under_autocast() -> None:
    model = on_meta(Lora(alpha=16))
    for name, parameter in model.named_parameters():
        if not adapters.is_trained(name):
            parameter.data = parameter.data.bfloat16()
    seen = training_pass(model, Shape(B, T, N), dtype=torch.bfloat16, checkpointing=False, accumulating=False)
    assert sum(seen.largest.values()) == pytest.approx(really(Lora(alpha=16), False, False, "bfloat16"), rel=0.05)


@pytest.mark.parametrize("settings", [Lora(alpha=16), Full()], ids=["lora", "full"])
def test_six_layers_come_to_what_two_and_three_say(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"dtype": torch.float32, "checkpointing": False, "accumulating": False}
    short = training_pass(on_meta(settings), Shape(B, T, N), **how)
    monkeypatch.setattr("cola.plan.passes.few_layers", lambda _: None)
    whole = training_pass(on_meta(settings), Shape(B, T, N), **how)
    for phase, parts in whole.phases.items():
        assert sum(short.phases[phase].values()) == pytest.approx(sum(parts.values()), rel=1e-6), phase
    assert short.work.products == whole.work.products
    assert short.work.moved == pytest.approx(whole.work.moved)


def test_a_model_is_left_as_it_was() -> None:
    model = on_meta(Lora(alpha=16))
    before = {name: (p.device.type, p.requires_grad) for name, p in model.named_parameters()}
    scoring_pass(model, Shape(B, T, N), dtype=torch.float32, cached=True)
    assert {name: (p.device.type, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keys_and_values_are_counted_where_they_are_kept() -> None:
    model = on_meta(Lora(alpha=16))
    kept, not_kept = (
        scoring_pass(model, Shape(B, T, N), dtype=torch.float32, cached=cached).phases["head"]
        for cached in (True, False)
    )
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * 4 * config.num_hidden_layers * B * T * config.num_key_value_heads * size
    assert kept["activations"] - not_kept["activations"] == pytest.approx(keys_and_values, rel=0.2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [Lora(alpha=16), Full()], ids=["lora", "full"])
def test_the_flops_of_few_layers_are_those_that_torch_counts_of_all(settings: Settings, checkpointing: bool) -> None:
    skeleton = tiny_model(**SIZE).to("meta")
    cost = Meter(skeleton, [(T, N)], checkpointing).steps(Link(settings=settings, seed=0), [[0]], 0)[0]
    model = adapters.attach(copy.deepcopy(skeleton), settings, 0)
    assert few_layers(model) is not None
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=torch.zeros(1, T, dtype=torch.long, device="meta")).last_hidden_state
        forward = counter.get_total_flops()
        hidden.sum().backward()
    head = 2 * N * SIZE["hidden_size"] * model.config.vocab_size
    head *= 3 if settings.is_whole else 2  # forward, back to its input, and its own gradient
    assert cost.flops == counter.get_total_flops() + checkpointing * forward + head


def test_layers_that_differ_are_all_looked_at() -> None:
    assert few_layers(on_meta(Lora(alpha=16, target_modules=("model.layers.3.mlp.up_proj",)))) is None
    assert few_layers(on_meta(Lora(alpha=16), num_hidden_layers=2)) is None
    assert few_layers(on_meta(Full())) is not None


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_codes_take_the_bytes_that_bitsandbytes_gives_them(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model(**SIZE).save_pretrained(tmp_path)
    source = Source("tiny", tmp_path, False)
    real = source.load("float32", torch.device("cpu"), quantization)
    codes = states = 0
    for module in real.modules():
        weight = module._parameters.get("weight")
        if (state := getattr(weight, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
            states += sum(tensor.nbytes for tensor in tensors)
        elif getattr(weight, "SCB", None) is not None:
            states += weight.SCB.nbytes + 1  # and the format of its codes
    codes = sum(parameter.nbytes for parameter in real.parameters())
    weights = weights_of(source.skeleton(), quantization)
    assert (weights.codes, weights.states) == (codes, states)
