"""The start of LoRA-GA against PEFT's and against its formula. Run: pytest tests/link/ideas/test_lora_ga.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from test_chain import outputs
from test_lora_one import falling, matrix
from test_methods import chain_of, close, gradients, links, logits, tuner, what
from torch import Tensor, nn

from cola.chain import extend, run_chain, tie_knot
from cola.errors import ModelError
from cola.link import adapter_files, adapters, starts
from cola.link.ideas.lora_ga import lora_ga


def pefts(gradient_OI: Tensor, rank: int, gamma: int) -> tuple[Tensor, Tensor]:
    """A and B as PEFT draws them for a layer with this gradient."""
    model: Any = nn.Sequential(nn.Linear(gradient_OI.shape[1], gradient_OI.shape[0], bias=False))
    model[0]._peft_loraga_grad = gradient_OI
    config = LoraConfig(
        r=rank, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=gamma)
    )
    layer = get_peft_model(model, config).base_model.model[0]
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def test_the_start_is_pefts_but_for_the_sign_of_each_direction() -> None:
    gradient_OI = falling(20, 16)
    A_RI, B_OR = pefts(gradient_OI, 4, 9)
    ours = lora_ga(matrix(gradient_OI, 4), gamma=9.0, version="peft")
    assert ours.B_OR is not None
    assert not ours.moves
    assert close(ours.A_RI * (ours.A_RI * A_RI).sum(1, keepdim=True).sign(), A_RI)
    assert close(ours.B_OR * (ours.B_OR * B_OR).sum(0).sign(), B_OR, 1e-4)
    assert all((row[row.abs().argmax()] > 0).item() for row in ours.A_RI)


def test_in_the_authors_version_both_factors_are_singular_vectors_of_one_length() -> None:
    gradient_OI = falling(20, 16)
    ours = lora_ga(matrix(gradient_OI, 3), gamma=16.0, version="authors")
    assert ours.B_OR is not None
    U_OK, _, V_KI = torch.linalg.svd(gradient_OI.double(), full_matrices=False)
    size = 20**0.25 / 4
    assert close((ours.A_RI.double() @ V_KI[:3].T).abs(), size * torch.eye(3, dtype=torch.float64))
    assert close((U_OK[:, 3:6].T @ ours.B_OR.double()).abs(), size * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("version", ["peft", "authors"])
def test_a_chain_that_begins_its_links_so_moves_no_output_where_one_begins_or_ends(version: str) -> None:
    chain = chain_of(tiny_model())
    for own in links(3, init={"lora_ga": {"version": version, "gamma": 64.0}}, init_batches=2):
        start, name = outputs(chain.model), "model.layers.0.mlp.up_proj"
        weight_OI = chain.model.get_submodule(name).weight.clone()  # pyright: ignore[reportCallIssue]
        extend(chain, own, gradients)
        assert close(outputs(chain.model).logits_NV, start.logits_NV, 1e-5)
        A_RI, B_OR = adapters.factors_of(adapters.pair_layers(chain.model)[name])
        frozen = chain.model.get_submodule(name).base_layer.weight
        assert B_OR.any()
        assert close(frozen + 2 * B_OR @ A_RI, weight_OI)
        tuner()(chain, own)
        assert tie_knot(chain, start, outputs, more_to_come=True).drift.relative < 1e-5


def test_a_link_that_is_put_back_is_the_one_that_was_kept(tmp_path: Path) -> None:
    chain, own = chain_of(tiny_model()), links(2, init={"lora_ga": {}}, init_batches=2)
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


def test_a_matrix_must_have_two_singular_vectors_for_each_rank() -> None:
    starts.check_room(tiny_model(), [what(rank=8, init={"lora_ga": {}})])
    with pytest.raises(ModelError, match=r"has 16 singular vectors, of which it takes 2 for each rank, so rank 9"):
        starts.check_room(tiny_model(), [what(rank=9, init={"lora_ga": {}})])
    starts.check_room(tiny_model(), [what(rank=16, init={"lora_one": {}})])
