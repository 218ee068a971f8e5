"""What cola relies on is tried on the loaded model: faults are found, healthy models pass, slower ways are right.

Run: pytest tests/measure/test_selfcheck.py
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import SIZES, tiny_tokenizer
from runs import go
from safetensors.torch import load_file
from test_architectures import without
from torch import Tensor, nn

from cola.data.encode import Example
from cola.errors import ModelError
from cola.link import adapter_files
from cola.link.adapters import kept_buffers, whole_state
from cola.link.forward import logits_at
from cola.link.model import Source
from cola.link.targets import left_out, left_out_note, shared_matrices, target_names
from cola.measure.evaluate import Evaluator, Ways
from cola.measure.likelihood import choice_nats
from cola.measure.selfcheck import Subject, difference, self_check, slowest
from cola.recipe.methods import Full

TOKENIZER = tiny_tokenizer()
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 403, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
GLM = {**SIZES, **MOE, "head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "gemma2 of 8": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_positions=128)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=403, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "glm4": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**GLM, first_k_dense_replace=1)),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(**SIZES, attn_layer_indices=[1], **MAMBA2)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=403, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2)
    ),
    "recurrent gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **without("initializer_range", "max_position_embeddings", "pad_token_id"),
            pad_token_id=5,  # not what prompts are padded with, whose embedding would be zero
            head_dim=8,
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "attention"],
        )
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(
            vocab_size=403, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48
        )
    ),
    "zamba2": lambda: hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **without("num_hidden_layers"),
            num_hidden_layers=4,
            mamba_d_state=8,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=1,
            chunk_size=8,
            adapter_rank=4,
            num_mem_blocks=1,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        )
    ),
}
QUICK = ["llama", "gemma2", "gpt2", "bloom", "mixtral", "glm4"]
NO_CACHE = ["bamba", "lfm2", "mamba"]


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().to(dtype).eval().requires_grad_(False)


def rows(n: int = 5) -> list[Example]:
    """Prompts of 4 to 12 tokens with choices of 1 to 3."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in range(n):
        tokens = torch.randint(3, 400, (4 + 2 * i + 6,), generator=draw).tolist()
        found.append(Example(f"e{i}", tokens[6:], [tokens[:1], tokens[1:3], tokens[3:6]], i % 3, ["a", "b", "c"], None))
    return found


def evaluator(task: str, ways: Ways | None = None) -> Evaluator:
    return Evaluator(task, TOKENIZER, [], 4096, nullcontext, 3).asking(ways or Ways())


def check(model: Any, task: str = "answer", examples: list[Example] | None = None, **settings: Any) -> dict[str, Any]:
    return self_check(Subject("tiny", model, evaluator(task), examples or rows(), **settings))


def plain_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens], device=model.device)).logits[0].float()


