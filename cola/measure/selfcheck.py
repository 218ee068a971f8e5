"""What cola relies on, tried on the loaded model before anything is trained or scored.

    later token   what comes later moves no earlier logit, neither what it is nor whether it is there
    batch         a row among others, padded on the right, has its own logits, and so have positions that are picked
    choices       choices that go on from the prompt's cache are as likely as in plain passes
    decoding      each step from the cache of a pass over rows, or else of `generate` on prompts that are padded on the
                  left, has the logits of a plain pass
    positions     the longest row, and what may be decoded after it, are within the model's positions
    state         all of the state dict is in what is kept of a fully fine-tuned model; training moves no buffer besides

Where a quick way is not right for the model the slower one that is right is taken, and the record says so (`Ways`);
where there is none the model is refused. Some 25 passes over a few short rows, of tokens that are at hand.

A difference is the root mean square, over the vocabulary, of the difference of two log-probabilities, by their standard
deviation: 0.01 is a hundredth of what tells tokens apart. Within one pass what is the same is computed alike, and
nothing but a last digit may move (`WITHIN`), less where twins of the rows show no such digit (`FAINT`). Passes of
different shapes round differently, the more the deeper the model, so there the tolerance follows the model too
(`ACROSS`, or four times what shorter passes over a row change).
In half formats a mixture's router may send a token elsewhere where two experts are as good as equal; a fault is there
in every row or at every position, a tie now and then, so that the median counts.

Axes: B rows, T tokens, N positions, P prompts, S steps, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from time import perf_counter
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cola.data.batches import collate
from cola.data.encode import Example
from cola.errors import ModelError, one_line
from cola.link.adapters import kept_buffers, unwrapped, virtual_tokens, whole_state
from cola.link.forward import logits_and_cache, logits_at
from cola.measure.continued import Continued, going_on
from cola.measure.evaluate import Decoding, Evaluator, Ways
from cola.measure.likelihood import choice_nats, last_logits, left_padded, plain_choice_nats

VERSION = 3  # part of the name of a remembered result: raise it when other things are tried, or otherwise
WITHIN = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
FAINT = 3e-4  # the same, at most, where the place of a row in its batch changes nothing
ACROSS = {torch.float32: 1e-3, torch.float16: 1.5e-2, torch.bfloat16: 5e-2}
LENGTHS = (16, 11, 6, 9)  # of the rows, the longest first
CUTS = (3, 8, 13)  # from where later tokens are others: no block of two or more tokens begins at all three
TARGETS = 5  # last positions of a row whose logits are compared, fewer than the shortest row has
STEPS = 4  # tokens that are decoded
FLOOR = -40.0  # log-probabilities below count as this: some models mask tokens with minus infinity
ROWS = 8  # examples whose tokens make the rows


@dataclass(frozen=True)
class Subject:
    """A loaded model and what it is tried on."""

    name: str  # as the user calls it
    model: PreTrainedModel  # with whatever is attached to it
    evaluator: Evaluator  # will score it
    examples: Sequence[Example]  # rows at hand
    n_virtual: int = 0  # virtual tokens that an arm will put before a row
    trains: bool = False  # whether something will be trained
    full: bool = False  # whether all weights will

    def refuse(self, why: str) -> NoReturn:
        """Raise a ModelError that names the model."""
        raise ModelError(f"model.name_or_path: {self.name}: {why}")


def self_check(subject: Subject) -> dict[str, Any]:
    """Try a model, which is left in eval mode, as it was. Raises ModelError where it is not what cola relies on, and
    there is no slower way that is right.

    Returns:
        The record: `ways` (of `Ways`), the differences that were found, `tolerance`, `notes` for the user, `seconds`.
    """
    started = perf_counter()
    model, evaluator = subject.model.eval(), subject.evaluator
    dtype = next(p.dtype for p in model.parameters() if p.dtype in ACROSS)
    with torch.no_grad(), evaluator.autocast():
        reach, positions = _positions(subject)
        rows = _rows(subject, positions - virtual_tokens(model))
        record = _Trial(subject, dtype, rows).record(None if positions >= reach else positions)
    if subject.trains:
        _check_training(subject, rows)
    return {**record, "tensors": len(whole_state(unwrapped(model))), "seconds": perf_counter() - started}


def slowest(ways: Sequence[Ways]) -> Ways:
    """The ways that are right for several models, which are then all asked alike."""
    order = {
        "rows": ("together", "alone"),
        "choices": ("cached", "plain"),
        "decoding": ("cached", "padded", "alike", "plain"),
    }
    worst = {name: max((getattr(way, name) for way in ways), key=known.index) for name, known in order.items()}
    positions = [way.positions for way in ways if way.positions is not None]
    return Ways(**worst, positions=min(positions, default=None))


def difference(got_NV: Tensor, want_NV: Tensor) -> Tensor:
    """How far logits (..., V) are apart, (...): 0 for what gives the same predictions."""
    got, want = (logits.float().log_softmax(-1).clamp(min=FLOOR) for logits in (got_NV, want_NV))
    return (got - want).square().mean(-1).sqrt() / want.std(-1).clamp(min=1e-12)


def _rows(subject: Subject, positions: int) -> list[list[int]]:
    """Rows of `LENGTHS`, of the examples' own tokens, each from its beginning and repeated where it is shorter."""
    streams = [example.prompt + example.answers[example.gold] for example in subject.examples[:ROWS]]
    room = min(LENGTHS[0], positions - STEPS)
    lengths = [max(TARGETS + 1, length * room // LENGTHS[0]) for length in LENGTHS]
    return [_cycled(streams[i % len(streams)], length) for i, length in enumerate(lengths)]


def _cycled(tokens: list[int], length: int) -> list[int]:
    return (tokens * (length // len(tokens) + 1))[:length]


def _positions(subject: Subject) -> tuple[int, int]:
    """How many positions the longest row and decoding come to, and how many of them the model has, tried."""
    model, examples, new = subject.model, subject.examples, subject.evaluator.new_tokens
    virtual = virtual_tokens(model)
    before = max(virtual, subject.n_virtual)
    row = max((e.prompt + max(e.answers, key=len) for e in examples), key=len)
    needed = reach = before + len(row)
    if subject.evaluator.task == "answer":
        reach = max(needed, before + max(len(e.prompt) for e in examples) + new - 1)
    said = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    most = max(reach, LENGTHS[0] + STEPS + virtual)
    why = f"its config says {said}"
    for length in range(min(most, said or most), needed - 1, -1):
        try:
            last_logits(model, _cycled(row, length - virtual))
        except Exception as error:  # of the model's own code, beyond its last position
            why = _line(error)
            continue
        return reach, length
    try:
        last_logits(model, row[:2])
    except Exception as error:  # of the model's own code
        subject.refuse(f"a plain pass fails: {_line(error)}")
    subject.refuse(f"rows of {needed} tokens are drawn and it takes fewer ({why}); lower data.max_length")


class _Trial:
    """The passes over one model."""

    def __init__(self, subject: Subject, dtype: torch.dtype, rows: list[list[int]]) -> None:
        self.subject, self.model, self.rows = subject, subject.model, rows
        self.dtype, self.tolerance, self.notes = dtype, ACROSS[dtype], []
        self.whole = [self._whole([row])[0] for row in rows]

    def record(self, positions: int | None) -> dict[str, Any]:
        """What came out; `positions`: of the model, where decoding could go beyond them."""
        if not all(logits.isfinite().any(-1).all() and not logits.isnan().any() for logits in self.whole):
            self.subject.refuse(f"its logits are no finite numbers in {str(self.dtype).removeprefix('torch.')}")
        later, rounding = self._later_token(), self._longer_row()
        batch = self._apart(difference(self._at_last(self.rows), torch.stack([row[-TARGETS:] for row in self.whole])))
        together = batch <= self.tolerance
        if not together:
            self._refuse_if_random()
            self._check_single_positions()
            self.notes.append(f"each row is read alone: in a batch the model gives it other logits ({batch:.2g})")
        task = self.subject.evaluator.task
        choices = self._cached_choices() if task == "multiple_choice" and together else None
        cached = task != "multiple_choice" or (choices is not None and choices <= self.tolerance)
        decoding, how = self._decoding(together) if task == "answer" else (None, "cached")
        ways = Ways("together" if together else "alone", "cached" if cached else "plain", how, positions)
        return {
            "ways": asdict(ways),
            "tolerance": self.tolerance,
            "later_token": later,
            "rounding": rounding,
            "batch": batch,
            "choices": choices,
            "decoding": decoding,
            "notes": self.notes,
        }

    def _whole(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, T, V) of rows of one length, in one plain pass, without those of virtual tokens."""
        ids_BT = torch.tensor(rows, device=self.model.device)
        return self.model(input_ids=ids_BT).logits[:, -ids_BT.shape[1] :]

    def _apart(self, apart_BN: Tensor) -> float:
        """One number for rows times positions: the largest; in half formats the largest median of a row or a place."""
        if self.dtype == torch.float32:
            return apart_BN.max().item()
        return max(apart_BN.quantile(0.5, dim=axis).max().item() for axis in range(apart_BN.ndim))

    def _later_token(self) -> float:
        """The largest change of a logit by tokens after it, in one pass over rows that are alike up to a cut."""
        row = self.rows[0]
        pool = sorted({0, 1, 2}.union(*self.rows))
        others = [[pool[(pool.index(token) + shift) % len(pool)] for token in row] for shift in (1, 2)]
        cuts = [cut for cut in CUTS if cut < len(row)]
        tried = [row, *(row[:cut] + other[cut:] for cut in cuts for other in others)]
        logits, twins = self._whole(tried * 2).chunk(2)
        moved = 0.0
        for place, cut in enumerate(cuts):
            alike = [logits[b, :cut] for b in (0, 2 * place + 1, 2 * place + 2)]
            # A fault is there under each replacement; where a router was at a tie, two of the three agree.
            pairs = torch.stack([difference(first, other) for first, other in combinations(alike, 2)])
            moved = max(moved, pairs.min(0).values.max().item())
        # What the place in the batch alone changes is rounding; where that is nothing, the tokens are what moved it.
        rounding = 4 * difference(logits, twins).max().item()
        if moved > min(WITHIN[self.dtype], max(FAINT, rounding)):
            self._refuse_later(moved)
        return moved

    def _longer_row(self) -> float:
        """What the same tokens with and without more of them on the right differ by, which should be rounding."""
        length = len(self.rows[1])
        apart_N = difference(self._whole([self.rows[0][:length]])[0], self.whole[0][:length])
        if self._apart(apart_N) > 4 * ACROSS[self.dtype]:
            self._refuse_later(self._apart(apart_N))
        # Of one token too, as decoding has it: other kernels compute that.
        rows = zip(self.rows, self.whole, strict=True)
        firsts = [difference(self._whole([row[:1]])[0], logits[:1]) for row, logits in rows]
        rounding = torch.cat([apart_N, *firsts]).max().item()
        self.tolerance = max(self.tolerance, 4 * min(rounding, 4 * ACROSS[self.dtype]))
        return rounding

    def _refuse_later(self, moved: float) -> NoReturn:
        self._refuse_if_random()
        said = getattr(unwrapped(self.model).config, "is_causal", None) is False
        self.subject.refuse(
            f"a later token moves an earlier logit, by {moved:.2g} of the logits' spread, so the model sees the answer "
            "that it is to predict; a causal model is needed" + (" (its config says is_causal: false)" if said else "")
        )

    def _refuse_if_random(self) -> None:
        if self._apart(difference(self._whole([self.rows[1]])[0], self.whole[1])) > WITHIN[self.dtype]:
            self.subject.refuse("the same row twice gives different logits: something random is left on in eval mode")

    def _at_last(self, rows: Sequence[list[int]]) -> Tensor:
        """Logits (B, TARGETS, V) at the last positions of rows, as training and scoring ask for them."""
        batch = collate([("", row[: 1 - TARGETS], [*row[1 - TARGETS :], 0]) for row in rows]).to(self.model.device)
        ids_BT, where_BT = batch.input_ids_BT[:, :-1], batch.predicts_BT[:, :-1]
        return logits_at(self.model, ids_BT, where_BT).unflatten(0, (len(rows), TARGETS))

    def _check_single_positions(self) -> None:
        apart = self._apart(difference(self._at_last(self.rows[:1]), self.whole[0][None, -TARGETS:]))
        if apart > self.tolerance:
            self.subject.refuse(
                f"its head gives other logits for single positions than for a whole pass ({apart:.2g} apart): it "
                "does not read one position at a time"
            )

    def _cached_choices(self) -> float | None:
        """How far choices from the cache are from plain passes, per token; None where there is no such cache."""
        answers = [self.rows[3][:n] for n in (1, 2, 4)]
        examples = [Example("", prompt, answers, 0, [], None) for prompt in self.rows[:3]]
        want = torch.tensor([plain_choice_nats(self.model, example, 4096) for example in examples])
        try:
            got = torch.tensor(choice_nats(self.model, examples))
        except Exception as error:  # of the model's own code, which knows no such cache
            self.notes.append(f"choices are scored one by one: from the cache the model fails ({_line(error)})")
            return None
        spread = self.whole[0].float().log_softmax(-1).clamp(min=FLOOR).std(-1).mean().item()
        apart = self._apart((got - want).abs() / torch.tensor([len(a) for a in answers]) / max(spread, 1e-12))
        if apart > self.tolerance:
            self.notes.append(f"choices are scored one by one: from the cache the model gives others ({apart:.2g})")
        return apart

    def _decoding(self, together: bool) -> tuple[float | None, Decoding]:
        """How far the steps of the quickest right way to decode are from plain passes, and which way that is."""
        short = len(self.rows[2])
        tried: dict[Decoding, Callable[[], float]] = {"cached": self._continued}
        if unwrapped(self.model) is self.model:  # virtual tokens have no place before padding
            tried["padded"] = partial(self._decoded, self.rows)
        if not together:
            tried = {}
        alike = [[row[:short] for row in self.rows[: 2 if together else 1]], self.rows[1:2]]
        tried["alike"] = lambda: max(self._decoded(rows) for rows in alike)
        why = []
        for how, apart_of in tried.items():
            try:
                apart = apart_of()
            except Exception as error:  # of the model's own code, which keeps or generates otherwise, or not at all
                why.append(f"{how}: it fails ({_line(error)})")
                continue
            if apart <= self.tolerance:
                if why:
                    self.notes.append(f"answers are decoded in a slower way, {how}, since {'; '.join(why)}")
                return apart, how
            why.append(f"{how}: it gives other logits ({apart:.2g})")
        self.notes.append(f"answers are decoded by plain passes, one token at a time, since {'; '.join(why)}")
        return None, "plain"

    def _continued(self) -> float:
        """How far decoding from the cache of a pass over rows, each from a place of its own, is from plain passes."""
        batch = collate([("", row[:-1], row[-1:]) for row in self.rows]).to(self.model.device)
        _, cache = logits_and_cache(self.model, batch.input_ids_BT, batch.predicts_BT, **going_on(self.model, True))
        said = [row[: len(row) - b % 3] for b, row in enumerate(self.rows)]
        read = [len(row) - 1 for row in said]
        continued = Continued(self.model, cache, batch.input_ids_BT.shape[1], range(len(said)), read)
        steps = []
        for _ in range(STEPS):
            last_B1 = torch.tensor([row[-1:] for row in said], device=self.model.device)
            steps.append(continued.logits(last_B1, torch.ones_like(last_B1, dtype=torch.bool)))
            for row, token in zip(said, steps[-1].argmax(-1).tolist(), strict=True):
                row.append(token)
        want = [self._whole([row])[0, n : n + STEPS] for row, n in zip(said, read, strict=True)]
        return self._apart(difference(torch.stack(steps, dim=1), torch.stack(want)))

    def _decoded(self, prompts: Sequence[list[int]]) -> float:
        end = self.subject.evaluator.tokenizer.eos_token_id  # what decoding pads with
        ids_BT, mask_BT = left_padded(prompts, fill=end if isinstance(end, int) else 0)
        settings = GenerationConfig(
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        output: Any = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_BT.to(self.model.device),
            attention_mask=mask_BT.to(self.model.device),
            generation_config=settings,
        )
        got = torch.stack(output.logits, dim=1)
        new = output.sequences[:, ids_BT.shape[1] :].tolist()
        want = [self._whole([row + tokens])[0, len(row) - 1 : -1] for row, tokens in zip(prompts, new, strict=True)]
        return self._apart(difference(got, torch.stack(want)))


def _check_training(subject: Subject, rows: list[list[int]]) -> None:
    """A pass in training mode goes through and moves no buffer that what is kept of an arm would not hold."""
    model, evaluator = subject.model, subject.evaluator
    # A shared matrix is kept under one of its names.
    buffers, parameters = set(kept_buffers(model)), set(map(id, model.parameters()))
    state = model.state_dict(keep_vars=True)
    lost = [name for name, entry in state.items() if name not in buffers and id(entry) not in parameters]
    if subject.full and lost:
        subject.refuse(
            f"full fine-tuning cannot keep all of it: its state dict has {lost[0]}, neither parameter nor buffer"
        )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = collate([("", row[:-1], row[-1:]) for row in rows]).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluator.autocast():
            logits_at(model.train(), batch.input_ids_BT, batch.predicts_BT)
    except Exception as error:  # of the model's own code, which asks for more in training mode
        subject.refuse(f"a pass in training mode fails: {_line(error)}")
    finally:
        model.eval()
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    for name in moved:
        model.get_buffer(name).copy_(before[name])
    if moved:
        subject.refuse(
            f"training moves its buffer {moved[0]}, which is no weight: nothing that is kept of a link gives it back"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 120)}"
