"""The device, its number format, and the libraries told to keep to what is asked."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers.utils import logging as transformers_logging

from cola import environment
from cola.errors import ModelError
from cola.link import wires


def quiet_libraries() -> None:
    """No warnings and progress bars of transformers between cola's own lines."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def dtype_warning(dtype: str, device: torch.device) -> str | None:
    """What a half-precision format costs on a CPU that has no instructions for it; None where it is fine."""
    if device.type != "cpu" or dtype == "float32":
        return None
    if dtype == "bfloat16" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return None
    times = "3 to 4" if dtype == "bfloat16" else "about 10"
    return f"model.dtype {dtype} on this CPU, which has no instructions for it, is {times} times slower than float32"


def make_accelerator(dtype: str) -> Accelerator:
    """accelerate with a base's precision, on the device it finds, and torch as it is by default. Raises ModelError in
    one of several processes of a launcher that have not met (`wires.join`), which only those of a run do.

    accelerate fixes the precision once per process; here every arm may have one of its own. On a CPU it has no fp16
    autocast: the weights are fp16 there and a pair computes in float32.
    """
    environment.settle()
    several = environment.launched()
    if several and not wires.joined():
        raise ModelError(
            f"`cola run` and `cola ablate` train over several processes and this runs as one, and "
            f"WORLD_SIZE={os.environ['WORLD_SIZE'][:20]} says that there are several; start it without accelerate "
            "launch or torchrun, or unset WORLD_SIZE"
        )
    _settle_torch()
    AcceleratorState._reset_state(reset_partial_state=True)
    # accelerate takes several processes without a GPU for one unless it is told that they are of a CPU.
    on_cpu = several and not torch.cuda.is_available()
    return Accelerator(mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype], cpu=on_cpu)


def device_said() -> str:
    """What this process computes on, as a record has it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"cpu, threads: {torch.get_num_threads()}"  # whose number moves the last bits


def _settle_torch() -> None:
    """Every switch of torch's that changes what is computed, as torch has it when it is imported: whoever has set one
    before (a sitecustomize, a notebook, a variable that torch read first) has changed what no name holds."""
    backends = torch.backends
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)
    for device in ("cpu", "cuda"):
        torch.set_autocast_enabled(device, False)
    # Precision of float32 products: torch has an older and a newer way to say it, and refuses to read a mixture.
    precisions: Any = backends  # torch replaces the modules by objects of its own, which pyright does not know
    precisions.fp32_precision = precisions.cudnn.fp32_precision = precisions.mkldnn.fp32_precision = "none"
    precisions.mkldnn.conv.fp32_precision = precisions.mkldnn.rnn.fp32_precision = "none"
    precisions.cudnn.conv.fp32_precision = precisions.cudnn.rnn.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = False, True
    backends.mkldnn.enabled, backends.mkldnn.deterministic = True, False
    backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic = True, False, False
    backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    backends.cuda.matmul.allow_fp16_accumulation = False
    backends.cuda.preferred_blas_library("default")
    backends.cuda.preferred_linalg_library("default")
    backends.cuda.enable_flash_sdp(True)
    backends.cuda.enable_math_sdp(True)
    backends.cuda.enable_mem_efficient_sdp(True)
    backends.cuda.enable_cudnn_sdp(True)
    backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
