import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid.errors import UserError
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import shard_params
from jaxvid.training import log
from jaxvid.training.guard import Guard
from jaxvid.training.log import Progress, duration, parameter_table


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (7500, "2h 05m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_parameter_table_names_shapes_numbers_and_axes():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    params = {"block": {"up": {"kernel": jnp.zeros((8, 6)), "other": jnp.zeros(6)}}}
    table = parameter_table(jax.device_put(params, shard_params(params, mesh)))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["block/up/kernel", "48", "(8,", "6)", "fsdp,", "tensor"],
        ["block/up/other", "6", "(6,)"],
        ["all", "54"],
    ]
    params |= {"head": {"bias": jnp.zeros(3)}}
    for depth, modules in ((1, [["block", "54"]]), (2, [["block/up", "54"]])):
        head = ["head"] if depth == 1 else ["head/bias"]
        rows = [line.split() for line in parameter_table(params, depth).splitlines()[1:]]
        assert rows == [*modules, [*head, "3"], ["all", "57"]]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; calling it with seconds moves it."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds
        return now[0]

    return pass_time


def test_speeds_leave_out_the_first_step_and_pauses(clock):
    progress = Progress(steps=100, frames=32, flops=4e9, machine=2e10)
    progress.settled(1, clock(60))  # compilation
    assert progress.rates(1, 60.0) == {}
    progress.next(clock(0.5) for _ in [0])
    with progress.pause():
        clock(1000)
    done = clock(4.5)
    rates = progress.rates(11, done)
    expected = {"steps_per_s": 2.0, "frames_per_s": 64.0, "data_wait": 0.1, "mfu": 0.4}
    assert rates == pytest.approx(expected | {"pauses": 1000 / 1005})
    line = progress.line(11, {"loss": 0.5, "skipped": 3, "evaluate/psnr": 21.0} | rates)
    for part in ("step  11/100", "loss 0.5000", "2 steps/s", "64 frames/s", "data wait 10.0%"):
        assert part in line
    for part in ("MFU 40.0%", "ETA 2h 29m", "pauses 99.5%", "3 steps skipped", "evaluate/psnr 21"):
        assert part in line  # 89 steps at 100.5 s each


def test_a_pause_counts_once_and_after_the_step_that_it_follows(clock):
    """A line is written after its evaluation, and its step was done before."""
    progress = Progress(steps=100, frames=1, flops=1, machine=None)
    progress.settled(1, 0.0)
    done = clock(10)
    with progress.pause():
        clock(50)
    assert progress.rates(11, done) == {
        "steps_per_s": 1, "frames_per_s": 1, "data_wait": 0, "pauses": 0
    }  # fmt: skip
    rates = progress.rates(16, clock(5))
    assert (rates["steps_per_s"], rates["pauses"]) == (1, pytest.approx(50 / 55))


class Lines(dict):
    """A writer that keeps the lines."""

    scalars = dict.__setitem__


def test_a_line_has_means_since_the_line_before():
    config = ConfigDict({"log": {"every": 3}, "steps": 7})
    lines, progress = Lines(), Progress(steps=7, frames=1, flops=1, machine=None)
    run = log.Log(config, lines, progress, Guard(9, Names()))
    losses = [2.0, 4.0, 9.0, 1.0, float("nan"), 2.0, float("nan")]
    for step, loss in enumerate(losses, start=1):
        metrics = {"loss": loss, "lr": 0.1 * step, "skipped": np.int32(step > 4)}
        run.push(step, {n: jnp.asarray(x) for n, x in metrics.items()}, ids=[step])
        if step == 4:
            run.settle({"psnr": 20.0})
    run.settle()
    assert [*lines] == [3, 4, 6, 7]
    assert [line["loss"] for line in lines.values()][:3] == [5, 1, 2]
    assert np.isnan(lines[7]["loss"]) and lines[4]["evaluate/psnr"] == 20
    assert [line["lr"] for line in lines.values()] == pytest.approx([0.3, 0.4, 0.6, 0.7])
    assert [line["skipped"] for line in lines.values()] == [0, 0, 1, 1]
    assert type(lines[3]["skipped"]) is int


class Names:
    def name(self, index):
        return f"clip-{index}"


def test_the_guard_forgives_a_streak_that_ends():
    guard = Guard(2, Names())
    for step, skipped in enumerate([1, 2, 2, 3, 4, 4], start=1):
        guard.check(step, skipped, ids=[step])
    guard.check(7, 5, ids=[7])
    guard.check(8, 6, ids=[8])
    with pytest.raises(UserError, match=r"3 steps in a row, 7 to 9.*7 \(clip-7\), 8 .*, 9 "):
        guard.check(9, 7, ids=[9])


def test_the_guard_does_not_count_what_was_skipped_before_a_resume():
    guard = Guard(0, Names(), skipped=5)
    guard.check(11, 5, ids=[1])
    with pytest.raises(UserError, match="12 to 12"):
        guard.check(12, 6, ids=[1])
