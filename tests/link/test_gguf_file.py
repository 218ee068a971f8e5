"""What a GGUF file's header says is carried over or refused by name, with the model that it came from as the reference.

Run: pytest tests/link/test_gguf_file.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from conftest import SIZES, tiny_tokenizer

from cola.data.encode import tokenizer_fingerprint
from cola.errors import ModelError
from cola.link.find import find_model, find_tokenizer, gguf_tokenizer
from cola.recipe import recipe

TIED = {**SIZES, "tie_word_embeddings": True}
IDS = torch.randint(3, 400, (2, 40), generator=torch.Generator().manual_seed(0))


def permuted(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """As llama.cpp keeps Llama's queries and keys: the two halves of each head interleaved."""
    return weight.unflatten(0, (n_heads, 2, -1)).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, arch: str, model: hf.PreTrainedModel, say: Callable[[gguf.GGUFWriter], object]) -> Path:
    """A model as llama.cpp's converter would write it, with what a test adds to the header."""
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*vocabulary, *(f"<unused{n}>" for n in range(config.vocab_size - len(vocabulary)))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    say(writer)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        stem, _, suffix = name.rpartition(".")
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            tensor = permuted(tensor, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads)
        if arch.startswith("gemma") and "norm" in stem:
            tensor = tensor + 1
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(kind: str, **settings: Any) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config, model = getattr(hf, f"{kind}Config"), getattr(hf, f"{kind}ForCausalLM")
        return model(config(**{**TIED, **settings})).eval()


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def factors(writer: gguf.GGUFWriter) -> None:
    """As llama.cpp keeps Llama 3.1's scaling: by how much each frequency is divided."""
    plain = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(make("Llama").config).inv_freq
    scaled = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(make("Llama", rope_parameters=LLAMA3).config).inv_freq
    writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())


def gemma2(writer: gguf.GGUFWriter) -> None:
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_sliding_window(4)
    writer.add_attn_logit_softcapping(2.0)
    writer.add_final_logit_softcapping(3.0)


def window(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_count(8)
    writer.add_sliding_window(4)


GEMMA2 = {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
CARRIED = {
    "linear rope scaling": ("llama", "Llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}, linear),
    "yarn": (
        "qwen2",
        "Qwen2",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 32}},
        yarn,
    ),
    "llama3's frequencies": ("llama", "Llama", {"rope_parameters": LLAMA3}, factors),
    "soft caps and a window": ("gemma2", "Gemma2", GEMMA2 | {"query_pre_attn_scalar": 8}, gemma2),
    "phi3's window": ("phi3", "Phi3", {"sliding_window": 4}, window),
    "biases of attention": ("llama", "Llama", {"attention_bias": True}, lambda writer: None),
}


@pytest.mark.parametrize("case", CARRIED)
def test_what_a_header_says_is_in_the_model_that_is_made_of_it(case: str, tmp_path: Path) -> None:
    arch, kind, settings, say = CARRIED[case]
    model = make(kind, **settings)
    for name, parameter in model.named_parameters():  # a fresh bias is zero, which a lost one would be too
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, without = model(IDS).logits, make(kind)(IDS).logits
    source = find_model(recipe.Model(name_or_path=str(write(tmp_path / "tiny.gguf", arch, model, say))))
    with torch.no_grad():
        logits = source.load("float32", torch.device("cpu"))(IDS).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, without, rtol=1e-2, atol=1e-2)  # so that the header's word makes a difference


def scale(writer: gguf.GGUFWriter) -> None:
    writer.add_embedding_scale(12.0)


def sections(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_yarn_log_mul(0.1)


def narrow(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_dimension_count(4)


REFUSED = {
    "llama.embedding_scale = 12.0": ("llama", "Llama", scale),
    "llama.rope.scaling.yarn_log_multiplier = 0.1": ("llama", "Llama", sections),
    "llama.attention.sliding_window = 4": ("llama", "Llama", lambda writer: writer.add_sliding_window(4)),
    "qwen2.attention.sliding_window = 4": ("qwen2", "Qwen2", lambda writer: writer.add_sliding_window(4)),
    "qwen2.rope.dimension_count = 4": ("qwen2", "Qwen2", narrow),
    "llama.final_logit_softcapping = 3.0": (
        "llama",
        "Llama",
        lambda writer: writer.add_final_logit_softcapping(3.0),
    ),
    "the tensor blk.0.attn_q_norm.weight": (
        "llama",
        "Llama",
        lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", torch.ones(8).numpy()),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_cannot_be_told_is_refused_by_name(what: str, tmp_path: Path) -> None:
    arch, kind, say = REFUSED[what]
    file = write(tmp_path / "tiny.gguf", arch, make(kind), say)
    with pytest.raises(ModelError) as refused:
        find_model(recipe.Model(name_or_path=str(file)))
    said = str(refused.value)
    assert what in said
    assert str(file) in said
    assert "\n" not in said


def test_every_end_token_of_a_header_ends_an_answer(tmp_path: Path) -> None:
    def turn(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(2)

    file = write(tmp_path / "tiny.gguf", "llama", make("Llama"), turn)
    settings = recipe.Model(name_or_path=str(file))
    from_file, ends = find_tokenizer(settings)
    assert from_file.name_or_path == str(gguf_tokenizer(file))  # which is read and not made the next time
    assert ends == find_model(settings).ends() == [0, 2]
    again, ends = find_tokenizer(settings)  # by what the file has become in between
    assert ends == [0, 2]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(from_file)
    assert again.name_or_path != from_file.name_or_path
    # The class's default, token 2 in Llama, is no word of a file that names another one alone.
    one = write(tmp_path / "one.gguf", "llama", make("Llama"), lambda writer: None)
    assert find_model(recipe.Model(name_or_path=str(one))).ends() == [0]