def plain_nats(model: Any, prompt: list[int], answer: list[int]) -> float:
    table = plain_logits(model, prompt + answer).log_softmax(-1)
    return -sum(table[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def plain_text(model: Any, prompt: list[int], n_tokens: int) -> str:
    """Greedy decoding, each token by one pass of transformers over all before it."""
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        token = int(plain_logits(model, prompt + tokens)[-1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        tokens.append(token)
    return str(TOKENIZER.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_healthy_models_pass_and_are_asked_the_quick_way(dtype: torch.dtype) -> None:
    for name in QUICK:
        for task in ("answer", "multiple_choice"):
            passes, model = [], make(name, dtype)
            model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            record = check(model, task, trains=True, full=dtype == torch.float32)
            assert record["ways"] == vars(Ways()), (name, record)
            assert record["notes"] == []
            assert record["later_token"] == 0.0
            assert len(passes) <= 30, (name, task, len(passes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_class_whose_config_says_otherwise_is_refused(dtype: torch.dtype) -> None:
    config = hf.LlamaConfig(**SIZES)
    config.is_causal = False
    model = hf.LlamaForCausalLM(config).to(dtype).eval()
    with pytest.raises(ModelError, match=r"tiny: a later token moves an earlier logit, by .* is_causal: false\)$"):
        check(model)


def test_a_leak_from_the_next_token_alone_and_within_blocks_is_found() -> None:
    def next_one(_module: nn.Module, _args: object, x_BTH: Tensor) -> Tensor:
        return x_BTH + 0.05 * x_BTH.roll(-1, dims=1)

    def blocks_of_5(_module: nn.Module, _args: object, x_BTH: Tensor) -> Tensor:
        means = [part + 0.05 * part.mean(1, keepdim=True) for part in x_BTH.split(5, dim=1)]
        return torch.cat(means, dim=1)

    for leak in (next_one, blocks_of_5):
        model = make("llama")
        model.model.embed_tokens.register_forward_hook(leak)
        with pytest.raises(ModelError, match="a later token moves an earlier logit"):
            check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leak_that_is_fainter_than_a_half_formats_rounding_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = hf.BertLMHeadModel(hf.BertConfig(**(SIZES | {"initializer_range": 0.02}))).to(dtype).eval()
    with pytest.raises(ModelError, match=r"a later token moves an earlier logit, by 0\.00"):
        check(model)


def test_a_last_digit_that_the_place_in_the_batch_moves_is_no_leak() -> None:
    def placed(_module: nn.Module, _args: object, x_BTH: Tensor) -> Tensor:
        return x_BTH * (1 + 0.001 * torch.arange(len(x_BTH))[:, None, None])

    model = make("llama", torch.bfloat16)
    model.lm_head.register_forward_hook(placed)
    assert 3e-4 < check(model)["later_token"] < 0.03


def test_a_model_that_depends_on_how_many_tokens_follow_is_refused() -> None:
    model = make("llama")
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, x_BTH: x_BTH * x_BTH.shape[1] ** 0.1)
    with pytest.raises(ModelError, match="a later token moves an earlier logit"):
        check(model)


def test_a_model_with_something_random_left_on_is_told_apart_from_one_that_sees_ahead() -> None:
    model = make("llama")
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, x_BTH: x_BTH + 0.1 * torch.randn_like(x_BTH))
    with pytest.raises(ModelError, match="the same row twice gives different logits"):
        check(model)


def test_rows_that_a_batch_changes_are_read_alone_and_score_as_plain_passes() -> None:
    model = make("llama")
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, x_BTH: x_BTH - 0.3 * x_BTH.mean((0, 1)).detach())
    # Of one row alone the mean is over its own tokens, later ones too: that is another fault.
    with pytest.raises(ModelError, match="later token"):
        check(model)
    model = make("llama")
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, x_BTH: x_BTH * (1 + 0.2 * (len(x_BTH) > 1)))
    for task in ("answer", "multiple_choice"):
        record = check(model, task)
        assert record["ways"]["rows"] == "alone"
        assert "each row is read alone" in record["notes"][0]
        asked = evaluator(task, Ways(**record["ways"]))
        for example, score in zip(rows(), asked(model, rows()), strict=True):
            assert score.nats == pytest.approx(
                plain_nats(model, example.prompt, example.answers[example.gold]), rel=1e-4
            )
    assert evaluator("answer", Ways(rows="alone")).of_text().batch_tokens == 1


@pytest.mark.parametrize("name", NO_CACHE)
def test_choices_of_a_model_without_a_plain_cache_score_as_plain_passes(name: str) -> None:
    model, examples = make(name), rows()
    record = check(model, "multiple_choice")
    assert record["ways"]["choices"] == "plain"
    assert "choices are scored one by one" in record["notes"][0]
    asked = evaluator("multiple_choice", Ways(**record["ways"]))
    for example, score in zip(examples, asked(model, examples), strict=True):
        nats = [plain_nats(model, example.prompt, answer) for answer in example.answers]
        assert score.nats == pytest.approx(nats[example.gold], rel=1e-5)
        assert score.prediction == min(range(3), key=nats.__getitem__)
    assert asked.causes()["ways"] == {"choices": "plain"}
    assert "ways" not in evaluator("multiple_choice").causes()  # what healthy models have scored stays good


def test_a_model_that_gives_no_cache_does_not_score_longer_choices_by_their_first_token() -> None:
    with pytest.raises(ModelError, match="MambaForCausalLM gives no cache"):
        choice_nats(make("mamba"), rows(1))


@pytest.mark.parametrize(("name", "way"), [("recurrent gemma", "alike"), ("rwkv", "plain")])
def test_answers_of_a_model_that_minds_padding_are_decoded_as_by_plain_passes(name: str, way: str) -> None:
    model, examples = make(name), rows()
    record = check(model, "answer")
    assert record["ways"]["decoding"] == way
    assert record["notes"]
    asked = evaluator("answer", Ways(**record["ways"]))
    got = [score.prediction for score in asked(model, examples)]
    assert got == [plain_text(model, example.prompt, asked.new_tokens) for example in examples]


def test_a_cache_that_is_wrong_in_silence_is_not_used() -> None:
    model = make("llama")

    def shifted(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, kwargs

    model.model.register_forward_pre_hook(shifted, with_kwargs=True)
    record = check(model, "multiple_choice")
    assert record["ways"]["choices"] == "plain"
    assert record["choices"] > record["tolerance"]
    record = check(model, "answer")
    assert record["ways"]["decoding"] == "plain"
    assert "cached: it gives other logits" in record["notes"][0]


@pytest.mark.parametrize("name", [*QUICK, "gemma2 of 8"])  # its rows are shorter and longer than its window
def test_answers_are_decoded_from_the_cache_of_the_loss_as_by_plain_passes(name: str) -> None:
    model, made, quick = make(name), [], evaluator("answer")
    for i, row in enumerate(rows(6)):  # greedy decoding leaves the right answer at its first token, second, ...
        tokens = list(row.prompt)
        while len(tokens) < len(row.prompt) + 3:
            token = int(plain_logits(model, tokens)[-1].argmax())
            tokens.append(token if len(tokens) < len(row.prompt) + i % 3 else (token + 7) % 400 + 3)
        answer = tokens[len(row.prompt) :]
        made.append(Example(row.id, row.prompt, [answer], 0, [TOKENIZER.decode(answer)], None))
    got = quick(model, made)
    assert [score.prediction for score in got] == [plain_text(model, e.prompt, quick.new_tokens) for e in made]
    want = [plain_nats(model, example.prompt, example.answers[0]) for example in made]
    assert [score.nats for score in got] == pytest.approx(want, rel=1e-5)
    assert [s.prediction for s in evaluator("answer", Ways(decoding="padded"))(model, made)] == [
        s.prediction for s in got
    ]


def test_decoding_stops_at_the_last_position_of_a_model_with_learned_ones() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_positions=14)).eval()
    examples = [example for example in rows() if len(example.prompt) + 3 <= 14]
    assert max(len(example.prompt) for example in examples) == 10
    record = check(model, "answer", examples)
    assert record["ways"]["positions"] == 14
    asked = evaluator("answer", Ways(**record["ways"]))
    got = [score.prediction for score in asked(model, examples)]
    assert got == [plain_text(model, e.prompt, min(asked.new_tokens, 15 - len(e.prompt))) for e in examples]
    # Where decoding stays within them nothing changes, nor does what was scored before.
    assert check(model, "answer", examples[:1])["ways"]["positions"] is None


def test_positions_are_tried_and_not_taken_from_the_config_alone() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_positions=14)).eval()
    model.config.n_positions = 500
    assert check(model, "answer", rows(4))["ways"]["positions"] == 14
    with pytest.raises(ModelError, match=r"rows of 15 tokens are drawn .* lower data.max_length"):
        check(model, "answer", rows(5))


