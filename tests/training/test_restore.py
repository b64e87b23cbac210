"""Weights taken out of a run for evaluation and sampling."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy

from configs import ar_diffusion
from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.errors import UserError
from jaxvid.runs import open_run, open_weights
from jaxvid.train import train
from jaxvid.training import restore


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(work folder, last state) of a run without TensorBoard."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(toy.config(steps=4), str(workdir))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_the_averaged_weights_come_back_on_all_devices(finished):
    workdir, state = finished
    before = sorted(workdir.rglob("*"))
    run = open_run(str(workdir))
    assert (run.step, run.config.task.name) == (4, "toy")
    same(run.params, state.weights)
    assert not np.array_equal(state.ema["out"]["kernel"], state.params["out"]["kernel"])
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(run.params))
    assert jax.device_get(run.frozen) == {"scale": 2}
    assert sorted(workdir.rglob("*")) == before


def test_without_an_average_the_parameters_come_back(tmp_path):
    state = train(toy.config(steps=2, optim__ema=0.0), str(tmp_path))
    same(open_run(str(tmp_path)).params, {**state.params, **state.extra})


def test_an_unfinished_save_is_passed_over(finished, tmp_path):
    workdir, state = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "ckpt" / "4", tmp_path / "ckpt" / "5.orbax-checkpoint-tmp")
    run = open_run(str(tmp_path))
    assert run.step == 4
    same(run.params, state.weights)
    assert (tmp_path / "ckpt" / "5.orbax-checkpoint-tmp").is_dir()  # another process may write it


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda workdir: (workdir / "config.json").unlink(), "no such file"),
        (lambda workdir: shutil.rmtree(workdir / "ckpt"), "there is no checkpoint yet"),
        (
            lambda workdir: save(workdir, task__width=8),
            r"checkpoint 4 .* \(config.json differs in task.width: 16 -> 8\); bring back",
        ),
        (
            lambda workdir: both(workdir, "state/manifest.ocdbt"),
            r"\(arrays in it cannot be read\); bring .*, or delete .*/ckpt/4 to go on from step 3$",
        ),
        (
            lambda workdir: both(workdir, "state/_METADATA"),
            r"damaged \(a description in it is cut short or no JSON\); bring",
        ),
    ],
)
def test_what_cannot_be_opened_is_one_line(finished, tmp_path, spoil, message):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_run(str(tmp_path))
    assert "\n" not in str(error.value)


def both(workdir, name):
    """Spoil a file of both checkpoints."""
    for step in "34":
        (workdir / "ckpt" / step / name).write_text("{")


@pytest.mark.parametrize("on_devices", [True, False])
def test_a_damaged_checkpoint_is_passed_over_and_named(finished, tmp_path, capsys, on_devices):
    """By sample and evaluate, which take all devices, and by init_from and tokenizers."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = restore_from(tmp_path, on_devices)
    toy.damage(tmp_path, 4, "params.up.kernel")  # what is not read is not checked
    same(restore_from(tmp_path, on_devices), before)
    toy.damage(tmp_path, 4, "ema.out.kernel")
    files = contents(tmp_path)
    assert capsys.readouterr().err == ""
    earlier = restore_from(tmp_path, on_devices)
    line = "checkpoint 4 is damaged (ema/out/kernel differs from what was saved); reading step 3"
    assert capsys.readouterr().err == f"{tmp_path}: {line}\n"
    assert contents(tmp_path) == files
    shutil.rmtree(tmp_path / "ckpt" / "4")
    same(earlier, restore_from(tmp_path, on_devices))
    toy.damage(tmp_path, 3, "ema.out.kernel")
    with pytest.raises(UserError, match=r"damaged \(ema/out/kernel differs from what was saved\);"):
        restore_from(tmp_path, on_devices)


def restore_from(workdir, on_devices):
    if on_devices:
        return open_run(str(workdir)).params
    return open_weights(str(workdir), "toy", "init_from")[2]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_without_digests_is_read_with_a_note(finished, tmp_path, capsys):
    """As those of older versions are."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "ckpt" / "4" / "digests")
    same(open_run(str(tmp_path)).params, finished[1].weights)
    note = f"checkpoint 4 {restore.UNVERIFIED}\n"
    assert capsys.readouterr().out == f"{tmp_path}: {note}"
    same(train(toy.config(steps=4), str(tmp_path)), finished[1])
    assert capsys.readouterr().out.count(note) == 1


def test_a_schedule_without_s_refuses_one(tmp_path):
    config_lib.save(ar_diffusion.get_config("size=s"), tmp_path / "config.json")
    with pytest.raises(UserError, match=r"^s=2: schedule=synchronous has no s; leave --s out"):
        open_run(str(tmp_path), sampler={"schedule": "synchronous", "s": 2.0})
    with pytest.raises(UserError, match="no checkpoint yet"):
        open_run(str(tmp_path), sampler={"schedule": "synchronous"})


def test_the_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """With the config.json of that version, and with the one that a later version has written."""
    config = ar_diffusion.get_config("size=s")
    saved = json.loads(config.to_json())
    del saved["task"]["layout"], saved["task"]["model"]["mixer"]["positions"], saved["data"]["fps"]
    del saved["task"]["train_frames"], saved["task"]["sampler"]["history"]
    saved["task"]["clean_prefix"] = 0.5
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "metadata").write_text(json.dumps(saved))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for now in (config_lib.load(tmp_path / "config.json"), config.copy_and_resolve_references()):
        restore._check_config(tmp_path, now, None)
    now = config.copy_and_resolve_references()
    now.task.layout = "diffusion_forcing"
    with pytest.raises(ValueError, match=r"config.json differs in task.layout: 'clean_prefix=0.5,"):
        restore._check_config(tmp_path, now, None)


def test_another_model_is_refused_without_a_mesh_too(finished):
    config = toy.config(steps=4)
    task = toy.Task(width=8)
    with pytest.raises(UserError, match=r"kernel has shape \(16, 48\), not \(8, 48\)"):
        restore.restore_weights(str(finished[0]), config, task)


def save(workdir, **changes):
    config_lib.save(toy.config(steps=4, **changes), workdir / "config.json")


@pytest.mark.parametrize("tokens", [0, 3])
def test_batch_shapes_are_those_of_the_iterator(tokens):
    fields = toy.config(data__text_tokens=tokens).data
    batch = next(data.make_iterator(fields, split="train", seed=0, batch_size=8))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert data.batch_shapes(fields, 8) == shapes
