"""What a step takes is known before it is compiled, and what cannot fit is refused."""

import functools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from configs import ar_diffusion, mqar, tokenizer
from jaxvid import data, memory
from jaxvid.errors import UserError
from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.parallel.mesh import make_mesh
from jaxvid.runs import make_task
from jaxvid.train import train
from jaxvid.training import memory as of_training
from jaxvid.training.optim import make_optimizer
from jaxvid.training.state import make_init

SMALL = {"data.frames": 5, "data.size": 16, "task.patch": 4, "task.model.depth": 1}
WIDTH = {"task.model.width": 2**18, "data.batch_size": 8}


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_estimate_is_what_the_compiler_takes():
    config = ar_diffusion.get_config()
    config.update_from_flattened_dict(SMALL)
    task, state, batch, _ = make(config)

    def loss(params, batch):
        rng = jax.random.key(0)
        return task.loss(params, batch, rng, step=0, frozen={}, extra=state.extra)[0]

    kept, _ = of_training.of_gradient(task, state, {}, batch)
    compiled = jax.jit(jax.grad(loss)).lower(state.params, batch).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert of_training.SURE * kept < taken < 2 * kept


def make(config):
    """(task, state, batch, mesh) as shapes, before anything is allocated."""
    mesh = make_mesh(config.mesh)
    task, batch = make_task(config.task), data.batch_shapes(config.data, config.data.batch_size)
    tx, _ = make_optimizer(config.optim, config.steps)
    with jax.set_mesh(mesh):
        init, shardings = make_init(task, tx, batch, config, mesh)
        shapes = jax.eval_shape(init)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )
    return task, state, batch, mesh


@pytest.mark.parametrize(
    "file, changes, message",
    [
        (ar_diffusion, WIDTH, "^task.model.width=262144: parameters, gradients, .* take about"),
        (
            ar_diffusion,
            {"data.batch_size": 2**19},
            "^data.batch_size=524288, data.frames=16, data.size=24: state and activations of a",
        ),
        (tokenizer, {"task.network.width": 3 * 2**17}, "^task.network.width=393216: parameters"),
        (
            mqar,
            {"task.model.width": 2**19, "task.model.heads": 2**10},
            "^task.model.width=524288",
        ),
    ],
)
def test_steps_that_cannot_fit_name_their_fields(file, changes, message):
    config = file.get_config()
    config.update_from_flattened_dict(changes)
    task, state, batch, mesh = make(config)
    with jax.set_mesh(mesh), pytest.raises(UserError, match=message):
        of_training.check_step(task, config, state, {}, batch, mesh)


def test_the_bound_is_that_of_the_device(monkeypatch):
    """A state split over devices is counted in parts; devices of the CPU share the host's."""
    config = toy.config(mesh__data=1, mesh__fsdp=8)
    toy.install()
    task, state, batch, mesh = make(config)
    share = of_training._shard_bytes(state)
    assert share < bytes_of(state) / 4

    def limits(there):
        monkeypatch.setattr(memory, "host_bytes", lambda: there)
        with jax.set_mesh(mesh):
            of_training.check_step(task, config, state, {"scale": jnp.ones(())}, batch, mesh)

    limits(2**26)
    with pytest.raises(UserError, match="parameters, gradients"):
        limits(8 * share)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 5}

    assert memory.device_bytes(Device(), sharing=8) == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__batch_size": 2**20, "data__size": 512}, "^data.batch_size=1048576, data.frames=3"),
        (
            {"sample__num": 2**20, "data__size": 512},
            "^sample.num=1048576, data.frames=3, data.size",
        ),
        ({"task__width": 2**40}, "^task.width=1099511627776: parameters"),
    ],
)
def test_runs_that_cannot_fit_allocate_nothing(tmp_path, changes, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message):
        train(toy.config(**changes), str(tmp_path / "run"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert not (tmp_path / "run").exists()


def test_batches_that_are_read_ahead_must_fit(monkeypatch):
    fields = toy.config(data__threads=4).data  # 8 batches of 8 clips of 3 frames of 4 x 4 pixels
    monkeypatch.setattr(memory, "host_bytes", lambda: 8 * 8 * 3 * 16 * 3)
    data.check_memory(fields, 8)
    with pytest.raises(UserError, match=r"^batch_size=8, frames=3, size=4: 8 batches that are"):
        data.check_memory(fields, 9)


def test_programs_that_only_evaluate_must_hold_their_largest_product(monkeypatch):
    """Also one within a loop. Here it has 1000 x 50 numbers, and weights have 50 x 50."""
    mesh = make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    place = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    weights = jax.ShapeDtypeStruct((50, 50), jnp.float32, sharding=place)

    def program(weights, x):
        return jax.lax.scan(lambda x, _: (x @ weights, None), x, length=3)[0]

    jaxpr = jax.make_jaxpr(program)(weights, jnp.ones((1000, 50)))
    need = 4 * (1000 * 50 + 50 * 50)
    for there in (need, need - 1):
        monkeypatch.setattr(memory, "device_bytes", lambda *_, there=there, **__: there)
        if there == need:
            of_training.check_program("sample.num=1000", weights, jaxpr, mesh)
    with pytest.raises(UserError, match=r"^sample\.num=1000: weights and the largest product take"):
        of_training.check_program("sample.num=1000", weights, jaxpr, mesh)


def test_masks_of_attention_must_fit():
    """They are made while tracing."""
    tokens = 2**21
    shape = jax.ShapeDtypeStruct((1, tokens, 1, 2), jnp.float32)
    positions = np.arange(tokens)
    run = functools.partial(
        attention, q_position_L=positions, k_position_M=positions, allow=masks.causal()
    )
    with pytest.raises(UserError, match=r"^attention of 2097152 tokens to 2097152: masks take"):
        jax.eval_shape(run, shape, shape, shape)


def test_the_memory_of_a_control_group_counts(monkeypatch, tmp_path):
    whole = memory.host_bytes()
    assert whole > 2**28
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000\n")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "none", tmp_path / "max"))
    assert memory.host_bytes() >= whole
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "max", tmp_path / "limit"))
    assert memory.host_bytes() == 1000
