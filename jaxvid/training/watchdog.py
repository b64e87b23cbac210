"""A watch over training steps: one that never ends stops the process, which may start again."""

import faulthandler
import sys
import threading
import time

from jaxvid.errors import UserError
from jaxvid.parallel import peers

HUNG = 77  # exit status
SECONDS = 1800.0
_LOOK = 5.0  # seconds between two looks, at most


class Watchdog:
    """Ends the process with the stacks of all threads when a step takes longer than `seconds`.

    Not while it rests, as during evaluations. seconds: 0 = never. Time in which the process itself
    is stopped does not count.
    """

    def __init__(self, seconds: float):
        if not 0 <= seconds < 1e9:
            raise UserError(f"hang_seconds={seconds}: must be a number of seconds; 0 is never")
        self._seconds, self._step, self._since = seconds, 0, None
        self._done = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def step(self, step: int) -> None:
        """Call before a step, with the number of those that are done."""
        self._step, self._since = step, time.monotonic()

    def rest(self) -> None:
        """Call after a step."""
        self._since = None

    def close(self) -> None:
        """End the watch."""
        self._done.set()

    def _watch(self):
        look, last = min(_LOOK, self._seconds / 4), time.monotonic()
        while not self._done.wait(look):
            now, since = time.monotonic(), self._since
            if now - last > 3 * look and since is not None:  # the process stood still
                self._since = since = now
            last = now
            if since is not None and now - since > self._seconds:
                print(
                    f"error: the step after {self._step} has not ended for {self._seconds:g} s "
                    "(--hang_seconds); the same command goes on from the last checkpoint. All "
                    "threads:",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(file=sys.stderr)
                peers.end(HUNG)
