"""Compilation for devices that need not be there: figures, and refusals in one line."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxvid import compile as command
from jaxvid import config as config_lib
from jaxvid.errors import UserError
from jaxvid.models.stand_in import stand_in
from jaxvid.parallel import topology
from jaxvid.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[1]


def small(depth=2, **mesh):
    config = config_lib.read(str(ROOT / "configs" / "ar_diffusion.py"))
    config.data.frames, config.task.train_frames, config.data.batch_size = 4, 4, 8
    config.task.model.update(dict(width=32, depth=depth, heads=2, scan=True, dtype="bfloat16"))
    config.task.given = 1
    config.task.sampler.steps = config.task.sampler.s = 2
    config.mesh.update(dict(data=-1) | mesh)
    return config


@pytest.fixture(scope="module")
def figures():
    """By depth, of a network whose layers are one scan, on the eight devices of the tests."""
    return {
        depth: command.measure(small(depth, fsdp=4), jax.devices(), stand_in("8x4"), "train")
        for depth in (2, 4)
    }


def test_work_and_gathers_follow_the_depth(figures):
    """What the compiler counts once per loop counts once per layer here."""
    shallow, deep = figures[2], figures[4]
    for name in ("flops", "model_flops"):
        assert 1.4 < deep[name] / shallow[name] < 2
    of_layers = [
        sum(row["bytes"] for row in found["collectives"] if "fsdp" in row["axes"])
        for found in (shallow, deep)
    ]
    assert of_layers[1] > 1.4 * of_layers[0]
    assert deep["memory"]["arguments"] > shallow["memory"]["arguments"]


def test_lines_name_every_figure(figures):
    text = "\n".join(command.lines("train", figures[2]))
    assert "unknown memory" in text and "model_flops" in text and "fsdp" in text
    refused = {"fits": False, "error": "RESOURCE_EXHAUSTED: too much", "buffers": ["2.0G f32[8]"]}
    text = "\n".join(command.lines("train", refused))
    assert "does not fit" in text and "2.0G f32[8]" in text and "task.model.remat" in text


def test_the_largest_batch_is_found(monkeypatch):
    """By doubling and halving, in multiples of what the mesh splits."""
    monkeypatch.setattr(topology, "MEMORY", {"cpu": 1})
    monkeypatch.setattr(
        command,
        "measure",
        lambda config, *_: {"fits": config.data.batch_size <= 100},
    )
    found = command.largest_batch(small(), jax.devices(), None)
    assert found % 8 == 0 and 88 <= found <= 100
    monkeypatch.setattr(command, "measure", lambda *_: {"fits": False})
    assert command.largest_batch(small(), jax.devices(), None) == 0


@pytest.mark.parametrize(
    "name, slices, message",
    [
        ("v5x:4x4", 1, r"topology=v5x:4x4: write local, or a version and shape"),
        ("v5e:4x4x4", 1, r"topology=v5e:4x4x4: write local"),
        ("v5e:0x4", 1, r"topology=v5e:0x4: write local"),
        ("local", 2, r"slices: topology=local has one"),
    ],
)
def test_unknown_devices_are_refused(name, slices, message):
    with pytest.raises(UserError, match=message):
        topology.devices(name, slices)


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_shape_that_libtpu_refuses(tpu_devices):
    with pytest.raises(UserError, match=r"^topology=v5e:3x5: [^\n]*$"):
        topology.devices("v5e:3x5")


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name, slices", [("v5p:8x8x8", 1), ("v5e:4x4", 2)])
def test_meshes_of_tpus(name, slices, tpu_devices):
    """An axis may be no side of the torus; slices are parts of `data`."""
    mesh = make_mesh({"data": -1, "fsdp": 16}, topology.devices(name, slices))
    assert mesh.shape["fsdp"] == 16
    of_data = [{getattr(d, "slice_index", 0) for d in row.flatten()} for row in mesh.devices]
    assert all(len(found) == 1 for found in of_data)
    assert len(set.union(*of_data)) == slices


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_two_slices_of_tpus(tpu_devices):
    """Only sums of gradients go from slice to slice, as `data` is split between them."""
    devices = topology.devices("v5e:2x2", slices=2)
    found = command.measure(small(fsdp=4), devices, stand_in("8x4"), "train")
    assert found["fits"] and found["memory"]["of the device"] == 16 * 2**30
    assert found["least_step_s"] > 0
    for row in found["collectives"]:
        if "data" in row["axes"]:
            assert row["kind"] in ("all-reduce", "reduce-scatter", "all-gather")
    with pytest.raises(UserError, match=r"mesh\.data=1: must be a multiple of the 2 slices"):
        command.measure(small(fsdp=8, data=1), devices, stand_in("8x4"), "train")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--topology=v5e:bad",), "error: --topology=v5e:bad: write local, or a version and shape"),
        (
            ("--topology=local", "--programs=dance"),
            "error: --programs=dance: choose of train, sample",
        ),
        (("--topology=local", "--json=/no/f.json"), "error: --json=/no/f.json: there is no folder"),
        (("--topology=local", "--latents=32"), "error: --latents=32: write TOKENSxCHANNELS"),
    ],
)
def test_one_line(flags, message):
    run = subprocess.run(
        [sys.executable, "-m", "jaxvid.compile", "--config=configs/ar_diffusion.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(message)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.cli, "config_from_flags", lambda: (small(data=8), "runs/unused"))
    path = tmp_path / "figures.json"
    values = dict(topology="local", slices=1, latents="8x4", programs="train,sample")
    values |= dict(json=str(path), largest_batch=False)
    monkeypatch.setattr(command, "FLAGS", type("Flags", (), values))
    command.main()
    found = json.loads(path.read_text())
    assert found["devices"] == 8 and found["sample"]["flops"] > 0
    assert "sample: unknown memory" in capsys.readouterr().out
