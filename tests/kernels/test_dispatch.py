"""The choice of an implementation, and the refusals of every operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxvid.errors import UserError
from jaxvid.kernels import dispatch
from jaxvid.kernels.attention import attention
from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention
from jaxvid.layers import masks


def refuses(*arrays):
    raise NotImplementedError("not here")


TABLE = {"refuses": refuses, "first": lambda x: x + 1, "second": lambda x: x + 2}


def test_run():
    assert dispatch.run(TABLE, "second", ("first",), 0) == 2
    assert dispatch.run(TABLE, "auto", ("refuses", "second", "first"), 0) == 2
    for implementation in ("refuses", "auto"):
        with pytest.raises(NotImplementedError, match="not here"):
            dispatch.run(TABLE, implementation, ("refuses",), 0)


@pytest.mark.parametrize(
    "platform, dtype, tokens, names",
    [
        ("gpu", jnp.bfloat16, 128, ("gpu", "chunked")),
        ("gpu", jnp.bfloat16, 127, ("chunked",)),  # kernels pad tokens to blocks
        ("tpu", jnp.float32, 128, ("chunked",)),  # not in the table below
        ("gpu", jnp.bfloat16, 1, ("reference",)),
        (None, jnp.bfloat16, 128, ("chunked",)),  # the CPU of the tests
    ],
)
def test_fastest(platform, dtype, tokens, names):
    q_BLAK = jnp.ones((1, tokens, 1, 1), dtype)
    device = platform and AbstractDevice(device_kind="", platform=platform, num_cores=None)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert dispatch.fastest(q_BLAK, {"gpu": None, "chunked": None}) == names


X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.float32)
OPERATIONS = {
    linear_attention: dict(q_BLAK=X, k_BLAK=X, v_BLAV=X),
    gated_delta: dict(q_BLAK=X, k_BLAK=X, v_BLAV=X, beta_BLA=X[..., 0]),
    attention: dict(
        q_BLAK=X,
        k_BMAK=X,
        v_BMAK=X,
        q_position_L=np.arange(4),
        k_position_M=np.arange(4),
        allow=masks.full,
    ),
}


@pytest.mark.parametrize(
    "op, changes, message",
    [
        (linear_attention, dict(k_BLAK=X[..., :5]), "q, k, v shapes="),
        (linear_attention, dict(v_BLAV=X[..., :0]), "q, k, v shapes="),
        (linear_attention, dict.fromkeys(("q_BLAK", "k_BLAK", "v_BLAV"), X[:0]), "at least 1"),
        (linear_attention, dict(log_decay=X[..., 0, 0]), r"log_decay.shape=\[1, 4\]: must be "),
        (linear_attention, dict(initial_state=X[0]), "initial_state.shape="),
        (linear_attention, dict(segment_ids=jnp.ones(4, int)), "segment_ids.shape="),
        (linear_attention, dict(chunk=0), "chunk=0: must be a whole number of at least 1"),
        (linear_attention, dict(chunk=2.5), "chunk=2.5: must be a whole number"),
        (linear_attention, dict(implementation="cuda"), "implementation='cuda': .*auto, tpu, gpu"),
        (gated_delta, dict(implementation="gpu"), "implementation='gpu': .*auto, tpu, chunked"),
        (gated_delta, dict(beta_BLA=X[..., 0, 0]), r"beta.shape=\[1, 4\]: must be \[1, 4, 2\]"),
        (gated_delta, dict(log_decay=X), "log_decay.shape=.*per channel"),
        (gated_delta, dict(chunk=0), "chunk=0"),
        (attention, dict(implementation="flash"), "implementation='flash': .*cudnn, gpu, tpu, xla"),
    ],
)
def test_refusals(op, changes, message):
    with pytest.raises(UserError, match=message) as error:
        op(**OPERATIONS[op] | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("op", OPERATIONS)
def test_scale(op):
    arguments = OPERATIONS[op]
    wanted = op(**arguments | dict(q_BLAK=4 * X))
    got = op(**arguments, scale=4 * X.shape[-1] ** -0.5)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [linear_attention, gated_delta])
def test_lists_are_as_arrays(op):
    beta = np.full((1, 4, 2), 0.5)
    segment_ids, state = [[0, 0, 1, 1]], np.ones((1, 2, 8, 8))

    def run(beta, log_decay, segment_ids, state):
        betas = (beta,) if op is gated_delta else ()
        return op(X, X, X, *betas, log_decay, segment_ids=segment_ids, initial_state=state)

    got = jax.jit(lambda a, b: run(beta.tolist(), [a, b], segment_ids, state.tolist()))(-1.0, -2.0)
    wanted = run(beta, jnp.array([-1.0, -2.0]), np.array(segment_ids), jnp.asarray(state))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
