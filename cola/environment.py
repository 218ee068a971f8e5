"""The environment changes nothing that is in no name: variables that steer the libraries are taken away. No torch.

accelerate reads some two hundred variables wherever it is not told otherwise (gradient accumulation, sharding, other
back ends), torch and the libraries under it read theirs when they are loaded or first used. What they say is in no
recipe and in no name, so it is taken from this process before they look: as cola is imported, which is before torch
is, and again where an accelerator is made. What stays says where files lie, which devices, threads and memory there
are, and what is printed.
"""

import os
from collections.abc import Iterable

# By what a variable begins with: one family for each library that computes, or that starts processes which do.
FAMILIES = (
    *("ACCELERATE_", "FSDP_", "DEEPSPEED_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FORK_LAUNCHED"),
    *("TRANSFORMERS_", "TRUST_REMOTE_CODE", "PEFT_", "USE_", "FLASH_ATTENTION_", "XFORMERS_", "NVTE_"),
    *("TORCH", "PYTORCH_", "ATEN_", "AOT", "INDUCTOR_", "TRITON_", "FBGEMM_", "XNNPACK_", "XLA_", "PJRT_", "PT_"),
    *("ONEDNN_", "DNNL_", "MKLDNN_", "MKL_", "KMP_", "OMP_", "OPENBLAS_", "BLIS_", "NPY_"),
    *("CUBLAS", "CUDNN_", "NVIDIA_TF32_OVERRIDE"),
)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
AGENT = ("TORCHELASTIC_",)  # torchrun's agent has opened the port at which its processes meet, and says so here

# Of those families, what no weight depends on, or (the number of threads, which moves the last bits) what is recorded.
KEPT = (
    *("TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"),
    *("TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_USE_RTLD_GLOBAL"),
    *("TORCH_DEVICE_BACKEND_AUTOLOAD", "TORCH_LOGS", "TORCH_TRACE", "TORCH_CPP_LOG_LEVEL", "ACCELERATE_LOG_LEVEL"),
    *("TORCH_SHOW_CPP_STACKTRACES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    *("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY", "OMP_STACKSIZE"),
    *("OMP_DISPLAY_ENV", "OMP_DISPLAY_AFFINITY", "MKL_NUM_THREADS", "MKL_THREADING_LAYER", "MKL_VERBOSE"),
    *("MKL_SERVICE_FORCE_INTEL", "KMP_DUPLICATE_LIB_OK", "KMP_AFFINITY", "KMP_BLOCKTIME", "OPENBLAS_NUM_THREADS"),
    *("PYTORCH_NVML_BASED_CUDA_CHECK", "ONEDNN_VERBOSE", "DNNL_VERBOSE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
)

taken: set[str] = set()  # of this process's variables, so far


def steering(names: Iterable[str]) -> set[str]:
    """Those of some variables that could change what is computed."""
    return {name for name in names if name in LAUNCHER or (name.startswith(FAMILIES) and name not in KEPT)}


def settle() -> None:
    """Take the variables that could change what is computed out of this process's environment.

    Those of a launcher that has started several processes are left: `cola run` is one command of all of them.
    """
    found = steering(os.environ)
    if launched():
        found = {name for name in found if name not in LAUNCHER and not name.startswith(AGENT)}
    for name in found:
        del os.environ[name]
    taken.update(found)


def note() -> str | None:
    """What there is to say of variables that were taken away; None where there were none."""
    if not taken:
        return None
    return f"environment: {', '.join(sorted(taken))}: not heeded, since what is computed is what the recipe says"


def launched() -> bool:
    """Whether a launcher has started this process as one of several. A job that is left over, or one process that a
    launcher has started, says 1, or does not say which it is."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1 and ("RANK" in os.environ or "LOCAL_RANK" in os.environ)
