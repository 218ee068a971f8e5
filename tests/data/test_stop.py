"""What of a decoded text counts as the answer: stop strings, the answer prefix. Run: pytest tests/data/test_stop.py"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model, tiny_tokenizer
from test_data import data_of, refusal, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cola.data.answers import usual_stops
from cola.data.splits import load_splits
from cola.errors import RecipeError
from cola.measure.evaluate import Evaluator
from cola.measure.scores import ExampleScore
from cola.recipe.read import read_recipe
from cola.recipe.write import dump_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = {"sky": "blue", "grass": "green", "sun": "yellow", "rose": "red", "yes": "no", "one": "two three"}


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over words that carry their space in front, as Llama's; decoding loses the first space, encoding adds one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    words = " ".join([*ANSWERS, *ANSWERS.values(), "Q: A: = \u00e9 \n"])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([words, words.upper()] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", pad_token="<s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": tiny_tokenizer, "metaspace": metaspace_tokenizer}


def base_that_goes_on(
    tokenizer: PreTrainedTokenizerBase, between: str, after: str, answers: dict[str, str] = ANSWERS
) -> PreTrainedModel:
    """A model that has read questions with their answers, and what follows an answer."""
    model = tiny_model().requires_grad_(True)
    shown = [f"Q: {q}\nA:{between}{a}{after}Q: sky" for q, a in answers.items()]
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in shown]
    ids = pad_sequence(rows, batch_first=True, padding_value=0)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def rows_file(path: Path, change: Callable[[str], str] = str) -> Path:
    return write_rows(path, [{"q": q, "a": change(a)} for q, a in ANSWERS.items()] * 4)


def of_row(scores: list[ExampleScore]) -> dict[str, ExampleScore]:
    """By question: the rows of `rows_file` repeat them in one order."""
    questions = list(ANSWERS)
    return {questions[(int(score.id.rpartition(":")[2]) - 1) % len(questions)]: score for score in scores}


def scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, path: Path, **data: Any
) -> tuple[list[ExampleScore], Evaluator]:
    """The training rows, by the evaluator that a recipe asks for."""
    rows = {"train": 20, "validation": 2, "test": 2}
    defaults = {"rows": rows, "overlap": "allow", "prompt": "Q: {q}\nA:", "normalize": ["whitespace"]}
    settings = data_of(path, **{**defaults, **data})
    splits = load_splits(settings, tokenizer)
    batch_tokens = read_recipe(recipe_file(tmp_path / "r.yaml")).evaluation.batch_tokens
    evaluator = Evaluator.of(settings, batch_tokens, tokenizer, splits, Accelerator(cpu=True))
    return evaluator(model, splits.train), evaluator


RECIPE = """
name: stops
model: {name_or_path: some-org/some-model}
data: {files: t.jsonl, rows: {train: 4}, task: answer, prompt: "{q}", answer: "{a}"}
training: {epochs: 1}
arms: {lora: {links: 1}}
seeds: [0]
"""


def recipe_file(path: Path, more: str = "") -> Path:
    path.write_text(RECIPE.replace('"{a}"', f'"{{a}}"{more}'))
    return path


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """transformers' own continuation of one prompt, without padding."""
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    output = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=0, pad_token_id=0)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


# ---------------------------------------------------------------------------------------------------------
# A base that answers right and goes on


