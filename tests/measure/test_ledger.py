"""What a knot gave each matrix and did to the outputs, against dense formulas in float64.

Run: pytest tests/measure/test_ledger.py
"""

import html
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from offline import records
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from runs import cola, go, read_jsonl, result
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from scipy.stats import entropy
from test_architectures import make
from test_chain import batches, chain_of, link, no_gradients, outputs, tune_with
from test_summary import ByHand, first_right, recipe
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cola.chain import Chain, extend, run_chain, tie_knot
from cola.compare.records import Summary
from cola.compare.summary import summarize
from cola.data.batches import collate
from cola.data.splits import load_splits
from cola.link import adapters, residual
from cola.link.base import Base
from cola.link.drift import Drift, Outputs
from cola.link.find import find_model
from cola.link.residual import Applied, LinkWeights, Pair, Residual
from cola.measure.evaluate import PROBE_ROWS, PROBE_TARGETS
from cola.recipe.read import read_recipe
from cola.recipe.resolved import Rules
from cola.report.page import write_report
from cola.report.tables import knots_table
from cola.tree.run_folder import FORMAT, RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
CONV1D = "transformer.h.0.mlp.c_fc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"plain": (UP, DOWN), "dora": (UP, DOWN), "conv1d": (CONV1D, "transformer.h.1.attn.c_attn")}


# ---------------------------------------------------------------------------------------------------------
# References


def model_of(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    return (make("gpt2 conv1d") if kind == "conv1d" else tiny_model()).to(dtype)


def dense(model: nn.Module, name: str) -> Tensor:
    """A module's weight as (O, I), copied, in the dtype it is kept in."""
    module = model.get_submodule(name)
    weight = module.weight.detach().clone()
    return weight.T if isinstance(module, Conv1D) else weight


def draw(model: nn.Module, name: str, number: int, size: float, with_rows: bool = False) -> Pair:
    """A pair whose update is a share of its matrix; with rows that rescale it as DoRA's do."""
    generator = torch.Generator().manual_seed(number)
    W = dense(model, name).float()
    A_RI, B_OR = torch.randn(4, W.shape[1], generator=generator), torch.randn(len(W), 4, generator=generator)
    B_OR *= size * W.norm() / (2.0 * B_OR @ A_RI).norm()
    rows_O = 1 + size * torch.randn(len(W), generator=generator) if with_rows else None
    return Pair(A_RI, B_OR, 2.0, rows_O)


def applied_to(W: Tensor, pairs: list[Pair]) -> Tensor:
    """W_k = d_k (W_{k-1} + s_k B_k A_k), link by link, in float64."""
    W = W.double()
    for pair in pairs:
        W = W + pair.scale * pair.B_OR.double() @ pair.A_RI.double()
        W = W if pair.rows_O is None else pair.rows_O.double()[:, None] * W
    return W


def expected(pristine: Tensor, before: Tensor, after: Tensor, pairs: list[Pair]) -> dict[str, float]:
    """Every field of the ledger from dense matrices: the base, the weights kept before and after the last knot."""
    W, learned = pristine.double(), applied_to(pristine, pairs) - pristine.double()
    last = applied_to(pristine, pairs) - applied_to(pristine, pairs[:-1])
    given = after.double() - W
    return {
        "relative_size": (last.norm() / W.norm()).item(),
        "unchanged": (after == before).double().mean().item(),
        "error": ((given - learned).norm() / learned.norm()).item(),
        "cosine": torch.cosine_similarity(given.flatten(), learned.flatten(), 0).item(),
    }


def agrees(found: Applied, reference: dict[str, float], dtype: torch.dtype) -> None:
    # In float32 the error is itself the rounding of float32, of which the ledger's own sums have some too.
    rounding = 4 * 2**-24 if dtype == torch.float32 else 1e-12
    tolerance = {"relative_size": (1e-5, 1e-12), "unchanged": (0, 0), "error": (1e-3, rounding), "cosine": (1e-6, 0)}
    for field, value in asdict(found).items():
        relative, absolute = tolerance[field]
        assert value == pytest.approx(reference[field], rel=relative, abs=absolute), field


def knots(
    model: PreTrainedModel, base: Base, links: Residual, names: tuple[str, ...], merge: str
) -> list[tuple[dict[str, Applied], dict[str, Tensor], dict[str, Tensor]]]:
    """Tie one link after the other: what the ledger says, and the weights before and after."""
    base.remember(names)
    seen = []
    for number in range(1, len(links) + 1):
        before = {name: dense(model, name) for name in names}
        found = residual.write(model, base, links[:number], list(names), merge, links[: number - 1])
        seen.append((found, before, {name: dense(model, name) for name in names}))
    return seen


def test_the_docs_say_at_which_rows_and_tokens_a_knots_outputs_are_compared() -> None:
    said = (Path(__file__).parents[2] / "docs/numbers.md").read_text()
    assert f"the last {PROBE_TARGETS} target tokens of each of the first {PROBE_ROWS} validation rows" in said


def test_a_knot_that_lets_a_pair_go_moves_the_weights_by_both() -> None:
    model = tiny_model()
    pristine, base = dense(model, UP).double(), Base(model)
    base.remember([UP])
    kept, gone, fresh = (draw(model, UP, number, 0.05) for number in (1, 2, 3))
    residual.write(model, base, [{UP: kept}, {UP: gone}], [UP])
    found = residual.write(model, base, [{UP: kept}, {UP: fresh}], [UP], "exact", [{UP: kept}, {UP: gone}])
    moved = applied_to(pristine, [kept, fresh]) - applied_to(pristine, [kept, gone])
    assert found[UP].relative_size == pytest.approx((moved.norm() / pristine.norm()).item(), rel=1e-5)


def test_what_pissa_took_out_is_no_change_by_the_knot() -> None:
    chain = chain_of(tiny_model())
    own = link(init="pissa")
    extend(chain, own, no_gradients)
    applied = tie_knot(chain, outputs(chain.model), outputs, more_to_come=True).applied
    # The pair was not trained, so the weights are what they were before, but for a last digit.
    assert min(one.unchanged for one in applied.values()) > 0.5


# ---------------------------------------------------------------------------------------------------------
# Every field of every knot


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", ["exact", "naive"])
def test_each_field_is_that_of_the_dense_matrices(kind: str, merge: str, dtype: torch.dtype) -> None:
    if (merge, kind) == ("naive", "dora"):
        pytest.skip("PEFT's merge in place of DoRA is none that a recipe can ask for")
    names, model = KINDS[kind], model_of(kind, dtype)
    pristine = {name: dense(model, name) for name in names}
    # A large link, one that lies within the rounding of half precision, and one that touches the first matrix alone.
    links = [{name: draw(model, name, n, size, kind == "dora") for name in names} for n, size in ((1, 0.1), (2, 1e-3))]
    links.append({names[0]: draw(model, names[0], 3, 0.02, kind == "dora")})
    for number, (found, before, after) in enumerate(knots(model, Base(model), links, names, merge), 1):
        assert found.keys() == set(names)
        for name in names:
            pairs = [one[name] for one in links[:number] if name in one]
            reference = expected(pristine[name], before[name], after[name], pairs)
            if name not in links[number - 1]:
                reference["relative_size"] = 0.0
                assert reference["unchanged"] == 1.0
            agrees(found[name], reference, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "conv1d"])
