"""Training and scoring on each kind of device: what the CPU gives, a GPU gives. Run: pytest tests/link/test_devices.py

`make gpu PART=tests` runs the half that needs a card, which is skipped where there is none.
"""

import importlib.util
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_model
from runs import go, open_run, outcome, quiet, result
from test_chain import INPUTS
from test_knots import Stop
from test_methods import (
    WIDE,
    batches,
    chain_of,
    close,
    codes_of,
    dequantized,
    gradients,
    link,
    links,
    logits,
    outputs,
    quantized,
    tuner,
)
from test_selfcheck import TOKENIZER, evaluator, make, plain_nats, plain_text, rows
from torch import Tensor, nn

from cola.chain import Chain, Knot, run_chain
from cola.data.encode import Example
from cola.link import adapters
from cola.link.accelerator import make_accelerator
from cola.measure.memory import peaks, restart_peaks
from cola.recipe.resolved import Rules
from cola.run.course import MAX_DRIFT
from cola.run.run import run

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = pytest.mark.gpu
FORMATS = ["float32", "bfloat16", "float16"]
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of the rounding of 1, half the last place


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("accelerate takes the GPU that is here")
    return request.param


def accelerator_on(device: str, dtype: str) -> Accelerator:
    made = make_accelerator(dtype)
    assert made.device.type == device
    return made


def deterministic(dtype: str) -> Accelerator:
    """cola's own, under torch's deterministic algorithms on a GPU, where attention's gradient is otherwise summed in
    whatever order its blocks come."""
    made = make_accelerator(dtype)
    if made.device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    return made


def trained(
    chain: Chain, accelerator: Accelerator, n_links: int = 3, **settings: Any
) -> tuple[list[float], list[Knot]]:
    """The losses of a chain's steps, and its knots."""
    losses: list[float] = []
    own = links(n_links, **settings)
    return losses, list(run_chain(chain, own, tuner(losses, accelerator), outputs, gradients))


