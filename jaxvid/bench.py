"""Benchmarks of a config on this machine, as a table and as JSON in the work folder.

    python -m jaxvid.bench step --config=configs/ar_diffusion.py     training step, MFU, memory
    python -m jaxvid.bench data --config=configs/ar_diffusion.py     input pipeline, waiting share
    python -m jaxvid.bench sample --config=configs/ar_diffusion.py   cached and uncached sampling
    python -m jaxvid.bench stream --config=configs/tokenizer.py      long videos through a tokenizer
    python -m jaxvid.bench kernels --op=linear_attention             kernels beside softmax, a plot
    python -m jaxvid.bench mixers                                    mixers by length of the stream

`--latents=32x4` puts 32 latent tokens of 4 channels in the place of a frame's patches, so that the
network can be timed at the size of a tokenizer's output without one.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.inference import make_task
from jaxvid.kernels import linear_attention
from jaxvid.mixers import MIXERS
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.multihost import to_global
from jaxvid.parallel.sharding import batch_sharding
from jaxvid.training import flops
from jaxvid.training.logging import peak_bytes
from jaxvid.training.optim import make_optimizer
from jaxvid.training.restore import batch_shapes
from jaxvid.training.state import make_init
from jaxvid.training.step import make_step

SECONDS = 15.0  # of measuring, start-up and compilation aside
FEWEST = 5  # repetitions, however long they take
SHORT_RUN = 40  # steps
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)  # tokens of a kernel
LARGEST_SCORES = 2**31  # bytes of softmax's matrix
# Rows, heads, tokens and head width that others publish times for (on a CPU of less of all).
PUBLISHED = (
    (4, 32, 32768, 128),
    (1, 96, 8192, 128),
    (2, 16, 16384, 128),
    (4, 64, 4096, 128),
    (4, 8, 16384, 256),
)
ROOFLINE_CHUNK = 128  # tokens between two states in the count of what a run must do
KINDS = ("plain", "decay")
STREAMS, STREAM_PIECE = (64, 1000), 16  # frames of long clips, and about that many at once
STREAM_LENGTHS = (512, 1024, 2048, 4096)  # tokens of a stream through a mixer
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grain", "av")


def main(command):
    """Runs one of COMMANDS, prints its table and writes <workdir>/bench_<command>.json."""
    if command == "kernels":
        workdir, figures = flags.FLAGS.workdir, kernels(flags.FLAGS.op)
        plot(figures, Path(workdir, "bench_kernels.png"))
    elif command == "mixers":
        workdir, figures = flags.FLAGS.workdir, mixers()
        plot(figures, Path(workdir, "bench_mixers.png"))
    else:
        config, workdir = config_lib.from_flags()
        figures = COMMANDS[command](config, _tokenizer(flags.FLAGS.latents))
    facts = circumstances()
    print(f"bench {command} on {facts['devices']} x {facts['device']}, {facts['date']}")
    for name, value in figures.items():
        print(f"  {name:<42}{value:>12,.5g}")
    path = Path(workdir, f"bench_{command}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "figures": figures}, indent=2) + "\n")
    print(f"written to {path}")


# The benchmarks: (config, tokenizer or None) -> {figure: number}


def step(config, tokenizer):
    """The training step on random clips, with plain matrix products as the measure of the machine.

    Steps and products take turns, so that whatever else the machine does slows both. FLOPs are
    those of matrix products and convolutions, forward and twice that backward. The share of what
    plain products reach compares best with best; everything else is of the median step.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        batch = jax.device_put(random_batch(config, config.data.batch_size), batch_sharding(mesh))
        task, frozen, state, update = _program(config, tokenizer, batch, mesh)
        work = flops.of_step(task, state, frozen, batch)
        begin = time.perf_counter()
        update = update.lower(state, frozen, batch).compile()
        compile_s = time.perf_counter() - begin

        def advance():
            nonlocal state
            state, metrics = update(state, frozen, batch)
            return metrics

        dtype = jnp.dtype(config.task.model.dtype)
        square, alike = products(config.task.model.width, dtype)
        times, square_times, alike_times = take_turns(advance, square.run, alike.run)

    frames = config.data.batch_size * config.data.frames
    best_rate = work / min(times)
    square_rate = mesh.size * square.flops / min(square_times)
    alike_rate = mesh.size * alike.flops / min(alike_times)
    promised = flops.peak(mesh.devices.flat[0], dtype)
    memory = update.memory_analysis()
    return {
        "step_ms": 1e3 * statistics.median(times),
        "step_ms_best": 1e3 * min(times),
        "frames_per_s": frames / statistics.median(times),
        "gflop_per_step": work / 1e9,
        "gflop_per_s": work / statistics.median(times) / 1e9,
        "gflop_per_s_best": best_rate / 1e9,
        "matmul_square_gflop_per_s": square_rate / 1e9,
        "matmul_alike_gflop_per_s": alike_rate / 1e9,
        "share_of_matmul": best_rate / max(square_rate, alike_rate),
        **({"mfu": work / statistics.median(times) / (mesh.size * promised)} if promised else {}),
        "compile_s": compile_s,
        "program_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
        "peak_mib": peak_bytes(mesh.devices.flat[0]) / 2**20,
    }


