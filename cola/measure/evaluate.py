"""Loss and score of every example, in eval mode, with the prompts that were trained on.

    loss    nats per target token: the tokens of the right answer (of the text)
    score   multiple_choice: the right choice has the highest summed log-likelihood, 0 or 1
            answer: greedy decoding, up to the first stop string, gives the right answer after the stated
            normalization, 0 or 1
            text: none; perplexity is exp(loss)

Per-example results are kept, since arms are compared example by example.

Axes: B rows, C choices, T tokens, N positions, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from cola.data.answers import normalized, up_to, usual_stops
from cola.data.batches import by_tokens, collate, training_row
from cola.data.encode import Example, all_ends, tokenizer_fingerprint
from cola.data.passages import PASSAGE_TOKENS
from cola.data.splits import Splits
from cola.link.adapters import unwrapped, virtual_tokens
from cola.link.drift import Outputs
from cola.link.forward import logits_at
from cola.measure.likelihood import choice_nats, last_logits, left_padded, nats_of, plain_choice_nats
from cola.measure.scores import ExampleScore
from cola.recipe.data_section import Data

EVALUATION_VERSION = 2  # part of what a kept score depends on: raise it when the same weights would score otherwise

PROBE_ROWS, PROBE_TARGETS = 16, 4  # validation rows whose logits tell what a knot changed, and targets of each

Decoding: TypeAlias = Literal["padded", "alike", "plain"]


@dataclass(frozen=True)
class Ways:
    """How a model is asked: the quick way, or a slower one that is right where the quick one is not for this model."""

    rows: Literal["together", "alone"] = "together"  # several in one pass, or each alone
    choices: Literal["cached", "plain"] = "cached"  # continued from the prompt's cache, or each a row of its own
    # By `generate` on prompts that are padded on the left, on prompts of one length, or one token at a time by plain
    # passes over one prompt.
    decoding: Decoding = "padded"
    positions: int | None = None  # those that the model has, where decoding could go beyond them


@dataclass(frozen=True)
class Evaluator:
    """Scores examples of one task."""

    task: str  # `multiple_choice`, `answer` or `text`
    tokenizer: PreTrainedTokenizerBase
    normalize: Sequence[str]  # what exact match ignores
    batch_tokens: int  # in one forward pass
    autocast: Callable[[], AbstractContextManager[None]]  # the context of the run's precision
    answer_tokens: int  # of the data's longest right answer; decoding stops a little after it
    stop: Sequence[str] = ()  # strings that end a decoded answer, beside the end tokens
    ends: Sequence[int] = ()  # tokens that end one, beside the tokenizer's own
    ways: Ways = Ways()  # how the model is asked, as `selfcheck` found it

    @classmethod
    def of(
        cls,
        data: Data,
        batch_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        accelerator: Accelerator,
        ends: Sequence[int] = (),
    ) -> "Evaluator":
        """The one for a recipe's data; `ends`: the tokens that end an answer by the model."""
        normalize = data.normalize or []
        examples = [example for _, examples in splits.items() for example in examples]
        stop = data.stop
        if stop is None:
            stop = usual_stops((e.texts[0] for e in examples), normalize) if data.task == "answer" else []
        return cls(
            data.task,
            tokenizer,
            normalize,
            batch_tokens,
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
        text = replace(self, task="text", normalize=[], batch_tokens=PASSAGE_TOKENS, answer_tokens=0, stop=(), ends=())
        return text.asking(Ways(rows=self.ways.rows))

    def asking(self, ways: Ways) -> "Evaluator":
        """The one that asks a model in these ways."""
        return replace(self, ways=ways, batch_tokens=self.batch_tokens if ways.rows == "together" else 1)

    @property
    def new_tokens(self) -> int:
        """The most that are decoded of an answer."""
        return self.answer_tokens + 4

    def causes(self) -> dict[str, Any]:
        """What a score depends on besides the weights, their precision and the examples."""
        causes = {
            "version": EVALUATION_VERSION,
            "task": self.task,
            "normalize": list(self.normalize),
            "batch_tokens": self.batch_tokens,
            "answer_tokens": self.answer_tokens,
            "stop": list(self.stop),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        if self.task == "answer" and len(self.end_tokens) > 1:
            causes["ends"] = sorted(self.end_tokens)
        if slower := {name: way for name, way in vars(self.ways).items() if way != getattr(Ways, name)}:
            causes["ways"] = slower
        return causes

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
            nats_N = nats_of(logits_NV, batch.targets_N)
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
        if self.ways.decoding == "plain":
            return [self._plainly(model, example) for example in examples]
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
            input_ids_BT, mask_BT = left_padded([e.prompt for e in group], ends[0])
            width = input_ids_BT.shape[1]
            output = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=input_ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=ends[0],
                eos_token_id=ends,
                stopping_criteria=StoppingCriteriaList([self._stopping(before, width)] if self.stop else []),
            )
            rows = zip(group, output[:, width:].tolist(), before, strict=True)
            texts |= {example.id: self._said(tokens, its_before)[0] for example, tokens, its_before in rows}
        return [texts[example.id] for example in examples]

    def _stopping(self, before: Sequence[str], width: int) -> Callable[..., Tensor]:
        """Ends each row of a batch once a stop string has ended its answer.

        transformers' own `stop_strings` looks for them in the prompt too, where it ends, and in the answer prefix.
        """

        def ended(input_ids: Tensor, _scores: Tensor, **_: object) -> Tensor:
            rows = zip(input_ids[:, width:].tolist(), before, strict=True)
            return torch.tensor(
                [self._said(tokens, its_before)[1] for tokens, its_before in rows], device=input_ids.device
            )

        return ended

    def _room(self, model: PreTrainedModel, example: Example) -> int:
        """New tokens that decoding may come to: the last one that follows from the model's last position at most."""
        if self.ways.positions is None:
            return self.new_tokens
        return min(self.new_tokens, self.ways.positions - virtual_tokens(model) - len(example.prompt) + 1)

    def _plainly(self, model: PreTrainedModel, example: Example) -> str:
        """The greedy answer, each of its tokens by a plain pass over all before it."""
        tokens: list[int] = []
        before, _ = self._right(example)
        while len(tokens) < self._room(model, example) and not self._said(tokens, before)[1]:
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
