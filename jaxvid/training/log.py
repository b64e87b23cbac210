"""The console lines of a run and its speed."""

import contextlib
import math
import time

import jax
import numpy as np

from jaxvid.parallel.sharding import path_name


class Log:
    """Metrics of each step, fetched while the next one runs: logging never stalls the device."""

    def __init__(self, config, writer, progress, guard):
        self.every, self.steps = config.log.every, config.steps
        self.writer, self.progress, self.guard = writer, progress, guard
        self.pending = None

    def push(self, step, metrics, ids):
        """Settle the step before; keep this one's metrics (on the device) and clip ids."""
        self.settle()
        self.pending = step, metrics, ids

    def settle(self, evaluation=None, always=False):
        """Fetch the metrics of the pending step, check them, and write them every `every` steps.

        Also written: a step with an evaluation, and any step if `always`.
        """
        if self.pending is None:
            return
        step, metrics, ids = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.guard.check(step, values["skipped"], ids)
        self.progress.settled(step)
        if evaluation or always or step % self.every == 0 or step == self.steps:
            values |= self.progress.rates(step) | _scores(evaluation or {})
            self.writer.scalars(step, values)
            say(self.progress.line(step, values))

    def catch_up(self, step, evaluation):
        """Write the evaluation of a step that a stop prevented."""
        scores = _scores(evaluation)
        self.writer.amend(step, scores)
        say("  ".join([f"step {step} evaluated", *_shown(scores)]))


def _scores(evaluation):
    return {f"evaluate/{name}": value for name, value in evaluation.items()}


def _shown(scores):
    return [f"{n} {figure(v, 4)}" for n, v in scores.items() if n.startswith("evaluate/")]


class Progress:
    """Speeds between two log lines, from the wall clock.

    `frames` and `flops` per step over all hosts; `machine` FLOP/s of all devices, None if unknown.
    The clock starts when the first step is done, so no figure includes its compilation.
    """

    def __init__(self, steps, frames, flops, machine):
        self.steps, self.frames = steps, frames
        self.seconds_at_peak = flops / machine if machine else None
        self.created, self.step = time.perf_counter(), None

    def settled(self, step):
        """Note that `step` is done; the first call starts the clock."""
        if self.step is None:
            say(f"first step done, {duration(time.perf_counter() - self.created)} with compilation")
            self._restart(step)

    def _restart(self, step):
        self.step, self.begin, self.waited, self.aside = step, time.perf_counter(), 0.0, 0.0

    def next(self, iterator):
        """next(iterator), counted as waiting for data."""
        begin = time.perf_counter()
        batch = next(iterator)
        if self.step is not None:
            self.waited += time.perf_counter() - begin
        return batch

    @contextlib.contextmanager
    def outside(self, metrics):
        """A context (evaluation, samples) that does not count as time of a step.

        Waits first for the step that computes `metrics`, which does count.
        """
        jax.block_until_ready(metrics)
        begin = time.perf_counter()
        yield
        if self.step is not None:
            self.aside += time.perf_counter() - begin

    def rates(self, step):
        """{steps_per_s, frames_per_s, data_wait, mfu} since the last call; {} at the first step."""
        if step == self.step:
            return {}
        seconds = time.perf_counter() - self.begin - self.aside
        speed = (step - self.step) / seconds
        rates = {
            "steps_per_s": speed,
            "frames_per_s": speed * self.frames,
            "data_wait": self.waited / seconds,
        }
        if self.seconds_at_peak:
            rates["mfu"] = speed * self.seconds_at_peak
        self._restart(step)
        return rates

    def line(self, step, values):
        """The console line of a step."""
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {values['loss']:.4f}"]
        if "steps_per_s" in values:
            parts += [
                f"{values['steps_per_s']:.3g} steps/s",
                f"{values['frames_per_s']:,.0f} frames/s",
                f"data wait {values['data_wait']:.1%}",
                f"MFU {values['mfu']:.1%}" if "mfu" in values else "MFU unknown",
                f"ETA {duration((self.steps - step) / values['steps_per_s'])}",
            ]
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
    """Print on process 0."""
    if jax.process_index() == 0:
        print(*text, flush=True)


def parameter_table(params):
    """A line for each parameter: path, shape, number, mesh axes; and their sum."""
    rows = [("parameter", "shape", "number", "split over")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = ", ".join("x".join(np.ravel(axes)) if axes else "-" for axes in leaf.sharding.spec)
        rows.append((path_name(path), str(leaf.shape), f"{leaf.size:,}", axes.strip("-, ")))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows.append(("all", "", f"{total:,}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {number:>{widths[2]}}  {axes}".rstrip()
        for name, shape, number, axes in rows
    )
