"""What a host's own memory needs for steps to be fast."""

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of glibc's malloc.h
_TWO_GB = 2_000_000_000


def keep_memory():
    """Let malloc keep what a step has freed; call before jax starts. No-op without glibc.

    XLA on CPU allocates a step's temporaries anew every time. glibc would return them to the system
    in between, and every page faults again: a fifth of the time of a step and more.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _TWO_GB)
        mallopt(_TRIM_THRESHOLD, _TWO_GB)
        mallopt(_ARENA_MAX, 1)  # other arenas cannot hold a large array