def test_a_head_whose_weight_is_taken_without_calling_it_gives_the_whole_pass_logits() -> None:
    class Direct(hf.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:  # pyright: ignore
            hidden_BTH = self.model(input_ids=input_ids).last_hidden_state
            return hf.modeling_outputs.CausalLMOutputWithPast(logits=hidden_BTH @ self.lm_head.weight.T)

    torch.manual_seed(0)
    model = Direct(hf.LlamaConfig(**SIZES)).eval()
    ids = torch.tensor([row.prompt[:4] for row in rows(2)])
    where = torch.tensor([[False, True, True, False], [True, False, False, True]])
    assert torch.equal(logits_at(model, ids, where), model(ids).logits[where])
    assert check(model, "multiple_choice")["ways"]["choices"] == "plain"


def test_a_head_that_mixes_positions_is_refused() -> None:
    model = make("llama")

    def mixed(_module: nn.Module, _args: object, logits_BTV: Tensor) -> Tensor:
        return logits_BTV.cumsum(1) / 4

    model.lm_head.register_forward_hook(mixed)
    with pytest.raises(ModelError, match="its head gives other logits for single positions"):
        check(model)


def test_a_buffer_that_training_moves_is_refused_and_put_back() -> None:
    model = make("llama")
    model.model.norm.register_buffer("seen", torch.zeros(1))

    def count(module: nn.Module, _args: object, _output: Tensor) -> None:
        if module.training:
            module.get_buffer("seen").add_(1)

    model.model.norm.register_forward_hook(count)
    with pytest.raises(ModelError, match=r"training moves its buffer model\.norm\.seen"):
        check(model, trains=True)
    assert model.model.norm.seen == 0
    assert not model.training
    check(model)  # to be scored it is good


def test_logits_that_are_no_numbers_and_passes_that_fail_are_one_line() -> None:
    model = make("llama")
    handle = model.model.embed_tokens.register_forward_hook(lambda _m, _a, x_BTH: x_BTH * float("nan"))
    with pytest.raises(ModelError, match="its logits are no finite numbers in float32"):
        check(model)
    handle.remove()

    def fails(_module: nn.Module, _args: object) -> None:
        raise KeyError("token_type_ids")

    model.model.register_forward_pre_hook(fails)
    with pytest.raises(ModelError, match="a plain pass fails: KeyError: 'token_type_ids'"):
        check(model)


def test_a_model_that_masks_tokens_with_minus_infinity_is_healthy() -> None:
    model = make("llama")
    mask_V = torch.zeros(403).index_fill(0, torch.arange(390, 403), float("-inf"))
    model.lm_head.register_forward_hook(lambda _m, _a, logits_BTV: logits_BTV + mask_V)
    examples = [Example("e", [4, 5, 6, 7, 8], [[9]], 0, ["x"], None)]
    assert check(model, "answer", examples)["ways"] == vars(Ways())
    assert difference(torch.tensor([0.0, float("-inf"), 1.0]), torch.tensor([0.0, float("-inf"), 1.0])) == 0


def test_several_bases_are_all_asked_in_the_slowest_of_their_ways() -> None:
    assert slowest([Ways(), Ways(rows="alone"), Ways(decoding="alike", positions=9)]) == Ways(
        "alone", "cached", "alike", 9
    )
    assert slowest([Ways()]) == Ways()


@pytest.mark.parametrize("name", ["glm4", "gpt2"])
def test_what_is_kept_of_full_fine_tuning_is_all_of_the_state_dict(name: str, tmp_path: Path) -> None:
    model, full = make(name), Full()
    for buffer in kept_buffers(model):
        model.get_buffer(buffer).copy_(torch.randn(model.get_buffer(buffer).shape))
    adapter_files.save(tmp_path, model, full, "base", model)
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    other = make(name)
    adapter_files.put_back(tmp_path, other, full)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert load_file(tmp_path / "model.safetensors").keys() == whole_state(model).keys()
    assert bool(kept_buffers(model)) == (name == "glm4")


def all_linear(model: Any) -> list[str]:
    return target_names(model, "all-linear")


def test_what_all_linear_leaves_out_is_named_with_its_share() -> None:
    model = make("mixtral")
    total = sum(p.numel() for p in model.parameters())
    names, shares = all_linear(model), left_out(model, all_linear(model))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = sum(p.numel() for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj")) / total
    assert shares["model.layers.*.mlp.experts.gate_up_proj"] == pytest.approx(experts)
    assert set(shares) == {
        f"model.layers.*.mlp.{n}" for n in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    }
    assert left_out(make("llama"), all_linear(make("llama"))) == {}
    assert set(left_out(make("lfm2"), all_linear(make("lfm2")))) == {"model.layers.*.conv.conv.weight"}
    note = left_out_note(model, names)
    assert f"model.layers.*.mlp.experts.gate_up_proj ({experts:.2g} of the parameters)" in note


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("mixtral", "gate_up_proj", r"a parameter of 3 axes \(4 x 96 x 32\) and no linear layer, which takes no pair"),
        ("lfm2", "conv.conv", r"model\.layers\.0\.conv\.conv, a Conv1d and no linear layer"),
        ("llama", "embed_tokens", r"model\.embed_tokens, a Embedding and no linear layer"),
        ("llama", "q_prj", r"did you mean q_proj\?"),
    ],
)
def test_a_name_that_takes_no_pair_says_what_it_is(name: str, target: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        target_names(make(name), (target,))


def test_matrices_that_several_modules_share_get_no_pair_and_are_said() -> None:
    model = make("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight  # one matrix in two modules
    second.o_proj = first.o_proj  # one module in two places
    names = [[f"model.layers.{i}.self_attn.{kind}.weight" for i in (0, 1)] for kind in ("q_proj", "o_proj")]
    assert sorted(shared_matrices(model)) == sorted(names)
    assert not any(name.endswith(("q_proj", "o_proj")) for name in all_linear(model))
    assert "self_attn.q_proj.weight (" in left_out_note(model, all_linear(model))
    assert "shared by several modules" in left_out_note(model, all_linear(model))
    with pytest.raises(ModelError, match=r"q_proj shares its matrix with model\.layers\.1\.self_attn\.q_proj\.weight"):
        target_names(model, ("q_proj",))
    # A whole layer in two places is one: its pair is seen from both.
    model = make("llama")
    model.model.layers[1] = model.model.layers[0]
    assert shared_matrices(model) == []
    assert len(all_linear(model)) == 7
    # As transformers has it.
    assert any("shared_transformer.self_attn.q_proj" in names[0] for names in shared_matrices(make("zamba2")))


def test_the_model_is_tried_before_anything_is_trained_and_the_record_has_it(
    recipe_text: str, tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("lfm2").save_pretrained(tmp_path / "lfm2")
    TOKENIZER.save_pretrained(tmp_path / "lfm2")
    choices = tmp_path / "choices.jsonl"
    lines = [json.loads(line) for line in colours.read_text().splitlines()]
    words = ["sky is blue", "green grass", "yellow", "red what colour"]
    choices.write_text("".join(json.dumps({**line, "choices": words}) + "\n" for line in lines))
    recipe = tmp_path / "lfm2.yaml"
    recipe.write_text(f"""
name: lfm2
model: {{name_or_path: {tmp_path / "lfm2"}}}
data:
  files: {choices}
  rows: {{train: 8, validation: 4, test: 6}}
  task: multiple_choice
  prompt: "{{question}}?"
  choices: choices
  label: label
training: {{steps: 2, batch_size: 4, learning_rate: 1e-2}}
arms: {{base: {{links: 0}}, lora: {{links: 1}}}}
evaluation: {{general_text: null}}
seeds: [0]
tracking: {{wandb: off}}
output: {tmp_path / "runs"}
""")
    folder, summary = go(recipe, folder=tmp_path / "run")
    assert not any(arm.errors for arm in summary.arms.values())
    provenance = folder.provenance()
    assert provenance is not None
    made = provenance.content()
    assert made["selfcheck"]["ways"] == {**vars(Ways()), "choices": "plain"}
    assert [base["dtype"] for base in made["selfcheck"]["bases"]] == ["float32"]
    assert made["selfcheck"]["shared"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    told = "\n".join(summary.notes)
    assert "choices are scored one by one" in told
    assert "lora: target_modules: all-linear: no pair is put on model.layers.*.conv.conv.weight" in told
    # The same again finds the check in the store, and loads nothing.
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("a model was loaded"))
    again, _ = go(recipe, folder=tmp_path / "again")
    second = again.provenance()
    assert second is not None
    assert second.content()["selfcheck"] == made["selfcheck"]
