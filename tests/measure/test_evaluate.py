"""Losses and scores, against one plain forward pass per answer and transformers' own generate.

Run: pytest tests/measure/test_evaluate.py
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cola.data.answers import normalized
from cola.data.encode import Example
from cola.link.base import Base
from cola.link.forward import logits_at
from cola.link.model import Source
from cola.measure.evaluate import Evaluator
from cola.measure.likelihood import choice_nats
from cola.measure.scores import mean_loss, mean_score

PROMPTS = [[5, 9, 11, 40], [7, 3, 22, 41], [8, 100, 300, 42], [1, 2, 3, 4, 5, 6]]
CHOICES = [[50], [60, 61], [70, 71, 72]]


def examples() -> list[Example]:
    return [Example(f"e{i}", prompt, CHOICES, i % 3, ["a", "b", "c"], None) for i, prompt in enumerate(PROMPTS)]


def evaluator(task: str, tokenizer: PreTrainedTokenizerBase, **settings: object) -> Evaluator:
    defaults = {"normalize": ["whitespace"], "batch_tokens": 4096, "answer_tokens": 4, "autocast": nullcontext}
    return Evaluator(task=task, tokenizer=tokenizer, **{**defaults, **settings})


@torch.no_grad()
def plain_nats(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """-log p(answer | prompt) by one unpadded forward pass."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return -sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def other_architectures() -> list[PreTrainedModel]:
    """Learned positions, rotary and parallel blocks, and OPT's offset positions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 403, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    neox = GPTNeoXConfig(**sizes, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    opt = OPTConfig(
        **{k: v for k, v in sizes.items() if k != "initializer_range"},
        init_std=0.2,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
    )
    models = [
        GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        GPTNeoXForCausalLM(neox),
        OPTForCausalLM(opt),
    ]
    return [model.eval() for model in models]


@pytest.mark.parametrize("number", range(4))
def test_choices_continued_from_the_cached_prompt_have_the_likelihood_of_a_plain_pass(number: int) -> None:
    model = [tiny_model(), *other_architectures()][number]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        got = choice_nats(model, examples())
    assert len(passes) == 2  # the prompts, of any lengths, and the choices
    expected = [[plain_nats(model, e.prompt, answer) for answer in e.answers] for e in examples()]
    assert [pytest.approx(row, rel=1e-4) for row in expected] == got


def test_rows_with_more_and_fewer_choices_share_a_pass(tokenizer: PreTrainedTokenizerBase) -> None:
    model, rows = tiny_model(), examples()
    rows[0] = Example("few", PROMPTS[0], [[50], [60, 61]], 1, ["a", "b"], None)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    scores = evaluator("multiple_choice", tokenizer)(model, rows)
    assert len(passes) == 2
    assert [s.nats for s in scores] == pytest.approx(
        [plain_nats(model, e.prompt, e.answers[e.gold]) for e in rows], rel=1e-4
    )


def test_choices_of_one_token_are_read_off_prompts_of_any_length_in_one_pass(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = tiny_model()
    rows = [Example(f"e{i}", prompt, [[50], [60]], 0, ["a", "b"], None) for i, prompt in enumerate(PROMPTS)]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    results = evaluator("multiple_choice", tokenizer)(model, rows)
    assert len(passes) == 1
    model._forward_hooks.clear()
    expected = [plain_nats(model, e.prompt, [50]) for e in rows]
    assert [r.nats for r in results] == pytest.approx(expected, rel=1e-4)


def test_the_head_scores_in_float32_so_that_answers_do_not_tie() -> None:
    model = tiny_model().to(torch.bfloat16)
    ids = torch.tensor([PROMPTS[0]])
    where = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        expected = hidden.float() @ model.lm_head.weight.float().T
        got = logits_at(model, ids, where)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert len(got[0].unique()) > len(got[0].to(torch.bfloat16).unique())


def test_a_half_precision_head_is_converted_once_a_scoring_and_its_logits_are_those_of_the_whole_product(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().to(torch.bfloat16)
    head, seen, converted, products = model.lm_head, [], [], []
    weight_VH, linear, to_float = head.weight, torch.nn.functional.linear, torch.Tensor.float

    def counted_linear(*args: torch.Tensor) -> torch.Tensor:
        products.append(args[1].shape)
        return linear(*args)

    def counted_float(tensor: torch.Tensor) -> torch.Tensor:
        converted.append(tensor.data_ptr() == weight_VH.data_ptr())
        return to_float(tensor)

    head.register_forward_hook(lambda _, args, logits: seen.append((args[0], logits)))
    monkeypatch.setattr(torch.nn.functional, "linear", counted_linear)
    monkeypatch.setattr(torch.Tensor, "float", counted_float)
    evaluator("answer", tokenizer, batch_tokens=8)(model, examples())
    monkeypatch.undo()
    assert len(seen) > 4  # passes over rows, and steps of decoding
    assert sum(converted) == 1
    assert products.count(weight_VH.shape) == len(seen)
    for hidden, logits in seen:
        assert torch.equal(logits, linear(hidden.float(), weight_VH.float()))
    assert "forward" not in vars(head)  # nor is the copy kept
    assert head(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_a_knot_has_put_beside_a_half_precision_head_is_scored_with_it() -> None:
    model = tiny_model().to(torch.bfloat16)
    B_OK, A_KI = torch.randn(403, 2), torch.randn(2, 32)
    ids = torch.tensor([PROMPTS[0]])
    where = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0].float()
        Base(model).put_beside("lm_head", model.lm_head, (B_OK, A_KI))
        got = logits_at(model, ids, where)
    expected = hidden @ (model.lm_head.weight.float() + B_OK @ A_KI).T
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_chosen_answer_is_the_likeliest_and_the_loss_is_the_right_answers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = tiny_model()
    results = evaluator("multiple_choice", tokenizer)(model, examples())
    for example, result in zip(examples(), results, strict=True):
        nats = [plain_nats(model, example.prompt, answer) for answer in example.answers]
        assert result.id == example.id
        assert result.prediction == nats.index(min(nats))
        assert result.score == float(result.prediction == example.gold)
        assert result.nats == pytest.approx(nats[example.gold], rel=1e-4)
        assert result.tokens == len(example.answers[example.gold])


@pytest.mark.parametrize("task", ["multiple_choice", "answer", "text"])
def test_results_do_not_depend_on_the_batches(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    large = evaluator(task, tokenizer)(model, examples())
    small = evaluator(task, tokenizer, batch_tokens=1)(model, examples())
    assert [r.nats for r in large] == pytest.approx([r.nats for r in small], rel=1e-4)
    assert [(r.score, r.prediction) for r in large] == [(r.score, r.prediction) for r in small]


def test_greedy_decoding_is_transformers_own_and_a_right_answer_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    made = []
    for i, prompt in enumerate(PROMPTS):
        output = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        right = output[0, len(prompt) :].tolist()
        wrong = [(token + 1) % 400 for token in right]
        answer = right if i % 2 else wrong
        made.append(Example(f"e{i}", prompt, [answer], 0, [tokenizer.decode(answer)], None))
    results = evaluator("answer", tokenizer, answer_tokens=3)(model, made)
    assert [r.score for r in results] == [0.0, 1.0, 0.0, 1.0]
    for example, result in zip(made, results, strict=True):
        assert result.nats == pytest.approx(plain_nats(model, example.prompt, example.answers[0]), rel=1e-4)


def test_greedy_is_the_argmax_whatever_generation_config_the_model_comes_with(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    loaded = Source("own", tmp_path, False).load("float32", torch.device("cpu"))
    prompt = torch.tensor([PROMPTS[0]])
    said = loaded.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = prompt
    for _ in range(12):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said, ids)
    penalized = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert not torch.equal(penalized, ids)


def test_a_miss_in_tokens_that_is_right_in_text_counts_as_right(tokenizer: PreTrainedTokenizerBase) -> None:
    # The model says "<token> <token>" and the right text differs from it by case alone.
    model = tiny_model()
    prompt = PROMPTS[0]
    output = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=7, do_sample=False, eos_token_id=0, pad_token_id=0
    )
    said = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    right = f"  {said.upper()} "
    example = Example("e", prompt, [tokenizer(right).input_ids], 0, [right], None)
    strict = evaluator("answer", tokenizer, answer_tokens=3)(model, [example])
    loose = evaluator("answer", tokenizer, answer_tokens=3, normalize=["whitespace", "lowercase"])(model, [example])
    assert said.upper() != said
    assert (strict[0].score, loose[0].score) == (0.0, 1.0)
    assert loose[0].prediction == said


def test_loss_is_nats_per_target_token_over_all_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    texts = [Example("a", [5], [[6, 7, 8]], 0, [], None), Example("b", [9], [[10]], 0, [], None)]
    results = evaluator("text", tokenizer)(model, texts)
    nats = [plain_nats(model, e.prompt, e.answers[0]) for e in texts]
    assert mean_loss(results) == pytest.approx(sum(nats) / 4, rel=1e-5)
    assert mean_score(results) is None
    reference = model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss
    assert math.exp(results[0].nats / 3) == pytest.approx(math.exp(reference.item()), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("  two \n words ", ["whitespace"], "two words"),
        ("Yes.", ["whitespace"], "Yes."),
        ("Yes.", ["lowercase", "punctuation"], "yes"),
        ("a - b", ["punctuation", "whitespace"], "a b"),
        (" kept ", [], " kept "),
    ],
)
def test_normalization_takes_out_what_it_says(text: str, steps: list[str], expected: str) -> None:
    assert normalized(text, steps) == expected


def test_dropout_is_off_while_scoring(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(attention_dropout=0.5)
    model.train()
    first, second = (evaluator("text", tokenizer)(model, examples()[:1]) for _ in range(2))
    assert first == second
    assert not model.training


def test_scores_that_are_to_the_bit_what_they_were_keep_their_name(tokenizer: PreTrainedTokenizerBase) -> None:
    def version(task: str, dtype: str = "float32", **settings: object) -> int:
        return evaluator(task, tokenizer, **settings).causes(dtype)["version"]

    assert version("answer") == version("text", "bfloat16") == version("multiple_choice", answer_tokens=1) == 2
    assert version("answer", "bfloat16") == version("multiple_choice", answer_tokens=2) == 3


def test_scores_survive_json(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [result] = evaluator("multiple_choice", tokenizer)(tiny_model(), examples()[:1])
    assert json.loads(json.dumps(vars(result))) == vars(result)
