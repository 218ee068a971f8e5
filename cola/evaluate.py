"""Loss and score of every example, in eval mode, with the prompts that were trained on.

    loss    nats per target token: the tokens of the right answer (of the text)
    score   multiple_choice: the right choice has the highest summed log-likelihood, 0 or 1
            answer: greedy decoding, up to the first stop string, gives the right answer after the stated
            normalization, 0 or 1
            text: none; perplexity is exp(loss)

Per-example results are kept, since arms are compared example by example.

Axes: B rows, C choices, T tokens, N positions, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from cola.adapters import unwrapped, virtual_tokens
from cola.answers import normalized, up_to, usual_stops
from cola.batches import by_tokens, collate, training_row
from cola.data import PASSAGE_TOKENS, Example, Splits, all_ends, tokenizer_fingerprint
from cola.drift import Outputs
from cola.forward import logits_after, logits_and_cache, logits_at
from cola.recipe import Recipe

EVALUATION_VERSION = 2  # part of what a kept score depends on: raise it when the same weights would score otherwise

PROBE_ROWS, PROBE_TARGETS = 16, 4  # validation rows whose logits tell what a knot changed, and targets of each


@dataclass(frozen=True)
class ExampleScore:
    """One example's result.

    Attributes:
        id: The example's.
        nats: -log p of the right answer, summed over its tokens.
        tokens: Their number.
        score: 1.0 or 0.0; None for plain text.
        prediction: Index of the chosen answer, or the decoded one.
        group: The example's.
    """

    id: str
    nats: float
    tokens: int
    score: float | None
    prediction: int | str | None
    group: str | None


Decoding: TypeAlias = Literal["padded", "alike", "plain"]


@dataclass(frozen=True)
class Ways:
    """How a model is asked: the quick way, or a slower one that is right where the quick one is not for this model.

    Attributes:
        rows: Several in one pass, or each alone.
        choices: Continued from the prompt's cache, or each read as a row of its own.
        decoding: By `generate` on prompts that are padded on the left, on prompts of one length, or one token at a time
            by plain passes over one prompt.
        positions: Those that the model has, where decoding could go beyond them.
    """

    rows: Literal["together", "alone"] = "together"
    choices: Literal["cached", "plain"] = "cached"
    decoding: Decoding = "padded"
    positions: int | None = None


@dataclass(frozen=True)
class Evaluator:
    """Scores examples of one task.

    Attributes:
        task: `multiple_choice`, `answer` or `text`.
        tokenizer: Decodes generated answers.
        normalize: What exact match ignores.
        batch_tokens: Tokens in one forward pass.
        autocast: Gives the context of the run's precision.
        answer_tokens: Longest right answer of the data; decoding stops a little after it.
        stop: Strings that end a decoded answer, beside the end tokens.
        ends: Tokens that end one, the tokenizer's own always among them.
        ways: How the model is asked, as `cola.selfcheck` found it.
    """

    task: str
    tokenizer: PreTrainedTokenizerBase
    normalize: Sequence[str]
    batch_tokens: int
    autocast: Callable[[], AbstractContextManager[None]]
    answer_tokens: int
    stop: Sequence[str] = ()
    ends: Sequence[int] = ()
    ways: Ways = Ways()

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        accelerator: Accelerator,
        ends: Sequence[int] = (),
    ) -> "Evaluator":
        """The one that a recipe asks for; `ends`: the tokens that end an answer by the model."""
        data, normalize = recipe.data, recipe.data.normalize or []
        examples = [example for _, examples in splits.items() for example in examples]
        stop = data.stop
        if stop is None:
            stop = usual_stops((e.texts[0] for e in examples), normalize) if data.task == "answer" else []
        return cls(
            data.task,
            tokenizer,
            normalize,
            recipe.evaluation.batch_tokens,
            accelerator.autocast,  # pyright: ignore[reportArgumentType] - accelerate annotates its default None wrongly
            max(len(answer) for e in examples for answer in e.answers),
            stop,
            ends,
        )

    @property
    def end_tokens(self) -> list[int]:
        """All tokens that end an answer."""
        return all_ends(self.tokenizer, self.ends)

    def of_text(self) -> "Evaluator":
        """The one for a general text. Nothing in it is the recipe's own: what one recipe has measured serves another.

        A passage at a time, since its logits are wanted at every position: of 4096 tokens they would take 2.5 GB under
        a vocabulary of 150,000.
        """
        ways = Ways(rows=self.ways.rows)
        text = replace(self, task="text", normalize=[], batch_tokens=PASSAGE_TOKENS, answer_tokens=0, stop=(), ends=())
        return text.asking(ways)

    def asking(self, ways: Ways) -> "Evaluator":
        """The one that asks a model in these ways."""
        return replace(self, ways=ways, batch_tokens=self.batch_tokens if ways.rows == "together" else 1)

    @property
    def new_tokens(self) -> int:
        """The most that are decoded of an answer."""
        return self.answer_tokens + 4

    def causes(self) -> dict[str, Any]:
        """What a score depends on besides the weights, their precision and the examples."""
        several = {"ends": sorted(self.end_tokens)} if self.task == "answer" and len(self.end_tokens) > 1 else {}
        slower = {name: way for name, way in vars(self.ways).items() if way != getattr(Ways, name)}
        return several | {
            "version": EVALUATION_VERSION,
            "task": self.task,
            "normalize": list(self.normalize),
            "batch_tokens": self.batch_tokens,
            "answer_tokens": self.answer_tokens,
            "stop": list(self.stop),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **({"ways": slower} if slower else {}),
        }

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, examples: Sequence[Example]) -> list[ExampleScore]:
        """Results in the order of the examples; the model is left in eval mode."""
        model.eval()
        with self.autocast():
            score = self._choices if self.task == "multiple_choice" else self._sequences
            results = {result.id: result for result in score(model, examples)}
        return [results[example.id] for example in examples]

    @torch.no_grad()
    def outputs(self, model: PreTrainedModel, examples: Sequence[Example]) -> Outputs:
        """What the model says at the last few targets of some examples, in eval mode."""
        batch = collate([training_row(example) for example in examples]).last_targets(PROBE_TARGETS).to(model.device)
        with self.autocast():
            return Outputs(logits_at(model.eval(), batch.input_ids_BT, batch.predicts_BT), batch.targets_N)

    def _sequences(self, model: PreTrainedModel, examples: Sequence[Example]) -> Iterable[ExampleScore]:
        missed = []
        for group in by_tokens(examples, lambda e: e.n_tokens, self.batch_tokens):
            batch = collate([training_row(e) for e in group]).to(model.device)
            logits_NV = logits_at(model, batch.input_ids_BT, batch.predicts_BT)
            nats_N = _nats(logits_NV, batch.targets_N)
            hits = logits_NV.argmax(-1) == batch.targets_N
            lengths = [len(e.answers[e.gold]) for e in group]
            for example, nats, hit in zip(group, nats_N.split(lengths), hits.split(lengths), strict=True):
                result = ExampleScore(example.id, nats.sum().item(), len(example.answers[0]), None, None, example.group)
                if self.task == "text":
                    yield result
                elif hit.all():
                    # Greedy decoding would walk through exactly these tokens, so it need not be run; no stop string
                    # lies in them.
                    yield replace(result, score=1.0, prediction=example.texts[0])
                else:
                    missed.append((example, result))
        for (example, result), text in zip(missed, self._decode(model, [e for e, _ in missed]), strict=True):
            right = normalized(text, self.normalize) == normalized(self._right(example)[1], self.normalize)
            yield replace(result, score=float(right), prediction=text)

    def _text(self, tokens: list[int]) -> str:
        # A token that ends an answer need not be one that the tokenizer leaves out.
        ends = self.end_tokens
        length = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
        return str(self.tokenizer.decode(tokens[:length], skip_special_tokens=True))

    def _right(self, example: Example) -> tuple[str, str]:
        """The right answer as decoding gives it: what stands before it, such as the answer prefix, and the answer.

        A tokenizer need not give back the text that was put in (a first space is lost, an accent composed), so both
        sides of a comparison are decoded from tokens.
        """
        text = self._text(example.answers[0])
        before = text.removesuffix(example.texts[0]) if text.endswith(example.texts[0]) else ""
        return before, text.removeprefix(before)

    def _said(self, tokens: list[int], before: str) -> tuple[str, bool]:
        """The answer in generated tokens, and whether a stop string has ended it; `before`: from `_right`."""
        text = self._text(tokens)
        if len(text) < len(before) and before.startswith(text):
            return text, False  # on its way to the answer, through a prefix that may hold a stop string itself
        text = text.removeprefix(before)
        answer = up_to(text, self.stop)
        return answer, len(answer) < len(text)

    def _decode(self, model: PreTrainedModel, examples: Sequence[Example]) -> list[str]:
        """Greedy answers to the prompts, up to an end token, a stop string or a little over the longest right answer.

        What stands before a right answer (the answer prefix) is taken off where the model says it too.
        """
        texts = {}
        ends = self.end_tokens  # load_splits refuses task answer without one
        # Virtual tokens stand before the padding, which would lie between them and a shorter prompt.
        padded = unwrapped(model) is model and self.ways.decoding == "padded"
        alike: dict[tuple[int, int], list[Example]] = defaultdict(list)
        for example in examples:
            alike[0 if padded else len(example.prompt), self._room(model, example)].append(example)
        groups = [
            (group, new_tokens)
            for (_, new_tokens), same in alike.items()
            for group in by_tokens(same, lambda e, new_tokens=new_tokens: len(e.prompt) + new_tokens, self.batch_tokens)
        ]
        for group, new_tokens in groups:
            before = [self._right(e)[0] for e in group]
            if self.ways.decoding == "plain":
                texts |= {e.id: self._plainly(model, e, b, new_tokens) for e, b in zip(group, before, strict=True)}
                continue
            input_ids_BT, mask_BT = left_padded([e.prompt for e in group], ends[0])
            width = input_ids_BT.shape[1]
            output = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=input_ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=ends[0],
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList([_Stopped(self, before, width)] if self.stop else []),
            )
            rows = zip(group, output[:, width:].tolist(), before, strict=True)
            texts |= {example.id: self._said(tokens, its_before)[0] for example, tokens, its_before in rows}
        return [texts[example.id] for example in examples]

    def _room(self, model: PreTrainedModel, example: Example) -> int:
        """New tokens that decoding may come to: the last one that follows from the model's last position at most."""
        if self.ways.positions is None:
            return self.new_tokens
        return min(self.new_tokens, self.ways.positions - virtual_tokens(model) - len(example.prompt) + 1)

    def _plainly(self, model: PreTrainedModel, example: Example, before: str, new_tokens: int) -> str:
        """The greedy answer, each of its tokens by a plain pass over all before it."""
        tokens: list[int] = []
        while len(tokens) < new_tokens and not self._said(tokens, before)[1]:
            token = int(last_logits(model, example.prompt + tokens).argmax())
            if token in self.end_tokens:
                break
            tokens.append(token)
        return self._said(tokens, before)[0]

    def _choices(self, model: PreTrainedModel, examples: Sequence[Example]) -> Iterable[ExampleScore]:
        # Choices of one token are read off the prompt's last position, prompts of any length together. Longer ones
        # continue from the cached prompt: prompts of one length share a pass, nothing is padded, and so it does not
        # matter what kind of positions the model has. Where it has no such cache, each choice is a row of its own.
        alike: dict[tuple[int, int], list[Example]] = defaultdict(list)
        for example in examples:
            long = max(map(len, example.answers)) > 1
            if long and self.ways.choices == "plain":
                yield _chosen(example, plain_choice_nats(model, example, self.batch_tokens))
                continue
            alike[len(example.prompt) if long else 0, len(example.answers)].append(example)
        for (_, n_choices), same in alike.items():
            rest = n_choices * (max(len(a) for e in same for a in e.answers) - 1)
            for group in by_tokens(same, lambda e, rest=rest: len(e.prompt) + rest, self.batch_tokens):
                for example, scores in zip(group, choice_nats(model, group), strict=True):
                    yield _chosen(example, scores)


