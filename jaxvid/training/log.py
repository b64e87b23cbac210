"""The console lines of a run and its speed."""

import collections
import concurrent.futures
import contextlib
import math
import time

import jax
import numpy as np

from jaxvid.parallel.sharding import path_name

LATEST = ("lr", "skipped")  # metrics of which a line has the latest value, of others the mean


class Log:
    """Metrics of each step, fetched while the next one runs: logging never stalls the device.

    A line has the means over the steps since the line before, or since the start of the process.
    """

    def __init__(self, config, writer, progress, guard):
        self.every, self.steps = config.log.every, config.steps
        self.writer, self.progress, self.guard = writer, progress, guard
        self.pending, self.since_line = None, []
        # A thread of its own sees when a step is done, whatever this one waits for.
        self._fetcher = concurrent.futures.ThreadPoolExecutor(1)

    def push(self, step, metrics, ids):
        """Settle the step before; keep this one's metrics (on the device) and clip ids."""
        self.settle()
        self.pending = step, self._fetcher.submit(_fetch, metrics), ids

    @contextlib.contextmanager
    def pause(self, doing=""):
        """A context (evaluation, samples, a checkpoint) that does not count as time of a step.

        Waits first for the pending step, which does count. doing: said before, "" for nothing.
        """
        if self.pending:
            self.pending[1].result()
        if doing:
            say(doing)
        with self.progress.pause():
            yield

    def settle(self, evaluation=None, always=False):
        """Fetch the metrics of the pending step, check them, and write them every `every` steps.

        Also written: a step with an evaluation, and any step if `always`.
        """
        if self.pending is None:
            return
        step, fetched, ids = self.pending
        self.pending = None
        values, time_done = fetched.result()
        self.since_line.append(values)
        self.guard.check(step, values["skipped"], ids)
        self.progress.settled(step, time_done)
        if evaluation or always or step % self.every == 0 or step == self.steps:
            values = _means(self.since_line) | self.progress.rates(step, time_done)
            values |= _scores(evaluation or {})
            self.since_line = []
            self.writer.scalars(step, values)
            say(self.progress.line(step, values))

    def catch_up(self, step, evaluation):
        """Write the evaluation of a step that a stop prevented."""
        scores = _scores(evaluation)
        self.writer.amend(step, scores)
        say("  ".join([f"step {step} evaluated", *_shown(scores)]))


def _fetch(metrics):
    """(metrics as numbers, the time when they were there)."""
    metrics = jax.device_get(metrics)
    return {name: value.item() for name, value in metrics.items()}, time.perf_counter()


def _means(steps):
    """Means of the finite values of each metric of some steps; NaN if there are none."""
    means = {}
    for name, latest in steps[-1].items():
        values = [step[name] for step in steps if math.isfinite(step[name])]
        mean = sum(values) / len(values) if values else math.nan
        means[name] = latest if name in LATEST else mean
    return means


def _scores(evaluation):
    return {f"evaluate/{name}": value for name, value in evaluation.items()}


def _shown(scores):
    return [f"{n} {figure(v, 4)}" for n, v in scores.items() if n.startswith("evaluate/")]


