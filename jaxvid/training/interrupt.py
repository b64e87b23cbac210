"""Ctrl-C: the first saves and stops, as SIGTERM does; the second stops at once."""

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

    Processes that are started inside, as those of loaders, do not receive Ctrl-C.
    """
    if not jax.distributed.is_initialized():  # only this turns SIGTERM into a save
        yield
        return
    _start_tracker()
    kept = "the last complete checkpoint is kept"
    with _answered([signal.SIGINT], lambda: os.kill(os.getpid(), signal.SIGTERM), kept):
        yield


@contextlib.contextmanager
def stops() -> Iterator[threading.Event]:
    """A context whose event Ctrl-C or SIGTERM sets, for a loop that then saves and ends.

    Call in the main thread.
    """
    event, kept = threading.Event(), "what was saved last is kept"
    with _answered([signal.SIGINT, signal.SIGTERM], event.set, kept):
        yield event


@contextlib.contextmanager
def _answered(signals, answer, kept):
    """A context in which the first of the signals calls `answer`, and Ctrl-C after it exits.

    A thread of its own reads the signals, so the second stops even while the main thread compiles.
    kept: what the exit says of the work so far.
    """
    inside, outside = socket.socketpair()
    inside.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
    wakeup = signal.set_wakeup_fd(inside.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(outside, signals, answer, kept), daemon=True)
    thread.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
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


def _watch(received, signals, answer, kept):
    """Answer the signals until the other end is closed."""
    is_stopping = False
    while number := received.recv(1):
        if number[0] not in signals:
            continue
        if not is_stopping:
            is_stopping = True
            # One write: the main thread may be printing a line too.
            print("stopping after a save; Ctrl-C again stops at once\n", end="", flush=True)
            answer()
        elif number[0] == signal.SIGINT:
            for process in multiprocessing.active_children():
                process.kill()
            print(f"error: interrupted; {kept}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(STATUS)
