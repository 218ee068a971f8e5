"""What a run was expected to take beside what it took. No torch."""

from collections.abc import Iterable

from cola.report.numbers import duration, duration_if_known, number, size
from cola.report.table import NONE, Shown, Table
from cola.tree.foreseen import Foreseen
from cola.tree.records import Result


def beside_table(foreseen: Foreseen, results: Iterable[Result]) -> Table:
    """Predicted beside measured: the largest peak of an arm's seeds, and the mean seconds of its steps."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.train_info.steps and not result.train_info.reused_steps:  # what was found was measured elsewhere
            found.setdefault(result.run_info.arm, []).append(result)
    rows: list[list[Shown]] = []
    for arm, one in foreseen.arms.items():
        infos = [result.train_info for result in found.get(arm, [])]
        if not infos:
            continue
        key = "accelerator_memory_max" if foreseen.device == "cuda" else "process_memory_max"
        peak = max((n for info in infos if (n := getattr(info, key)) is not None), default=None)
        seconds = sum(info.train_seconds for info in infos) / len(infos)
        times = [duration_if_known(one.seconds), duration(seconds), _off(one.seconds, seconds)]
        rows.append([arm, size(one.peak), size(peak), _off(one.peak, peak), *times])
    heads = ["arm", "peak memory, predicted", "measured", "off by", "training, predicted", "measured ", "off by "]
    return Table("predicted beside measured", heads, rows)


def _off(predicted: float | None, measured: float | None) -> Shown:
    return NONE if not predicted or not measured else number(predicted / measured - 1, "+.0%")
