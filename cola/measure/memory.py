"""Peak memory since a point in time: of the GPU's allocator, and of the process as the kernel counts it.

What is in memory already at that point counts. Weights that are read from a file that is mapped into memory count with
the part of it that is there.
"""

import ctypes
import os
import re
from pathlib import Path

import torch

from cola.errors import ModelError

TRAINED_BYTES = 8  # of each parameter: in float32 with its gradient
MOMENTS_BYTES = 8  # AdamW's two; another optimizer may remember less
PROCESS = Path("/proc/self")


def restart_peaks(device: torch.device) -> bool:
    """Count from now on; returns whether the process can be counted at all, which takes Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    give_back()
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
    except OSError:
        return False  # another system, or a container that forbids it: the peak would be one of long ago
    return True


def give_back() -> None:
    """Hand what this process has freed back to the system, where its C library knows how (glibc).

    It keeps blocks of up to 32 MB for itself, in pieces between others that are in use: after full fine-tuning of a
    model of 0.5 GB 1.2 GB were held of which nothing was used, beside all that was loaded and trained next.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))


def need_memory(n_trained: int, device: torch.device, by_adamw: bool) -> None:
    """Raise ModelError where the parameters that a link trains have no room, which is the least that its training
    takes; `by_adamw`: with AdamW's moments, where that is what takes the steps."""
    room, wanted = memory_of(device), (TRAINED_BYTES + by_adamw * MOMENTS_BYTES) * n_trained
    if wanted > room:
        what = "gradients and AdamW's moments" if by_adamw else "gradients"
        raise ModelError(
            f"{n_trained} trained parameters take {wanted / 1e9:.1f} GB with their {what}, and "
            f"there are {room / 1e9:.1f} GB: lower rank (or bottleneck, num_virtual_tokens, encoder_hidden_size), or "
            "name fewer target_modules"
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory in all: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where it cannot be told, which takes Linux."""
    try:
        status = (PROCESS / "status").read_text(encoding="utf-8")
    except OSError:
        return 0
    now = re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)
    return int(now[1]) * 1024 if now else 0


def peaks(device: torch.device, process: bool) -> dict[str, int | None]:
    """Largest memory in bytes since `restart_peaks`, which said `process`; None where it is not known.

    Returns:
        `accelerator`: allocated on the GPU; `process`: resident, of this process.
    """
    resident = None
    if process:
        status = (PROCESS / "status").read_text(encoding="utf-8")
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        resident = int(peak[1]) * 1024 if peak else None
    allocated = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"accelerator": allocated, "process": resident}