def sample(config, tokenizer):
    """One clip with the exact cache and one with every frame recomputed in every iteration."""
    frames, figures = config.data.frames, {}
    cond = {**random_batch(config, 1), "num": 1}
    for memory in ("cache", "none"):
        fields = ConfigDict(config.task.to_dict())
        fields.sampler.memory = memory
        task = _task(fields, tokenizer)
        frozen = task.frozen()
        params, _ = jax.jit(task.init)(jax.random.key(0), random_batch(config, 1))

        def clip(task=task, params=params, frozen=frozen):
            return task.sample(params, jax.random.key(1), cond, frozen=frozen, frames=frames)

        begin = time.perf_counter()
        jax.block_until_ready(clip())
        compile_s = time.perf_counter() - begin
        (times,) = take_turns(clip)
        name = "cached" if memory == "cache" else "uncached"
        figures[f"{name}_s"] = statistics.median(times)
        figures[f"{name}_first_call_s"] = compile_s
    schedule = task.schedule(frames)
    return {
        **figures,
        "cached_share": figures["cached_s"] / figures["uncached_s"],
        "cached_frames_per_s": frames / figures["cached_s"],
        "cached_evaluations": schedule.evaluations,
        "uncached_evaluations": schedule.iterations * frames,
    }


def input_pipeline(config, tokenizer):
    """Frames per second out of the iterator alone, and the share of training spent waiting for it.

    The loop is that of `train`: the next batch is fetched while the device works on the last.
    """
    mesh, size = make_mesh(config.mesh), config.data.batch_size
    alone = data.throughput(config.data, SECONDS)
    options = dict(split="train", seed=config.seed, batch_size=size)
    with (
        jax.set_mesh(mesh),
        contextlib.closing(data.make_iterator(config.data, **options)) as clips,
    ):
        _, frozen, state, update = _program(config, tokenizer, next(clips), mesh)
        last, waited, begin = None, 0.0, None
        for _ in range(1 + SHORT_RUN):
            asked = time.perf_counter()
            rows = next(clips)
            waited += time.perf_counter() - asked
            state, metrics = update(state, frozen, to_global(rows, batch_sharding(mesh)))
            jax.block_until_ready(last)
            last = metrics
            if begin is None:  # the first step compiles, and then the clock starts
                jax.block_until_ready(last)
                waited, begin = 0.0, time.perf_counter()
        jax.block_until_ready(last)
    seconds = time.perf_counter() - begin
    return {
        "frames_per_s": alone,
        "train_frames_per_s": SHORT_RUN * size * config.data.frames / seconds,
        "train_data_wait": waited / seconds,
    }


