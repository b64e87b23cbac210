"""Timing for all benchmarks: runs in turns, plain products beside them, and the circumstances."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
import re
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from jaxvid.errors import UserError
from jaxvid.evaluators import report
from jaxvid.parallel.devices import device_name

SECONDS = 15.0  # of measuring, start-up and compilation aside
LONG = 0.05  # seconds that need no more calls in a row
FEWEST = 5  # repetitions, however long they take
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grain", "av")


def use(platform):
    """Select the platform of all later computation: cpu, gpu (or cuda, rocm) or tpu.

    Call it before JAX looks for devices. Raises UserError if it finds none of that platform.
    """
    jax.config.update("jax_platforms", platform)
    try:
        found = jax.default_backend()
    except RuntimeError:
        found = None
    if found != {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform):
        raise UserError(f"device={platform}: JAX finds no such device on this machine")


def take_turns(*functions, fewest=None, calls=1):
    """Seconds per call of every function, called in turn for SECONDS: one list each.

    fewest: repetitions, however long they take; FEWEST unless given. calls: the most in a row
    before the clock stops. Several short ones hide the time that the host takes to start a kernel.
    """
    counts = [calls] * len(functions)
    for index, function in enumerate(functions):
        jax.block_until_ready(function())
        if calls > 1:
            begin = time.perf_counter()
            jax.block_until_ready(function())
            counts[index] = max(1, min(calls, int(LONG / (time.perf_counter() - begin))))
    times = [[] for _ in functions]
    deadline = time.perf_counter() + SECONDS
    fewest = FEWEST if fewest is None else fewest
    while len(times[0]) < fewest or time.perf_counter() < deadline:
        for function, count, seconds in zip(functions, counts, times):
            begin = time.perf_counter()
            for _ in range(count):
                result = function()
            jax.block_until_ready(result)
            seconds.append((time.perf_counter() - begin) / count)
    return times


def compile_all(lowered):
    """The compiled programs, compiled side by side; None for one that does not compile."""

    def compiled(program):
        try:
            return program.compile()
        except jax.errors.JaxRuntimeError as error:  # more shared memory than there is, for one
            print(str(error).splitlines()[0], file=sys.stderr)
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compiled, lowered))


@contextlib.contextmanager
def lasting(seconds):
    """Replaces SECONDS for the time of a `with`."""
    global SECONDS
    before, SECONDS = SECONDS, seconds
    try:
        yield
    finally:
        SECONDS = before


def calls():
    """Calls of a kernel in a row, for `take_turns`. On a CPU a call ends before the next begins."""
    return 1 if jax.default_backend() == "cpu" else 10


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product: a function that runs it and the FLOPs that it takes."""

    run: object
    flops: int


def products(width, dtype):
    """(a large square product, one like those of an MLP of this width), compiled."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    shapes = (size, size, size), (size, width, 4 * width)

    def make(rows, inner, columns):
        keys = jax.random.split(jax.random.key(0))  # zeros or ones would be faster
        shapes = (rows, inner), (inner, columns)
        a, b = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))
        product = jax.jit(jnp.matmul)
        product(a, b)
        return Product(lambda: product(a, b), 2 * rows * inner * columns)

    return tuple(make(*shape) for shape in shapes)


def circumstances():
    """The circumstances of a figure: device, date, command and versions."""
    return {
        "device": device_name(),
        "devices": jax.device_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": shlex.join(["python", "-m", "jaxvid.bench", *sys.argv[1:]]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def plot(figures, path):
    """Milliseconds over tokens, one line for each contender. Nothing without any, or matplotlib."""
    lines = {}
    for name, value in figures.items():
        if match := re.fullmatch(r"(.+)_(\d+)_(forward|both)_ms", name):
            lines.setdefault(f"{match[1]}, {match[3]}", []).append((int(match[2]), value))
    if not lines:
        return

    def draw(figure):
        axes = figure.add_subplot(
            xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds"
        )
        for name, points in lines.items():
            style = "o--" if name.endswith("forward") else "o-"
            axes.plot(*zip(*points), style, label=name)
        axes.legend()

    report.write_plot(path, draw)


def plot_stream(rows, path):
    """Milliseconds per frame and mebibytes over the frames of a stream; nothing without matplotlib.

    rows: {last frame of a part: {name_ms or name_mib: value}}.
    """

    def draw(figure):
        panels = figure.subplots(2, sharex=True)
        for axes, unit, label in zip(panels, ("_ms", "_mib"), ("ms per frame", "MiB")):
            for name in next(iter(rows.values())):
                if name.endswith(unit):
                    values = [row[name] for row in rows.values()]
                    axes.plot(list(rows), values, "o-", label=name.removesuffix(unit))
            axes.set(ylabel=label, ylim=(0, None))
            axes.legend()
        axes.set_xlabel("frame")

    report.write_plot(path, draw)
