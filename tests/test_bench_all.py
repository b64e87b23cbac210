"""The benchmark of a whole device, and those of attention and of tiles."""

import jax
import pytest

from jaxvid.bench import attention, everything, kernels, runs, timing, tune
from jaxvid.errors import UserError
from jaxvid.kernels import dispatch


@pytest.fixture
def parts(monkeypatch):
    """Every part gives its name; `fails` names those that do not."""
    fails = {}

    def give(name):
        def part(*_):
            if name in fails:
                raise fails[name]
            return {"name": name}

        return part

    monkeypatch.setattr(everything, "_rates", give("rates"))
    monkeypatch.setattr(attention, "measure", give("attention"))
    monkeypatch.setattr(kernels, "measure", give("linear_attention"))
    for name in ("step", "cached_sample", "encode", "input_pipeline"):
        monkeypatch.setattr(runs, name, give(name))
    return fails


def test_every_part_is_measured_and_saved(parts):
    saved = []
    figures = everything.measure(1, lambda found: saved.append(list(found)))
    assert list(figures) == [
        *("rates", "attention", "step_tiny", "linear_attention"),
        *("sample_tiny", "encode_tiny", "data"),
    ]
    assert saved[0] == ["rates"] and saved[-1] == list(figures)
    assert figures["data"]["name"] == "input_pipeline" and figures["data"]["took_s"] >= 0
    assert timing.SECONDS == 15.0  # only while they are measured


def test_no_part_begins_after_the_time(parts):
    figures = everything.measure(0, lambda found: None)
    assert all(found == {"left_out": "0 minutes were over"} for found in figures.values())


def test_a_part_that_fails_leaves_the_others(parts):
    parts["step"] = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 80 GiB\nand more")
    parts["encode"] = UserError("data.size=24: no")
    figures = everything.measure(1, lambda found: None)
    assert figures["step_tiny"]["error"] == "RESOURCE_EXHAUSTED: 80 GiB"
    assert figures["encode_tiny"]["error"] == "data.size=24: no"
    assert figures["data"]["name"] == "input_pipeline"


def test_attention_is_timed_by_visible_pair(monkeypatch):
    """Four frames of two tokens on a CPU: 10 of 16 pairs of frames are visible."""
    monkeypatch.setattr(attention, "SHAPES", {"small": (1, 2, 4, 32, 8, None)})
    with timing.lasting(0):
        rows = attention.measure(("small",))["by_shape"]
    assert list(rows) == ["small_xla", "small_reference", list(rows)[-1]]
    assert list(rows)[-1] in ("small_xla_unmasked", "small_reference_unmasked")
    for name, row in rows.items():
        pairs = 64 if "unmasked" in name else 40
        for direction, products in (("forward", 2), ("both", 7)):
            work = products * 2 * 2 * 8 * pairs
            rate = work / (row[f"{direction}_ms"] / 1e3) / 1e12
            assert row[f"{direction}_tflop_per_s"] == pytest.approx(rate)
    fastest = rows[list(rows)[-1]]
    assert fastest["both_of_unmasked"] == 1
    per_pair = rows["small_xla"]["both_ms"] / 40 / (fastest["both_ms"] / 64)
    assert rows["small_xla"]["both_of_unmasked"] == pytest.approx(per_pair)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["attention", "linear_attention"])
def test_tiles_take_turns(op, monkeypatch):
    """Interpreted; every tile is in the place of the one that the kernel would take."""
    from jax.experimental import pallas as pl

    call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *a, **own: call(*a, **own | {"interpret": True}))
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tune, "SECONDS", 0)
    monkeypatch.setattr(tune, "LINEAR", {(1, 1, 1024, 16): [(16, 4, 2), (64, 4, 2)]})
    tiles = [(128, 64, 4, 3)], [(64, 64, 4, 2)], [(64, 128, 8, 2)]
    monkeypatch.setattr(tune, "ATTENTION", {(1, 1, 2, 128, 16): tiles})
    before = dict(tune.attention_gpu.TILES), dict(tune.linear_gpu.TILES)
    rows = tune.measure(op)["by_tile"]
    assert before == (tune.attention_gpu.TILES, tune.linear_gpu.TILES)
    wanted = {
        "attention": {
            "16 forward (128, 64, 4, 3)",
            "16 queries (64, 64, 4, 2)",
            "16 keys (64, 128, 8, 2)",
        },
        "linear_attention": {
            *(f"16 ({columns}, 4, 2) segments 2" for columns in (16, 64)),
            *(f"16 (64, 4, 3) segments {n}" for n in (1, 4, 8)),
        },
    }[op]
    assert set(rows) == wanted
    assert all(row["both_ms"] > 0 for row in rows.values())


def test_tiles_are_for_gpus():
    with pytest.raises(UserError, match=r"^tune=true: tiles are for GPUs"):
        tune.measure("attention")
    with pytest.raises(UserError, match=r"^op=gated_delta: has no tiles"):
        tune.measure("gated_delta")
