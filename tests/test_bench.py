"""Benchmarks: their figures are consistent on every machine."""

import functools
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid import config as config_lib
from jaxvid.bench import __main__ as main
from jaxvid.bench import forcing, kernels, memory, mixers, runs, timing
from jaxvid.diffusion import samplers
from jaxvid.diffusion.frame_schedules import block_causal
from jaxvid.diffusion.noise import make_noise_schedule
from jaxvid.errors import UserError
from jaxvid.models.stand_in import Latents, stand_in
from jaxvid.runs import make_task
from jaxvid.tasks import ar_diffusion, streaming

FILE = str(Path(__file__).parents[1] / "configs" / "ar_diffusion.py")


@pytest.fixture
def settings(monkeypatch):
    """A tiny config, measured briefly."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST", 2)
    monkeypatch.setattr(runs, "SHORT_RUN", 4)
    config = config_lib.read(FILE)
    config.data.update(frames=4, size=16, batch_size=8, num_clips=32)
    config.task.model.update(width=16, depth=1, heads=2)
    config.task.sampler.update(steps=4, s=2)
    config.task.update(patch=8, given=2)
    return config


MEMORY = ("state_mib", "live_mib", "program_mib")  # grow if a stream remembers all of it


@pytest.mark.slow
def test_memory_does_not_grow_with_the_stream(monkeypatch):
    monkeypatch.setattr(runs, "SHORT_STREAM", 40)
    config = config_lib.read(FILE.replace("ar_diffusion", "tokenizer"))
    config.data.update(frames=5, size=8)
    config.task.network.update(width=16, heads=2, encode_blocks="t", decode_blocks="t")
    figures = runs.stream(config, None, 80)
    for name in MEMORY:
        assert figures[f"{name}_40"] == figures[f"{name}_80"] > 0
    assert figures["frames_per_s_80"] > 0
    with pytest.raises(UserError, match=r"configs/tokenizer\.py"):
        runs.stream(config_lib.read(FILE.replace("ar_diffusion", "mqar")), None, 80)


@pytest.mark.slow
def test_growing_memory_shows(monkeypatch):
    class Hoarder(Latents):
        def decode(self, params, z_BTNZ, grid, state=None):
            seen = z_BTNZ if state is None else jnp.concatenate([state, z_BTNZ], axis=1)
            return seen.cumsum(1)[:, -z_BTNZ.shape[1] :, ..., None], seen

    monkeypatch.setattr(runs, "SHORT_STREAM", 40)
    monkeypatch.setattr(runs, "_own_tokenizer", lambda *arguments: (Hoarder(4, 3), {}))
    config = config_lib.read(FILE.replace("ar_diffusion", "tokenizer"))
    config.data.update(frames=5, size=8)
    figures = runs.stream(config, None, 80)
    for name in MEMORY:
        assert figures[f"{name}_80"] > figures[f"{name}_40"] > 0


@pytest.mark.slow
def test_encoding_counts_only_the_encoder(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    config = config_lib.read(FILE.replace("ar_diffusion", "tokenizer"))
    config.data.update(frames=5, size=8, batch_size=2)
    config.task.network.update(
        width=16, heads=2, encode_blocks="t", decode_blocks="t", mlp_ratio=1.0, position="rope"
    )
    figures = runs.encode(config, None)
    # 2 clips of 3 latents of 4 tokens; layers of 4 + 3 square matrices in space and in time.
    tokens, latents = 24, 6
    stem = 8 * 48 * 16 + 16 * 96 * 16
    layers = tokens * 2 * 7 * 16 * 16
    scores = latents * 2 * 4 * 4 * 16 + 8 * 2 * 3 * 3 * 16
    assert figures["gflop"] == pytest.approx(2e-9 * (stem + layers + scores + tokens * 16 * 6))
    assert figures["encode_ms"] >= figures["encode_ms_best"] > 0
    with pytest.raises(UserError, match=r"configs/tokenizer\.py"):
        runs.encode(config_lib.read(FILE), None)


@pytest.mark.slow
def test_step(settings):
    figures = runs.step(settings, None)
    seconds = figures["step_ms"] / 1e3
    assert 0 < figures["step_ms_best"] <= figures["step_ms"]
    assert figures["frames_per_s"] == pytest.approx(8 * 4 / seconds)
    assert figures["gflop_per_s"] == pytest.approx(figures["gflop_per_step"] / seconds)
    best = max(figures["matmul_square_gflop_per_s"], figures["matmul_alike_gflop_per_s"])
    assert figures["share_of_matmul"] == pytest.approx(figures["gflop_per_s_best"] / best)
    assert figures["share_of_matmul_all_pairs"] >= figures["share_of_matmul"]
    assert figures["compile_s"] > 0
    assert 0 < figures["program_mib"] < figures["peak_mib"]


@pytest.mark.slow
def test_sample(settings, monkeypatch):
    """Steps that the network knows alone."""
    few = config_lib.read(f"{FILE}:steps=few").copy_and_resolve_references().task
    for name in ("noise", "shortcut", "weight", "prediction"):
        settings.task[name] = few[name]
    settings.task.sampler.s = 1
    settings.task.shortcut.finest = 4
    evaluated = count_evaluations(monkeypatch)
    figures = runs.sample(settings, Latents(tokens=6, channels=4))
    assert figures["cached_evaluations"] == 4 * 4 + 4
    assert figures["uncached_evaluations"] == (4 + 3 * 1) * 4
    assert figures["cached_share"] == pytest.approx(figures["cached_s"] / figures["uncached_s"])
    for steps in (50, 10):
        assert f"task.sampler.steps={steps}: the network knows 4" in figures[f"left_out_{steps}"]
    rows = figures["by_steps"]
    assert list(rows) == [4, 2, 1] and figures["schedule"] == "ad"
    for steps, row in rows.items():
        assert row["evaluations"] >= 4 * steps + 4
        assert row["s"] == 1 and row["first_call_s"] > row["first_frame_s"] > 0
        assert row["frames_per_s_without_decoding"] > row["frames_per_s"] > 0
    assert rows[4]["evaluations"] == streamed(evaluated, settings)
    assert rows[1]["evaluations"] == 4 * 1 + 4  # one frame after another: nothing to spare
    text = main.lines(figures)
    assert ["steps", *rows[4]] in [line.split() for line in text]
    assert any(line.split()[:2] == ["schedule", "ad"] for line in text)


def test_a_sampled_stream_does_not_grow_and_growth_shows(settings, monkeypatch, tmp_path):
    """It compiles nothing once it has begun, and its parts share the clocks."""
    monkeypatch.setattr(runs, "PARTS", 4)
    latents = Latents(tokens=6, channels=4)
    begin = time.perf_counter()
    figures = runs.stream(settings, latents, 22)
    seconds, rows = time.perf_counter() - begin, figures["by_frame"]
    assert list(rows) == [6, 11, 17, 22] and figures["compilations"] == 0
    counts = np.diff([0, *rows])
    for clock in ("cpu_ms", "wall_ms"):
        assert all(row[clock] > 0 for row in rows.values())
    assert 0 < counts @ [row["wall_ms"] for row in rows.values()] < 1e3 * seconds
    assert len({row["live_mib"] for row in rows.values()}) == 1
    peaks = [row["peak_mib"] for row in rows.values()]
    assert peaks == sorted(peaks) and peaks[0] > figures["state_mib"] > 0
    assert ["frame", *rows[6]] in [line.split() for line in main.lines(figures)]
    timing.plot_stream(rows, tmp_path / "stream.png")

    class Hoarder(streaming.Decoded):
        kept: ClassVar = []

        def __next__(self):
            self.kept.append(jnp.zeros(1000) + len(self.kept))
            return super().__next__()

    monkeypatch.setattr(runs, "Decoded", Hoarder)
    rows = runs.stream(settings, latents, 22)["by_frame"]
    live = [row["live_mib"] for row in rows.values()]
    np.testing.assert_allclose(np.diff(live), 4000 / 2**20 * counts[1:], rtol=1e-5)


def count_evaluations(monkeypatch):
    """A list that gets the number of frames of every call of the network of AR-Diffusion."""
    evaluated, apply = [], ar_diffusion.Task._apply

    def counted(self, params, x_BTNC, *arguments, **options):
        jax.debug.callback(lambda: evaluated.append(x_BTNC.shape[1]))
        return apply(self, params, x_BTNC, *arguments, **options)

    monkeypatch.setattr(ar_diffusion.Task, "_apply", counted)
    return evaluated


def streamed(evaluated, config):
    """Evaluations of a stream of config.data.frames frames."""
    run = runs._sampling(config, Latents(tokens=6, channels=4))
    jax.effects_barrier()
    evaluated.clear()
    frames = sum(clip.shape[1] for clip, *_ in runs._decoded(run, config.data.frames))
    jax.effects_barrier()
    assert frames == config.data.frames
    return sum(evaluated)


@pytest.mark.parametrize("block, s", [(1, 1), (1, 2), (1, 3), (2, 4)])
def test_evaluations_of_a_stream_are_counted_from_its_pieces(block, s, monkeypatch):
    """Against a network that counts its frames."""
    evaluated = []

    def predict(x_BTNC, t_BT, state):
        jax.debug.callback(lambda: evaluated.append(x_BTNC.shape[1]))
        return 0.5 * x_BTNC, state

    schedule = block_causal(7, 4, block=block, s=s)
    plan = samplers.stream_plan(schedule)
    solver = samplers.Solver(make_noise_schedule("flow", 1000), "x0")

    @jax.jit
    def step(x_BWNC, state, piece):
        rng, options = jax.random.key(0), dict(solver=solver, plan=plan)
        return streaming.advance(predict, x_BWNC, state, piece, 0, rng, **options)

    carry = streaming.Carry(jnp.ones((1, plan.slots, 1, 2)), jnp.zeros(()), samplers.BEGINNING)
    parts = list(streaming.Stream(step, carry, schedule, 7, None))
    jax.effects_barrier()
    assert sum(part.shape[1] for part in parts) == 7
    assert runs._evaluations(schedule) == sum(evaluated) >= schedule.evaluations


@pytest.mark.parametrize(
    "schedule, steps, s, wanted",
    [("ad", 10, 1, [5, 1, 1, 1, 1]), ("ad", 50, 5, [5, 1, 1, 1, 1]), ("pyramid", 4, 0.5, None)],
)
def test_s_keeps_its_proportion_to_the_steps(schedule, steps, s, wanted):
    sampler = SimpleNamespace(schedule=schedule, steps=steps, s=s)
    found = [runs._s_of(sampler, n) for n in runs.SAMPLE_STEPS]
    assert found == (wanted or [6.25, 1.25, 0.5, 0.25, 0.125])


@pytest.mark.slow
def test_data(settings, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.2)
    figures = runs.input_pipeline(settings, None)
    assert figures["frames_per_s"] > 0 and figures["train_frames_per_s"] > 0
    assert 0 <= figures["train_data_wait"] < 1


@pytest.mark.parametrize(
    "op, contender, forward, both",
    [
        ("linear_attention", "chunked_decay", 2 * 64 + 2 * 64, 7 * 64 + 6 * 64),
        ("gated_delta", "chunked_delta", 4 * 64 + 3 * 64, 3 * (4 * 64 + 3 * 64)),
    ],
)
def test_kernels(op, contender, forward, both, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "LENGTHS", (256,))
    monkeypatch.setattr(kernels, "PUBLISHED", [(8, 16, 512, 128)])
    monkeypatch.setattr(kernels.flops, "peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(kernels.flops, "bandwidth", lambda device: 1e12)
    figures = kernels.measure(op)
    for direction, products in (("forward", forward), ("both", both)):
        name = f"{contender}_256_{direction}"
        flop = 2 * 2 * 256 * 4 * 64 * products
        assert figures[f"{name}_tflop_per_s"] == pytest.approx(flop / figures[f"{name}_ms"] / 1e9)
        assert figures[f"{name}_gb_per_s"] > 0
        of_matmul = figures[f"{name}_share_of_matmul"]
        assert figures[f"{name}_share_of_limit"] >= 0.999 * of_matmul > 0
    label = "chunked_decay_b1a2l64k16"  # an eighth of everything on a CPU
    forward_ms, backward_ms, both_ms = (figures[f"{label}_{n}_ms"] for n in kernels.DIRECTIONS)
    assert backward_ms == pytest.approx(both_ms - forward_ms)
    # Arithmetic is the limit at 1 GFLOP/s.
    least = 1 * 2 * 64 * 4 * 16 * (128 + 16) / 1e9
    assert figures[f"{label}_forward_share_of_roofline"] == pytest.approx(1e3 * least / forward_ms)
    assert {"softmax_256_both_ms", f"{contender}_both_ahead_of_softmax_from"} <= figures.keys()
    assert "softmax_256_both_share_of_limit" not in figures
    timing.plot(figures, tmp_path / "kernels.png")


def test_the_length_from_which_a_kernel_is_ahead_of_softmax(monkeypatch):
    monkeypatch.setattr(kernels, "LENGTHS", (1, 2, 4, 8))
    times = dict(softmax=(1, 2, 4, None), fast=(2, 1, 2, 9), slow=(0, 1, 5, 9), early=(0, 1, 3, 9))
    figures = {
        f"{name}_{L}_both_ms": ms
        for name, values in times.items()
        for L, ms in zip(kernels.LENGTHS, values)
        if ms is not None
    }
    ahead = kernels.ahead_of_softmax(figures)
    assert ahead["fast_both_ahead_of_softmax_from"] == 2
    assert ahead["early_both_ahead_of_softmax_from"] == 1
    assert np.isnan(ahead["slow_both_ahead_of_softmax_from"])
    assert len(ahead) == 3


def test_mixers(settings, monkeypatch):
    monkeypatch.setattr(mixers, "STREAM_LENGTHS", (64, 128, 192))
    monkeypatch.setattr(
        mixers, "MIXERS", {n: mixers.MIXERS[n] for n in ("softmax", "alibi", "gla")}
    )
    figures = mixers.measure()
    for unit in ("ms", "mib"):
        names = {f"{n}_{L}_forward_{unit}" for n in ("softmax", "gla") for L in (64, 128, 192)}
        found = {name for name in figures if name.endswith(unit)}
        assert found == names | {f"gla_efficiency_length_{unit}"}
        assert all(figures[name] > 0 for name in names)


@pytest.fixture
def small_memory(monkeypatch):
    for name, value in dict(LENGTHS=(16,), ROWS=1, HEADS=2, WIDTH=4, FRAME=8).items():
        monkeypatch.setattr(memory, name, value)


def test_memory(settings, small_memory, monkeypatch):
    figures = memory.measure()
    for name in ("memory", "tokens", "naive", "layer", "softmax"):
        for direction in ("forward", "both"):
            run = f"{name}_16_{direction}"
            seconds = figures[f"{run}_ms"] / 1e3
            assert figures[f"{run}_tokens_per_s"] == pytest.approx(16 / seconds)
            assert figures[f"{run}_mib"] > 0
    largest = max(value for name, value in figures.items() if name.endswith("_mib"))
    monkeypatch.setattr(memory, "device_bytes", lambda *_: (largest * 2**20 - 1) / memory.SHARE)
    assert len(memory.measure()) == len(figures) - 3


def test_the_naive_memory_is_the_same_function(small_memory):
    operands = memory._operands(16)
    got, wanted = memory.naive(operands), memory.by_frames(operands, tokens=1)
    np.testing.assert_allclose(got, wanted[:, :, 0], atol=1e-5)
    first, whole = got[:, :8], memory.by_frames(operands, tokens=8)[:, 0]
    assert np.abs(first - whole).max() > 1e-3


def test_efficiency_length_is_where_the_costs_cross():
    lengths = np.array([512, 1024, 2048, 4096])
    quadratic = 1e-6 * lengths**2 + 1e-3 * lengths + 2
    linear = 4e-3 * lengths + 1
    assert mixers.efficiency_length(lengths, linear, quadratic) == pytest.approx(
        (3e-3 + np.sqrt(9e-6 - 4e-6)) / 2e-6
    )
    assert mixers.efficiency_length(lengths, 0 * lengths, quadratic) == 0
    assert np.isnan(mixers.efficiency_length(lengths, linear, -quadratic))


def test_limits_of_an_h100():
    """Milliseconds at 989 TFLOP/s and 3.35 TB/s, forward, and with a backward that reads states."""
    known = [(1.28, 2.56), (0.240, 0.481), (0.160, 0.321), (0.321, 0.641), (0.321, 0.721)]
    for (B, A, L, K), (forward, backward) in zip(kernels.PUBLISHED, known):
        (_, moved), (_, both) = (kernels.work(name, K, 128) for name in ("forward", "both"))
        token_ms = 2 * B * A * L / 3.35e12 * 1e3
        written = K * K / 128  # of the states that forward saves, in the sum of both alone
        assert moved * token_ms == pytest.approx(forward, rel=5e-3)
        assert (both - moved - written) * token_ms == pytest.approx(backward, rel=5e-3)


def test_softmax_competes_while_its_scores_fit(monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_SCORES", 4 * 2 * 4 * 256**2)
    for tokens, fits in ((256, True), (257, False)):
        found = kernels.contenders("linear_attention", 2, tokens, 4, 64, "float32")
        assert ("softmax" in found) == fits and {"chunked_plain", "chunked_decay"} <= set(found)


@pytest.mark.parametrize(
    "capability, K, dtype, flash",
    [
        ("9.0", 256, "bfloat16", True),
        ("8.0", 128, "bfloat16", True),
        ("8.0", 256, "bfloat16", False),
        ("9.0", 128, "float32", False),
        ("gfx942", 128, "bfloat16", False),
    ],
)
def test_softmax_on_a_gpu_needs_no_scores(capability, K, dtype, flash, monkeypatch):
    """However many tokens, by cuDNN's kernel where it applies."""
    calls = []
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(kernels.jax, "devices", lambda: [device])
    monkeypatch.setattr(
        kernels.jax.nn,
        "dot_product_attention",
        lambda q, k, v, *, is_causal, implementation: (calls.append(implementation), q)[1],
    )
    found = kernels.contenders("linear_attention", 4, 2**16, 16, K, dtype)
    assert ("softmax" in found) == flash
    if flash:
        found["softmax"](*[np.ones(2)] * 5)
        assert calls == ["cudnn"]


