"""LightNet's one scan against its definition, over the axes of a video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.layers.embed import rotary_angles
from jaxvid.mixers.lightnet import exponentials, softmax_keys, spread
from jaxvid.mixers.linear_attention import over_frames

B, T, GRID, A, K = 2, 5, (2, 3), 2, 6
N = GRID[0] * GRID[1]


@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_one_scan_equals_the_definition(sharpness):
    """o_i = sum_j sum_c q_ic softmax_{j seen by i}(k_jc) cos(angle_i - angle_j) v_j, in float64."""
    q, k, v = np.random.default_rng(0).standard_normal((3, B, T, N, A, K)).astype(np.float32)
    k *= sharpness
    angle_TNK = rotary_angles(np.arange(T, dtype=np.int32), GRID, 2 * K)

    def scan(q, k, v):
        k, g_BTAK, _ = softmax_keys(k, jnp.full((B, A, K), -1e30))
        q, k = spread(q, angle_TNK), spread(k, angle_TNK)
        return over_frames(q, k, v, jnp.concatenate([g_BTAK] * 2, -1), None, scale=1.0)[0]

    y = np.asarray(jax.jit(scan)(q, k, v))
    angle_LK = np.float64(angle_TNK).reshape(-1, K)
    q, k, v = (np.float64(part).reshape(B, T * N, A, K) for part in (q, k, v))
    for t in range(T):
        seen = slice(0, (t + 1) * N)
        p_BMAK = np.exp(k[:, seen] - k[:, seen].max(axis=1, keepdims=True))
        p_BMAK /= p_BMAK.sum(axis=1, keepdims=True)
        for n in range(N):
            near_MK = np.cos(angle_LK[t * N + n] - angle_LK[seen])
            score = np.einsum("BAK,BMAK,MK->BMA", q[:, t * N + n], p_BMAK, near_MK)
            expected = np.einsum("BMA,BMAV->BAV", score, v[:, seen])
            np.testing.assert_allclose(y[:, t, n], expected, atol=1e-5 * sharpness)


def test_many_equal_keys_weigh_the_same_however_long_the_stream():
    """After n equal frames the memory is the mean of the values: decays of 1/n lose nothing."""
    frames = 3000
    k, v = np.zeros((1, frames, 1, 1, 2), np.float32), np.linspace(-1, 1, 2 * frames)
    v = v.astype(np.float32).reshape(1, frames, 1, 1, 2)
    k, g, log_sum = softmax_keys(k + 7.0, jnp.full((1, 1, 2), -1e30))
    _, memory = over_frames(jnp.ones_like(k), k, v, g, None, scale=1.0)
    np.testing.assert_allclose(memory[0, 0, 0], v.mean((0, 1, 2, 3)), atol=2e-5)
    np.testing.assert_allclose(log_sum, np.log(frames) + 7, rtol=1e-5)


def test_toeplitz_positions_equal_their_matrix():
    L, D, E = 6, 4, 3
    rng = np.random.default_rng(1)
    x, weight, logit = rng.standard_normal((2, L, D)), *rng.standard_normal((2, D, E))
    decay = 1 / (1 + np.exp(-logit))
    gap = np.arange(L)[:, None] - np.arange(L)
    matrix_DLM = np.einsum("DE,DELM->DLM", weight, decay[..., None, None] ** np.maximum(gap, 0))
    expected = np.einsum("DLM,BMD->BLD", matrix_DLM * (gap >= 0), x)
    y, state = jax.jit(exponentials)(x, weight, logit, np.zeros((2, D, E)))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose((weight * state).sum(-1), expected[:, -1], atol=1e-5)
