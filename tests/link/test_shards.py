"""A frozen base in shards on two and three processes, against the whole one. Run: pytest tests/link/test_shards.py"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end, launched, processes
from conftest import tiny_model
from test_chain import INPUTS
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cola.chain import Chain, retie
from cola.errors import ColaError, ModelError
from cola.link import adapters, shards, wires
from cola.link.base import Base, own_rows
from cola.link.residual import Pair
from cola.recipe.methods import Lora
from cola.recipe.resolved import Rules

CPU = torch.device("cpu")
# Of a key's two rows a third process has none.
SMALL = {"num_key_value_heads": 1, "head_dim": 2, "tie_word_embeddings": True}


def mixed() -> Any:
    """Norms in float32 among weights in bfloat16, as many models keep them."""
    model = tiny_model().bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.register_forward_hook(lambda _module, _args, output: output.bfloat16())
    return model


MODELS = {"whole": tiny_model, "small and tied": lambda: tiny_model(**SMALL), "mixed": mixed}


def gradients(model: Any, seed: int = 3) -> list[torch.Tensor]:
    adapters.attach(model, Lora(alpha=16.0), seed)
    for layer in adapters.pair_layers(model).values():
        adapters.factors_of(layer)[1].fill_(0.01)
    model.train()(input_ids=INPUTS).logits.float().logsumexp(-1).sum().backward()
    found = [parameter.grad for parameter in adapters.trainable(model)]
    adapters.detach(model.eval())
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def passes(kind: str) -> None:
    """Logits, and the gradient of every pair, whole on each rank; a pair is put on and taken off twice."""
    model, whole = MODELS[kind](), MODELS[kind]()
    entries = sum(parameter.numel() for parameter in model.parameters())
    shards.shard(model, shards.layers_of(model), CPU, wires.count())
    held = sum(own_rows(parameter.detach())[0].numel() for parameter in model.parameters())
    assert held < 1.1 * entries / wires.count()
    for seed in (3, 4):
        with torch.no_grad():
            found, expected = (m(input_ids=INPUTS).logits.float() for m in (model, whole))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(gradients(model, seed), gradients(whole, seed), strict=True):
            assert got.shape == wanted.shape
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def pairs_of(model: nn.Module, seed: int) -> dict[str, Pair]:
    numbers = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            n_out, n_in = module.weight.shape
            A_RI = torch.randn(2, n_in, generator=numbers)
            found[name] = Pair(A_RI, torch.randn(n_out, 2, generator=numbers) / 50, 2.0)
    return found


def knots(kind: str, folder: str) -> None:
    """Each rank ties its own rows: those of the whole model, but for the last bit of a product of other rows, and its
    ledger."""
    model, whole = MODELS[kind](), MODELS[kind]()
    file = [Path(folder) / "model.safetensors"]
    links = [pairs_of(whole, seed) for seed in (0, 1)]
    names = dict(whole.named_parameters())
    shards.shard(model, shards.layers_of(model), CPU, wires.count())
    mine, theirs = Chain(model, Base(model, file), Rules()), Chain(whole, Base(whole, file), Rules())
    for learned in (links[:1], links, links[1:], []):
        found, expected = (retie(chain, learned, account=True) for chain in (mine, theirs))
        for name, parameter in model.named_parameters():
            own, first = own_rows(parameter.detach())
            wanted = names[name].detach()[first : first + len(own)]
            assert own.shape == wanted.shape
            rounded = own.dtype == torch.bfloat16
            assert torch.allclose(own, wanted, rtol=1e-2 if rounded else 1e-6, atol=1e-6), name
            assert not rounded or (own != wanted).float().mean() < 0.01, name  # once, so that few turn the other way
        assert found.keys() == expected.keys()
        for name, applied in expected.items():
            numbers = [[value for value in asdict(it).values() if value is not None] for it in (found[name], applied)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-7), name


def not_in_the_files(folder: str) -> None:
    """A weight that the files have otherwise than the model cannot be had again from them."""
    model = tiny_model(seed=1)
    shards.shard(model, shards.layers_of(model), CPU, wires.count())
    base = Base(model, [Path(folder) / "model.safetensors"])
    with pytest.raises(ModelError, match="the files do not hold the weight of model"):
        base.remember(["model.layers.0.mlp.up_proj"])


def child(task: Callable[..., None], asked: tuple[str, ...], variables: dict[str, str], said: Path) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        wires.join()
        task(*asked)
    except (AssertionError, ColaError) as error:
        said.write_text(repr(error))
        os._exit(1)
    os._exit(0)


def over(n: int, folder: Path, task: Callable[..., None], *asked: str) -> None:
    """The task on n processes, each of which comes to its end."""
    places = [(variables, folder / f"said-{rank}") for rank, variables in enumerate(launched(n))]
    children = [processes.Process(target=child, args=(task, asked, *place)) for place in places]
    for process in children:
        process.start()
    codes = [end(process) for process in children]
    assert codes == [0] * n, [path.read_text() for path in folder.glob("said-*")]


@pytest.mark.parametrize(("n", "kind"), [(2, "whole"), (3, "small and tied"), (2, "mixed")])
def test_a_model_in_shards_computes_what_the_whole_one_does_and_no_process_holds_more_than_its_share(
    tmp_path: Path, n: int, kind: str
) -> None:
    over(n, tmp_path, passes, kind)


@pytest.mark.parametrize(("n", "kind"), [(2, "whole"), (3, "small and tied"), (2, "mixed")])
def test_at_a_knot_each_rank_ties_its_own_rows(tmp_path: Path, n: int, kind: str) -> None:
    MODELS[kind]().save_pretrained(tmp_path)
    over(n, tmp_path, knots, kind, str(tmp_path))


def test_what_cannot_lie_in_shards_is_refused_before_anything_is_spread() -> None:
    other_way = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8))
    with pytest.raises(ModelError, match="keeps its weights the other way round"):
        shards.layers_of(other_way)
    unknown = tiny_model()
    unknown._no_split_modules = None
    with pytest.raises(ModelError, match="does not say what its layers are"):
        shards.layers_of(unknown)


def test_a_weight_that_the_files_do_not_hold_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    over(2, tmp_path, not_in_the_files, str(tmp_path))
