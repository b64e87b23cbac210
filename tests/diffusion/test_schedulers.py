"""Frame schedules against the official tables and recursions, and one whole toy sampling run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import schedulers, schedules
from jaxvid.errors import UserError


def all_kinds():
    return [
        schedulers.synchronous(16, 50),
        schedulers.autoregressive(4, 10),
        schedulers.ad(16, 50, 5),
        schedulers.ad(40, 50, 4, window=16),
        schedulers.pyramid(9, 7, 1.6),
        schedulers.block_causal(10, 6, block=4),
        schedulers.block_causal(12, 6, block=3, s=2),
        schedulers.ad(1, 1, 0),
    ]


def test_official_step_indices():
    index = schedulers.ad(frames=4, sample_steps=5, s=2).index
    rows = " ".join("".join(map(str, row)) for row in index)
    assert rows == "1000 2000 3100 4200 5310 5420 5531 5542 5553 5554 5555"
    assert index.dtype == np.int32


def official_recursion(frames, sample_steps, s):
    """Frame 0 advances by one, and so does a frame whose predecessor had already finished; any
    other frame is s behind its predecessor."""
    rows, row = [], [0] * frames
    while row[-1] < sample_steps:
        new = []
        for i in range(frames):
            free = i == 0 or row[i - 1] == sample_steps
            n = row[i] + 1 if free else new[i - 1] - s
            new.append(min(max(n, 0), sample_steps))
        rows.append(row := new)
    return np.array(rows)


@pytest.mark.parametrize("sample_steps", [5, 10, 50])
@pytest.mark.parametrize("frames", [1, 4, 16, 20])
def test_ad_is_the_closed_form_and_the_recursion(frames, sample_steps):
    for s in range(sample_steps + 1):
        index = schedulers.ad(frames, sample_steps, s).index
        k, i = np.ogrid[1 : sample_steps + (frames - 1) * s + 1, :frames]
        np.testing.assert_array_equal(index, np.clip(k - i * s, 0, sample_steps))
        np.testing.assert_array_equal(index, official_recursion(frames, sample_steps, s))


def test_official_iteration_counts():
    counts = {0: 50, 5: 125, 10: 200, 15: 275, 20: 350, 25: 425, 50: 800}
    assert {s: schedulers.ad(16, 50, s).iterations for s in counts} == counts
    assert schedulers.ad(128, 50, 5).iterations == 685


def test_ends_of_the_continuum():
    assert schedulers.synchronous(16, 50) == schedulers.ad(16, 50, 0)
    assert schedulers.autoregressive(16, 50) == schedulers.ad(16, 50, 50)
    assert schedulers.block_causal(16, 50, 16) == schedulers.synchronous(16, 50)
    assert schedulers.block_causal(16, 50, 1) == schedulers.autoregressive(16, 50)
    assert schedulers.block_causal(16, 50, 1, s=5) == schedulers.ad(16, 50, 5)


@pytest.mark.parametrize("s", [0, 1, 2, 4, 50])
def test_ad_is_the_pyramid(s):
    assert schedulers.ad(16, 50, s) == schedulers.pyramid(16, 50, float(s))


@pytest.mark.parametrize(
    "u, levels", [(1.0, "444 344 234 123 012 001 000"), (0.5, "444 334 223 112 001 000")]
)
def test_official_pyramid_levels(u, levels):
    index = schedulers.pyramid(frames=3, sample_steps=4, u=u).index
    noise = 4 - np.vstack([np.zeros((1, 3), int), index])
    assert " ".join("".join(map(str, row)) for row in noise) == levels


def test_skyreels_timesteps():
    """Told in each iteration: 1000, 800, .. on the step, 999 while waiting, 0 when finished."""
    schedule = schedulers.ad(frames=4, sample_steps=5, s=2)
    step_n = np.array([1000, 800, 600, 400, 200])
    idle = np.where(schedule.index == 0, 999, 0)
    told = np.where(schedule.update, step_n[np.maximum(schedule.index, 1) - 1], idle)
    assert told.tolist() == [
        [1000, 999, 999, 999],
        [800, 999, 999, 999],
        [600, 1000, 999, 999],
        [400, 800, 999, 999],
        [200, 600, 1000, 999],
        [0, 400, 800, 999],
        [0, 200, 600, 1000],
        [0, 0, 400, 800],
        [0, 0, 200, 600],
        [0, 0, 0, 400],
        [0, 0, 0, 200],
    ]


def test_skyreels_windows():
    schedule = schedulers.ad(frames=8, sample_steps=5, s=2, window=4)
    assert schedule.window_stop_K.tolist() == [4] * 8 + [5] * 2 + [6] * 2 + [7] * 2 + [8] * 5


@pytest.mark.parametrize("s", [4, 5, 10, 50])
@pytest.mark.parametrize("frames", [12, 16, 40])
def test_window_end_closed_form(frames, s):
    schedule = schedulers.ad(frames, 50, s, window=16)
    k = np.arange(1, schedule.iterations + 1)
    expected = np.clip((k - 1) // s + 1, min(16, frames), frames)
    np.testing.assert_array_equal(schedule.window_stop_K, expected)


@pytest.mark.parametrize("s, lost", [(0, 5600), (1, 3808), (2, 2016), (3, 224), (4, 0), (5, 0)])
def test_updates_lost_to_a_window_that_nobody_checked(s, lost):
    """Official counts for 128 frames, window 16; a schedule that loses any is refused."""
    schedule = schedulers.FrameSchedule(tuple(i * s for i in range(128)), 50, window=16)
    left_K1 = schedule.window_stop_K[:, None] - 16
    assert (schedule.update & (np.arange(128) < left_K1)).sum() == lost
    if lost:
        with pytest.raises(UserError, match=f"s={s}: .* use s >= 4"):
            schedulers.ad(128, 50, s, window=16)
    else:
        assert schedulers.ad(128, 50, s, window=16) == schedule


@pytest.mark.parametrize("schedule", all_kinds(), ids=lambda s: f"{s.frames}x{s.sample_steps}")
def test_every_schedule(schedule):
    index, K, N = schedule.index, schedule.iterations, schedule.sample_steps
    assert index.shape == schedule.update.shape == (K, schedule.frames)
    steps = np.diff(index, axis=0, prepend=0)
    np.testing.assert_array_equal(schedule.update, steps == 1)
    assert set(np.unique(steps)) <= {0, 1}, "one step at a time, never back"
    assert (index[-1] == N).all() and (index[-2:-1] < N).any(axis=1).all()
    assert (np.diff(index, axis=1) <= 0).all(), "earlier frames are never noisier"
    for update, (first, stop) in zip(schedule.update, schedule.active_K2):
        assert np.flatnonzero(update).tolist() == list(range(first, stop)) and stop > first
    assert (schedule.window_stop_K >= schedule.active_K2[:, 1]).all()
    assert (schedule.window_stop_K - schedule.window <= schedule.active_K2[:, 0]).all()
    assert schedule.update.sum() + schedule.frames == schedule.evaluations


def test_frame_evaluations_with_a_cache():
    assert {schedulers.ad(16, 50, s).evaluations for s in (0, 4, 5, 10, 50)} == {16 * 50 + 16}


def test_blocks_share_a_step_and_the_last_may_be_short():
    schedule = schedulers.block_causal(frames=7, sample_steps=5, block=3, s=2)
    k, b = np.ogrid[1 : schedule.iterations + 1, :3]
    block_index = np.clip(k - 2 * b, 0, 5)
    assert schedule.iterations == 5 + 2 * 2
    np.testing.assert_array_equal(schedule.index, np.repeat(block_index, 3, axis=1)[:, :7])
    assert schedulers.block_causal(7, 5, 3).iterations == 15


@pytest.mark.parametrize("sample_steps", [1, 5, 30, 50])
@pytest.mark.parametrize("window", [1, 3, 16])
def test_the_smallest_s_that_a_message_names_works_and_none_below(window, sample_steps):
    def named(make, s):
        with pytest.raises(UserError) as error:
            make(s)
        assert f"s={s}: 40 frames would be noisy at once but window={window}" in str(error.value)
        return float(str(error.value).split("s >= ")[1].split()[0])

    for block in {1, min(2, window), window}:

        def blocks(s, block=block):
            return schedulers.block_causal(40, sample_steps, block, s, window)

        smallest = int(named(blocks, 0))
        blocks(smallest)
        for s in range(smallest):
            with pytest.raises(UserError):
                blocks(s)

    def pyramid(u):
        return schedulers.pyramid(40, sample_steps, u, window)

    smallest = named(pyramid, 0.0)
    pyramid(smallest)
    with pytest.raises(UserError):
        pyramid(smallest - 0.002)


def test_no_window_is_too_small_for_a_clip_that_fits_in_it():
    assert schedulers.ad(16, 50, 0, window=16).window == 16
    assert schedulers.ad(9, 50, 1, window=16).window == 9
    assert schedulers.block_causal(9, 50, 12, window=10).window == 9


@pytest.mark.parametrize(
    "name, expected",
    [
        ("synchronous", schedulers.synchronous(8, 6)),
        ("ad", schedulers.ad(8, 6, 3)),
        ("autoregressive", schedulers.autoregressive(8, 6)),
        ("pyramid", schedulers.pyramid(8, 6, 3)),
        ("block_causal", schedulers.block_causal(8, 6, 2, 3)),
    ],
)
def test_make(name, expected):
    assert schedulers.make(name, 8, 6, s=3, block=2 if name == "block_causal" else 1) == expected


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            lambda: schedulers.ad(40, 50, 2, window=16),
            r"^s=2: 25 frames would be noisy at once but window=16; use s >= 4 \(sample_steps=50",
        ),
        (lambda: schedulers.ad(4, 5, 6), "s=6: .* use 0 <= s <= 5"),
        (lambda: schedulers.ad(4, 5, -1), "s=-1: .* use 0 <= s <= 5"),
        (lambda: schedulers.pyramid(4, 5, 5.5), "s=5.5: .* use 0 <= s <= 5"),
        (lambda: schedulers.pyramid(4, 5, math.nan), "s=nan: .* use 0 <= s <= 5"),
        (lambda: schedulers.ad(4, 5, 1.5), "s=1.5: .* use schedule='pyramid'"),
        (lambda: schedulers.ad(0, 5, 1), "frames=0: must be positive"),
        (lambda: schedulers.ad(4, 0, 0), "sample_steps=0: must be positive"),
        (lambda: schedulers.ad(4, 5, 1, window=0), "window=0: must be positive"),
        (lambda: schedulers.block_causal(4, 5, 0), "block=0: .* use block >= 1"),
        (lambda: schedulers.block_causal(40, 5, 8, window=4), "block=8: .* use block <= 4"),
        (
            lambda: schedulers.make("synchronous", 40, 50, s=1, window=16),
            r"^schedule='synchronous': 40 frames .* window=16; use schedule='ad' with s >= 4",
        ),
        (lambda: schedulers.make("ad", 4, 5), "s=None: schedule='ad' needs it; use s=0..5"),
        (lambda: schedulers.make("sync", 4, 5), "schedule='sync': .* use one of synchronous, ad"),
    ],
)
def test_bad_input_is_one_clear_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        bad()
    assert "\n" not in str(error.value)


def test_a_schedule_is_static_under_jit():
    traces = []

    def finished(schedule, k):
        traces.append(schedule)
        return jnp.sum(jnp.asarray(schedule.index)[k] == schedule.sample_steps)

    finished = jax.jit(finished, static_argnums=0)
    assert [int(finished(schedulers.ad(4, 5, 2), k)) for k in (0, 5, 10)] == [0, 1, 4]
    assert len(traces) == 1


def toy_denoiser(x_FC, t_F):
    """Strictly causal: frame f reads the mean of frames <= f, and its own timestep."""
    prefix_FC = np.cumsum(x_FC, axis=0) / np.arange(1, len(x_FC) + 1)[:, None]
    return 0.5 * np.tanh(prefix_FC) * (1 - t_F[:, None] / 2000) + 0.1


def sample_toy(schedule):
    """DDIM from linspace(-1.5, 1.5), the official run but for `where` in place of a blend."""
    noise, frames = schedules.make("linear"), schedule.frames
    levels = noise.levels(schedule.sample_steps)
    x_FC = np.linspace(-1.5, 1.5, 2 * frames).reshape(frames, 2).astype(np.float32)
    index_F = np.zeros(frames, int)
    for index_next_F, update_F in zip(schedule.index, schedule.update):
        t_F, t_next_F = levels[index_F], levels[index_next_F]
        x0_FC, eps_FC = noise.split(toy_denoiser(x_FC, t_F), jnp.asarray(x_FC), t_F, "x0")
        stepped_FC = noise.step(x0_FC, eps_FC, t_F, t_next_F)
        x_FC = np.where(update_F[:, None], stepped_FC, x_FC)
        index_F = index_next_F
    return x_FC


OFFICIAL_TOY = {  # float32 by the official sampler where no frame idles, else float64 with `where`
    0: [-0.137005, -0.081393, -0.087273, -0.018507, -0.027335, 0.054857, 0.042880, 0.134277],
    2: [-0.136992, -0.081383, 0.017320, 0.072978, 0.104975, 0.151359, 0.157750, 0.196499],
    5: [-0.136992, -0.081383, 0.025025, 0.080577, 0.108722, 0.153748, 0.158992, 0.196968],
}


@pytest.mark.parametrize("s, calls", [(0, 5), (2, 11), (5, 20)])
def test_official_toy_run(s, calls):
    schedule = schedulers.ad(frames=4, sample_steps=5, s=s)
    assert schedule.iterations == calls
    np.testing.assert_allclose(sample_toy(schedule).ravel(), OFFICIAL_TOY[s], atol=2e-5)


def test_the_first_frame_of_a_causal_network_does_not_depend_on_s():
    first = [sample_toy(schedulers.ad(4, 5, s))[0] for s in range(6)]
    np.testing.assert_allclose(first, np.broadcast_to(first[0], (6, 2)), atol=1e-6)
