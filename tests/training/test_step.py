import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.multihost import to_global
from jaxvid.parallel.sharding import batch_sharding, replicated
from jaxvid.training.optim import make_optimizer
from jaxvid.training.state import TrainState, make_init
from jaxvid.training.step import average, gradients, make_step, microbatches


def batches(config, count):
    iterator = data.make_iterator(
        config.data, split="train", seed=config.seed, batch_size=config.data.batch_size
    )
    return [next(iterator) for _ in range(count)]


def build(config, devices=None):
    """(mesh, state, step) of the toy."""
    task = toy.Task(**{k: v for k, v in config.task.items() if k != "name"})
    mesh = make_mesh(config.mesh, devices)
    tx, schedule = make_optimizer(config.optim, config.steps)
    with jax.set_mesh(mesh):
        init, shardings = make_init(task, tx, batches(config, 1)[0], config, mesh)
        step = make_step(task, tx, schedule, config, mesh, shardings)
        return mesh, init(), lambda state, batch: step(state, task.frozen(), batch), step


def run(config, steps=4, devices=None):
    """(metrics of each step, final state), on the host. Kept, since several tests compare alike."""
    return _run(config.to_json(), steps, tuple(devices) if devices else None)


@functools.cache
def _run(config_json, steps, devices):
    config = ConfigDict(json.loads(config_json))
    mesh, state, step, _ = build(config, devices)
    history = []
    with jax.set_mesh(mesh):
        for batch in batches(config, steps):
            state, metrics = step(state, to_global(batch, batch_sharding(mesh)))
            history.append(jax.device_get(metrics))
    return history, jax.device_get(state)


