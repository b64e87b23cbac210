"""Where parameters, moments, activations and batches are placed on a mesh."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxvid.config import read
from jaxvid.data import batch_shapes
from jaxvid.models.dit import DiT
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import (
    PARAM_RULES,
    batch_sharding,
    find_rule,
    partition,
    path_name,
    shard,
    shard_params,
)
from jaxvid.runs import make_task
from tests import laws

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("params/q/kernel", (16, 8), P(("fsdp",), ("tensor",))),
        ("params/layers/q/kernel", (3, 16, 8), P(None, ("fsdp",), ("tensor",))),
        ("opt_state/0/mu/up/kernel", (16, 8), P(("fsdp",), ("tensor",))),
        ("params/out/kernel", (16, 8), P(("tensor",), ("fsdp",))),
        ("params/decay_out/kernel", (16, 8), P(("fsdp",), ("tensor",))),
        ("params/q/kernel", (16, 7), P(("fsdp",), None)),  # 7 does not split: whole
        ("params/q/bias", (8,), P(("tensor",))),
        ("params/other/kernel", (6, 16), P(None, "fsdp")),  # fallback: the largest divisible
        ("params/other/kernel", (9, 6), P(None, "fsdp")),
        ("params/other/kernel", (9, 7), P()),
        ("params/other/bias", (64,), P()),
        ("step", (), P()),
    ],
)
def test_partition(mesh, name, shape, expected):
    assert partition(name, shape, mesh) == expected


def test_moments_are_placed_like_their_parameters(mesh):
    params = {"q": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}}
    state = {"params": params, "opt_state": optax.adam(1.0).init(params)}
    shardings = shard_params(jax.eval_shape(lambda: state), mesh)
    moments = shardings["opt_state"][0].mu
    assert moments["q"]["kernel"].spec == shardings["params"]["q"]["kernel"].spec
    placed = jax.device_put(state, shardings)
    assert placed["params"]["q"]["kernel"].addressable_shards[0].data.shape == (8, 4)


def test_every_rule_matches_a_parameter_of_some_task():
    """By shapes alone."""
    paths = []
    for file, options in (("ar_diffusion", "cond=class,mixer=gla"), ("tokenizer", "")):
        config = read(f"{ROOT}/configs/{file}.py:{options}")
        task = make_task(config.task)
        batch = batch_shapes(config.data, 1)
        params, _ = jax.eval_shape(
            lambda task=task, batch=batch: task.init(
                jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
            )
        )
        paths += [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    for rule in PARAM_RULES:
        assert any(find_rule(path) is rule for path in paths), rule.pattern


def test_shard_is_a_no_op_without_a_mesh():
    x_BTND = jnp.ones((4, 3, 2, 5))
    assert shard(x_BTND, "BTND") is x_BTND


def test_shard_splits_by_letter(mesh):
    with jax.set_mesh(mesh):
        y_BLAK = jax.jit(lambda x: shard(x, "BLAK"))(jnp.ones((8, 3, 4, 5)))
        odd_BLAK = jax.jit(lambda x: shard(x, "BLAK"))(jnp.ones((3, 3, 5, 5)))
    assert y_BLAK.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None)), 4
    )
    assert odd_BLAK.sharding.is_fully_replicated  # a single clip still samples on many devices


def test_shard_refuses_letters_that_do_not_fit(mesh):
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="BTND"):
        shard(jnp.ones((2, 3)), "BTND")


def test_a_batch_is_split_over_data_and_fsdp(mesh):
    rows = jax.device_put(jnp.arange(8), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}


@pytest.mark.parametrize("arrangement", ["joint", "factorised"])
def test_eight_devices_compute_the_gradients_of_a_context(arrangement):
    mixer = {"name": "softmax", "window": 4}
    model = DiT(16, 1, 2, (3, 3), scan=False, mixer=mixer, arrangement=arrangement)
    inputs = jax.random.normal(jax.random.key(0), (4, 2, 9, 5)), jnp.full((4, 2), 7)
    context_BME = jax.random.normal(jax.random.key(1), (4, 8, 64))
    params = laws.disturbed(model.init(jax.random.key(2), *inputs, context_BME))
    weight = jax.random.normal(jax.random.key(3), inputs[0].shape)

    def loss(params, context_BME, inputs):
        return (model.apply(params, *inputs, context_BME)[0] * weight).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    expected = gradient(params, context_BME, inputs)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shard_params(params, mesh))
        context_BME, inputs = jax.device_put((context_BME, inputs), batch_sharding(mesh))
        found = gradient(params, context_BME, inputs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, expected)