def _chosen(example: Example, scores: Sequence[float]) -> ExampleScore:
    """The result of an example, from -log p of each of its choices."""
    best, right = min(range(len(scores)), key=scores.__getitem__), example.answers[example.gold]
    return ExampleScore(example.id, scores[example.gold], len(right), float(best == example.gold), best, example.group)


class _Stopped(StoppingCriteria):
    """Ends each row of a batch once a stop string has ended its answer.

    transformers' own `stop_strings` looks for them in the prompt too, where it ends, and in the answer prefix.
    """

    def __init__(self, evaluator: Evaluator, before: Sequence[str], width: int) -> None:
        self.evaluator, self.before, self.width = evaluator, before, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # pyright: ignore
        rows = zip(input_ids[:, self.width :].tolist(), self.before, strict=True)
        ended = [self.evaluator._said(tokens, before)[1] for tokens, before in rows]
        return torch.tensor(ended, device=input_ids.device)


def last_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits (1, V) of what follows a row, by a plain pass over it."""
    batch = collate([("", tokens, [0])]).to(model.device)
    return logits_at(model, batch.input_ids_BT[:, :-1], batch.predicts_BT[:, :-1])


def left_padded(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Prompts (B, T) for decoding, which goes on at their common end, and their attention mask."""
    width = max(map(len, prompts))
    input_ids_BT = torch.full((len(prompts), width), fill)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, prompt in enumerate(prompts):
        input_ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, width - len(prompt) :] = 1
    return input_ids_BT, mask_BT


