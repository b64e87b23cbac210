"""The gated delta rule: the reference, the inverse, and the TPU kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvid.kernels.gated_delta import chunked, gated_delta
from tests.kernels.harness import (
    TOPOLOGIES,
    assert_close,
    assert_equals_reference,
    interpreter,
    make,
)


def test_reference_equals_matrix_form():
    """S_t = exp(g_t) (1 - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t in float64."""
    arrays, segment_ids = make(30, 6, 5, "token", packed=True, op=gated_delta)
    (*tokens, state) = arrays
    y, last = gated_delta(
        *tokens,
        initial_state=state,
        segment_ids=segment_ids,
        return_state=True,
        implementation="reference",
    )
    q, k, v, beta, g, state = (np.asarray(x, np.float64) for x in arrays)
    wanted = np.zeros(v.shape)
    for b, t, a in np.ndindex(beta.shape):
        begins = t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]
        keep = 0 if begins else np.exp(g[b, t, a])
        erase = np.eye(6) - beta[b, t, a] * np.outer(k[b, t, a], k[b, t, a])
        write = beta[b, t, a] * np.outer(k[b, t, a], v[b, t, a])
        state[b, a] = keep * erase @ state[b, a] + write
        wanted[b, t, a] = q[b, t, a] @ state[b, a] * 6**-0.5
    assert_close({"y": y, "state": last}, {"y": wanted, "state": state})


@pytest.mark.parametrize("G", [1, 17, 37, 64])
def test_inverse(G):
    lower_NGG = np.tril(np.random.default_rng(G).normal(size=(3, G, G)), -1) * G**-0.5
    exact = np.linalg.inv(np.eye(G) + lower_NGG)
    rolled = functools.partial(chunked.inverse, rolled=True)
    for invert in (chunked.inverse, chunked.by_halves, rolled):
        got = jax.jit(invert)(lower_NGG.astype(np.float32))
        np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("implementation", ["chunked", "tpu"])
def test_equal_keys(implementation, launch):
    """With equal keys, as in a still video, every write replaces the one before."""
    L = 128
    k = jnp.full((1, L, 1, 16), 0.25)
    v = jax.random.normal(jax.random.key(0), (1, L, 1, 16))
    beta = jnp.ones((1, L, 1))
    y = gated_delta(k, k, v, beta, scale=1.0, chunk=L, implementation=implementation)
    np.testing.assert_allclose(y, v, atol=1e-5)


@pytest.mark.parametrize("power", [1.9, 1.97, 1.99])
def test_repeated_keys_do_not_diverge_in_bfloat16(power):
    """One key for 65,536 tokens: what it reads is s <- (1 - power) s + power v, with
    power = beta |k|^2 below 2, in float64."""
    L, K = 2**16, 16
    key_K = jax.random.normal(jax.random.key(1), (K,))
    key_K = (key_K / jnp.linalg.norm(key_K)).astype(jnp.bfloat16)
    norm2 = float(jnp.square(key_K.astype(jnp.float32)).sum())
    v = jax.random.normal(jax.random.key(0), (1, L, 1, 4)).astype(jnp.bfloat16)
    y = _repeated(jnp.broadcast_to(key_K, (1, L, 1, K)), v, jnp.full((1, L, 1), power / norm2))
    read = np.zeros(4)
    wanted = [read := (1 - power) * read + power * v_V for v_V in np.asarray(v[0, :, 0], float)]
    error = np.asarray(y[0, :, 0], float) - wanted
    assert np.sqrt(np.square(error).mean()) < 0.3 * np.sqrt(np.square(wanted).mean())


@jax.jit
def _repeated(k, v, beta):
    return gated_delta(k, k, v, beta, scale=1.0)


def test_tpu_kernel_interpreted(capfd):
    """Heads and rows in random order, memory that starts as NaN, and a check for races."""
    arrays, segment_ids = make(300, 16, 24, "token", packed=True, op=gated_delta)
    with pltpu.force_tpu_interpret_mode(interpreter(cores=2, seed=4)):
        assert_equals_reference(arrays, segment_ids, op=gated_delta, implementation="tpu")
    assert "RACE" not in capfd.readouterr().out


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
    inverse = 2 * 6 * 128**2  # two products per doubling of a block of two tokens
    products = B * L * A * (2 * 128 * (K + V) + 3 * K * V + inverse)
    assert compiled.cost_analysis()["flops"] == pytest.approx(2 * products, rel=0.05)


@pytest.mark.tpu_aot
def test_tpu_gradient_compiles(tpu_devices):
    """The kernel forward, and XLA chunks backward."""
    sharding = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    shapes = ((2, 256, 2, 64),) * 3 + ((2, 256, 2),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]

    def loss(*arrays):
        return jnp.sum(gated_delta(*arrays, implementation="tpu").astype(jnp.float32))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=range(5))).lower(*arrays).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1


@pytest.mark.tpu_aot
def test_tpu_kernel_compiles_for_a_pod(tpu_pod):
    """The automatic choice on TPU. Rows and heads are split and exchange nothing."""
    split = NamedSharding(tpu_pod, PartitionSpec(("data", "fsdp"), None, "tensor"))
    shapes = ((8, 256, 4, 128),) * 3 + ((8, 256, 4),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]
    with jax.set_mesh(tpu_pod):
        program = jax.jit(gated_delta).lower(*arrays).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 1
    assert not re.search(r" (all-|collective|reduce-scatter)", program)
