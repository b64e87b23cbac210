"""Frame schedules against official tables, recursions and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion.frame_schedules import (
    FrameSchedule,
    ad,
    autoregressive,
    block_causal,
    make_frame_schedule,
    pyramid,
    synchronous,
)
from jaxvid.errors import UserError


def digits(index_IF):
    return " ".join("".join(map(str, row)) for row in index_IF)


def test_official_tables():
    index_IF = ad(frames=4, sample_steps=5, s=2).index_IF
    assert digits(index_IF) == "1000 2000 3100 4200 5310 5420 5531 5542 5553 5554 5555"
    assert index_IF.dtype == np.int32
    for u, levels in ((1.0, "344 234 123 012 001 000"), (0.5, "334 223 112 001 000")):
        assert digits(4 - pyramid(frames=3, sample_steps=4, u=u).index_IF) == levels
    counts = {0: 50, 5: 125, 10: 200, 15: 275, 20: 350, 25: 425, 50: 800}
    assert {s: ad(16, 50, s).iterations for s in counts} == counts
    assert ad(128, 50, 5).iterations == 685
    assert {ad(16, 50, s).evaluations for s in counts} == {16 * 50 + 16}


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


def test_ad_is_the_closed_form_and_the_recursion():
    for frames, sample_steps in ((1, 5), (4, 10), (20, 7)):
        for s in range(sample_steps + 1):
            index_IF = ad(frames, sample_steps, s).index_IF
            k, i = np.ogrid[1 : sample_steps + (frames - 1) * s + 1, :frames]
            np.testing.assert_array_equal(index_IF, np.clip(k - i * s, 0, sample_steps))
            np.testing.assert_array_equal(index_IF, official_recursion(frames, sample_steps, s))


def test_special_cases():
    assert synchronous(16, 50) == ad(16, 50, 0) == block_causal(16, 50, 16)
    assert autoregressive(16, 50) == ad(16, 50, 50) == block_causal(16, 50, 1)
    for s in (0, 1, 5, 50):
        assert ad(16, 50, s) == pyramid(16, 50, float(s)) == block_causal(16, 50, 1, s=s)


def test_window_end():
    """Official numbers, and the closed form of AR-Diffusion."""
    schedule = ad(frames=8, sample_steps=5, s=2, window=4)
    assert schedule.window_stop_I.tolist() == [4] * 8 + [5] * 2 + [6] * 2 + [7] * 2 + [8] * 5
    for frames, s in ((12, 4), (40, 4), (40, 50)):
        schedule = ad(frames, 50, s, window=16)
        k = np.arange(1, schedule.iterations + 1)
        expected = np.clip((k - 1) // s + 1, min(16, frames), frames)
        np.testing.assert_array_equal(schedule.window_stop_I, expected)


def test_schedules_that_lose_updates_to_the_window_are_refused():
    """Official counts of lost updates for 128 frames, window 16."""
    for s, lost in ((0, 5600), (1, 3808), (2, 2016), (3, 224), (4, 0), (5, 0)):
        schedule = FrameSchedule(128, 50, s, block=1, window=16)
        left_I1 = schedule.window_stop_I[:, None] - 16
        assert (schedule.update_IF & (np.arange(128) < left_I1)).sum() == lost
        if lost:
            with pytest.raises(UserError, match=f"s={s}: .* use s >= 4"):
                ad(128, 50, s, window=16)
        else:
            assert ad(128, 50, s, window=16) == schedule


def test_every_schedule():
    for schedule in (
        synchronous(16, 50),
        autoregressive(4, 10),
        ad(40, 50, 4, window=16),
        pyramid(9, 7, 1.6),
        block_causal(10, 6, block=4),
        block_causal(12, 6, block=3, s=2),
        ad(1, 1, 0),
    ):
        index_IF, steps = schedule.index_IF, schedule.sample_steps
        assert index_IF.shape == schedule.update_IF.shape
        assert index_IF.shape == (schedule.iterations, schedule.frames)
        taken_IF = np.diff(index_IF, axis=0, prepend=0)
        np.testing.assert_array_equal(schedule.finished_I, (index_IF == steps).sum(axis=1))
        np.testing.assert_array_equal(schedule.update_IF, taken_IF == 1)
        assert set(np.unique(taken_IF)) <= {0, 1}, "one step at a time, never back"
        assert (index_IF[-1] == steps).all() and (index_IF[-2:-1] < steps).any(axis=1).all()
        assert (np.diff(index_IF, axis=1) <= 0).all(), "earlier frames are never noisier"
        for update_F, (first, stop) in zip(schedule.update_IF, schedule.active_I2):
            assert np.flatnonzero(update_F).tolist() == list(range(first, stop)) and stop > first
        assert (schedule.window_stop_I >= schedule.active_I2[:, 1]).all()
        assert (schedule.window_stop_I - schedule.window <= schedule.active_I2[:, 0]).all()
        assert schedule.update_IF.sum() + schedule.frames == schedule.evaluations


def test_blocks_share_steps_and_the_last_may_be_short():
    schedule = block_causal(frames=7, sample_steps=5, block=3, s=2)
    k, b = np.ogrid[1 : schedule.iterations + 1, :3]
    block_index = np.clip(k - 2 * b, 0, 5)
    assert schedule.iterations == 5 + 2 * 2
    np.testing.assert_array_equal(schedule.index_IF, np.repeat(block_index, 3, axis=1)[:, :7])
    assert block_causal(7, 5, 3).iterations == 15


@pytest.mark.parametrize("window, sample_steps", [(1, 5), (3, 30), (16, 50), (3, 1)])
def test_the_smallest_s_of_a_message_works_and_none_below(window, sample_steps):
    def smallest(make):
        with pytest.raises(UserError) as error:
            make(0)
        assert f"s=0: 40 frames would be noisy at once but window={window}" in str(error.value)
        return float(str(error.value).split("s >= ")[1].split()[0])

    for block in {1, min(2, window), window}:

        def blocks(s, block=block):
            return block_causal(40, sample_steps, block, s, window)

        s = int(smallest(blocks))
        blocks(s)
        for lower in range(s):
            with pytest.raises(UserError):
                blocks(lower)

    def continuous(u):
        return pyramid(40, sample_steps, u, window)

    u = smallest(continuous)
    continuous(u)
    with pytest.raises(UserError):
        continuous(u - 0.002)


def test_a_clip_inside_the_window_needs_no_s():
    assert ad(16, 50, 0, window=16).window == 16
    assert ad(9, 50, 1, window=16).window == 9
    assert block_causal(9, 50, 12, window=10).window == 9


def test_make():
    for name, block, expected in (
        ("synchronous", 1, synchronous(8, 6)),
        ("ad", 1, ad(8, 6, 3)),
        ("autoregressive", 1, autoregressive(8, 6)),
        ("pyramid", 1, pyramid(8, 6, 3)),
        ("block_causal", 2, block_causal(8, 6, 2, 3)),
    ):
        assert make_frame_schedule(name, 8, 6, s=3, block=block) == expected


def test_refusals():
    for call, message in (
        (
            lambda: ad(40, 50, 2, window=16),
            r"^s=2: 25 frames would be noisy at once but window=16; use s >= 4 \(sample_steps=50",
        ),
        (lambda: ad(4, 5, 6), "^s=6: .* to 5, the steps"),
        (lambda: ad(4, 5, -1), "^s=-1: .* to 5, the steps"),
        (lambda: pyramid(4, 5, 5.5), "^s=5.5: .* to 5, the steps"),
        (lambda: pyramid(4, 5, math.nan), "^s=nan: .* to 5, the steps"),
        (lambda: ad(4, 5, 1.5), "^s=1.5: .* use schedule='pyramid'"),
        (lambda: ad(0, 5, 1), "^frames=0: .* at least 1"),
        (lambda: ad(4, 0, 0), "^sample_steps=0: .* at least 1"),
        (lambda: ad(4, 5, 1, window=0), "^window=0: .* at least 1"),
        (lambda: block_causal(4, 5, 0), "^block=0: .* at least 1"),
        (lambda: block_causal(40, 5, 8, window=4), "^block=8: .* use block <= 4"),
        (
            lambda: make_frame_schedule("synchronous", 40, 50, s=1, window=16),
            r"^schedule='synchronous': 40 frames .* window=16; use schedule='ad' with s >= 4",
        ),
        (lambda: make_frame_schedule("ad", 4, 5), "^s=None: schedule='ad' needs .* 0 to 5"),
        (lambda: make_frame_schedule("sync", 4, 5), "^schedule='sync': .* synchronous, ad"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_schedule_is_static_under_jit():
    traces = []

    def finished(schedule, k):
        traces.append(schedule)
        return jnp.sum(jnp.asarray(schedule.index_IF)[k] == schedule.sample_steps)

    finished = jax.jit(finished, static_argnums=0)
    assert [int(finished(ad(4, 5, 2), k)) for k in (0, 5, 10)] == [0, 1, 4]
    assert len(traces) == 1
