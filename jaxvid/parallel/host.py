"""Settings of the host process for fast steps on its own cores."""

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

    XLA on CPU allocates the temporaries of every step. glibc would return them to the system
    between steps, and every page would fault again: a fifth of the time of a step or more.
    """
    _keep_memory()
    # The array of all temporaries then comes from the heap of the calling thread, which is kept, in
    # huge pages. On a dispatching thread it would be mapped again in every step.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _keep_memory():
    """Make malloc keep freed memory, the main heap in huge pages. No-op without glibc."""
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
    # The heap keeps addresses once requested; only pages that are written to take memory.
    block = libc.malloc(_HEAP)
    if block:
        libc.madvise(block + -block % _PAGE, _HEAP - _PAGE, _HUGEPAGE)
        libc.free(block)
