"""The processes of a cluster watch each other, so that none waits long for one that is gone.

jax notices a lost process too, by its own heartbeats, but ends with a page of C++; a collective
that waits for a lost peer may never end.
"""

import atexit
import contextlib
import multiprocessing
import os
import re
import sys
import threading
import time

import jax

from jaxvid.errors import UserError

LOST = 76  # exit status where another process is lost
BEAT, SILENT = 4.0, 40.0  # seconds between signs of life, and without one from a peer until the end
_KEY = "jaxvid/alive/"
_REMEDY = "start the same command again on all hosts, and the run goes on from its last checkpoint"
# Of a collective on CPU whose peer has closed its connection.
_CLOSED = re.compile(r"closed by peer|reset by peer|Broken pipe|Socket closed", re.IGNORECASE)


@contextlib.contextmanager
def joining(who: str, seconds: float):
    """A context that ends the process if it lasts longer than `seconds`: some peer never started.

    jax would wait for its own time and then abort. who: the processes that are waited for.
    """
    line = (
        f"{who} did not all start within {seconds:g} s; start the same command on all hosts, or "
        "wait longer with --join_seconds"
    )
    timer = threading.Timer(seconds, _end, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def watch(client) -> None:
    """Give signs of life from now on, and end the process when a peer gives none.

    client: that of jax.distributed, whose table of keys and values all processes see.
    """
    count = jax.process_count()
    if count > 1:
        arguments = client, jax.process_index(), count
        threading.Thread(target=_watch, args=arguments, daemon=True).start()


def _watch(client, index, count):
    beats, heard, last = {}, dict.fromkeys(range(count), time.monotonic()), time.monotonic()
    for number in range(2**62):
        now = time.monotonic()
        if now - last > 3 * BEAT:  # this process itself stood still
            heard = dict.fromkeys(heard, now)
        last = now
        try:
            client.key_value_set(f"{_KEY}{index}", str(number), allow_overwrite=True)
            found = dict(client.key_value_dir_get(_KEY))
        except Exception:  # of many kinds: process 0, which holds the table, does not answer
            found = {}
        for key, beat in found.items():
            peer = int(key.rpartition("/")[2])
            if beats.get(peer) != beat:
                beats[peer], heard[peer] = beat, now
        silent = [peer for peer in heard if now - heard[peer] > SILENT]
        if silent and not found:
            silent = [0]
        if silent:
            peer = f"process {silent[0]} of {count}"
            _end(f"{peer} gives no sign of life for {SILENT:g} s; {_REMEDY}")
        time.sleep(BEAT)


def leave(error: BaseException, status: int) -> None:
    """Call when this process fails for itself: its end will not wait for the others.

    Without this, the shutdown of jax waits for peers, which wait for this one. An error that only
    says that a peer is gone ends the process at once, in one line.
    """
    if jax.process_count() == 1:
        return
    is_ours = isinstance(error, UserError | OSError)  # as of a closed pipe of our own output
    if not is_ours and _CLOSED.search(str(error)):
        _end(f"another process has ended, its connection is closed; {_REMEDY}")
    # Runs before jax's own handler, which was registered earlier, and after the error is printed.
    atexit.register(end, status)


def _end(line):
    print(f"error: {line}", file=sys.stderr)
    end(LOST)


def end(status: int) -> None:
    """End this process at once, without waiting for others, and those that load its data."""
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
