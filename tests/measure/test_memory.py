"""Memory that is counted and given back. Run: pytest tests/measure/test_memory.py"""

import gc
import platform
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from runs import go

from cola.measure.evaluate import Evaluator
from cola.measure.memory import give_back


def resident() -> int:
    """Bytes of this process that are in memory and no file's."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps no such blocks")
def test_what_was_freed_is_given_back() -> None:
    give_back()
    before = resident()
    blocks = [torch.ones(1 << 14) for _ in range(4096)]  # 64 KB each: the C library's own, not mapped
    kept = blocks[::64]
    assert resident() - before > 200e6
    del blocks
    give_back()
    assert resident() - before < 50e6
    assert len(kept) == 64


def test_the_optimizer_is_gone_when_a_trained_model_is_scored(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    scores = Evaluator.__call__

    def noted(self: Evaluator, model: object, examples: object) -> object:
        alive.append(sum(isinstance(thing, AcceleratedOptimizer) for thing in gc.get_objects()))
        return scores(self, model, examples)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Evaluator, "__call__", noted)
    full_alone = ("arms.lora=null", "arms.chain3=null", "arms.base=null", "comparison.primary=null")
    go(recipe_file, "evaluation.every=never", *full_alone)
    assert alive
    assert not any(alive)