class Progress:
    """Speeds between two log lines, from the times when their steps were done.

    `frames` and `flops` per step over all hosts; `machine` FLOP/s of all devices, None if unknown.
    The clock starts when the first step is done, so no figure includes its compilation. Pauses are
    no time of a step; they have a figure of their own, and the ETA counts them.
    """

    def __init__(self, steps, frames, flops, machine):
        self.steps, self.frames = steps, frames
        self.seconds_at_peak = flops / machine if machine else None
        self.created, self.first, self.last = time.perf_counter(), None, None
        self.waits, self.pauses = [], []  # (begin, seconds) of those that no line has counted

    def settled(self, step, time_done):
        """Note that `step` was done at that time; the first call starts the clock."""
        if self.first is None:
            say(f"first step done, {duration(time_done - self.created)} with compilation")
            self.first = self.last = step, time_done
            self._take(self.waits, time_done), self._take(self.pauses, time_done)

    def next(self, iterator):
        """next(iterator), counted as waiting for data."""
        with self._noted(self.waits):
            return next(iterator)

    def pause(self):
        """A context that does not count as time of a step; call it when no step is running."""
        return self._noted(self.pauses)

    @contextlib.contextmanager
    def _noted(self, intervals):
        begin = time.perf_counter()
        yield
        intervals.append((begin, time.perf_counter() - begin))

    @staticmethod
    def _take(intervals, until):
        """Seconds of the intervals that began before `until`, which are removed."""
        taken = [(begin, seconds) for begin, seconds in intervals if begin < until]
        intervals[:] = intervals[len(taken) :]
        return sum(seconds for _, seconds in taken)

    def rates(self, step, time_done):
        """Speeds since the last call, up to `step`, done at that time; {} at the first step.

        steps_per_s, frames_per_s and mfu of the steps alone; data_wait, share of that time spent
        waiting for data; pauses, share of the whole time.
        """
        before, begin = self.last
        if step == before:
            return {}
        waited, paused = (self._take(x, time_done) for x in (self.waits, self.pauses))
        seconds = time_done - begin - paused
        speed = (step - before) / seconds
        rates = {
            "steps_per_s": speed,
            "frames_per_s": speed * self.frames,
            "data_wait": waited / seconds,
            "pauses": paused / (seconds + paused),
        }
        if self.seconds_at_peak:
            rates["mfu"] = speed * self.seconds_at_peak
        self.last = step, time_done
        return rates

    def _eta(self, step):
        """Seconds that the other steps take at the mean speed so far, pauses included."""
        first, begin = self.first
        return (self.steps - step) * (time.perf_counter() - begin) / (step - first)

    def line(self, step, values):
        """The console line of a step."""
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {values['loss']:.4f}"]
        if "steps_per_s" in values:
            parts += [
                f"{values['steps_per_s']:.3g} steps/s",
                f"{values['frames_per_s']:,.0f} frames/s",
                f"data wait {values['data_wait']:.1%}",
                f"MFU {values['mfu']:.1%}" if "mfu" in values else "MFU unknown",
                f"ETA {duration(self._eta(step))}",
            ]
        if values.get("pauses"):
            parts.append(f"pauses {values['pauses']:.1%}")
        if values["skipped"]:
            parts.append(f"{values['skipped']:.0f} steps skipped")
        return "  ".join([*parts, *_shown(values)])


def figure(value, digits=5):
    """A number for people: whole and large numbers without decimals, others to `digits`."""
    value = float(value)
    is_whole = value.is_integer() or 10**digits <= abs(value) < math.inf
    return f"{value:.0f}" if is_whole else f"{value:.{digits}g}"


def duration(seconds):
    """ "2h 05m", "3m 20s" or "12s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def say(*text):
    """Print on process 0, in one write, so that no other thread's line falls into this one."""
    if jax.process_index() == 0:
        print(" ".join(map(str, text)) + "\n", end="", flush=True)


def parameter_table(params, depth=0):
    """A line for each module with its number of parameters, and their sum.

    depth: parts of a path that name a module; 0 gives a line for each array, with its shape and the
    mesh axes that split it.
    """
    arrays = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    if depth:
        sizes = collections.Counter()
        for name, leaf in arrays:
            sizes["/".join(name.split("/")[:depth])] += leaf.size
        rows = [("module", "parameters"), *((name, f"{size:,}") for name, size in sizes.items())]
    else:
        rows = [("parameter", "number", "shape", "split over")]
        for name, leaf in arrays:
            split = (axes and "x".join(np.ravel(axes)) for axes in leaf.sharding.spec)
            axes = ", ".join(axis or "-" for axis in split).strip("-, ")
            rows.append((name, f"{leaf.size:,}", str(leaf.shape), axes))
    rows.append(("all", f"{sum(leaf.size for _, leaf in arrays):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), *row[2:]]).rstrip()
        for row in rows
    )