def stream(config, tokenizer):
    """Clips of STREAMS frames through the encoder and the decoder of a tokenizer, piece by piece.

    The peak is of the process so far, so a longer clip that needs no more memory leaves it alone.
    """
    task = make_task(config.task)
    if tokenizer or config.task.name != "tokenizer":
        raise UserError(f"task.name={config.task.name}: use --config=configs/tokenizer.py")
    tokenizer, size = task.tokenizer, config.data.size
    batch = random_batch(config, 1)
    params, extra = jax.jit(task.init)(jax.random.key(0), batch)
    params, grid = {**params, **extra}, tokenizer.grid(size)
    group = tokenizer.frames_for_latents(2) - 1
    later = max(STREAM_PIECE // group, 1) * group
    noise_BTHWC = np.random.default_rng(0).integers(
        0, 256, (1, 1 + later, size, size, 3), dtype=np.uint8
    )

    @jax.jit
    def through(params, video_u8, states):
        z, encoder = tokenizer.encode(params, normalize(video_u8), states[0])
        video, decoder = tokenizer.decode(params, z, grid, states[1])
        return video.mean(), (encoder, decoder)

    figures = {}
    for frames in STREAMS:
        states = (None, None)
        pieces = -(-(frames - 1) // later)
        for piece in range(pieces):
            value, states = through(params, noise_BTHWC[:, min(piece, 1) :], states)
            jax.block_until_ready(value)
            if piece == 1:  # both programs are compiled by then
                begin = time.perf_counter()
        figures[f"peak_mib_{frames}"] = peak_bytes(jax.devices()[0]) / 2**20
        figures[f"state_mib_{frames}"] = sum(x.nbytes for x in jax.tree.leaves(states)) / 2**20
        figures[f"frames_per_s_{frames}"] = (pieces - 2) * later / (time.perf_counter() - begin)
    return figures


def kernels(op):
    """Every implementation of linear attention beside causal softmax attention, over lengths.

    Named <contender>_<tokens>_<forward or both>: the best milliseconds, the FLOP/s and bytes/s of
    the chunk algorithm in it, and the share of what this device could do at the rates of a plain
    product and a plain copy, measured in turn with it. Softmax stands alone: it does other work.
    """
    cpu = jax.default_backend() == "cpu"
    B, A, K, dtype = (2, 4, 64, jnp.float32) if cpu else (4, 16, 128, jnp.bfloat16)
    square, _ = products(K, dtype)
    large = jnp.ones(2**24 if cpu else 2**28, dtype)
    copy = jax.jit(lambda x: x + 1)
    figures = {}
    for L in LENGTHS:
        runs = _runs(op, B, L, A, K, dtype)
        square_s, copy_s, *times = take_turns(
            square.run, functools.partial(copy, large), *runs.values()
        )
        rate, moving = square.flops / min(square_s), 2 * large.nbytes / min(copy_s)
        for (name, direction), seconds in zip(runs, times):
            label = f"{name}_{L}_{direction}"
            figures[f"{label}_ms"] = 1e3 * min(seconds)
            if name != "softmax":
                chunk = getattr(linear_attention, name.split("_")[0]).CHUNK
                operations, moved = (B * L * A * each for each in work(direction, K, chunk))
                moved *= jnp.dtype(dtype).itemsize
                figures[f"{label}_gflop_per_s"] = operations / min(seconds) / 1e9
                figures[f"{label}_gb_per_s"] = moved / min(seconds) / 1e9
                limit = max(operations / rate, moved / moving)
                figures[f"{label}_share_of_limit"] = limit / min(seconds)
    for shape in PUBLISHED:
        figures |= published(op, *((max(1, n // 8) for n in shape) if cpu else shape), dtype)
    return figures


def published(op, B, A, L, K, dtype):
    """Best milliseconds at one of PUBLISHED, and the share of what the device's maker promises.

    That is left out where the maker's figures are unknown.
    """
    device, figures = jax.devices()[0], {}
    rate, moving = flops.peak(device, dtype), flops.bandwidth(device)
    runs = _runs(op, B, L, A, K, dtype)
    for (name, direction), seconds in zip(runs, take_turns(*runs.values())):
        label = f"{name}_b{B}a{A}l{L}k{K}_{direction}"
        figures[f"{label}_ms"] = 1e3 * min(seconds)
        if rate and moving and name != "softmax":
            operations, moved = (B * L * A * each for each in work(direction, K, ROOFLINE_CHUNK))
            limit = max(operations / rate, moved * jnp.dtype(dtype).itemsize / moving)
            figures[f"{label}_share_of_roofline"] = limit / min(seconds)
    return figures


def mixers():
    """Every mixer over frames of 16 tokens, width 64, 4 heads, forward, by length of the stream.

    Named <mixer>_<tokens>_forward_ms, the best time, and _mib, the memory of the program beside
    arguments and results. <mixer>_efficiency_length_ms and _mib: from how many tokens on the mixer
    costs less than softmax, by `efficiency_length`. alibi, which is quadratic too, is left out.
    """
    figures = {}
    names = [name for name in MIXERS if name != "alibi"]
    for L in STREAM_LENGTHS:
        x_BTND = jax.random.normal(jax.random.key(0), (1, L // 16, 16, 64))
        runs = []
        for name in names:
            mixer = MIXERS[name](width=64, heads=4, grid=(4, 4))
            params = jax.jit(mixer.init)(jax.random.key(1), x_BTND[:, :1])
            program = jax.jit(lambda params, x, mixer=mixer: mixer.apply(params, x)[0])
            program = program.lower(params, x_BTND).compile()
            memory = program.memory_analysis().temp_size_in_bytes
            figures[f"{name}_{L}_forward_mib"] = memory / 2**20
            runs.append(functools.partial(program, params, x_BTND))
        for name, seconds in zip(names, take_turns(*runs)):
            figures[f"{name}_{L}_forward_ms"] = 1e3 * min(seconds)
    for unit in ("ms", "mib"):
        costs = {
            name: [figures[f"{name}_{L}_forward_{unit}"] for L in STREAM_LENGTHS] for name in names
        }
        for name in names[1:]:
            length = efficiency_length(STREAM_LENGTHS, costs[name], costs["softmax"])
            figures[f"{name}_efficiency_length_{unit}"] = length
    return figures


# Parts


def efficiency_length(lengths, costs, quadratic):
    """From which length on a linear cost stays below a quadratic one (CAB, Zhang et al. 2023).

    Least squares of d n + e and of a n^2 + b n + c; the last crossing of the two, 0 where the
    linear one is always lower. NaN where `quadratic` does not bend upwards.
    """
    a, b, c = np.polyfit(lengths, quadratic, 2)
    d, e = np.polyfit(lengths, costs, 1)
    if a <= 0:
        return float("nan")
    roots = np.roots([a, b - d, c - e])
    return max([0.0, *roots[np.isreal(roots)].real.tolist()])


def work(direction, K, chunk):
    """(FLOPs, numbers moved) per token and head of a run of `kernels`, by the chunk algorithm.

    Whole tiles of scores count, and states between chunks that forward saves for backward.
    """
    if direction == "forward":
        return 4 * K * (chunk + K), 4 * K
    return K * (14 * chunk + 12 * K), 11 * K + 2 * K * K / chunk


def _runs(op, B, L, A, K, dtype):
    """{(contender, forward or both): a function that runs it} on random tokens."""
    x = jax.random.normal(jax.random.key(0), (4, B, L, A, K), dtype)
    inputs = (*x, -jax.random.uniform(jax.random.key(1), (B, L, A)))
    runs = {}
    for name, attend in contenders(op, B, L, A).items():
        gradients = jax.grad(attend, argnums=(0, 1, 2, 4))
        runs[name, "forward"] = functools.partial(jax.jit(attend), *inputs)
        runs[name, "both"] = functools.partial(jax.jit(gradients), *inputs)
    return runs


def contenders(op, B, L, A):
    """{name: function of (q, k, v, dy, g) -> a scalar} of what applies here and fits in memory."""
    attend = OPS[op]

    def linear(implementation, decayed):
        def run(q, k, v, dy, g):
            g = g if decayed else None
            return jnp.vdot(attend(q, k, v, g, implementation=implementation), dy)

        return run

    def softmax(q, k, v, dy, g):
        return jnp.vdot(jax.nn.dot_product_attention(q, k, v, is_causal=True), dy)

    platform = jax.default_backend()
    names = ["chunked", *({platform} & set(linear_attention.IMPLEMENTATIONS))]
    found = {f"{name}_{kind}": linear(name, kind == "decay") for name in names for kind in KINDS}
    if 4 * B * A * L**2 <= LARGEST_SCORES:
        found["softmax"] = softmax
    return found


def plot(figures, path):
    """Milliseconds over tokens, one line for each contender; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'jaxvid[plot]'")
        return
    lines = {}
    for name, value in figures.items():
        if match := re.fullmatch(r"(.+)_(\d+)_(forward|both)_ms", name):
            lines.setdefault(f"{match[1]}, {match[3]}", []).append((int(match[2]), value))
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
    for name, points in lines.items():
        axes.plot(*zip(*points), "o--" if name.endswith("forward") else "o-", label=name)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@dataclasses.dataclass(frozen=True)
class Latents:
    """Stands in for a tokenizer of one row of tokens; its latents are pixels off the frame's top.

    The members are those of `models.patches.Patches`. `decode` shows latents as grey pictures.
    """

    tokens: int
    channels: int

    def grid(self, size):
        del size
        return (1, self.tokens)

    def latents_for_frames(self, frames):
        return frames

    def encode(self, params, video_BTHWC, state=None):
        del params
        B, T = video_BTHWC.shape[:2]
        z = video_BTHWC.reshape(B, T, -1)[..., : self.tokens * self.channels]
        return z.reshape(B, T, self.tokens, self.channels), state

    def decode(self, params, z_BTNZ, grid, state=None):
        del params, grid
        return z_BTNZ[..., None], state


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product: a function that runs it and the FLOPs that it takes."""

    run: object
    flops: int


def products(width, dtype):
    """(a large square product, one like those of an MLP of this width), compiled and run once."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    shapes = (size, size, size), (size, width, 4 * width)

    def make(rows, inner, columns):
        a, b = (jnp.ones(shape, dtype) for shape in ((rows, inner), (inner, columns)))
        product = jax.jit(jnp.matmul)
        product(a, b)
        return Product(lambda: product(a, b), 2 * rows * inner * columns)

    return tuple(make(*shape) for shape in shapes)


def take_turns(*functions):
    """Seconds of every call of every function, called in turn for SECONDS: one list each."""
    for function in functions:
        jax.block_until_ready(function())
    times = [[] for _ in functions]
    deadline = time.perf_counter() + SECONDS
    while len(times[0]) < FEWEST or time.perf_counter() < deadline:
        for function, seconds in zip(functions, times):
            begin = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - begin)
    return times


def random_batch(config, size):
    """A batch of `size` clips of noise, of class 0 and without words."""
    shapes = batch_shapes(config.data, size)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["video"] = np.random.default_rng(0).integers(0, 256, shapes["video"].shape, np.uint8)
    return batch


def _task(fields, tokenizer):
    """The task of `config.task`, with another tokenizer than its own unless None."""
    return make_task(ConfigDict({**fields, "tokenizer": tokenizer}) if tokenizer else fields)


def _program(config, tokenizer, batch, mesh):
    """(task, frozen weights, first state, step) of training; call inside the mesh."""
    config_lib.check_batch(config, mesh.shape["data"] * mesh.shape["fsdp"])
    task = _task(config.task, tokenizer)
    tx, schedule = make_optimizer(config.optim, config.steps)
    init, shardings = make_init(task, tx, batch, config, mesh)
    return task, task.frozen(), init(), make_step(task, tx, schedule, config, mesh, shardings)


def _tokenizer(latents):
    if not latents:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", latents)
    if not match:
        raise UserError(f"latents={latents}: write TOKENSxCHANNELS, such as 32x4")
    return Latents(*map(int, match.groups()))


def circumstances():
    """What a figure means nothing without: device, date, command and versions."""
    device = jax.devices()[0]
    return {
        "device": _cpu() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": shlex.join(["python", "-m", "jaxvid.bench", *sys.argv[1:]]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _cpu():
    """Model and usable cores of the processor, as far as the system tells."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        cores = len(os.sched_getaffinity(0))
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{model[1] if model else platform.machine()} ({cores} cores)"


COMMANDS = {"step": step, "data": input_pipeline, "sample": sample, "stream": stream}
OPS = {"linear_attention": linear_attention.linear_attention}

if __name__ == "__main__":
    if "kernels" in sys.argv[1:]:
        flags.DEFINE_enum("op", "linear_attention", list(OPS), "Operation to time.")
        flags.DEFINE_string("workdir", "runs/kernels", "Folder for the figures and the plot.")
    elif "mixers" in sys.argv[1:]:
        flags.DEFINE_string("workdir", "runs/mixers", "Folder for the figures and the plot.")
    else:
        config_lib.define_flags()
        flags.DEFINE_string(
            "latents", "", "Time the network on TOKENSxCHANNELS latents, as in 32x4."
        )
    config_lib.run(main, commands=(*COMMANDS, "kernels", "mixers"))
