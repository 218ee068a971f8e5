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
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from cola.data.answers import normalized, up_to, usual_stops
from cola.data.batches import by_tokens, collate, training_row
from cola.data.encode import Example, all_ends, tokenizer_fingerprint
from cola.data.passages import PASSAGE_TOKENS
from cola.data.splits import Splits
from cola.link.adapters import unwrapped, virtual_tokens
from cola.link.drift import Outputs
from cola.link.forward import head_in_float32, logits_and_cache, logits_at
from cola.measure.continued import Continued, going_on
from cola.measure.likelihood import choice_nats, last_logits, left_padded, nats_of, plain_choice_nats
from cola.measure.scores import ExampleScore
from cola.recipe.data_section import Data

# Part of what a kept score depends on: raise it when the same weights would score otherwise. Since 3 longer choices of
# all prompts share a pass, which moves a last digit, and in half formats answers are decoded with a head in float32;
# everything else scores to the bit as under 2, and keeps that name.
EVALUATION_VERSION = 3

PROBE_ROWS, PROBE_TARGETS = 4, 4  # validation rows whose logits tell what a knot changed, and targets of each

Decoding: TypeAlias = Literal["cached", "padded", "alike", "plain"]


@dataclass(frozen=True)
class Ways:
    """How a model is asked: the quick way, or a slower one that is right where the quick one is not for this model."""

    rows: Literal["together", "alone"] = "together"  # several in one pass, or each alone
    choices: Literal["cached", "plain"] = "cached"  # continued from the prompt's cache, or each a row of its own
    # From the cache of the pass that has read the right answer; by `generate` on prompts that are padded on the left,
    # or of one length; or one token at a time by plain passes over one prompt.
    decoding: Decoding = "cached"
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

    def causes(self, dtype: str = "float32") -> dict[str, Any]:
        """What a score depends on besides the weights (of that dtype) and the examples."""
        longer_choices = self.task == "multiple_choice" and self.answer_tokens > 1
        as_before = not longer_choices and (self.task != "answer" or dtype == "float32")
        causes = {
            "version": 2 if as_before else EVALUATION_VERSION,
            "task": self.task,
            "normalize": list(self.normalize),
            "batch_tokens": self.batch_tokens,
            "answer_tokens": self.answer_tokens,
            "stop": list(self.stop),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        if self.task == "answer" and len(self.end_tokens) > 1:
            causes["ends"] = sorted(self.end_tokens)
        quick = {"decoding": ("cached", "padded")}  # which give the same
        ways = vars(self.ways).items()
        if slower := {name: way for name, way in ways if way not in quick.get(name, (getattr(Ways, name),))}:
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
        cached = self.task == "answer" and self.ways.decoding == "cached"
        missed: list[tuple[Example, ExampleScore]] = []
        texts: dict[str, str] = {}
        with head_in_float32(model):
            for group in by_tokens(examples, lambda e: e.n_tokens, self.batch_tokens):
                batch = collate([training_row(e) for e in group]).to(model.device)
                inputs = going_on(model, cached)
                logits_NV, cache = logits_and_cache(model, batch.input_ids_BT, batch.predicts_BT, **inputs)
                lengths = [len(e.answers[e.gold]) for e in group]
                nats = nats_of(logits_NV, batch.targets_N).split(lengths)
                greedy = [tokens.tolist() for tokens in logits_NV.argmax(-1).split(lengths)]
                misses: dict[int, list[int]] = {}
                for row, example in enumerate(group):
                    right = example.answers[example.gold]
                    result = ExampleScore(example.id, nats[row].sum().item(), len(right), None, None, example.group)
                    if self.task == "text":
                        yield result
                    elif greedy[row] == right:
                        # Greedy decoding would walk through exactly these tokens, so it need not be run; no stop string
                        # lies in them.
                        yield replace(result, score=1.0, prediction=example.texts[0])
                    else:
                        missed.append((example, result))
                        n_right = next(n for n, token in enumerate(greedy[row]) if token != right[n])
                        misses[row] = greedy[row][: n_right + 1]
                if cached and misses:
                    texts |= self._go_on(model, cache, batch.input_ids_BT.shape[1], group, misses)
        if not cached:
            texts = self._decode(model, [example for example, _ in missed])
        for example, result in missed:
            text = texts[example.id]
            right = normalized(text, self.normalize) == normalized(self._right(example)[1], self.normalize)
            yield replace(result, score=float(right), prediction=text)

    def _go_on(
        self,
        model: PreTrainedModel,
        cache: Cache | None,
        width: int,
        group: Sequence[Example],
        misses: dict[int, list[int]],
    ) -> dict[str, str]:
        """Greedy answers from the cache of the pass that has read the right ones, along which decoding walks as well
        up to its first miss; the text of each by id.

        Args:
            model: That has read them.
            cache: Of that pass.
            width: Its tokens of a row.
            group: Its rows.
            misses: Of some of them the greedy tokens up to the first miss; added to.
        """
        examples = [group[row] for row in misses]
        said, before = list(misses.values()), [self._right(example)[0] for example in examples]
        room, ends = [self._room(model, example) for example in examples], self.end_tokens

        def goes_on(i: int) -> bool:
            tokens = said[i]
            return tokens[-1] not in ends and len(tokens) < room[i] and not self._said(tokens, before[i])[1]

        going = list(range(len(said)))
        lengths = [len(example.prompt) + len(tokens) - 1 for example, tokens in zip(examples, said, strict=True)]
        continued = Continued(model, cache, width, list(misses), lengths)
        while kept := [place for place, i in enumerate(going) if goes_on(i)]:
            continued.keep(kept)
            going = [going[place] for place in kept]
            last_B1 = torch.tensor([said[i][-1:] for i in going], device=model.device)
            logits_BV = continued.logits(last_B1, torch.ones_like(last_B1, dtype=torch.bool))
            for i, token in zip(going, logits_BV.argmax(-1).tolist(), strict=True):
                said[i].append(token)
        return {e.id: self._said(tokens, b)[0] for e, tokens, b in zip(examples, said, before, strict=True)}

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

    def _decode(self, model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, str]:
        """Greedy answers to the prompts, up to an end token, a stop string or a little over the longest right answer.

        What stands before a right answer (the answer prefix) is taken off where the model says it too.
        """
        if self.ways.decoding == "plain":
            with head_in_float32(model):
                return {example.id: self._plainly(model, example) for example in examples}
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
        return texts

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
        # Where the model has no cache that choices can go on from, each longer choice is a row of its own.
        quick = []
        with head_in_float32(model):
            for example in examples:
                if self.ways.choices == "plain" and max(map(len, example.answers)) > 1:
                    yield _chosen(example, plain_choice_nats(model, example, self.batch_tokens))
                else:
                    quick.append(example)
            for group in by_tokens(quick, _choice_tokens, self.batch_tokens):
                for example, scores in zip(group, choice_nats(model, group), strict=True):
                    yield _chosen(example, scores)


def _choice_tokens(example: Example) -> int:
    """Tokens that an example takes in a batch at most: its prompt, and what its choices go on with."""
    return len(example.prompt) + sum(len(answer) - 1 for answer in example.answers)


def _chosen(example: Example, scores: Sequence[float]) -> ExampleScore:
    """The result of an example, from -log p of each of its choices."""
    best, right = min(range(len(scores)), key=scores.__getitem__), example.answers[example.gold]
    return ExampleScore(example.id, scores[example.gold], len(right), float(best == example.gold), best, example.group)
