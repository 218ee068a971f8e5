"""`cola plan --table qwen`: what the Qwen1.5 family takes at each size and precision, and one 7B case, from the models
themselves."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from cola.measure.cost import Meter
from cola.plan.devices import device_of
from cola.plan.look import Asked, look
from cola.plan.memory import Circumstances, memory_of, weights_of
from cola.plan.models import FAMILY, Planned, built_in, find_planned
from cola.plan.passes import Shape
from cola.recipe.methods import Lora, Targets
from cola.recipe.plan import Link
from cola.recipe.resolved import BaseFormat
from cola.recipe.schema import Model
from cola.report.numbers import count, number, size
from cola.report.table import Shown, Table

PRECISIONS = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}  # bytes of a parameter
TARGETS: dict[str, Targets] = {"q and v": ("q_proj", "v_proj"), "all linear layers": "all-linear"}
# A tutorial's case: LoRA of the 7B model with r = 8 and alpha = 16 in float16, 10,000 rows for 100 epochs in 4 days.
CASE, RANK, ALPHA, ROWS, EPOCHS, DAYS = "7B", 8, 16.0, 10_000, 100, 4
TOKENS, ANSWER = 512, 256  # of a row, which the tutorial does not say: an assumption
PASSES = (1, 4)  # rows
CARDS = ("rtx3090", "rtx4090", "a100-80gb", "h100")


@cache
def _planned(size_: str) -> Planned:
    planned = find_planned(Model(name_or_path=f"{FAMILY}{size_}"), network=False)
    assert planned is not None  # it is built in
    return planned


@dataclass(frozen=True)
class Size:
    """A model of the family: parameters, and bytes of its weights."""

    name: str
    parameters: int
    bytes: dict[str, int]  # of all parameters, by precision
    nf4: int  # as bitsandbytes keeps it: embeddings and head in 16 bits, scales beside the codes


def sizes() -> list[Size]:
    """All of them, smallest first."""
    found = []
    for name in (full.removeprefix(FAMILY) for full in built_in()):
        model = copy.deepcopy(_planned(name).skeleton)
        n = model.num_parameters()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float16)
        nf4 = weights_of(model, "nf4")
        found.append(Size(name, n, {p: round(n * each) for p, each in PRECISIONS.items()}, nf4.codes + nf4.states))
    return found


def case() -> dict[str, Any]:
    """The 7B case: what is trained, the memory of a pass, and what rate 4 days mean."""
    skeleton = _planned(CASE).skeleton
    n = skeleton.num_parameters()
    found: dict[str, Any] = {"parameters": n}
    for title, targets in TARGETS.items():
        settings = Lora(rank=RANK, alpha=ALPHA, target_modules=targets)
        peaks = {f"{rows} x {TOKENS}": _peak(settings, rows, False) for rows in PASSES}
        peaks |= {f"{rows} x {TOKENS}, checkpointed": _peak(settings, rows, True) for rows in PASSES}
        meter = Meter(skeleton, [(TOKENS, ANSWER)], checkpointing=False)
        flops = meter.steps(Link(settings=settings, seed=0), [[0]], 0)[0].flops
        rate = ROWS * EPOCHS / (DAYS * 86_400)
        trained = _looked(settings, 1, False).trained
        found[title] = {
            "trained": trained,
            "share": trained / n,
            "peak_bytes": peaks,
            "flops_of_a_row": flops,
            "rows_a_second": rate,
            "tokens_a_second": rate * TOKENS,
            "flops_a_second": rate * flops,
            "share_of_peak": {card: rate * flops / device_of(card).peak["float16"] for card in CARDS},
        }
    return found


def _looked(settings: Lora, rows: int, checkpointing: bool) -> Any:
    shape = Shape(rows, TOKENS, rows * ANSWER)
    return look(
        _planned(CASE).skeleton, Asked(settings, BaseFormat("float16", None), shape, checkpointing, False, {}, False)
    )


def _peak(settings: Lora, rows: int, checkpointing: bool) -> int:
    return memory_of(_looked(settings, rows, checkpointing), Circumstances(0, False, False, False, 0)).peak


def qwen_record() -> dict[str, Any]:
    """As JSON."""
    return {
        "sizes": {one.name: {"parameters": one.parameters, **one.bytes, "nf4": one.nf4} for one in sizes()},
        "case": case(),
    }


def qwen_tables() -> tuple[list[Table], list[str]]:
    """The tables, and what is to be said of them."""
    rows: list[list[Shown]] = [
        [one.name, f"{one.parameters:,}", *(size(n) for n in one.bytes.values()), size(one.nf4)] for one in sizes()
    ]
    heads = ["Qwen1.5", "parameters", *PRECISIONS, "NF4 as it is kept"]
    found = case()
    cases = {title: found[title] for title in TARGETS}
    peaks = list(next(iter(cases.values()))["peak_bytes"])
    of_case: list[list[Shown]] = [
        [title, count(one["trained"]), number(one["share"], ".3%"), *(size(one["peak_bytes"][p]) for p in peaks)]
        for title, one in cases.items()
    ]
    rates: list[list[Shown]] = [
        [
            title,
            count(one["flops_of_a_row"]),
            number(one["rows_a_second"], ".2f"),
            number(one["tokens_a_second"], ".0f"),
            count(one["flops_a_second"]),
            *(number(share, ".0%") for share in one["share_of_peak"].values()),
        ]
        for title, one in cases.items()
    ]
    what = f"Qwen1.5-{CASE}, LoRA r = {RANK}, alpha = {ALPHA:g}, float16"
    tables = [
        Table("Qwen1.5: weights", heads, rows),
        Table(
            f"{what}: trained, and peak memory on a GPU by rows x tokens of a pass",
            ["pairs on", "trained", "share", *peaks],
            of_case,
        ),
        Table(
            f"{what}: {ROWS:,} rows, {EPOCHS} epochs in {DAYS} days",
            ["pairs on", "FLOPs a row", "rows/s", "tokens/s", "FLOP/s", *(f"of {card}'s peak" for card in CARDS)],
            rates,
        ),
    ]
    lines = [
        "weights: parameters times 4, 2, 1 and 0.5 bytes; as bitsandbytes keeps NF4, embeddings and head stay in 16 "
        "bits and scales lie beside the codes",
        f"assumed, since a tutorial's case does not say it: rows of {TOKENS} tokens, {ANSWER} of them targets",
    ]
    return tables, lines
