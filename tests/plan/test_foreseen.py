"""What a run says beforehand, and lays beside what it took.

Run: pytest tests/plan/test_foreseen.py
"""

import json
from pathlib import Path

import pytest
from runs import LORA_ONLY, cola, go, result

from cola.plan.beside import beside_table

pytestmark = pytest.mark.usefixtures("one_thread")


def test_predicted_stands_beside_measured(recipe_file: Path) -> None:
    folder, _ = go(recipe_file, *LORA_ONLY)
    foreseen = folder.foreseen()
    assert foreseen is not None
    assert foreseen.arms["lora"].peak == sum(foreseen.arms["lora"].memory.values())
    table = beside_table(foreseen, folder.results())
    row = dict(zip(table.columns, table.texts[0], strict=True))
    measured = result(folder, "lora")["train_info"]["process_memory_max"]
    assert row["arm"] == "lora"
    assert row["off by"] == f"{foreseen.arms['lora'].peak / measured - 1:+.0%}"
    assert row["training, predicted"] == "?"  # this machine was never calibrated
    told = cola("report", folder.path)
    assert "predicted beside measured" in told.output


@pytest.mark.slow
def test_a_run_warns_of_what_will_not_fit(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cola.plan.devices.memory_of", lambda _: 10**6)
    told = cola("run", recipe_file, *LORA_ONLY)
    assert told.exit_code == 0, told.output
    assert "warning: lora takes about" in told.output
    assert "there are 1.00 MB: no change would do" in told.output


def test_a_run_whose_memory_cannot_be_told_goes_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a kernel of its own")

    monkeypatch.setattr("cola.plan.forecast.look", fails)
    told = cola("run", recipe_file, *LORA_ONLY)
    assert told.exit_code == 0, told.output
    assert "lora: its memory is not known beforehand: RuntimeError: a kernel of its own" in told.output
    runs = sorted((recipe_file.parent / "runs").glob("tiny-*/plan.json"))
    assert json.loads(runs[0].read_text())["arms"] == {}
