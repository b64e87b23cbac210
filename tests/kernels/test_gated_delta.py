"""The gated delta rule: chunks against the token recurrence, and what the rule promises."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvid.kernels.gated_delta import chunked, gated_delta
from tests.kernels import harness
from tests.kernels.harness import TOPOLOGIES, assert_close, interpreter


def inputs(L, K=16, V=24, decay=None, batch=2, heads=2):
    """(q, k, v, beta, log_decay, initial_state) with keys of norm 1 and beta in (0, 2)."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, L, heads, width)) for width in (K, K, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0, 2, (batch, L, heads))
    if decay == "token":
        some = rng.exponential(0.3, beta.shape)
        decay = -np.where(rng.random(beta.shape) < 0.1, 50.0, some)
    state = rng.normal(size=(batch, heads, K, V))
    arrays = (q, k, v, beta, decay, state)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


value_and_grads = functools.partial(harness.value_and_grads, op=gated_delta)


@pytest.mark.parametrize("L, decay, chunk", [(65, None, 64), (150, "token", 32), (1, "token", 1)])
def test_equals_reference(L, decay, chunk):
    arrays = inputs(L, decay=decay)
    segment_ids = jnp.asarray([np.arange(L) // 40, np.arange(L) // 7])
    got = value_and_grads(arrays, segment_ids, chunk=chunk)
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


@pytest.mark.parametrize("G", [1, 16, 17, 37, 64])
def test_inverse_of_a_triangle(G):
    lower_NGG = np.tril(np.random.default_rng(G).normal(size=(3, G, G)), -1) * G**-0.5
    exact = np.linalg.inv(np.eye(G) + lower_NGG)
    rolled = functools.partial(chunked.inverse, rolled=True)
    for invert in (chunked.inverse, chunked.by_halves, rolled):
        got = jax.jit(invert)(lower_NGG.astype(np.float32))
        np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("implementation", ["chunked", "tpu"])
def test_keys_that_do_not_change(implementation):
    """As in a still video: every write replaces the one before, however long the chunk."""
    L = 128
    k = jnp.full((1, L, 1, 16), 0.25)
    v = jax.random.normal(jax.random.key(0), (1, L, 1, 16))
    with pltpu.force_tpu_interpret_mode():
        y = gated_delta(
            k, k, v, jnp.ones((1, L, 1)), scale=1.0, chunk=L, implementation=implementation
        )
    np.testing.assert_allclose(y, v, atol=1e-5)


@pytest.mark.parametrize("L, decay, cores, seed", [(65, None, 1, 0), (300, "token", 2, 4)])
def test_tpu_kernel_interpreted(L, decay, cores, seed, capfd):
    """Chunks in order, heads and rows in any; memory starts as NaN and races are looked for."""
    arrays = inputs(L, decay=decay)
    segment_ids = jnp.asarray([np.arange(L) // 40, np.arange(L) // 7])
    with pltpu.force_tpu_interpret_mode(interpreter(cores, seed)):
        got = value_and_grads(arrays, segment_ids, implementation="tpu")
        jax.block_until_ready(got)
    assert "RACE" not in capfd.readouterr().out
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_tpu_kernel_compiles(topology, tpu_devices):
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])
    B, L, A, K, V = 2, 512, 2, 128, 256
    shapes = ((B, L, A, K), (B, L, A, K), (B, L, A, V), (B, L, A), (B, L, A))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    run = jax.jit(functools.partial(gated_delta, implementation="tpu"))
    compiled = run.lower(*arrays).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    inverse = 2 * 6 * 128**2  # two products for every doubling of a block of two tokens
    products = B * L * A * (2 * 128 * (K + V) + 3 * K * V + inverse)
    assert compiled.cost_analysis()["flops"] == pytest.approx(2 * products, rel=0.05)


@pytest.mark.tpu_aot
def test_tpu_gradient_compiles(tpu_devices):
    """The kernel forward and the chunks of XLA backward."""
    sharding = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    shapes = ((2, 256, 2, 64),) * 3 + ((2, 256, 2),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]

    def loss(*arrays):
        return jnp.sum(gated_delta(*arrays, implementation="tpu").astype(jnp.float32))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=range(5))).lower(*arrays).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1


@pytest.mark.tpu_aot
def test_tpu_kernel_compiles_for_a_pod(tpu_pod):
    """By itself the choice on TPU; rows and heads apart, with nothing to exchange."""
    split = NamedSharding(tpu_pod, PartitionSpec(("data", "fsdp"), None, "tensor"))
    shapes = ((8, 256, 4, 128),) * 3 + ((8, 256, 4),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]
    with jax.set_mesh(tpu_pod):
        program = jax.jit(gated_delta).lower(*arrays).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 1
    assert not re.search(r" (all-|collective|reduce-scatter)", program)


def test_a_written_value_is_read_back_and_overwritten():
    """With beta 1 a key returns the value that was written to it last, whatever others hold."""
    keys = jnp.eye(4)[jnp.array([0, 1, 2, 0, 3, 1])]
    values = jax.random.normal(jax.random.key(0), (6, 5))
    k, v = keys[None, :, None], values[None, :, None]
    _, state = gated_delta(
        k, k, v, jnp.ones((1, 6, 1)), return_state=True, implementation="chunked"
    )
    np.testing.assert_allclose(state[0, 0], values[jnp.array([3, 5, 2, 4])], atol=1e-6)


def test_bfloat16_keeps_its_dtype():
    exact = inputs(100, decay="token")
    arrays = [x.astype(jnp.bfloat16) for x in exact[:3]] + [*exact[3:]]
    wanted = value_and_grads([x.astype(jnp.float32) for x in arrays], implementation="reference")
    got = value_and_grads(arrays)
    assert got["y"].dtype == got["dq"].dtype == jnp.bfloat16
    assert got["state"].dtype == jnp.float32
    assert_close(got, wanted, value=0.02, gradient=0.03)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(beta_BLA=jnp.ones((1, 4))), r"beta of shape \[1, 4\]: must be \[1, 4, 2\]"),
        (dict(log_decay=jnp.ones((1, 4, 2, 8))), "log_decay by channel"),
        (dict(implementation="gpu"), "implementation='gpu': use auto, tpu, chunked, reference"),
    ],
)
def test_bad_input_is_answered_in_one_line(changes, message):
    x = jnp.ones((1, 4, 2, 8))
    arguments = dict(q_BLAK=x, k_BLAK=x, v_BLAV=x, beta_BLA=x[..., 0])
    with pytest.raises(ValueError, match=message):
        gated_delta(**{**arguments, **changes})


def test_gates_may_be_lists():
    x = jnp.ones((1, 2, 2, 8))
    beta, log_decay = [[[0.5, 1.0], [0.25, 0.0]]], [-0.5, -1.0]
    wanted = gated_delta(x, x, x, jnp.array(beta), jnp.array(log_decay))
    np.testing.assert_array_equal(gated_delta(x, x, x, beta, log_decay), wanted)
