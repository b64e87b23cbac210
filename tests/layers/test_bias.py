"""Biased attention against loops; slopes against published numbers; one set of weights per grid."""

import jax
import numpy as np

from jaxvid.layers.bias import ContinuousBias, DistanceBias, TableBias, alibi_slopes, attend


def build(module, grid):
    """(variables, compiled apply)."""
    variables = jax.jit(module.init, static_argnums=1)(jax.random.key(0), grid)
    return variables, jax.jit(module.apply, static_argnums=1)


def test_slopes_of_8_and_of_12_heads():
    np.testing.assert_array_equal(alibi_slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(12)[:8], alibi_slopes(8))
    others = [0.70711, 0.35355, 0.17678, 0.08839]
    np.testing.assert_allclose(alibi_slopes(12)[8:], others, atol=1e-5)


def test_attention_with_a_bias_by_hand():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, 4)) for n in (2, 5, 5))
    bias = rng.standard_normal((3, 2, 5))
    y = jax.jit(attend)(*(x.astype(np.float32) for x in (q, k, v, bias)))
    for b, i, a in np.ndindex(2, 2, 3):
        p = np.exp(k[b, :, a] @ q[b, i, a] / 2 + bias[a, i])
        np.testing.assert_allclose(y[b, i, a], p @ v[b, :, a] / p.sum(), rtol=1e-4, atol=1e-5)


def test_a_bias_depends_on_the_offset_alone_and_serves_every_grid():
    for module in (ContinuousBias(heads=2, width=8), TableBias(heads=2, window=5)):
        variables, apply = build(module, (3, 5))
        bias = np.asarray(apply(variables, (3, 5))).reshape(2, 3, 5, 3, 5)
        for dy, dx in ((1, 2), (0, -1), (-2, 3)):
            cells = [
                bias[:, y, x, y - dy, x - dx]
                for y, x in np.ndindex(3, 5)
                if 0 <= y - dy < 3 and 0 <= x - dx < 5
            ]
            np.testing.assert_allclose(np.ptp(cells, axis=0), 0, atol=1e-6)
            assert np.abs(cells[0] - bias[:, 0, 0, 0, 0]).max() > 1e-4
        part = np.asarray(apply(variables, (2, 4))).reshape(2, 2, 4, 2, 4)
        np.testing.assert_allclose(part, bias[:, :2, :4, :2, :4], atol=1e-6)


def test_continuous_bias_reads_logarithmic_offsets():
    """Swin v2's formula, layer by layer, for the offset (2, -1)."""
    variables, apply = build(ContinuousBias(heads=2, width=8), (3, 2))
    weights = jax.device_get(variables["params"])
    x = np.array([np.log(3.0), -np.log(2.0)])
    for name in ("in", "hidden"):
        x = x @ weights[name]["kernel"] + weights[name]["bias"]
        x = np.where(x > 0, x, 0.1 * x)
    expected = x @ weights["out"]["kernel"] + weights["out"]["bias"]
    bias = np.asarray(apply(variables, (3, 2))).reshape(2, 3, 2, 3, 2)
    np.testing.assert_allclose(bias[:, 2, 0, 0, 1], expected, rtol=1e-5, atol=1e-6)


def test_distance_bias_by_hand_and_its_gradient():
    """Distances between cells at (0.5, 0.5) .. and tokens, in units of the tokens' spacing."""
    variables, apply = build(DistanceBias(heads=2, tokens=3), (2, 4))
    tokens = np.asarray(variables["params"]["place"])
    slopes = np.exp(variables["params"]["log_slope"])
    np.testing.assert_allclose(slopes, [8, 0.5], rtol=1e-6)
    bias = np.asarray(apply(variables, (2, 4)))
    positions = [(y + 0.5, x + 0.5) for y, x in np.ndindex(2, 4)]
    positions += [(2 * y, 4 * x) for y, x in tokens]
    for i, j in np.ndindex(11, 11):
        distance = np.hypot(*np.subtract(positions[i], positions[j])) / (2 * 4 / 3) ** 0.5
        np.testing.assert_allclose(bias[:, i, j], -slopes * distance, rtol=1e-5, atol=1e-5)
    grads = jax.jit(jax.grad(lambda v: apply(v, (2, 4)).sum()))(variables)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_tokens_start_evenly_spread():
    """No point of the frame is further from a token than 1.3 spacings of a square lattice."""
    for count in (1, 5, 32, 100):
        module = DistanceBias(heads=1, tokens=count)
        token_M2 = module.init(jax.random.key(0), (1, 1))["params"]["place"]
        point = np.stack(np.mgrid[:50, :50], -1).reshape(-1, 1, 2) / 50
        nearest = np.linalg.norm(point - np.asarray(token_M2), axis=-1).min(axis=1)
        assert nearest.max() * count**0.5 < 1.3, count
