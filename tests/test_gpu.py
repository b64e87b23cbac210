"""What only a GPU can show: JAX_PLATFORMS=cuda python -m pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