def plain_choice_nats(model: PreTrainedModel, example: Example, batch_tokens: int) -> list[float]:
    """-log p of every choice, summed over its tokens, each choice read after the prompt as a row of its own."""
    nats = [0.0] * len(example.answers)
    rows = [(str(c), example.prompt, answer) for c, answer in enumerate(example.answers)]
    for group in by_tokens(rows, lambda row: len(row[1]) + len(row[2]), batch_tokens):
        batch = collate(group).to(model.device)
        nats_N = _nats(logits_at(model, batch.input_ids_BT, batch.predicts_BT), batch.targets_N)
        for (choice, _, _), own_N in zip(group, nats_N.split([len(row[2]) for row in group]), strict=True):
            nats[int(choice)] = own_N.sum().item()
    return nats


def choice_nats(model: PreTrainedModel, examples: Sequence[Example]) -> list[list[float]]:
    """-log p of every choice, summed over its tokens, for examples with one number of choices.

    The prompt is read once; choices of more than one token continue from its cache, for which the prompts must be of
    one length.
    """
    n_choices = len(examples[0].answers)
    prompts = collate([(example.id, example.prompt, example.answers[0][:1]) for example in examples]).to(model.device)
    prompts_BT, last_BT = prompts.input_ids_BT[:, :-1], prompts.predicts_BT[:, :-1]
    longest = max(len(answer) for example in examples for answer in example.answers)
    cache = None
    if longest > 1:
        logits_BV, cache = logits_and_cache(model, prompts_BT, last_BT)
    else:
        logits_BV = logits_at(model, prompts_BT, last_BT)
    first_BC = torch.tensor([[answer[0] for answer in example.answers] for example in examples], device=model.device)
    nats_BC = -logits_BV.log_softmax(-1).gather(1, first_BC)
    if cache is not None:
        cache.batch_repeat_interleave(n_choices)
        answers = [answer for example in examples for answer in example.answers]
        rest = collate([("", answer[:1], [*answer[1:], *[0] * (longest - len(answer))]) for answer in answers])
        real_QT = torch.tensor([[t < len(answer) - 1 for t in range(longest)] for answer in answers])
        rest_ids_QT, real_QT = rest.input_ids_BT.to(model.device), real_QT.to(model.device)
        logits_NV = logits_after(cache, model, rest_ids_QT, real_QT)
        targets_N = torch.tensor([token for answer in answers for token in answer[1:]], device=model.device)
        rest_Q = torch.zeros(len(answers), device=model.device)
        rows_N = repeat(torch.arange(len(answers), device=model.device), "q -> q t", t=longest)[real_QT]
        rest_Q.index_add_(0, rows_N, _nats(logits_NV, targets_N))
        nats_BC = nats_BC + rearrange(rest_Q, "(b c) -> b c", c=n_choices)
    return nats_BC.tolist()


