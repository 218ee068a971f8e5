"""The loop on other families than Qwen2: positions, tied heads, soft-capping, fused layers, towers.

Run: pytest tests/test_architectures.py    (python tests/architectures.py for all of the table in docs/architectures.md)
"""

import json
from pathlib import Path

import architectures
import pytest
import torch
import transformers as hf
from conftest import SIZES
from test_chain import batches, chain_of, link, logits, no_gradients, outputs, tune_with

from cola.chain import run_chain
from cola.data.encode import Example
from cola.link.forward import logits_at
from cola.measure.likelihood import choice_nats


def without(*names: str) -> dict:
    return {key: value for key, value in SIZES.items() if key not in names}


MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral sliding window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=4)),
    "gemma2 soft-capped": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=4)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "granite scaled logits": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=3.0)),
    "phi parallel": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "phi3 fused": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES)),
    "gpt2 conv1d": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=403, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**without("num_key_value_heads"))),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=403,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
            init_std=0.2,
        )
    ),
    "bloom alibi": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=403, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
}


def make(name: str) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_at_positions_are_the_models_own_there(name: str) -> None:
    model = make(name)
    ids = torch.randint(3, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    where = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = model(input_ids=ids).logits.float()[where]
    assert torch.allclose(logits_at(model, ids, where), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_on_the_right_needs_no_mask(name: str) -> None:
    model = make(name)
    ids = torch.randint(3, 400, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    where = torch.zeros(1, 10, dtype=torch.bool)
    where[:, 2:6] = True
    expected = model(input_ids=ids).logits.float()[0, 2:6]
    assert torch.allclose(logits_at(model, padded, where), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_choices_from_the_cache_have_the_likelihood_of_a_plain_pass(name: str) -> None:
    model = make(name)
    choices = [[50], [60, 61], [70, 71, 72]]
    rows = [Example(f"e{i}", [5 + i, 9, 11, 40, 41, 42, 43], choices, 0, [], None) for i in range(3)]
    got = choice_nats(model, rows)
    for example, mine in zip(rows, got, strict=True):
        for answer, nats in zip(choices, mine, strict=True):
            table = model(input_ids=torch.tensor([example.prompt + answer])).logits[0].float().log_softmax(-1)
            plain = -sum(table[len(example.prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert nats == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_chain_on_all_linear_layers_learns_and_its_knots_hold(name: str) -> None:
    model = make(name)
    before = logits(model)
    links = [link(first_step=0), link(first_step=5, seed=8)]
    knots = list(run_chain(chain_of(model), links, tune_with(batches(10)), outputs, no_gradients))
    assert len(knots) == 2
    for knot in knots:
        knot.drift.check(1e-4)
    assert all(knot.weights for knot in knots)
    assert (logits(model) - before).abs().max() > 1e-2


CONTRASTING = ["GPT-2", "Gemma 3, with vision", "Gemma 3n, text", "Qwen3-MoE", "LFM2"]


@pytest.fixture(scope="module", params=CONTRASTING)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a folder for its base and all that its arms export."""
    return request.param, tmp_path_factory.mktemp("architecture")


@pytest.mark.slow
@pytest.mark.parametrize("arm", architectures.ARMS)
def test_an_architecture_goes_the_whole_way_as_its_row_of_the_table_says(
    kept: tuple[str, Path], arm: str, tokenizer: hf.PreTrainedTokenizerBase
) -> None:
    name, folder = kept
    said = json.loads(architectures.RESULTS.read_text())["architectures"][name][arm]
    assert architectures.examined(name, arm, folder, tokenizer) == said


def test_the_table_has_every_architecture_and_arm() -> None:
    table = json.loads(architectures.RESULTS.read_text())["architectures"]
    wanted = {name: list(architectures.ARMS) for name in architectures.MODELS}
    assert {name: list(arms) for name, arms in table.items()} == wanted
