"""Tests that need a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention
from tests.kernels import harness
from tests.tasks.test_ar_diffusion import Task, batch, fields, opened

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("arrangement", ["joint", "factorised"])
def test_bfloat16_gradients_follow_float32(arrangement):
    grads = {}
    for dtype in ("float32", "bfloat16"):
        task = Task(**fields(model__dtype=dtype, model__arrangement=arrangement))

        def loss(params, task=task):
            rng = jax.random.key(0)
            return task.loss(params, batch(), rng, step=0, frozen={}, extra={})[0]

        with jax.default_matmul_precision("highest"):
            grads[dtype] = jax.jit(jax.grad(loss))(opened(task))
    flat = {
        dtype: jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(g))))
        for dtype, g in grads.items()
    }
    error = jnp.linalg.norm(flat["bfloat16"] - flat["float32"]) / jnp.linalg.norm(flat["float32"])
    assert error < 0.05


def test_cached_sampling_equals_uncached():
    rng, cond = jax.random.key(0), {"num": 2}
    videos = []
    with jax.default_matmul_precision("highest"):
        for memory in ("cache", "none"):
            task = Task(**fields(sampler__memory=memory))
            videos.append(task.sample(opened(task), rng, cond, frozen={}, frames=9))
    np.testing.assert_allclose(*videos, atol=1e-4)


@pytest.mark.parametrize(
    "L, K, V, decay, strength, form, chunk",
    [
        *(row[2:] for row in harness.COVER if row[1] == "gpu"),
        (1000, 16, 24, "token", "mixed", "packed", None),
        (5000, 128, 128, "token", "weak", "plain", None),  # in four segments
    ],
)
def test_linear_attention_kernels(L, K, V, decay, strength, form, chunk):
    arrays, segment_ids = harness.make(L, K, V, decay, strength, packed=form == "packed")
    run = dict(implementation="gpu", chunk=chunk, value=0.02, gradient=0.03)
    harness.assert_equals_reference(harness.rounded(arrays), segment_ids, **run)


@pytest.mark.parametrize("L", [64, 300])
def test_gated_delta_uses_xla(L):
    """It has no GPU kernel."""
    arrays, _ = harness.make(L, 64, 256, "token", op=gated_delta)
    program = jax.jit(gated_delta).lower(*harness.rounded(arrays)[:-1]).as_text()
    assert "triton" not in program
    run = dict(op=gated_delta, implementation="auto", value=0.02, gradient=0.03)
    harness.assert_equals_reference(harness.rounded(arrays), **run)


def test_linear_attention_uses_its_kernels():
    x = jnp.ones((1, 256, 2, 64), jnp.bfloat16)
    program = jax.jit(linear_attention).lower(x, x, x).as_text()
    assert "triton" in program
