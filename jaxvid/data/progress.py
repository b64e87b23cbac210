"""A bar on the terminal for work that takes long."""

import sys
import time
from collections.abc import Iterable, Iterator


def shown(outcomes: Iterable[tuple], total: int, unit: str = "clips") -> Iterator[tuple]:
    """Pass (name, outcome) pairs through and draw a bar on stderr, in place on a terminal.

    An outcome that is a str is the reason for which a file was skipped.
    """
    begin = last = time.monotonic()
    skipped = 0
    for done, (name, outcome) in enumerate(outcomes, 1):
        yield name, outcome
        skipped += isinstance(outcome, str)
        now = time.monotonic()
        if done == total or now - last > (0.2 if sys.stderr.isatty() else 10.0):
            last = now
            left = round((now - begin) / done * (total - done))
            bar = "#" * (30 * done // total)
            line = f"[{bar:<30}] {done}/{total} {unit}, {skipped} skipped, {left} s left"
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            print(f"{line:<75}", end=end, file=sys.stderr, flush=True)
