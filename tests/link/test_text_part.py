"""A text model inside one that sees too: every method works on the text alone, and the tower stays as it came.

Run: pytest tests/link/test_text_part.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import IDS, of
from architectures import make as make_tiny
from summaries import quickstart
from test_chain import batches, chain_of, link, logits, no_gradients, outputs, tune_with

from cola.chain import run_chain
from cola.compare.records import Summary
from cola.errors import ModelError
from cola.link import adapters
from cola.link.base import Base
from cola.link.targets import target_names
from cola.link.text_part import in_text, outside_text
from cola.measure import cost
from cola.recipe.methods import settings_of
from cola.report.figures import KINDS, figures_of

TOWER = ["model.vision_tower", "model.multi_modal_projector"]
PAIR = {"method": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": PAIR | {"target_modules": "all-linear"},
    "full": {"method": "full"},
    "adapter": {"method": "adapter", "bottleneck": 4, "placement": "houlsby", "activation": "relu"},
    "prefix": {"method": "prefix", "num_virtual_tokens": 3, "prefix_projection": False},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 3},
    "prompt_tuning": {"method": "prompt_tuning", "num_virtual_tokens": 3},
}


def make() -> hf.PreTrainedModel:
    return make_tiny("Gemma 3, with vision")


def test_what_no_text_passes_through_is_known() -> None:
    assert outside_text(make()) == TOWER
    assert in_text("model.language_model.layers.0.mlp", TOWER)
    assert not in_text("model.vision_tower.encoder", TOWER)
    assert in_text("model.vision_tower_of_text", TOWER)
    for text in (of("Llama"), make_tiny("OPT"), make_tiny("Gemma 3n, text")):
        assert outside_text(text) == []
    sees = hf.GitConfig(vision_config={"num_hidden_layers": 1}, num_hidden_layers=1)
    with torch.device("meta"):
        assert outside_text(hf.GitForCausalLM(sees)) == ["git.image_encoder"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_the_text_part_and_nothing_of_the_tower(method: str) -> None:
    settings = settings_of(METHODS[method])
    model = adapters.attach(make(), settings, 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not any("vision" in name or "projector" in name for name in trained)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)
    meter = cost.Meter(make().to("meta"), [(9, 3)], False)
    assert meter._shape(settings, False)[1] > 0
    assert meter.trouble is None


def test_full_fine_tuning_and_a_chain_leave_the_tower_as_it_was() -> None:
    before = {name: tensor.clone() for name, tensor in make().named_parameters()}
    for links in ([link(method="full")], [link(target_modules=["q_proj"]), link(first_step=5, seed=8)]):
        model = make()
        list(run_chain(chain_of(model), links, tune_with(batches(10)), outputs, no_gradients))
        moved = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
        assert moved
        assert all(name.startswith("model.language_model.") for name in moved)


def test_a_module_of_the_tower_is_no_target() -> None:
    with pytest.raises(ModelError, match=r"'fc1' is in a part of the model that text does not pass through"):
        target_names(make(), ("q_proj", "fc1"))
    names = target_names(make(), ("q_proj",))
    assert names == [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)]


def test_matrices_are_found_under_the_names_of_the_file(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    files = [tmp_path / "model.safetensors"]
    names = target_names(model, "all-linear")
    found, base = Base(make().to("meta"), files), Base(model, files)
    base.remember(names)
    assert len(names) == 14
    assert all(torch.equal(found.matrix(name), model.get_submodule(name).weight) for name in names)
    assert not base._copies  # what the file has is not kept in memory a second time


def test_a_pair_where_the_fused_kernels_pass_over_it_is_refused_and_left_out() -> None:
    model = of("Mamba", state_size=8, intermediate_size=None)
    names = target_names(model, "all-linear")
    assert {name.rpartition(".")[2] for name in names} == {"in_proj", "x_proj", "dt_proj"}
    adapters.attach(model, settings_of(METHODS["lora"]), 0)
    with pytest.raises(ModelError, match=r"out_proj: PEFT puts no pair there"):
        target_names(of("Mamba", state_size=8), ("in_proj", "out_proj"))


def test_an_update_of_nothing_spoils_no_page() -> None:
    content = quickstart().content()
    about = content["spectra"]["chain3"]
    for row in about["rows"]:
        row |= dict.fromkeys(("effective_rank", "rank_90", "stable_rank"))
    about["values"] = {what: [] for what in about["values"]}
    labels = about["overlap"]["labels"]
    about["overlap"] |= {"matrix": [[1.0 if a == b else None for a in labels] for b in labels], "random": None}
    summary = Summary.model_validate(content)
    drawn = figures_of(summary, {})
    for name in ("spectra", "overlap"):
        assert drawn[name] is not None
        assert "nothing learned" in KINDS[name].says(summary)


def test_the_model_learns_as_its_text_model_alone_would() -> None:
    whole, text = make(), hf.Gemma3ForCausalLM(make().config.text_config).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.weight = text.model.embed_tokens.weight
    assert torch.equal(logits(whole), logits(text))
    for model in (whole, text):
        model.requires_grad_(False)
        list(run_chain(chain_of(model), [link()], tune_with(batches(5)), outputs, no_gradients))
    assert torch.allclose(logits(whole), logits(text), rtol=1e-5, atol=1e-6)
