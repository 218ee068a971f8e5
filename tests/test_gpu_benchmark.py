"""The benchmark for a GPU, tried on a CPU with tiny shapes. Run: pytest tests/test_gpu_benchmark.py"""

import json
import math
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(ROOT / Path(path).parent)
    return runpy.run_path(str(ROOT / path))


@pytest.mark.slow
def test_what_the_benchmark_trains_on_a_gpu_is_trained_on_a_cpu_and_the_contenders_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its parts `tests` and `arms` start processes that have tests of their own.
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "steps", "memory"]
    where = {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT), "COLA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu_tiny.json").read_text())
    assert record.keys() == {"others", "steps", "memory"}
    cases = record["steps"]["found"] | record["memory"]["found"]
    assert len(cases) == 4
    for name, case in cases.items():
        allowed = 1e-2 if "nf4" in name else 1e-4  # beside codes TRL has its pair in bfloat16
        assert case["largest_difference_of_losses"] < allowed, name
        assert case["flops_a_step"] > 1e7
        assert len(case["contenders"]) == (1 if "chain3" in name else 3)
        for who, numbers in case["contenders"].items():
            if "absent" in numbers:
                assert (who, find_spec("trl")) == ("TRL + Liger", None), (name, numbers)
                continue
            assert numbers["tokens_per_second"] > 0
            assert numbers["peak_bytes"] > 1e8
            assert len(numbers["losses"]) == 4
            assert all(map(math.isfinite, numbers["losses"]))
    table = script("docs/generate.py", monkeypatch)["on_a_gpu"](tmp_path / "gpu_tiny.json")
    assert table.count("| cola |") == 4


@pytest.mark.slow
def test_without_a_card_the_benchmark_says_so() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "steps"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1
    assert "torch finds no NVIDIA GPU here" in done.stderr


def test_the_shapes_are_of_the_models_that_they_are_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shapes, counts = script("benchmarks/gpu.py", monkeypatch)["SHAPES"], {}
    for name, config in shapes.items():
        with torch.device("meta"):
            counts[name] = AutoModelForCausalLM.from_config(config).num_parameters()
    # As the hub counts them in their safetensors files.
    known = {"SmolLM2-135M": 134_515_008, "Qwen1.5-0.5B": 463_987_712}
    known |= {"Qwen1.5-1.8B": 1_836_828_672, "Qwen1.5-7B": 7_721_324_544}
    assert {name: counts[name] for name in known} == known