def test_a_missing_device_is_refused_in_one_line():
    before = jax.config.jax_platforms
    try:
        timing.use("cpu")
        with pytest.raises(UserError, match=r"^device=rocm: JAX finds no such device"):
            timing.use("rocm")
    finally:
        jax.config.update("jax_platforms", before)


def test_functions_take_turns(settings):
    calls = []

    def function(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))[1]

    slow, fast = timing.take_turns(function("slow", 0.02), function("fast", 0.0))
    assert calls == ["slow", "fast"] * (1 + timing.FEWEST)  # the first round warms up
    assert len(slow) == len(fast) == timing.FEWEST
    assert min(slow) >= 0.02 > max(fast)


def test_latents_stand_in_for_a_tokenizer():
    latents = stand_in("32x4")
    assert (latents.tokens, latents.channels, latents.grid(64)) == (32, 4, (1, 32))
    video = np.random.default_rng(0).standard_normal((2, 3, 16, 16, 3))
    z, _ = latents.encode({}, video)
    assert z.shape == (2, 3, 32, 4)
    np.testing.assert_array_equal(z[1, 2].ravel(), video[1, 2].ravel()[:128])
    assert stand_in("") is None
    with pytest.raises(UserError, match="latents=32: write TOKENSxCHANNELS"):
        stand_in("32")