def _nats(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


def score_rows(
    examples: Sequence[Example], scores: Sequence[ExampleScore], tokenizer: PreTrainedTokenizerBase, prompts: bool
) -> list[dict[str, Any]]:
    """The rows of scores/SPLIT.jsonl: each score with the right answer beside it.

    Args:
        examples: What was scored.
        scores: Theirs, in the same order.
        tokenizer: Gives the tokens that were read back as text.
        prompts: Whether to add that text (of a task `text` all of it) and a multiple choice's answers.
    """
    rows = []
    for example, score in zip(examples, scores, strict=True):
        answer = example.texts[example.gold] if example.texts else None
        row = {**asdict(score), "answer": answer, "gold": example.gold if len(example.answers) > 1 else None}
        if prompts:
            read = example.prompt if example.texts else [*example.prompt, *example.answers[0]]
            row["prompt"] = tokenizer.decode(read, clean_up_tokenization_spaces=False)
            row["choices"] = example.texts if len(example.answers) > 1 else None
        rows.append(row)
    return rows


def mean_loss(scores: Iterable[ExampleScore]) -> float:
    """Nats per target token over all examples: the sum of nats by the sum of tokens."""
    scores = list(scores)
    return math.fsum(s.nats for s in scores) / sum(s.tokens for s in scores)


def mean_score(scores: Iterable[ExampleScore]) -> float | None:
    """Mean of the examples' scores; None for plain text."""
    values = [s.score for s in scores if s.score is not None]
    return math.fsum(values) / len(values) if values else None


def forgetting_of(before: Sequence[ExampleScore], after: Sequence[ExampleScore]) -> dict[str, Any]:
    """What training has cost on a general text: its loss after training, before, and the difference.

    Args:
        before: Its passages by the untouched base.
        after: The same by the model that is scored.
    """
    loss, start = mean_loss(after), mean_loss(before)
    tokens = sum(score.tokens for score in after)
    return {"loss": loss, "before": start, "forgetting": loss - start, "n": len(after), "tokens": tokens}


def evaluation_of(scores: dict[str, list[ExampleScore]]) -> dict[str, Any]:
    """Loss, score and number of rows of each split, and the gaps where train and test are there."""
    evaluation: dict[str, Any] = {
        split: {"loss": mean_loss(rows), "score": mean_score(rows), "n": len(rows)} for split, rows in scores.items()
    }
    if "train" in evaluation and "test" in evaluation:
        train, test = evaluation["train"], evaluation["test"]
        evaluation["gap_loss"] = test["loss"] - train["loss"]
        evaluation["gap_acc"] = None if train["score"] is None else train["score"] - test["score"]
    return evaluation
