import jax
import jax.numpy as jnp
import pytest

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
        ["block/up/kernel", "(8,", "6)", "48", "fsdp,", "tensor"],
        ["block/up/other", "(6,)", "6"],
        ["all", "54"],
    ]


def test_speeds_leave_out_the_first_step_and_what_is_outside(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds
        yield "batch"

    progress = Progress(steps=100, frames=32, flops=4e9, machine=2e10)
    next(pass_time(60))  # compilation
    progress.settled(1)
    assert progress.rates(1) == {}
    progress.next(pass_time(0.5))
    with progress.outside(metrics=jnp.zeros(())):
        next(pass_time(1000))
    next(pass_time(4.5))
    rates = progress.rates(11)
    assert rates == pytest.approx(
        {"steps_per_s": 2.0, "frames_per_s": 64.0, "data_wait": 0.1, "mfu": 0.4}
    )
    line = progress.line(11, {"loss": 0.5, "skipped": 3.0, "evaluate/psnr": 21.0} | rates)
    for part in ("step  11/100", "loss 0.5000", "2 steps/s", "64 frames/s", "data wait 10.0%"):
        assert part in line
    for part in ("MFU 40.0%", "ETA 44s", "3 steps skipped", "evaluate/psnr 21"):
        assert part in line


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
