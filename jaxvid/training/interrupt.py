"""Ctrl-C: the first saves and stops as SIGTERM does, the second stops at once."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import jax

STATUS = 130  # that of shells for SIGINT


@contextlib.contextmanager
def saves() -> Iterator[None]:
    """A context in which Ctrl-C saves; call in the main thread after `multihost.initialize`.

    A thread of its own reads the signals, so the second stops even while the main thread compiles.
    Processes that are started inside, as those of loaders, do not receive Ctrl-C.
    """
    if not jax.distributed.is_initialized():  # only this turns SIGTERM into a save
        yield
        return
    _start_tracker()
    inside, outside = socket.socketpair()
    inside.setblocking(False)
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    wakeup = signal.set_wakeup_fd(inside.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(outside,), daemon=True)
    thread.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        inside.close()
        thread.join()
        outside.close()


def _start_tracker():
    """Start the process that frees the shared memory of loaders: later it would unblock Ctrl-C.

    It warns of memory that a stopped loader left, though it frees it, so it is started to be quiet.
    """
    sys.warnoptions.append("ignore:resource_tracker")  # which the process takes over
    resource_tracker.ensure_running()
    sys.warnoptions.remove("ignore:resource_tracker")


def _watch(signals):
    """Answer Ctrl-C until the other end is closed."""
    count = 0
    while received := signals.recv(1):
        if received[0] != signal.SIGINT:
            continue
        count += 1
        if count == 1:
            # One write: the main thread may be printing a line too.
            print("stopping after a save; Ctrl-C again stops at once\n", end="", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            for process in multiprocessing.active_children():
                process.kill()
            print("error: interrupted; the last complete checkpoint is kept", file=sys.stderr)
            sys.stderr.flush()
            os._exit(STATUS)
