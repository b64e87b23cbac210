"""Benchmarks of a config: functions of (config, tokenizer or None) -> figures.

{name: a number, a text, or a table as {row: {column: number}}}.
"""

import contextlib
import functools
import gc
import itertools
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.bench import timing
from jaxvid.data.transforms import normalize
from jaxvid.diffusion import samplers
from jaxvid.errors import UserError, within
from jaxvid.parallel.devices import peak_bytes
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.multihost import to_global
from jaxvid.parallel.sharding import batch_sharding
from jaxvid.runs import make_task
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded
from jaxvid.training import flops
from jaxvid.training.optim import make_optimizer
from jaxvid.training.state import make_init
from jaxvid.training.step import make_step

SHORT_RUN = 40  # steps
SHORT_STREAM, STREAM_PIECE = 64, 16  # frames through a tokenizer; about that many at once
PARTS = 20  # of a sampled stream, which are measured one by one
SAMPLE_STEPS = (50, 10, 4, 2, 1)  # denoising steps per frame
COMPILATION = "/jax/core/compile/backend_compile_duration"  # an event of jax.monitoring


def step(config, tokenizer):
    """The training step on random clips, beside plain matrix products on the same machine.

    Steps and products take turns, so other load on the machine slows both. FLOPs are those of
    matrix products and convolutions, forward and twice that backward. The share of the rate of
    plain products compares the best step with the best product; everything else is of the median
    step. Pairs hidden by a mask are not computed and do not count. `share_of_matmul_all_pairs`
    counts them: it is the rate that an attention that computes them would need for the same time.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        batch = jax.device_put(random_batch(config, config.data.batch_size), batch_sharding(mesh))
        task, frozen, state, update = _program(config, tokenizer, batch, mesh)
        work = flops.of_step(task, state, frozen, batch)
        all_pairs = flops.of_step(task, state, frozen, batch, all_pairs=True)
        begin = time.perf_counter()
        update = update.lower(state, frozen, batch).compile()
        compile_s = time.perf_counter() - begin

        def advance():
            nonlocal state
            state, metrics = update(state, frozen, batch)
            return metrics

        width, dtype = _width_and_dtype(config)
        square, alike = timing.products(width, dtype)
        times, *others = timing.take_turns(advance, square.run, alike.run)

    rates = _rates(work, times, (square, alike), others, mesh.size)
    promised = flops.peak(mesh.devices.flat[0], dtype)
    memory = update.memory_analysis()
    return {
        "step_ms": 1e3 * statistics.median(times),
        "step_ms_best": 1e3 * min(times),
        "frames_per_s": config.data.batch_size * config.data.frames / statistics.median(times),
        "gflop_per_step": work / 1e9,
        **rates,
        "share_of_matmul_all_pairs": all_pairs / work * rates["share_of_matmul"],
        **({"mfu": work / statistics.median(times) / (mesh.size * promised)} if promised else {}),
        "compile_s": compile_s,
        "program_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
        "peak_mib": peak_bytes(mesh.devices.flat[0]) / 2**20,
    }


def sample(config, tokenizer):
    """Sampling of one clip by random weights, which are as fast as trained ones.

    by_steps: clips as long as in training, as streams, for SAMPLE_STEPS per frame. `s` of the
    schedule keeps its proportion to the steps. evaluations: frames that the network evaluates or
    reads. first_frame: the latency, decoding included. No time but `first_call` has compilation in
    it. cached, uncached: whole clips by the same schedule as the config, with the exact cache and
    with every frame in every iteration.
    """
    if "sampler" not in config.task:
        raise UserError(f"task.name={config.task.name}: use --config=configs/ar_diffusion.py")
    figures = {"schedule": config.task.sampler.schedule, "frames": config.data.frames}
    sampler, rows = config.task.sampler, {}
    run = _sampling(config, tokenizer)
    for steps in SAMPLE_STEPS:
        try:
            options = dict(memory="cache", steps=steps, s=_s_of(sampler, steps))
            rows[steps] = _short_samples(run._replace(task=_resampled(config, tokenizer, options)))
        except UserError as error:
            figures[f"left_out_{steps}"] = str(error)
    figures["by_steps"] = rows
    uncached = run._replace(task=_resampled(config, tokenizer, {"memory": "none"}))
    return figures | _whole_clips(cached=run, uncached=uncached)


def cached_sample(config, tokenizer):
    """The part of `sample` about one clip with the exact cache."""
    return _whole_clips(cached=_sampling(config, tokenizer))


def _sampling(config, tokenizer) -> Run:
    """A run with random weights that can stream."""
    task = _resampled(config, tokenizer, {"memory": "cache"})
    with within("task"):
        frozen = task.frozen()
        params, _ = jax.jit(task.init)(jax.random.key(0), random_batch(config, 1))
    return Run(config, task, params, frozen, 0, make_mesh(config.mesh))


def _resampled(config, tokenizer, sampler):
    """The task with these values in the place of those of config.task.sampler."""
    fields = ConfigDict(config.task.to_dict())
    with fields.ignore_type():  # s may be whole or not
        fields.sampler.update(sampler)
    return make_task(fields, tokenizer)


def _s_of(sampler, steps):
    """The s of `steps` steps per frame that leaves as many frames noisy at once, or fewer."""
    s = sampler.s * steps / sampler.steps
    return s if sampler.schedule == "pyramid" else math.ceil(s)


def _decoded(run, frames):
    """A stream of one clip without given frames."""
    cond = {**random_batch(run.config, 1), "num": 1}
    with within("task"):
        return Decoded(run, cond, frames, jax.random.key(1))


@contextlib.contextmanager
def _compilations():
    """A list that gets an item with every program that is compiled meanwhile."""
    found = []

    def listen(event, seconds, **_):
        if event == COMPILATION:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _short_samples(run):
    """Evaluations, latency and speed of a stream as long as a training clip."""
    frames = run.config.data.frames
    schedule = run.task.schedule(run.task.split_frames(frames))
    times = []  # until the first frame, in all without decoding, in all

    def clip():
        begin, first, decoding = time.perf_counter(), None, 0.0
        for _, _, decode in _decoded(run, frames):
            first = first or time.perf_counter() - begin
            decoding += decode
        whole = time.perf_counter() - begin
        times.append((first, whole - decoding, whole))

    timing.take_turns(clip)
    (*_, first_call), *later = times
    first, latents, whole = (statistics.median(column) for column in zip(*later))
    return {
        "s": schedule.s,
        "evaluations": _evaluations(schedule),
        "first_call_s": first_call,
        "first_frame_s": first,
        "frames_per_s": frames / whole,
        "frames_per_s_without_decoding": frames / latents,
    }


def _evaluations(schedule):
    """Frames that the network evaluates or reads in a stream of schedule.frames frames.

    At its ends a stream evaluates more frames than `schedule.evaluations`, that of a clip: it knows
    few sizes of its pieces and does not know its last frame.
    """
    plan, total = samplers.stream_plan(schedule), 0
    for piece, position in samplers.pieces(schedule, plan, endless=True):
        total += sum(plan.widths[u] for u in piece.width_U) + plan.commits[piece.commit]
        if position.finished >= schedule.frames:
            return total


def _whole_clips(**runs):
    """One clip by each of the runs: `cached`, and `uncached`, which evaluates all frames always."""
    figures, clips = {}, {}
    config, task = runs["cached"].config, runs["cached"].task
    frames, cond = config.data.frames, {**random_batch(config, 1), "num": 1}
    schedule = task.schedule(task.split_frames(frames))
    iterations = schedule.iterations * task.split_frames(frames)
    evaluations = {"cached": schedule.evaluations, "uncached": iterations}
    for name, run in runs.items():

        def clip(run=run):
            options = dict(frozen=run.frozen, frames=frames)
            return run.task.sample(run.params, jax.random.key(1), cond, **options)

        begin = time.perf_counter()
        jax.block_until_ready(clip())
        figures[f"{name}_first_call_s"] = time.perf_counter() - begin
        figures[f"{name}_evaluations"] = evaluations[name]
        clips[name] = clip
    for name, times in zip(clips, timing.take_turns(*clips.values())):
        figures[f"{name}_s"] = statistics.median(times)
    if "uncached" in runs:
        figures["cached_share"] = figures["cached_s"] / figures["uncached_s"]
    return figures | {"cached_frames_per_s": frames / figures["cached_s"]}


def input_pipeline(config, tokenizer):
    """Frames per second of the iterator alone, and the share of training time spent waiting for it.

    The loop is that of `train`: it fetches the next batch while the device works on the last one.
    """
    mesh, size = make_mesh(config.mesh), config.data.batch_size
    with within("data"):
        alone = data.throughput(config.data, timing.SECONDS)
        options = dict(split="train", seed=config.seed, batch_size=size)
        iterator = data.make_iterator(config.data, **options)
    with jax.set_mesh(mesh), contextlib.closing(iterator) as clips:
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


def encode(config, tokenizer):
    """Encoding a batch of random clips, in turn with plain matrix products as in `step`."""
    tokenizer, params = _own_tokenizer(config, tokenizer)
    video_BTHWC = jnp.asarray(normalize(random_batch(config, config.data.batch_size)["video"]))

    def run(params, video_BTHWC):
        return tokenizer.encode(params, video_BTHWC)[0]

    work = flops.count(run, params, video_BTHWC)
    program = functools.partial(jax.jit(run), params, video_BTHWC)
    square, alike = timing.products(*_width_and_dtype(config))
    times, *others = timing.take_turns(program, square.run, alike.run)
    return {
        "encode_ms": 1e3 * statistics.median(times),
        "encode_ms_best": 1e3 * min(times),
        "frames_per_s": config.data.batch_size * config.data.frames / statistics.median(times),
        "gflop": work / 1e9,
        **_rates(work, times, (square, alike), others),
    }


def stream(config, tokenizer, frames):
    """A stream of `frames` frames, sampled or, by a config of a tokenizer, encoded and decoded."""
    kind = _sampled_stream if "sampler" in config.task else _tokenized_stream
    return kind(config, tokenizer, frames)


def _sampled_stream(config, tokenizer, frames):
    """One clip, sampled by random weights, which are as fast as trained ones, and decoded.

    by_frame: the PARTS of the stream, each named by its last frame. Milliseconds are per frame;
    `cpu` is of all threads of the process, so that other work on the machine changes it little.
    Mebibytes are taken at the end of a part: `live`, all arrays on the devices; `peak`, the most so
    far, of the device if it keeps count, else of the process, compilation included. state: what the
    stream and its decoding go on from. Nothing of this should grow. compilations: of the stream,
    after the first pieces of another one.
    """
    run = _sampling(config, tokenizer)
    run.task.split_frames(frames)  # raises for lengths that do not suit the tokenizer
    ends, rows, done = np.linspace(0, frames, PARTS + 1)[1:], {}, 0
    with _compilations() as compiled:
        for _ in itertools.islice(_decoded(run, frames), 2):
            pass
        pieces, first, clocks = _decoded(run, frames), len(compiled), _clocks()
        for clip, *_ in pieces:
            done += clip.shape[1]
            if done < ends[0]:
                continue
            spent, count, clocks = _clocks() - clocks, done - max(rows, default=0), _clocks()
            cpu, wall = 1e3 * spent / count
            live, peak = _live_bytes() / 2**20, peak_bytes(jax.devices()[0]) / 2**20
            rows[done] = {"cpu_ms": cpu, "wall_ms": wall, "live_mib": live, "peak_mib": peak}
            ends = ends[ends > done]
    state = jax.tree.leaves(pieces.state())
    return {
        "state_mib": sum(np.asarray(x).nbytes for x in state) / 2**20,
        "compilations": len(compiled) - first,
        "by_frame": rows,
    }


def _clocks():
    """Seconds of CPU time of the process and of wall-clock time."""
    return np.array([time.process_time(), time.perf_counter()])


def _tokenized_stream(config, tokenizer, frames):
    """Clips of SHORT_STREAM and of `frames` frames through encoder and decoder, piece by piece.

    Figures that must not grow with the length: `state`, carried from piece to piece; `live`, the
    largest total of arrays on the devices between two pieces, beyond that at the start; `program`,
    the largest memory of XLA for the arguments, results and intermediates of a piece. A piece of
    other shapes is another program, so growth of either shows. `peak` is of the process so far.
    """
    tokenizer, params = _own_tokenizer(config, tokenizer)
    size = config.data.size
    grid = tokenizer.grid(size)
    later = tokenizer.pieces(1 + STREAM_PIECE, about=STREAM_PIECE)[0] - 1
    noise_BTHWC = np.random.default_rng(0).integers(
        0, 256, (1, 1 + later, size, size, 3), dtype=np.uint8
    )

    @jax.jit
    def through(params, video_u8, states):
        z, encoder = tokenizer.encode(params, normalize(video_u8), states[0])
        video, decoder = tokenizer.decode(params, z, grid, states[1])
        return video.mean(), (encoder, decoder)

    programs, figures = {}, {}

    def program(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, *((x.shape, x.dtype) for x in leaves)
        if key not in programs:
            programs[key] = through.lower(*arguments).compile()
        return programs[key]

    for length in (SHORT_STREAM, frames):
        arguments, states, value = None, (None, None), None
        gc.collect()  # garbage of earlier work would be freed meanwhile
        before, live, taken = _live_bytes(), 0, 0
        count = -(-(length - 1) // later)
        for piece in range(count):
            arguments = params, noise_BTHWC[:, min(piece, 1) :], states
            run = program(*arguments)
            value, states = run(*arguments)
            jax.block_until_ready(value)
            arguments = None  # the states before
            live, taken = max(live, _live_bytes() - before), max(taken, _program_bytes(run))
            if piece == 1:  # both programs are compiled by then
                begin = time.perf_counter()
        seconds = time.perf_counter() - begin
        figures[f"frames_per_s_{length}"] = (count - 2) * later / seconds
        figures[f"state_mib_{length}"] = sum(x.nbytes for x in jax.tree.leaves(states)) / 2**20
        figures[f"live_mib_{length}"] = live / 2**20
        figures[f"program_mib_{length}"] = taken / 2**20
        figures[f"peak_mib_{length}"] = peak_bytes(jax.devices()[0]) / 2**20
    return figures


def _live_bytes():
    """Of all arrays on the devices."""
    return sum(array.nbytes for array in jax.live_arrays())


def _program_bytes(compiled):
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def random_batch(config, size):
    """A batch of `size` clips of noise, of class 0 and with empty captions."""
    with within("data"):
        data.check_memory(config.data, size)
    shapes = data.batch_shapes(config.data, size)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["video"] = np.random.default_rng(0).integers(0, 256, shapes["video"].shape, np.uint8)
    return batch


def _rates(work, seconds, products, product_seconds, devices=1):
    """Rates of `work` FLOPs in `seconds`, beside those of a square and a similar product."""
    best = work / min(seconds)
    square, alike = (devices * p.flops / min(s) for p, s in zip(products, product_seconds))
    return {
        "gflop_per_s": work / statistics.median(seconds) / 1e9,
        "gflop_per_s_best": best / 1e9,
        "matmul_square_gflop_per_s": square / 1e9,
        "matmul_alike_gflop_per_s": alike / 1e9,
        "share_of_matmul": best / max(square, alike),
    }


def _width_and_dtype(config):
    """Width and dtype of the network that `config` trains."""
    network = config.task.get("model") or config.task.network
    return network.width, jnp.dtype(network.dtype)


def _own_tokenizer(config, tokenizer):
    """(the tokenizer that `config` trains, random weights for it)."""
    if tokenizer or config.task.name != "tokenizer":
        raise UserError(f"task.name={config.task.name}: use --config=configs/tokenizer.py")
    task = make_task(config.task)
    params, extra = jax.jit(task.init)(jax.random.key(0), random_batch(config, 1))
    return task.tokenizer, {**params, **extra}


def _program(config, tokenizer, batch, mesh):
    """(task, frozen weights, first state, step) of training; call inside the mesh."""
    config_lib.check_batch(config, mesh.shape["data"] * mesh.shape["fsdp"])
    task = make_task(config.task, tokenizer)
    with within("optim"):
        tx, schedule = make_optimizer(config.optim, config.steps)
    with within("task"):
        frozen = task.frozen()
        init, shardings = make_init(task, tx, batch, config, mesh)
        state = init()
    return task, frozen, state, make_step(task, tx, schedule, config, mesh, shardings)
