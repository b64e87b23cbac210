"""What a host needs for steps on its own cores to be fast."""

import ctypes
import sys

import jax

# mallopt's names in glibc's malloc.h, and madvise's in Linux's mman.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_HUGEPAGE = 14
_PAGE = 2 << 20  # bytes of a huge page
_HEAP = 8 << 30  # bytes of the heap that may be in huge pages
_ARENA = 64 << 20  # bytes of a piece of a thread's own heap


def prepare():
    """Set up memory and dispatch for computation on CPU; call before jax starts a backend.

    XLA on CPU allocates a step's temporaries anew every time. glibc would return them to the system
    in between, and every page faults again: a fifth of the time of a step and more.
    """
    _keep_memory()
    # The large array of all temporaries then comes from the heap of the thread that calls, which is
    # kept and in huge pages. A dispatching thread would have it mapped anew in every step.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _keep_memory():
    """Let malloc keep what has been freed, the main heap in huge pages. No-op without glibc."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_MMAP_MAX, 0)  # all blocks come from a heap
    libc.mallopt(_TOP_PAD, 2 * _ARENA)  # and no piece of a thread's heap is given back
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Once asked for, the addresses stay the heap's; only what is written to takes memory.
    block = libc.malloc(_HEAP)
    if block:
        libc.madvise(block + -block % _PAGE, _HEAP - _PAGE, _HUGEPAGE)
        libc.free(block)