def reference(model: nn.Module, n_links: int = 3) -> list[float]:
    """The same losses in float32 on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return trained(chain_of(model), Accelerator(cpu=True), n_links)[0]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_chain_learns_in_every_number_format_and_its_knots_drift_by_rounding(device: str, dtype: str) -> None:
    expected = reference(tiny_model())
    accelerator = accelerator_on(device, dtype)
    chain = chain_of(tiny_model().to(device, getattr(torch, dtype)))
    losses, knots = trained(chain, accelerator)
    assert losses == pytest.approx(expected, rel={"float32": 1e-4, "bfloat16": 0.03, "float16": 5e-3}[dtype])
    assert not close(logits(chain.model), logits(tiny_model()), 0.05)
    assert all(0 < knot.drift.relative < MAX_DRIFT[dtype] for knot in knots)
    assert {(p.device.type, p.dtype) for p in chain.model.parameters()} == {(device, getattr(torch, dtype))}


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_weights_after_each_knot_are_the_float32_sum_rounded_once(device: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    base, chain = tiny_model().to(kind), chain_of(tiny_model().to(device, kind))
    _, knots = trained(chain, accelerator_on(device, dtype))
    off = entries = 0
    for name in knots[0].weights:
        sums = sum(2.0 * knot.weights[name].B_OR.double() @ knot.weights[name].A_RI.double() for knot in knots)
        expected_OI: Tensor = base.get_submodule(name).weight.double() + sums
        found_OI = chain.model.get_submodule(name).weight.cpu()
        # And the last bits of the float32 sum, which may turn a tie the other way.
        allowed_OI = UNIT[dtype] * expected_OI.abs() + 4e-7 * expected_OI.abs().max()
        assert ((found_OI.double() - expected_OI).abs() <= allowed_OI).all(), name
        off += int((found_OI != expected_OI.float().to(kind)).sum())
        entries += found_OI.numel()
    assert off < 0.002 * entries or dtype == "float32"


def test_products_in_float32_are_of_float32(device: str) -> None:
    """Fails under TF32, which keeps 10 bits of each factor."""
    accelerator_on(device, "float32")
    found, exact = logits(tiny_model().to(device)), tiny_model().double()(input_ids=INPUTS).logits.float()
    assert close(found, exact, 1e-5)


@pytest.mark.parametrize(("how", "dtype"), [("nf4", "bfloat16"), ("nf4", "float16"), ("int8", "float16")])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_chain_beside_codes_learns_as_on_the_weights_they_stand_for(
    device: str, tmp_path: Path, how: str, dtype: str
) -> None:
    folder = tiny_wide(tmp_path)
    expected = reference(dequantized(folder, how))
    accelerator = accelerator_on(device, dtype)
    model, base = quantized(folder, how, dtype, device)
    logits(model)  # int8 codes move to where they stay as they are first used
    before, start = codes_of(model), logits(model)
    losses, knots = trained(Chain(model, base, Rules()), accelerator)
    assert losses == pytest.approx(expected, rel=0.05)
    # On a GPU int8 products round the activations too, so that rounding moves codes.
    assert all(knot.drift.relative < MAX_DRIFT["float16" if how == "int8" else dtype] for knot in knots)
    after = codes_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not close(logits(model), start, 0.05)


def test_a_gradient_that_overflows_is_skipped_and_the_scale_lowered(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = accelerator_on(device, "float16")
    if device == "cpu":  # accelerate makes a scaler on a GPU only
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    assert accelerator.scaler is not None
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**21))
    chain = chain_of(tiny_model().to(device, torch.float16))
    losses, knots = trained(chain, accelerator, 1)
    assert accelerator.scaler is not None
    assert 1 <= math.log2(2.0**21 / accelerator.scaler.get_scale()) < len(losses)  # steps that were skipped
    assert any(pair.B_OR.any() for pair in knots[0].weights.values())
    assert all(pair.A_RI.isfinite().all() and pair.B_OR.isfinite().all() for pair in knots[0].weights.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_and_choices_from_the_cache_are_those_of_plain_passes(device: str, dtype: str) -> None:
    accelerator = accelerator_on(device, dtype)
    model, made = make("llama", getattr(torch, dtype)).to(device), []
    for row in rows(6):
        answer = TOKENIZER(plain_text(model, row.prompt, 3)).input_ids[:1] + row.answers[1]
        made.append(Example(row.id, row.prompt, [answer], 0, [TOKENIZER.decode(answer)], None))
    asked = {task: replace(evaluator(task), autocast=accelerator.autocast) for task in ("answer", "multiple_choice")}
    near = {"float32": 1e-4, "bfloat16": 0.03}[dtype]
    found = asked["answer"](model, made)
    assert [s.nats for s in found] == pytest.approx([plain_nats(model, e.prompt, e.answers[0]) for e in made], rel=near)
    if dtype == "float32":  # in half formats a plain pass of transformers rounds its logits, and some of them tie
        said = [plain_text(model, e.prompt, asked["answer"].new_tokens) for e in made]
        assert [s.prediction for s in found] == said
        padded = asked["answer"].asking(replace(asked["answer"].ways, decoding="padded"))
        assert [s.prediction for s in padded(model, made)] == said
    chosen = asked["multiple_choice"](model, rows())
    assert [s.nats for s in chosen] == pytest.approx(
        [plain_nats(model, e.prompt, e.answers[e.gold]) for e in rows()], rel=near
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "base",
    [
        "{dtype: bfloat16}",
        pytest.param("{dtype: float32}", marks=GPU),
        pytest.param("{dtype: float16}", marks=GPU),
        pytest.param("{dtype: bfloat16, quantization: nf4}", marks=GPU),
    ],
)
def test_a_run_that_is_stopped_and_gone_on_with_has_the_bits_of_one_that_is_not(
    device: str, base: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "nf4" in base:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("cola.run.assignment.make_accelerator", deterministic)
    arms = ["arms.base=null", "arms.lora=null", "arms.full=null", "comparison.primary=null", "arms.chain3.dropout=0.1"]
    recipe = [*arms, "training.steps=6", "data.rows={train: 16, validation: 2, test: 4}", "checkpoint_seconds=0"]
    recipe += [f"model={base[:-1]}, name_or_path: {tiny_wide(tmp_path)}}}"]
    whole, summary = go(recipe_file, *recipe, f"store={tmp_path / 'undisturbed'}")
    assert summary.arms["chain3"].states == {0: "ok"}
    Stop(monkeypatch, [3])
    stopped, summary = go(recipe_file, *recipe, f"store={tmp_path / 'stopped'}")
    assert summary.interrupted
    folder, again = open_run(stopped.path)
    assert not run(again, folder, quiet()).interrupted
    info = result(folder, "chain3")["train_info"]
    assert info["reused_steps"] == 3
    assert outcome(stopped.path).differences(outcome(whole.path)) == []
    assert (info["accelerator_memory_max"] is not None) == (device == "cuda")


def tiny_wide(folder: Path) -> Path:
    """A model whose rows are as long as NF4's blocks, with a tokenizer."""
    tiny_model(**WIDE).save_pretrained(folder / "wide")
    TOKENIZER.save_pretrained(folder / "wide")
    return folder / "wide"


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_same_link_twice_has_the_same_losses(device: str, dtype: str, record_property: Any) -> None:
    """To the bit under deterministic algorithms; without them, which is how cola trains, a GPU's last bits may move."""
    found = {}
    for how, number in (("as it is", 1), ("as it is", 2), ("deterministic", 1), ("deterministic", 2)):
        accelerator = {"as it is": make_accelerator, "deterministic": deterministic}[how](dtype)
        found[how, number] = trained(chain_of(tiny_model().to(device, getattr(torch, dtype))), accelerator)[0]
    assert found["deterministic", 1] == found["deterministic", 2]
    assert found["as it is", 1] == pytest.approx(found["as it is", 2], rel=0 if device == "cpu" else 0.02)
    record_property("the same bits as it is", found["as it is", 1] == found["as it is", 2])


def test_the_memory_of_a_gpu_is_what_its_allocator_gave_at_most(device: str) -> None:
    where = torch.device(device)
    restart_peaks(where)
    big = torch.ones(1_000_000, device=where)
    del big
    allocated = peaks(where, process=False)["accelerator"]
    assert (allocated is None) == (device == "cpu")
    assert allocated is None or allocated >= 4_000_000


def test_attention_is_causal_without_a_mask(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step pads on the left or hands a mask over, with which torch's quickest kernels do not go along."""
    asked, attention = [], nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **settings: Any) -> Tensor:
        asked.append((settings["attn_mask"], settings["is_causal"]))
        return attention(*args, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    chain, own = chain_of(tiny_model().to(device)), link(n_steps=2)
    adapters.attach(chain.model, own.settings, own.seed)
    tuner(accelerator=accelerator_on(device, "float32"))(chain, own)
    assert asked == [(None, True)] * 2 * 2  # layers and steps


def test_a_pair_is_drawn_alike_on_every_device(device: str) -> None:
    drawn = []
    for where in ("cpu", device):
        chain = chain_of(tiny_model().to(where))
        adapters.attach(chain.model, link().settings, 7)
        drawn.append(adapters.read_pair(chain.model))
    for name, pair in drawn[0].items():
        assert torch.equal(pair.A_RI, drawn[1][name].A_RI)
    assert batches(1)[0][0].to(torch.device(device)).input_ids_BT.device.type == device