def test_pairs_beside_the_weights_are_applied_as_they_were_learned(kind: str, dtype: torch.dtype) -> None:
    names, model = KINDS[kind], model_of(kind, dtype)
    links = [{name: draw(model, name, n, size) for name in names} for n, size in ((1, 0.1), (2, 1e-3))]
    for (found, before, after), own in zip(knots(model, Base(model), links, names, "no"), links, strict=True):
        for name in names:
            assert torch.equal(before[name], after[name])
            W, pair = before[name].double(), own[name]
            size = (2.0 * pair.B_OR.double() @ pair.A_RI.double()).norm() / W.norm()
            assert found[name].relative_size == pytest.approx(size.item(), rel=1e-5)
            assert (found[name].unchanged, found[name].error, found[name].cosine) == (0.0, 0.0, 1.0)


def test_pairs_beside_the_weights_are_accounted_for_without_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    names, model = KINDS["plain"], model_of("plain", torch.float32)
    links = [{name: draw(model, name, n, 0.1) for name in names} for n in (1, 2)]
    base = Base(model)
    expected = [found for found, _, _ in knots(model, base, links, names, "no")]

    def entered(*_: object) -> Tensor:
        raise AssertionError("a matrix of the size of the weight")

    monkeypatch.setattr(residual._Links, "low_rank", entered)
    monkeypatch.setattr(base, "weight", entered)  # nor is the base read a second time for its norm
    assert [found for found, _, _ in knots(model, base, links, names, "no")] == expected


def test_a_base_whose_file_is_finer_than_its_weights_is_accounted_for_by_the_file(tmp_path: Path) -> None:
    # A float32 checkpoint loaded in bfloat16: the sum is rounded once, from the file's numbers.
    model = tiny_model()
    model.save_pretrained(tmp_path)
    pristine = dense(model, UP)
    model = model.to(torch.bfloat16)
    links = [{UP: draw(model, UP, 1, 0.05)}]
    [(found, before, after)] = knots(model, Base(model, [tmp_path / "model.safetensors"]), links, (UP,), "exact")
    agrees(found[UP], expected(pristine, before[UP], after[UP], [links[0][UP]]), torch.bfloat16)
    # But for the last bit of the float32 sum, which may turn a tie the other way.
    assert (after[UP] != applied_to(pristine, [links[0][UP]]).float().bfloat16()).float().mean() < 0.002


