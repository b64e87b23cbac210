"""The devices of this machine: name, capability and peak memory."""

import os
import platform
import re
import resource
from pathlib import Path

import jax


def device_name() -> str:
    """The name of the first device."""
    device = jax.devices()[0]
    return _cpu() if device.platform == "cpu" else device.device_kind


def _cpu():
    """Model and usable cores of the processor, as far as the system tells."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        cores = len(os.sched_getaffinity(0))
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{model[1] if model else platform.machine()} ({cores} cores)"


def cuda_capability() -> float | None:
    """Compute capability of the first device: 9.0 for an H100, 0 for GPUs of other makers.

    None if there is no GPU, which says nothing of the target of a compilation ahead of time.
    """
    text = getattr(jax.devices()[0], "compute_capability", None)  # "9.0"; AMD has "gfx942"
    if text is None:
        return None
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else 0.0


def peak_bytes(device) -> int:
    """Peak memory of the device if it keeps count, else of this process."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
