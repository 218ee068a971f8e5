"""The environment changes nothing that is in no name. Run: pytest tests/cli/test_environment.py

`python tests/fuzz_names.py 200` tries two hundred changes of environment and files, each in a process of its own.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import fuzz_names
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from cola import environment
from cola.environment import steering
from cola.errors import ModelError
from cola.link.accelerator import make_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")

# What accelerate, PEFT and bitsandbytes read and no weight depends on: other people's accounts, the printing of logs,
# where files lie, which library bitsandbytes loads, the number of threads, and what is read for `cpu=True` alone.
HARMLESS = {
    *("AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"),
    *("CLEARML_PROJECT", "CLEARML_TASK", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_NESTED_RUN", "MLFLOW_RUN_ID", "MLFLOW_TAGS"),
    *("ACCELERATE_LOG_LEVEL", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "HF_HUB_OFFLINE", "BNB_CUDA_VERSION"),
    *("BNB_ROCM_VERSION", "OMP_NUM_THREADS", "NPROC", "PMI_SIZE", "TPU_NAME", "PYTEST_XDIST_WORKER", "RUN_SLOW", "FOO"),
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that a test sets are taken away as others are; what was said of them is forgotten with it."""
    monkeypatch.setattr(environment, "taken", set())


@pytest.mark.parametrize("package", ["accelerate", "peft", "bitsandbytes"])
def test_every_variable_that_the_library_reads_is_taken_away_or_known_to_be_harmless(package: str) -> None:
    read = set(fuzz_names.names_read(package))
    assert read - steering(read) <= HARMLESS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_USE_CPU", "true"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "2"),
    ],
)
def test_an_accelerator_is_the_same_whatever_the_environment_says(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(accelerator: Accelerator) -> list[object]:
        plugins = [accelerator.state.deepspeed_plugins, accelerator.state.dynamo_plugin.to_kwargs()]
        kind = [
            accelerator.distributed_type,
            accelerator.mixed_precision,
            accelerator.num_processes,
            accelerator.device,
        ]
        return [accelerator.gradient_accumulation_steps, GradientState().num_steps, *kind, *plugins]

    plain = seen(make_accelerator("float32"))
    monkeypatch.setenv(name, value)
    assert seen(make_accelerator("float32")) == plain
    assert environment.note() == f"environment: {name}: not heeded, since what is computed is what the recipe says"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_gradients_are_whole_whatever_number_of_steps_the_environment_would_have_accumulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.tensor([3.0], requires_grad=True)
    make_accelerator("float32").backward((weight * 2).sum())
    assert weight.grad is not None
    assert weight.grad.item() == 2.0


def test_one_of_several_processes_of_a_launcher_is_refused_in_one_line_where_it_is_not_of_a_run(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=r"train over several processes and this runs as one, and WORLD_SIZE=2 says"):
        make_accelerator("float32")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make_accelerator("float32").num_processes == 1
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)


def test_importing_cola_takes_away_what_the_libraries_would_read_as_they_load() -> None:
    there = {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    there |= {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "RANK": "0", "FSDP_OFFLOAD_PARAMS": "true"}
    kept = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "a:1"}
    code = (
        "import ctypes, os, sys, cola\n"
        "assert 'torch' not in sys.modules\n"
        "getenv = ctypes.CDLL(None).getenv\n"
        "getenv.restype = ctypes.c_char_p\n"  # what C sees
        f"print(sorted(n for n in {[*there, *kept]} if n in os.environ or getenv(n.encode())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | there | kept)
    assert done.stdout.strip() == str(sorted(kept)), done.stderr


@pytest.mark.slow
def test_torchs_switches_are_what_they_are_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a torch that nothing has touched, in a process of its own."""
    backends = [
        *("cuda.matmul.allow_tf32", "cudnn.allow_tf32", "mkldnn.enabled", "mkldnn.deterministic", "cudnn.enabled"),
        *("cudnn.benchmark", "cudnn.deterministic", "cuda.matmul.allow_fp16_reduced_precision_reduction"),
        *("cuda.matmul.allow_bf16_reduced_precision_reduction", "cuda.matmul.allow_fp16_accumulation"),
        *("cuda.flash_sdp_enabled()", "cuda.math_sdp_enabled()", "cuda.mem_efficient_sdp_enabled()"),
        *("cuda.cudnn_sdp_enabled()", "cuda.fp16_bf16_reduction_math_sdp_allowed()", "fp32_precision"),
        *("cuda.preferred_blas_library()", "cuda.preferred_linalg_library()", "cudnn.fp32_precision"),
        *("cudnn.conv.fp32_precision", "cudnn.rnn.fp32_precision", "mkldnn.fp32_precision"),
        *("mkldnn.conv.fp32_precision", "mkldnn.rnn.fp32_precision"),
    ]
    whole = ["get_float32_matmul_precision()", "get_default_dtype()", "get_default_device()"]
    whole += ["are_deterministic_algorithms_enabled()", "is_autocast_enabled('cpu')", "is_autocast_enabled('cuda')"]
    names = [*(f"torch.{name}" for name in whole), *(f"torch.backends.{name}" for name in backends)]
    code = f"import torch\nfor name in {names!r}:\n    print(name, eval(name))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    switches = [switch for switch in fuzz_names.SWITCHES if switch.startswith("torch.") and "seed" not in switch]
    for switch in switches:
        fuzz_names.make(("switch", switch, ""), Path())
    make_accelerator("float32")
    assert [f"{name} {eval(name)}" for name in names] == fresh
    small = torch.full((8,), 1e-30) * 1e-10
    assert small.count_nonzero() == 8  # numbers below the normal ones are not flushed to zero


@pytest.mark.slow
def test_a_changed_environment_or_file_changes_the_name_or_leaves_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of the two hundred, made one after the other in this process."""
    case, cache = tmp_path / "case", tmp_path / "cache"
    fuzz_names.write_case(case)
    files = {path: path.read_bytes() for path in case.rglob("*") if path.is_file()}
    before = fuzz_names.train(case, cache, tmp_path / "store")
    came = {}
    changes = [
        ("variable", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("switch", "torch.set_autocast_enabled('cpu', True)", ""),
        ("file", "a weight, through a map", "1"),
    ]
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", fuzz_names.day("2031-05-17"))
    for number, change in enumerate(changes):
        aside = tmp_path / str(number)
        aside.mkdir()
        monkeypatch.delenv(change[1], raising=False)
        came[change[1]] = fuzz_names.outcome(change, case, cache, before, aside)
        for path, content in files.items():
            path.write_bytes(content)
    assert list(came.values()) == ["weights the same", "weights the same", "name changed"]


def test_the_fuzzer_draws_the_same_changes_under_the_same_seed_and_of_every_kind() -> None:
    drawn = [[fuzz_names.draw(random.Random(seed), ("accelerate",)) for seed in range(60)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {kind for kind, *_ in drawn[0]} == {"variable", "switch", "file"}
    assert len(set(drawn[0])) > 50
