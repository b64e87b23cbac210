"""Frames split over the mesh axis `seq`: what is exchanged, and that no result changes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.ar_diffusion import get_config
from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.errors import UserError
from jaxvid.mixers import MIXERS
from jaxvid.models.dit import DiT
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.multihost import to_global
from jaxvid.parallel.sharding import batch_sharding
from jaxvid.runs import make_task
from jaxvid.training.optim import make_optimizer
from jaxvid.training.state import make_init
from jaxvid.training.step import make_step
from tests.laws import disturbed

pytestmark = pytest.mark.slow


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "seq": 4})


def exchanged(function, *arguments):
    """Sizes of the arrays, on one device, that the compiled program receives from other devices.

    Sums over devices do not count: they are of gradients of parameters.
    """
    program = jax.jit(function).lower(*arguments).compile().as_text()
    collective = r"= (.*) (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    shapes = re.findall(r"\w\d+\[([\d,]*)\]", " ".join(re.findall(collective, program)))
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


@pytest.mark.parametrize("name", ["linear", "gla"])
def test_a_mixer_at_one_token_per_frame_exchanges_only_states(mesh, name):
    B, T, heads, K = 4, 128, 2, 8
    mixer = MIXERS[name](width=heads * K, heads=heads)
    x = jax.random.normal(jax.random.key(0), (B, T, 1, heads * K))
    params = mixer.init(jax.random.key(1), x[:, :1])

    def loss(params, x):
        return jnp.square(mixer.apply(params, x)[0]).sum()

    states = 4 * (B // 2) * heads * K * (K + 1)  # what four devices add to the states of two clips
    assert states < T * heads * K
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "seq")))
        for function in (mixer.apply, jax.grad(loss, argnums=(0, 1))):
            sizes = exchanged(function, params, rows)
            assert sizes and max(sizes) <= states


def test_a_factorised_transformer_exchanges_only_states(mesh):
    """Its spatial attention and MLP exchange no frames."""
    T, width = 64, 8
    mixer = {"name": "gla"}
    model = DiT(width, 1, 2, (2, 1), arrangement="factorised", mixer=mixer, scan=False)
    x, t = jnp.ones((4, T, 2, 3)), jnp.zeros((4, T), jnp.int32)
    params = model.init(jax.random.key(1), x[:, :1], t[:, :1])

    def loss(params, x, t):
        return jnp.square(model.apply(params, x, t)[0]).sum()

    with jax.set_mesh(mesh):
        frames = NamedSharding(mesh, PartitionSpec("data", "seq"))
        sizes = exchanged(jax.grad(loss), params, *jax.device_put((x, t), frames))
    assert sizes and max(sizes) <= 4 * (2 * 2) * width * (width // 2) < 2 * T * 2 * width


def trained(options, sizes, devices):
    """(losses of two steps, parameters) of AR-Diffusion on a mesh."""
    config = get_config(f"mixer=gla,{options}")
    changes = {"data.size": 8, "data.frames": 8, "data.batch_size": 4, "task.patch": 4}
    changes |= {"task.model.width": 16, "task.model.depth": 1, "task.model.heads": 2}
    changes |= {"task.model.arrangement": "factorised", "task.train_frames": 8, "optim.warmup": 1}
    config.update_from_flattened_dict(changes)
    config = config.copy_and_resolve_references()
    task, mesh = make_task(config.task), make_mesh(sizes, devices)
    tx, schedule = make_optimizer(config.optim, config.steps)
    iterator = data.make_iterator(config.data, split="train", seed=0, batch_size=4)
    batches = [next(iterator) for _ in range(2)]
    history = []
    with jax.set_mesh(mesh):
        init, shardings = make_init(task, tx, batches[0], config, mesh)
        step, state = make_step(task, tx, schedule, config, mesh, shardings), init()
        for batch in batches:
            state, metrics = step(state, {}, to_global(batch, batch_sharding(mesh)))
            history.append(float(metrics["loss"]))
    return history, jax.device_get(state.params)


@pytest.mark.parametrize("layout", ["mixed", "teacher_forced"])
def test_a_training_step_is_the_same_on_one_device(layout):
    options = f"layout={layout}"
    split, split_params = trained(options, {"data": 2, "seq": 4}, jax.devices())
    whole, whole_params = trained(options, {"data": 1}, jax.devices()[:1])
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole_params), jax.tree.leaves(split_params), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize(
    "frames, words", [(6, "does not divide the 6 frames"), (None, "does not split")]
)
def test_frames_that_cannot_be_split_are_refused_in_one_line(frames, words):
    config = get_config()
    with pytest.raises(UserError, match=f"^mesh.seq=4: .*{words}") as error:
        config_lib.check_sequence(config, frames, 4)
    assert "\n" not in str(error.value)
    config_lib.check_sequence(config, frames, 1)
    config_lib.check_sequence(config, 8, 4)


def losses(name, arrangement, mesh):
    """(loss, gradients) of a DiT with that mixer, on a mesh or on one device."""
    grid = (2, 1)
    options = {"window": 3} if name in ("softmax", "alibi") else {}
    mixer = {"name": name, **options}
    model = DiT(8, 1, 2, grid, mlp_ratio=1.0, arrangement=arrangement, mixer=mixer, scan=False)
    x = jax.random.normal(jax.random.key(0), (4, 8, 2, 3))
    context = jax.random.normal(jax.random.key(1), (4, 2, 5))
    t = jnp.arange(32).reshape(4, 8)
    params = disturbed(jax.jit(model.init)(jax.random.key(2), x, t, context))

    def loss(params, x):
        y, state = model.apply(params, x, t, context)
        return jnp.square(y).mean() + sum(jnp.square(s).mean() for s in jax.tree.leaves(state))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), allow_int=True))
    if mesh is None:
        return gradient(params, x)
    with jax.set_mesh(mesh):
        return gradient(params, x)


@pytest.mark.parametrize(
    "name, arrangement",
    # One mixer per kind of state: keys and values, a split matrix, a gathered matrix.
    [("softmax", "factorised"), ("gla", "factorised"), ("gated_delta", "joint")],
)
def test_a_network_computes_the_same_with_split_frames(mesh, name, arrangement):
    whole, split = (losses(name, arrangement, where) for where in (None, mesh))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-4)


def test_a_sample_is_the_same_with_split_frames(mesh):
    """A step of a sampler has any number of frames, as its schedule says, or none."""
    config = get_config("mixer=gla")
    changes = {"data.size": 8, "data.frames": 8, "task.patch": 4}
    config.update_from_flattened_dict(changes | {"task.sampler.steps": 3, "task.sampler.s": 1})
    config.task.model.update(width=16, depth=1, heads=2, arrangement="factorised")
    task = make_task(config.copy_and_resolve_references().task)
    batch = {"video": np.zeros((2, 8, 8, 8, 3), np.uint8), "id": np.arange(2)}
    params = disturbed(jax.jit(task.init)(jax.random.key(0), batch)[0])
    cond = {"num": 2, "first_frames": batch["video"][:, :4]}
    whole = task.sample(params, jax.random.key(1), cond, frozen={})
    jax.clear_caches()
    with jax.set_mesh(mesh):
        split = task.sample(params, jax.random.key(1), cond, frozen={})
    np.testing.assert_allclose(split, whole, atol=1e-5)