def test_a_link_that_learned_nothing_has_no_error_and_no_direction() -> None:
    model = tiny_model()
    pair = Pair(torch.randn(4, 32), torch.zeros(48, 4), 2.0)
    [(found, _, _)] = knots(model, Base(model), [{UP: pair}], (UP,), "exact")
    assert found[UP] == Applied(0.0, 1.0, None, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", ["exact", "naive", "no"])
def test_block_by_block_a_matrix_gets_what_it_gets_in_one_piece(
    kind: str, dtype: torch.dtype, merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "dora" and merge != "exact":
        pytest.skip("DoRA is merged exactly or not at all")
    names, seen = KINDS[kind], []
    # A row at a time though one is longer than a block; five rows, which divide no matrix here; the whole.
    for block in (1, 5 * 32 + 1, 1 << 20):
        monkeypatch.setattr(residual, "BLOCK", block)
        model = model_of(kind, dtype)
        links = [{name: draw(model, name, n, 0.05, kind == "dora") for name in names} for n in (1, 2)]
        seen.append(knots(model, Base(model), links, names, merge)[-1])
    (whole, _, whole_weights) = seen[-1]
    one_place = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for found, _, after in seen[:-1]:
        for name in names:
            away = (after[name].double() - whole_weights[name].double()).abs()
            assert (away <= one_place * whole_weights[name].double().abs() + 1e-7).all()
            if dtype != torch.float32:  # a tie turned, here and there
                assert (away > 0).double().mean() < 0.01
            reference, mine = asdict(whole[name]), asdict(found[name])
            assert mine.pop("unchanged") == pytest.approx(reference.pop("unchanged"), abs=0.01)
            # In float32 the error is rounding: half a place of the weights, which are ten times what was learned.
            rounding = 10 * 2**-24 if dtype == torch.float32 else 0.0
            assert mine.pop("error") == pytest.approx(reference.pop("error"), rel=2e-3, abs=rounding)
            assert mine == pytest.approx(reference, rel=1e-5)


def test_the_size_of_a_link_is_that_of_pefts_merge() -> None:
    model = tiny_model()
    chain = chain_of(model)
    extend(chain, link(use_dora=True), no_gradients)
    tune_with(batches(5))(chain, link())
    weights = {name: (pair.A_RI, pair.B_OR, pair.magnitude_O) for name, pair in adapters.read_pair(model).items()}
    knot = tie_knot(chain, outputs(tiny_model()), outputs, more_to_come=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    reference = get_peft_model(tiny_model().double(), config)
    with torch.no_grad():
        for name, (A_RI, B_OR, magnitude_O) in weights.items():
            layer: Any = reference.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(A_RI)
            layer.lora_B["default"].weight.copy_(B_OR)
            layer.lora_magnitude_vector["default"].weight.copy_(magnitude_O)
    merged = reference.merge_and_unload()
    assert knot.applied.keys() == weights.keys()
    for name, found in knot.applied.items():
        W = tiny_model().get_submodule(name).weight.double()
        change = merged.get_submodule(name).weight.double() - W
        assert found.relative_size == pytest.approx((change.norm() / W.norm()).item(), rel=1e-4)
        assert found.cosine == pytest.approx(1.0, abs=1e-6)
        assert found.error is not None
        assert found.error < 1e-4


# ---------------------------------------------------------------------------------------------------------
# Many small links


def half_a_place(value: Tensor) -> Tensor:
    """Half a unit in the last place of bfloat16, which keeps eight significant bits."""
    _, exponent = torch.frexp(value.double())
    return 2.0 ** (exponent - 9).double()


def small_links(model: nn.Module, n: int) -> Residual:
    """Links of 0.06 % of their matrix each that go much the same way, as those of a long training do."""
    common = draw(model, UP, 100, 6e-4)
    links: Residual = []
    for number in range(n):
        own = draw(model, UP, number, 2e-4)
        links.append({UP: Pair(torch.cat([common.A_RI, own.A_RI]), torch.cat([common.B_OR, own.B_OR], 1), 2.0)})
    return links


@pytest.mark.parametrize("n", [1, 4, 16])
def test_after_many_small_links_an_exact_merge_has_rounded_each_entry_once(n: int) -> None:
    model = tiny_model().to(torch.bfloat16)
    W, links = dense(model, UP), small_links(model, n)
    [*_, (found, _, after)] = knots(model, Base(model), links, (UP,), "exact")
    exact = applied_to(W, [one[UP] for one in links])
    # What adding up in float32 may cost: half a place of 24 bits for each of its terms.
    terms = sum(2.0 * one[UP].B_OR.abs().double() @ one[UP].A_RI.abs().double() for one in links) + W.double().abs()
    allowed = torch.maximum(half_a_place(exact), half_a_place(after[UP])) + (8 * n + 2) * 2**-24 * terms
    assert ((after[UP].double() - exact).abs() <= allowed).all()
    assert found[UP].error is not None
    assert found[UP].error <= (allowed.norm() / (exact - W.double()).norm()).item()


def test_naive_merging_loses_links_within_rounding_and_its_ledger_says_so() -> None:
    found, lost = {}, {}
    for merge in ("exact", "naive"):
        model = tiny_model().to(torch.bfloat16)
        W, links = dense(model, UP), small_links(model, 16)
        said = knots(model, Base(model), links, (UP,), merge)
        total = applied_to(W, [one[UP] for one in links]) - W.double()
        lost[merge] = ((said[-1][2][UP].double() - W.double() - total).norm() / total.norm()).item()
        found[merge] = [said[number][0][UP] for number in range(16)]
        for one, number in ((found[merge][n - 1], n) for n in (1, 4, 16)):
            reference = expected(W, said[number - 1][1][UP], said[number - 1][2][UP], [p[UP] for p in links[:number]])
            agrees(one, reference, torch.bfloat16)
    exact, naive = found["exact"][-1], found["naive"][-1]
    assert lost["naive"] > 3 * lost["exact"]
    assert naive.error == pytest.approx(lost["naive"], rel=1e-3)
    assert exact.error == pytest.approx(lost["exact"], rel=1e-3)
    assert naive.cosine is not None
    assert exact.cosine is not None
    assert naive.cosine < 0.8 < 0.98 < exact.cosine
    # What an entry is given by one link after the other does not come to a step of its format; by their sum it does.
    changed = {merge: sum(1 - one.unchanged for one in found[merge]) for merge in found}
    assert changed["naive"] < 0.7 * changed["exact"]
    # Both learned the same, so the size of what was learned is no measure of what was kept.
    assert naive.relative_size == pytest.approx(exact.relative_size, rel=1e-6)


@pytest.mark.parametrize("merge", ["exact", "naive", "no"])
def test_a_knot_touches_no_bias_no_norm_and_no_embedding_that_the_head_shares(merge: str) -> None:
    model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which are zeros in a model that nobody trained
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chain = Chain(model, Base(model), Rules(merge=merge))
    links = [link(), link(first_step=5, seed=8)]
    touched = set()
    for knot in run_chain(chain, links, tune_with(batches(10)), outputs, no_gradients):
        assert knot.applied.keys() == knot.weights.keys()
        touched |= {f"{name}.weight" for name in knot.applied}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert "lm_head.weight" not in touched
    assert len(touched) == 14
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == (set() if merge == "no" else touched)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# ---------------------------------------------------------------------------------------------------------
# Memory


def peak_of(do: Callable[[], object], trace: Path) -> int:
    """The most bytes that were allocated at one time, by torch's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        do()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    assert events
    allocated = np.cumsum([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])])
    return int(allocated.max())


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("account", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_merge_needs_less_memory_than_one_matrix_in_float32(account: bool, kind: str, tmp_path: Path) -> None:
    n_out, n_in = 4096, 4096
    holder = nn.Module()
    one = Conv1D(n_out, n_in) if kind == "conv1d" else nn.Linear(n_in, n_out, bias=False)
    holder.big = one.to(torch.bfloat16).requires_grad_(False)
    save_file({"big.weight": holder.big.weight.data}, tmp_path / "model.safetensors")
    base = Base(holder, [tmp_path / "model.safetensors"])
    base.remember(["big"])
    links = [{"big": draw(holder, "big", number, 0.01)} for number in range(3)]
    before = links[:2] if account else None
    peak = peak_of(lambda: residual.write(holder, base, links, ["big"], "exact", before), tmp_path / "trace.json")
    # torch counts the file as it is mapped, of which no byte is copied (see the next test).
    assert peak - 2 * n_out * n_in < 4 * n_out * n_in
    exact = applied_to(dense_of_file(tmp_path, kind)[:9], rows_of(links, 9))
    assert ((dense(holder, "big")[:9].double() - exact).abs() <= half_a_place(exact) + 1e-7).all()


def dense_of_file(folder: Path, kind: str) -> Tensor:
    weight = load_file(folder / "model.safetensors")["big.weight"]
    return weight.T if kind == "conv1d" else weight


def rows_of(links: list[LinkWeights], n: int) -> list[Pair]:
    return [Pair(one["big"].A_RI, one["big"].B_OR[:n], one["big"].scale) for one in links]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says which memory a file backs")  # noqa: PTH110
def test_a_base_in_a_file_is_never_copied_into_memory(tmp_path: Path) -> None:
    holder = nn.Module()
    holder.big = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    save_file({"big.weight": holder.big.weight.data}, tmp_path / "model.safetensors")
    base = Base(holder, [tmp_path / "model.safetensors"])
    base.remember(["big"])
    assert not base._copies
    before = anonymous_memory()
    weight = base.weight("big")
    assert all(bool(rows.any()) for rows in weight.split(64))  # every page of it is read
    assert anonymous_memory() - before < weight.nbytes / 4


# ---------------------------------------------------------------------------------------------------------
# Outputs


def some_outputs(change: float, n: int = 7) -> tuple[Outputs, Outputs, Outputs]:
    generator = torch.Generator().manual_seed(0)
    start, before, noise = (3 * torch.randn(n, 50, generator=generator) for _ in range(3))
    targets = torch.randint(0, 50, (n,), generator=generator)
    return tuple(Outputs(logits, targets) for logits in (start, before, before + change * noise))  # type: ignore[return-value]


@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-5])
def test_drift_is_scipys_divergence_and_torchs_loss(change: float) -> None:
    start, before, after = some_outputs(change)
    drift = Drift.between(start, before, after)
    old, new, first = (o.logits_NV.double().numpy() for o in (before, after, start))
    assert drift.kl == pytest.approx(entropy(softmax(old, axis=1), softmax(new, axis=1), axis=1).mean(), rel=1e-4)
    losses = [cross_entropy(o.logits_NV.double(), o.targets_N).item() for o in (before, after)]
    assert drift.loss_change == pytest.approx(losses[1] - losses[0], rel=1e-6, abs=1e-14)
    assert drift.max_logit_change == pytest.approx(np.abs(new - old).max(), rel=1e-6 / change)
    assert drift.relative == pytest.approx(np.abs(new - old).max() / np.abs(old).max(), rel=1e-6 / change)
    share = np.linalg.norm(new - old) / np.linalg.norm(old - first)
    assert drift.of_learned == pytest.approx(share, rel=1e-6 / change)


def test_the_divergence_is_from_the_outputs_before_to_those_after() -> None:
    start, before, after = some_outputs(1.0)
    forth, back = Drift.between(start, before, after), Drift.between(start, after, before)
    assert forth.kl != pytest.approx(back.kl, rel=0.01)
    assert forth.loss_change == pytest.approx(-back.loss_change)


def test_outputs_that_did_not_change_have_no_drift() -> None:
    start, before, _ = some_outputs(1.0)
    assert Drift.between(start, before, before) == Drift(0.0, 0.0, 0.0, 0.0, 0.0)
    assert Drift.between(before, before, before).of_learned is None


@pytest.mark.parametrize("merge", ["exact", "naive"])
def test_a_knots_drift_is_that_of_the_outputs_before_and_after_it(merge: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    chain = Chain(model, Base(model), Rules(merge=merge))
    seen: list[Outputs] = []

    def probe(model: PreTrainedModel) -> Outputs:
        seen.append(outputs(model))
        return seen[-1]

    links = [link(), link(first_step=5, seed=8)]
    for number, knot in enumerate(run_chain(chain, links, tune_with(batches(10)), probe, no_gradients)):
        assert len(seen) == 3 + 2 * number  # at the start, and before and after each knot: never the same twice
        start, before, after = seen[-3:]
        assert knot.outputs is after
        logits = [o.logits_NV.double().numpy() for o in (before, after)]
        kl = entropy(*(softmax(one, axis=1) for one in logits), axis=1).mean()
        assert knot.drift.kl == pytest.approx(kl, rel=1e-6)
        assert knot.drift.kl > 1e-7
        losses = [cross_entropy(o.logits_NV.double(), o.targets_N).item() for o in (before, after)]
        assert knot.drift.loss_change == pytest.approx(losses[1] - losses[0], rel=1e-6)
        learned, moved = before.logits_NV - start.logits_NV, after.logits_NV - before.logits_NV
        assert knot.drift.of_learned == pytest.approx((moved.norm() / learned.norm()).item(), rel=1e-5)


def test_the_last_targets_of_each_row_are_kept_and_no_others() -> None:
    rows = [("a", [1, 2, 3], [4, 5, 6, 7, 8, 9]), ("b", [1], [2]), ("c", [5, 6, 7, 8], [9, 10, 11]), ("d", [3], [4, 4])]
    batch = collate(rows)
    for n in (1, 2, 3, 4, 9):
        kept = batch.last_targets(n)
        assert kept.targets_N.tolist() == [token for _, _, answer in rows for token in answer[-n:]]
        assert torch.equal(kept.input_ids_BT, batch.input_ids_BT)
        for b, (_, prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer) - 1
            assert kept.predicts_BT[b].nonzero().flatten().tolist() == list(range(end - min(n, len(answer)), end))
    assert batch.n_targets == 12  # the batch itself is as it was


# ---------------------------------------------------------------------------------------------------------
# Runs

HALF = ["model.dtype=bfloat16", "arms.base=null", "arms.full=null", "arms.lora=null", "comparison.primary=null"]
ARMS = ["arms.naive={links: 3, knot: {merge: naive}}", "arms.beside={links: 3, knot: {merge: 'no'}}"]
WORST = {"relative_size": max, "unchanged": max, "error": max, "cosine": min}


def ledger_of(folder: RunFolder, arm: str) -> list[dict[str, Any]]:
    return read_jsonl(folder.path / f"arms/{arm}/seed-0/ledger.jsonl")


def test_a_run_writes_a_row_for_each_matrix_of_each_knot_and_its_record_agrees(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, *HALF, *ARMS)
    for arm in ("chain3", "naive", "beside"):
        rows, found = ledger_of(folder, arm), result(folder, arm)["train_info"]["knots"]
        assert [row["link"] for row in rows] == [1] * 14 + [2] * 14 + [3] * 14
        assert all(row.keys() == {"link", "module", *WORST} for row in rows)
        in_metrics = [
            row for row in read_jsonl(folder.path / f"arms/{arm}/seed-0/metrics.jsonl") if row["kind"] == "knot"
        ]
        assert in_metrics == [{"kind": "knot", **knot} for knot in found]
        for knot, shown in zip(found, summary.arms[arm].knots, strict=True):
            mine = [row for row in rows if row["link"] == knot["link"]]
            pairs = load_file(folder.path / f"arms/{arm}/seed-0/knots/link-{knot['link']}/adapter_model.safetensors")
            assert {row["module"] for row in mine} == {key.split(".", 2)[2].rsplit(".", 2)[0] for key in pairs}
            assert knot["merge"] == {"chain3": "exact", "naive": "naive", "beside": "no"}[arm]
            for field, worst in WORST.items():
                values = [row[field] for row in mine]
                assert knot[f"{field}_median"] == pytest.approx(np.median(values))
                assert knot[f"{field}_{worst.__name__}"] == worst(values)
            assert shown.merge == knot["merge"]
            assert shown.error_max == knot["error_max"]
            assert shown.cosine_min == knot["cosine_min"]
            assert shown.drift_kl == knot["drift_kl"]
            assert shown.drift_loss_change == knot["drift_loss_change"]
    beside = ledger_of(folder, "beside")
    assert all((row["unchanged"], row["error"], row["cosine"]) == (0.0, 0.0, 1.0) for row in beside)
    exact, naive = (result(folder, arm)["train_info"]["knots"][-1] for arm in ("chain3", "naive"))
    assert exact["error_median"] < naive["error_median"]


def test_the_ledger_of_a_run_is_that_of_the_adapters_it_leaves(recipe_file: Path, tiny_folder: Path) -> None:
    folder, _ = go(recipe_file, *HALF)
    base = load_file(tiny_folder / "model.safetensors")
    pairs: dict[str, list[Pair]] = {}
    rows = {(row["link"], row["module"]): row for row in ledger_of(folder, "chain3")}
    before = {name: weight.bfloat16() for name, weight in base.items()}
    for number in (1, 2, 3):
        where = folder.path / f"arms/chain3/seed-0/knots/link-{number}"
        config = json.loads((where / "adapter_config.json").read_text())
        tensors = load_file(where / "adapter_model.safetensors")
        for name in sorted({key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in tensors}):
            A_RI, B_OR = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            pairs.setdefault(name, []).append(Pair(A_RI, B_OR, config["lora_alpha"] / config["r"]))
            after = applied_to(base[f"{name}.weight"], pairs[name]).float().bfloat16()
            reference = expected(base[f"{name}.weight"], before[f"{name}.weight"], after, pairs[name])
            found = {key: value for key, value in rows[number, name].items() if key not in ("link", "module")}
            before[f"{name}.weight"] = after
            # The last bit of the float32 sum may turn a tie the other way.
            assert found.pop("unchanged") == pytest.approx(reference.pop("unchanged"), abs=0.002)
            assert found == pytest.approx(reference, rel=2e-3)
    assert len(rows) == 3 * 14


@pytest.mark.drawn
def test_what_is_no_pair_has_no_ledger(recipe_file: Path) -> None:
    folder, summary = go(recipe_file, "arms.lora=null", "arms.chain3=null", "comparison.primary=null")
    assert knots_table(summary).rows == []
    for arm in ("base", "full"):
        assert not (folder.path / f"arms/{arm}/seed-0/ledger.jsonl").exists()
        assert summary.arms[arm].knots == []
    [knot] = result(folder, "full")["train_info"]["knots"]
    assert knot["merge"] is None
    assert knot["drift_kl"] == knot["drift_loss_change"] == 0.0
    assert all(knot[f"{field}_median"] is None for field in WORST)
    assert "Knots" not in write_report(folder).read_text()


@pytest.mark.slow
def test_drift_is_measured_on_the_last_four_target_tokens_of_four_validation_rows(recipe_file: Path) -> None:
    # A knot that lets half of the pair go moves the outputs by far more than rounding, so PEFT's own are a reference.
    settings = ["data.rows={train: 24, validation: 20, test: 8}", "data.answer='{question} {answer}'"]
    alone = ["arms.base=null", "arms.full=null", "arms.lora=null", "comparison.primary=null"]
    folder, _ = go(recipe_file, *settings, *alone, "knot={merge_fraction: 0.5}")
    said = read_recipe(folder.path / "recipe.yaml")
    splits = load_splits(said.data, find_model(said.model).tokenizer())
    rows = [(one.prompt + one.answers[one.gold], len(one.answers[one.gold])) for one in splits.validation]
    assert len(rows) == 20
    assert all(n_targets > 4 for _, n_targets in rows)
    model = PeftModel.from_pretrained(tiny_model(), folder.path / "arms/chain3/seed-0/knots/link-1").eval()

    def logits() -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([model(input_ids=torch.tensor([row])).logits[0, -5:-1] for row, _ in rows[:4]])

    before = logits()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] /= 2
    after = logits()
    with model.disable_adapter():
        start = logits()
    targets = torch.tensor([row[-4:] for row, _ in rows[:4]]).flatten()
    knot = result(folder, "chain3")["train_info"]["knots"][0]
    kl = entropy(softmax(before, axis=1), softmax(after, axis=1), axis=1).mean()
    assert knot["drift_kl"] == pytest.approx(kl, rel=1e-3)
    losses = [cross_entropy(torch.tensor(one), targets).item() for one in (before, after)]
    assert abs(losses[1] - losses[0]) > 0.01
    assert knot["drift_loss_change"] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert knot["drift_max_logit_change"] == pytest.approx(np.abs(after - before).max(), rel=1e-3)
    share = np.linalg.norm(after - before) / np.linalg.norm(before - start)
    assert knot["drift_of_learned"] == pytest.approx(share, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------
# Tables


def knot_row(link: int, **values: Any) -> dict[str, Any]:
    drift = {"drift_max_logit_change": 1e-6, "drift_relative": 1e-7, "drift_of_learned": 1e-5, "drift_kl": 1e-12}
    sizes = {"relative_size_median": 0.01, "relative_size_max": 0.02, "unchanged_median": 0.1, "unchanged_max": 0.2}
    lost = {"error_median": 0.05, "error_max": 0.1, "cosine_median": 0.95, "cosine_min": 0.9}
    rest = {"step": 5 * link, "seed": link, "merge": "exact", "drift_loss_change": 1e-9, "seconds": 0.1}
    return {"link": link, **drift, **sizes, **lost, **rest, **values}


def link_row(number: int, cleared: float) -> dict[str, Any]:
    rates = {f"learning_rate_{where}": 1e-3 for where in ("first", "peak", "last")}
    steps = {"first_step": 5 * number - 5, "last_step": 5 * number}
    return {"method": "lora", "rank": 4, **steps, **rates, "seed": number, "cleared": cleared}


def test_over_seeds_sizes_are_means_and_losses_the_worst(tmp_path: Path) -> None:
    run, links = ByHand(tmp_path / "run"), [link_row(1, cleared=1.0), link_row(2, cleared=0.5)]
    ones = {
        "relative_size_median": 0.01,
        "error_max": 0.3,
        "cosine_min": 0.7,
        "drift_kl": 1e-3,
        "unchanged_median": 0.2,
    }
    others = {"relative_size_median": 0.03, "error_max": 0.1, "cosine_min": 0.99, "drift_kl": 2e-3}
    first = [knot_row(1, **ones, drift_loss_change=-4e-3), knot_row(2, error_max=None, cosine_min=None)]
    second = [knot_row(1, **others, drift_loss_change=2e-3, relative_size_max=0.5), knot_row(2, error_max=0.4)]
    for seed, found in enumerate((first, second)):
        run.ok("chain3", seed, first_right(50), knots=found, links=links, rules={"merge_fraction": 0.25})
    plan = recipe(arms=["chain3"], seeds=[0, 1], comparison={"primary": None})
    one, two = summarize(plan, run.folder).arms["chain3"].knots
    assert one.relative_size_median == pytest.approx(0.02)
    assert one.unchanged_median == pytest.approx(0.15)
    assert (one.relative_size_max, one.error_max, one.cosine_min) == (0.5, 0.3, 0.7)
    assert (one.drift_kl, one.drift_loss_change) == (2e-3, -4e-3)
    assert (one.fraction, two.fraction) == (0.25, 1.0)  # the last knot lets nothing go
    assert (two.error_max, two.cosine_min) == (0.4, 0.9)
    assert (one.cleared, two.cleared) == (1.0, 0.5)


COLUMNS = ["unchanged", "error", "cosine", "KL", "loss"]


@pytest.mark.slow
@pytest.mark.drawn
def test_the_ledger_is_shown_in_the_terminal_on_the_page_and_in_wandb(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    told = cola("run", recipe_file, *HALF, ARMS[0], "tracking.wandb=offline")
    assert told.exit_code == 0, told.output
    [path] = (recipe_file.parent / "runs").iterdir()
    folder = RunFolder(path)
    summary = Summary.model_validate_json((folder.path / "summary.json").read_text())
    short, long = knots_table(summary, short=True), knots_table(summary)
    assert [row[:2] for row in short.texts] == [[arm, str(k)] for arm in ("chain3", "naive") for k in (1, 2, 3)]
    assert set(COLUMNS) <= set(short.columns)
    assert set(short.columns) < set(long.columns)
    for again in (told.output, cola("report", path).output):
        assert short.title.split(":")[0] in again
        lines = again.splitlines()
        # The title is wrapped where the table is narrow, so the rows are looked for below it.
        below = lines[next(i for i, line in enumerate(lines) if short.title.split(":")[0] + ":" in line) :]
        assert any(all(column in line for column in short.columns) for line in below)
        for row in short.texts:
            assert any([cell.strip() for cell in line.split()] == row for line in below), row
    page = html.unescape((path / "report.html").read_text())
    for cells in (long.columns, *long.texts):
        places = [page.index(f">{cell}<", page.index(long.title)) for cell in cells]
        assert places
    found: dict[str, list[dict[str, Any]]] = {}
    for part in path.glob("wandb/offline-run-*"):
        mine = records(part)
        [name] = [r["run"]["display_name"] for r in mine if r["type"] == "run"]
        history = [r["history"]["item"] for r in mine if r["type"] == "history"]
        found[name] = [row for row in history if "knot/drift_kl" in row]
    for arm in ("chain3", "naive"):
        expected_knots = result(folder, arm)["train_info"]["knots"]
        for knot, row in zip(expected_knots, found[f"{arm}-seed0"], strict=True):
            assert row["step"] == knot["step"]
            for key in ("drift_kl", "drift_loss_change", "error_median", "error_max", "cosine_min", "unchanged_median"):
                assert row[f"knot/{key}"] == pytest.approx(knot[key]), key
            assert math.isfinite(row["knot/drift_kl"])


# ---------------------------------------------------------------------------------------------------------
# Other versions' runs

FEW = ["arms.full=null", "arms.chain3=null", "arms.base=null", "comparison.primary=null"]


@pytest.mark.parametrize("format", [1, FORMAT + 1])
def test_a_run_of_another_version_is_refused_in_one_line(recipe_file: Path, format: int) -> None:
    folder, _ = go(recipe_file, *FEW)
    provenance = folder.provenance()
    assert provenance is not None
    assert provenance.format == FORMAT == result(folder, "lora")["format"]
    folder.write_text("provenance.json", json.dumps({**provenance.content(), "format": format}))
    before = contents(folder.path)
    same = ["run", recipe_file, *FEW, "--run-folder", folder.path]
    for words in (["report", folder.path], ["run", "--resume", folder.path], same):
        told = cola(*words)
        assert told.exit_code == 2, told.output
        [line] = told.stderr.strip().splitlines()
        assert line.startswith(f"error: {folder.path} was written by another version of cola")
        assert f"cola run {folder.path / 'recipe.yaml'}" in line
    assert contents(folder.path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".lease" not in path.parts}


@pytest.mark.slow
def test_an_unfinished_run_of_another_version_is_left_and_a_new_one_begun(recipe_file: Path) -> None:
    assert cola("run", recipe_file, *FEW).exit_code == 0
    runs = recipe_file.parent / "runs"
    [old] = runs.iterdir()
    (old / "report.html").unlink()  # killed just before its end, so that the same command would go on with it
    folder = RunFolder(old)
    provenance = folder.provenance()
    assert provenance is not None
    folder.write_text("provenance.json", json.dumps({**provenance.content(), "format": 1}))
    assert cola("run", recipe_file, *FEW).exit_code == 0
    assert len(list(runs.iterdir())) == 2
    assert not (old / "report.html").exists()