@pytest.mark.parametrize("after", ["\n\n", "\n"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_that_is_followed_by_the_next_question_is_right(kind: str, after: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    model = base_that_goes_on(tokenizer, " ", after)
    path = rows_file(tmp_path / "t.jsonl")
    said = {q: greedy(model, tokenizer, f"Q: {q}\nA:", 30) for q in ANSWERS}
    assert {q: text.split("\n")[0].strip() for q, text in said.items()} == ANSWERS
    assert all("Q:" in text for text in said.values())
    default, evaluator = scored(model, tokenizer, tmp_path, path)
    assert evaluator.stop == ["\n"]
    assert {q: (row.score, row.prediction) for q, row in of_row(default).items()} == {
        q: (1.0, a) for q, a in ANSWERS.items()
    }
    strict, evaluator = scored(model, tokenizer, tmp_path, path, stop=[])
    assert evaluator.stop == []
    assert {row.score for row in strict} == {0.0}
    assert [row.nats for row in strict] == [row.nats for row in default]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_an_answer_is_what_precedes_the_stop_string_in_transformers_own_continuation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
) -> None:
    """A model without sense, prompts of many lengths, alone or in one padded batch, and pieces of what it says."""
    model = tiny_model(seed=3)
    prompts = ["red", "what colour is the sky", "one two three " * 5, "maybe", "is the grass green or blue"]
    longest = len(tokenizer(" ####").input_ids) + 1
    texts = {
        f"train.jsonl:{n + 1}": greedy(model, tokenizer, f"{prompt}?", longest + 4) for n, prompt in enumerate(prompts)
    }
    files = {
        split: write_rows(tmp_path / f"{split}.jsonl", [{"q": q, "a": "####"} for q in asked])
        for split, asked in (("train", prompts), ("validation", ["a"]), ("test", ["b"]))
    }
    found_at = set()
    for stop in sorted({text[n : n + 2] for text in texts.values() for n in (1, 3, 5)}):
        settings = {"prompt": "{q}?", "rows": {}, "normalize": [], "stop": [stop, "never said"]}
        _, evaluator = scored(model, tokenizer, tmp_path, files, **settings)
        found = replace(evaluator, batch_tokens=batch_tokens)(
            model, load_splits(data_of(files, **settings), tokenizer).train
        )
        assert {row.id: row.prediction for row in found} == {
            name: text.removeprefix(" ").split(stop)[0] for name, text in texts.items()
        }
        found_at |= {stop in text for text in texts.values()}
    assert found_at == {True, False}


def test_decoding_goes_on_from_the_first_miss_and_ends_with_the_batchs_last_stop_string(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = base_that_goes_on(tokenizer, " ", "\n")
    path = rows_file(tmp_path / "t.jsonl")
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    counts = {}
    for name, stop in (("newline", None), ("none", [])):
        passes.clear()
        scored(model, tokenizer, tmp_path, path, stop=stop)
        counts[name] = len(passes)
    lengths = [len(tokenizer(f" {a}\n", add_special_tokens=False).input_ids) for a in ANSWERS.values()]
    # One pass over the right answers, whose first miss is each row's newline; then one for each token up to the budget.
    assert counts == {"newline": 1, "none": 1 + (max(lengths) + 4) - min(lengths)}


@pytest.mark.parametrize("stop", [None, []])
def test_a_right_answer_that_is_not_decoded_scores_as_if_it_were(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, stop: list[str] | None
) -> None:
    """A model that has learned to end half of its answers: those are known from one pass, the others decoded."""
    model = base_that_goes_on(tokenizer, " ", "<|endoftext|>")
    path = rows_file(tmp_path / "t.jsonl", lambda answer: answer if len(answer) > 3 else "maybe")
    found = of_row(scored(model, tokenizer, tmp_path, path, stop=stop)[0])
    for q, row in found.items():
        said = greedy(model, tokenizer, f"Q: {q}\nA:", 20).strip()
        assert said == ANSWERS[q] == str(row.prediction).strip()
        assert row.score == float(len(ANSWERS[q]) > 3)


# ---------------------------------------------------------------------------------------------------------
# The answer prefix


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("between", [" ", "\n", "", " = "])
def test_the_answer_prefix_is_part_of_neither_the_answer_nor_the_reference(
    tmp_path: Path, between: str, kind: str
) -> None:
    tokenizer = TOKENIZERS[kind]()
    model = base_that_goes_on(tokenizer, between, "\n")
    same, capitals = rows_file(tmp_path / "t.jsonl"), rows_file(tmp_path / "T.jsonl", str.upper)
    for normalize in ([], ["lowercase"], ["punctuation"], ["whitespace"], ["lowercase", "punctuation"]):
        settings = {"answer_prefix": between, "normalize": normalize}
        right, _ = scored(model, tokenizer, tmp_path, same, **settings)
        assert {q: (row.score, row.prediction) for q, row in of_row(right).items()} == {
            q: (1.0, a) for q, a in ANSWERS.items()
        }
        found, _ = scored(model, tokenizer, tmp_path, capitals, **settings)
        assert {row.score for row in found} == {float("lowercase" in normalize)}


def test_blanks_at_a_prompts_end_are_no_part_of_the_answer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = base_that_goes_on(tokenizer, " ", "\n")
    settings = {"prompt": "Q: {q}\nA: ", "answer_prefix": "", "normalize": []}
    found, _ = scored(model, tokenizer, tmp_path, rows_file(tmp_path / "t.jsonl"), **settings)
    assert {(row.score, row.prediction) for row in found} == {(1.0, answer) for answer in ANSWERS.values()}


def test_a_space_that_begins_an_answer_is_the_answers_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = base_that_goes_on(tokenizer, "  ", "\n")
    path = rows_file(tmp_path / "t.jsonl", lambda answer: f" {answer}")
    found, _ = scored(model, tokenizer, tmp_path, path, normalize=[])
    assert {(row.score, row.prediction) for row in found} == {(1.0, f" {answer}") for answer in ANSWERS.values()}
    without, _ = scored(model, tokenizer, tmp_path, rows_file(tmp_path / "u.jsonl"), normalize=[])
    assert {row.score for row in without} == {0.0}


def test_an_accent_that_the_tokenizer_composes_is_the_same_answer(tmp_path: Path) -> None:
    tokenizer = metaspace_tokenizer()
    words = {"sky": "\u00e9t\u00e9", "sun": "e\u0301te\u0301"}  # composed, and to be composed: one text in NFKC
    path = write_rows(tmp_path / "t.jsonl", [{"q": q, "a": a} for q, a in words.items()] * 12)
    model = base_that_goes_on(tokenizer, " ", "\n", words)
    found, _ = scored(model, tokenizer, tmp_path, path, normalize=[])
    assert {(row.score, row.prediction) for row in found} == {(1.0, words["sky"])}


# ---------------------------------------------------------------------------------------------------------
# Which strings


@pytest.mark.parametrize(
    ("answers", "normalize", "expected"),
    [
        (["12", "a b"], [], ["\n"]),
        (["12", "a\nb"], ["whitespace"], ["\n\n"]),
        (["12", "a\nb", "c\n\nd"], ["whitespace"], []),
        (["12", "\n 13"], ["whitespace"], ["\n\n"]),  # a newline would leave nothing of the second
        (["12\n"], ["whitespace"], ["\n"]),  # what it cuts off is ignored in any case
        (["12\n"], [], []),
    ],
)
def test_what_ends_an_answer_by_default_leaves_every_right_answer_whole(
    answers: list[str], normalize: list[str], expected: list[str]
) -> None:
    assert usual_stops(answers, normalize) == expected


@pytest.mark.parametrize("rows", [["red"], ["red", "red\ngreen"], ["red\n\ngreen", "red\n"]])
def test_the_default_is_that_of_the_rows_and_part_of_what_a_score_depends_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[str]
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": str(n), "a": rows[n % len(rows)]} for n in range(24)])
    _, evaluator = scored(tiny_model(), tokenizer, tmp_path, path)
    assert evaluator.causes()["stop"] == next(([stop] for stop in ("\n", "\n\n") if stop not in "".join(rows)), [])
    assert evaluator.of_text().causes()["stop"] == []


@pytest.mark.parametrize(("answer", "stop"), [("blue; red", ";"), ("blue.", ".\n"), ("1 = 2", "=")])
def test_an_answer_that_a_stop_string_would_cut_is_refused_with_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, answer: str, stop: str
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"q": str(n), "a": answer if n == 4 else "blue"} for n in range(8)])
    data = data_of(path, rows={"train": 4, "validation": 2, "test": 2}, stop=["END", stop])
    assert refusal(load_splits, data, tokenizer) == (
        f"t.jsonl:5: data.stop: {stop!r} would cut the right answer short, {answer!r}; leave it out"
    )


@pytest.mark.parametrize(
    ("more", "stop"),
    [("", None), (", stop: []", []), (', stop: "###"', ["###"]), (', stop: ["\\n", ";"]', ["\n", ";"])],
)
def test_a_recipe_keeps_its_stop_strings_when_it_is_written_down(
    tmp_path: Path, more: str, stop: list[str] | None
) -> None:
    recipe = read_recipe(recipe_file(tmp_path / "r.yaml", more))
    assert recipe.data.stop == stop
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert read_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace('"{a}"', '"{a}", stop: [""]'), "data.stop.0"),
        (lambda text: text.replace('answer, prompt: "{q}", answer: "{a}"', 'text, text: "{q}", stop: []'), "no effect"),
    ],
)
def test_a_stop_string_that_can_do_nothing_is_refused(
    tmp_path: Path, change: Callable[[str], str], reason: str
) -> None:
    (tmp_path / "r.yaml").write_text(change(RECIPE))
    with pytest.raises(RecipeError, match=reason):
        read_recipe(tmp_path / "r.yaml")