def test_circumstances_can_be_repeated(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "step", "--config=a b.py"])
    facts = timing.circumstances()
    assert facts["command"] == "python -m jaxvid.bench step '--config=a b.py'"
    assert facts["jax"] == jax.__version__ and facts["devices"] == 8
    assert "cores)" in facts["device"] and json.dumps(facts)


def test_every_run_of_forcing_is_a_config_that_can_be_trained_and_scored(tmp_path):
    for layout, kind in itertools.product(forcing.LAYOUTS, forcing.FINEST):
        _, _, module, config, *overrides = forcing.command(layout, kind, 1, 200, tmp_path)
        assert (module, config.partition(":")[2]) == ("jaxvid.train", "steps=few")
        fields = config_lib.read(FILE + ":steps=few")
        for name, _, value in (part.partition("=") for part in overrides):
            if name.startswith("--config."):
                _set(fields, name.removeprefix("--config."), value)
        config_lib.validate(fields)
        for steps in forcing.STEPS:
            fields.task.sampler.steps = steps
            task = make_task(fields.task)
            assert task.schedule(forcing.LENGTHS[-1]).sample_steps == steps
        assert task.train_frames == forcing.FRAMES
        assert bool(task.resampling.share) == (layout == "resampled")


def _set(fields, name, value):
    section, _, field = name.rpartition(".")
    section = functools.reduce(getattr, section.split("."), fields) if section else fields
    section[field] = type(section[field])(value)


def test_scores_of_forcing_are_means_over_seeds_of_runs_of_their_own(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(forcing, "_train", lambda command, *_: trained.append(command))

    def scores(workdir, steps):
        seed = int(workdir.name.rpartition("_")[2])
        row = dict.fromkeys(forcing.SCORES, steps + 2.0 * seed)
        return {str(frames): row for frames in forcing.LENGTHS}

    monkeypatch.setattr(forcing, "_scores", scores)
    found = forcing.measure(tmp_path, seeds=3, steps=200)
    assert len({tuple(command) for command in trained}) == len(trained) == 3 * 2 * 5
    assert set(found) == {"by_16_frames", "by_64_frames"}
    row = found["by_64_frames"]["iid few 4"]
    assert row["psnr"] == 6.0 and row["psnr_std"] == 2.0 and "motion_real_std" not in row