def trees_equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 1, 4), (1, 4, 2)])
def test_one_device_equals_eight(sizes):
    one, one_state = run(toy.config(), devices=jax.devices()[:1])
    config = toy.config()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    eight, eight_state = run(config)
    losses = [[metrics["loss"] for metrics in history] for history in (one, eight)]
    np.testing.assert_allclose(*losses, atol=1e-5, rtol=0)
    for a, b in zip(jax.tree.leaves(one_state), jax.tree.leaves(eight_state)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_accumulation_equals_the_big_batch():
    whole, whole_state = run(toy.config(task__noise=0.0), devices=jax.devices()[:2])
    config = toy.config(task__noise=0.0, optim__accumulate=4)
    parts, parts_state = run(config, devices=jax.devices()[:2])
    for a, b in zip(whole, parts):
        for name in ("loss", "guess", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole_state), jax.tree.leaves(parts_state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_microbatches_deal_rows_out_in_turn():
    parts = microbatches({"id": jnp.arange(8)}, 2)["id"]
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_each_microbatch_draws_its_own_noise():
    class Noise:
        reads_average = False

        def loss(self, params, batch, rng, *, step, frozen, extra):
            draw = jax.random.normal(rng)
            return params * draw, ({"square": draw**2}, extra, 4)

    state = TrainState(jnp.int32(0), jnp.int32(0), jnp.ones(()), (), {}, {})
    rng = jax.random.key(1)
    grad, metrics, _ = gradients(Noise(), state, {}, {"id": jnp.arange(4)}, rng, 2)
    draws = [jax.random.normal(jax.random.fold_in(rng, part)) for part in range(2)]
    np.testing.assert_allclose(grad, np.mean(draws), rtol=1e-6)
    np.testing.assert_allclose(metrics["square"], np.mean(np.square(draws)), rtol=1e-6)


def test_parts_weigh_as_many_targets_as_they_have():
    """The mean over the targets of the whole batch, in any number of parts."""

    class Mean:
        reads_average = False

        def loss(self, params, batch, rng, *, step, frozen, extra):
            value_B, is_target_B = batch["value"], batch["is_target"]
            targets = is_target_B.sum()
            mean = (value_B * is_target_B).sum() / jnp.maximum(targets, 1)
            return params * mean, ({"mean": mean}, extra, targets)

    value_B = np.arange(1.0, 9.0) ** 2
    for is_target_B in (np.arange(8) % 4 == 0, np.arange(8) < 3, np.zeros(8, bool)):
        batch = {"value": value_B, "is_target": is_target_B}
        wanted = value_B[is_target_B].mean() if is_target_B.any() else 0
        for count in (1, 2, 4, 8):
            state = TrainState(jnp.int32(0), jnp.int32(0), jnp.ones(()), (), {}, {})
            grad, metrics, _ = gradients(Mean(), state, {}, batch, jax.random.key(0), count)
            for got in (grad, metrics["mean"], metrics["loss"]):
                np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_the_average_ramps_up():
    params = {"w": jnp.array(1.0)}
    for k in (0, 5, 10_000):
        decay = min(0.9, (1 + k) / (10 + k))
        ema = average({"w": jnp.array(0.0)}, params, 0.9, k)
        np.testing.assert_allclose(ema["w"], 1 - decay, rtol=1e-6)
    assert average({}, params, 0.9, 0) == {}


def test_without_an_average_the_parameters_are_evaluated():
    _, state = run(toy.config(optim__ema=0.0), steps=1, devices=jax.devices()[:1])
    assert state.ema == {} and state.weights["out"] is state.params["out"]


def test_a_step_follows_from_its_number_alone():
    """The same update by hand: rng from seed and step, clipped AdamW, average."""
    config = toy.config(optim__warmup=0)
    _, state, _, _ = build(config, jax.devices()[:1])
    task, batch = toy.Task(), batches(config, 1)[0]
    rng = jax.random.fold_in(jax.random.key(config.seed), 0)
    grads = jax.grad(
        lambda params: task.loss(
            params, batch, rng, step=0, frozen=task.frozen(), extra={"seen": 0.0}
        )[0]
    )(state.params)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)
    history, after = run(config, steps=1, devices=jax.devices()[:1])
    for path in (("up", "kernel"), ("up", "bias"), ("out", "kernel")):
        old, grad = state.params[path[0]][path[1]], grads[path[0]][path[1]]
        decay = 0.01 * old if path[1] == "kernel" else 0.0
        new = old - 1e-2 * (grad / (jnp.abs(grad) + 1e-8) + decay)
        np.testing.assert_allclose(after.params[path[0]][path[1]], new, atol=1e-6)
        np.testing.assert_allclose(after.ema[path[0]][path[1]], 0.1 * old + 0.9 * new, atol=1e-6)
    np.testing.assert_allclose(history[0]["grad_norm"], norm, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    config = toy.config(task__nan_from=2)
    history, state = run(config, steps=5, devices=jax.devices()[:1])
    _, before = run(toy.config(), steps=2, devices=jax.devices()[:1])
    assert [metrics["skipped"] for metrics in history] == [0, 0, 1, 2, 3]
    assert np.isnan(history[-1]["loss"])
    assert (state.step, state.skipped) == (5, 3)
    for name in ("params", "opt_state", "ema", "extra"):
        assert trees_equal(getattr(state, name), getattr(before, name)), name


def test_one_program_that_donates_and_never_recompiles_or_talks_to_the_host():
    config = toy.config(optim__accumulate=2, mesh__data=1, mesh__fsdp=2, mesh__tensor=4)
    mesh, state, _, step = build(config)
    for leaf in (state.opt_state[1][0].mu["up"]["kernel"], state.params["out"]["kernel"]):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size, "not split"
    feed = [to_global(batch, batch_sharding(mesh)) for batch in batches(config, 4)]
    frozen = jax.device_put(toy.Task().frozen(), replicated(mesh))
    with jax.set_mesh(mesh):
        text = step.lower(state, frozen, feed[0]).compile().as_text()
        with jax.transfer_guard("disallow"):
            for batch in feed:
                given, (state, _) = state, step(state, frozen, batch)
                assert given.params["out"]["kernel"].is_deleted(), "not donated"
    for word in ("infeed", "outfeed", "callback", "send(", "recv("):
        assert word not in text
    assert step._cache_size() == 1
