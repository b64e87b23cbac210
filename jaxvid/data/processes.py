"""Decoding processes of bounded memory, for files from anywhere."""

import collections
import concurrent.futures
import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterable, Iterator

MAX_BYTES = 2**33  # of address space in each process


def in_processes(work: Callable, names: Iterable[str], workers: int) -> Iterator[tuple]:
    """Yield (name, work(name)) in order; a reason, a str, if the file ends its process."""
    waiting = collections.deque(names)
    while waiting:
        running = collections.deque()
        try:
            with _pool(workers) as pool:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        running.append((waiting[0], pool.submit(work, waiting.popleft())))
                    outcome = running[0][1].result()
                    yield running.popleft()[0], outcome
        except concurrent.futures.process.BrokenProcessPool:
            # One of the running files is the cause; each in a process of its own shows which.
            for name, _ in running:
                yield name, _alone(work, name)


def _alone(work, name):
    try:
        with _pool(1) as pool:
            return pool.submit(work, name).result()
    except concurrent.futures.process.BrokenProcessPool:
        return "brings the decoder down"


def _pool(workers):
    # Spawned: a fork of a process with threads can hang.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, _begin)


def _begin():
    # Ctrl-C reaches all processes of a terminal; only the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, hard))
