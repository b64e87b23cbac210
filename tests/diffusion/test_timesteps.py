"""Timestep distributions against exact counting, brute force and published moments."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxvid.diffusion import timesteps

SAMPLERS = [timesteps.fopp, timesteps.uniform, timesteps.iid, timesteps.full_sequence]


@functools.cache
def draw(sampler, batch, frames, num_steps, seed=0):
    sampler = jax.jit(sampler, static_argnums=(1, 2, 3))
    return np.asarray(sampler(jax.random.key(seed), batch, frames, num_steps))


@functools.cache
def tails(frames, num_steps):
    """A[t][f]: non-decreasing ways to fill frames f+1.. when frame f is at t, exact integers."""
    A = [[1] * frames for _ in range(num_steps)]
    for t in reversed(range(num_steps - 1)):
        for f in reversed(range(frames - 1)):
            A[t][f] = A[t + 1][f] + A[t][f + 1]
    return A


@functools.cache
def heads(frames, num_steps):
    """E[t][f]: non-decreasing ways to fill frames 0..f-1 when frame f is at t, exact integers."""
    E = [[1] * frames for _ in range(num_steps)]
    for t in range(1, num_steps):
        for f in range(1, frames):
            E[t][f] = E[t - 1][f] + E[t][f - 1]
    return E


@functools.cache
def fopp_pmf(frames, num_steps):
    """Every non-decreasing vector -> its exact probability."""
    E, A = heads(frames, num_steps), tails(frames, num_steps)
    vectors = itertools.combinations_with_replacement(range(num_steps), frames)
    return {
        t: sum(Fraction(1, E[t[c]][c] * A[t[c]][c]) for c in range(frames)) / (frames * num_steps)
        for t in vectors
    }


@functools.cache
def fopp_marginals(frames, num_steps):
    """P(t_f = j) as float64 [T, S], by the paper's two recursions from every pivot frame:
    backward P(t_{f-1} = j | t_f = i) = E[j, f-1] / E[i, f] for j <= i,
    forward P(t_{f+1} = j | t_f = i) = A[j, f+1] / A[i, f] for j >= i.
    """
    E_ST = np.array(heads(frames, num_steps), dtype=float)
    A_ST = np.array(tails(frames, num_steps), dtype=float)
    total_TS = np.zeros((frames, num_steps))
    for c in range(frames):
        p_S = np.full(num_steps, 1 / num_steps)
        total_TS[c] += p_S
        for f in range(c, 0, -1):
            p_S = E_ST[:, f - 1] * np.cumsum((p_S / E_ST[:, f])[::-1])[::-1]
            total_TS[f - 1] += p_S
        p_S = np.full(num_steps, 1 / num_steps)
        for f in range(c, frames - 1):
            p_S = A_ST[:, f + 1] * np.cumsum(p_S / A_ST[:, f])
            total_TS[f + 1] += p_S
    return total_TS / frames


def test_official_counts():
    A, E = tails(16, 1000), heads(16, 1000)
    assert math.isclose(A[0][0], 8.489507323817043e32, rel_tol=1e-14)
    assert (A[500][8], A[998][0]) == (1616297597409000, 16)
    assert (E[500][8], E[10][14]) == (104071785999568101, 1961256)
    for t, f in itertools.product(range(0, 1000, 37), range(16)):
        assert A[t][f] == math.comb(999 - t + 15 - f, 15 - f) and E[t][f] == math.comb(t + f, f)
    assert sum(row[15] for row in E) == math.comb(1015, 16)
    assert tails(4, 6) == [
        [56, 21, 6, 1],
        [35, 15, 5, 1],
        [20, 10, 4, 1],
        [10, 6, 3, 1],
        [4, 3, 2, 1],
        [1, 1, 1, 1],
    ]
    assert heads(4, 6) == [
        [1, 1, 1, 1],
        [1, 2, 3, 4],
        [1, 3, 6, 10],
        [1, 4, 10, 20],
        [1, 5, 15, 35],
        [1, 6, 21, 56],
    ]


def test_official_small_marginals():
    pmf, p_TS = fopp_pmf(4, 6), fopp_marginals(4, 6)
    assert len(pmf) == 126 and sum(pmf.values()) == 1
    assert all(pmf[t] == pmf[tuple(5 - x for x in reversed(t))] for t in pmf), "mirror symmetry"
    for f, j in np.ndindex(4, 6):
        assert math.isclose(p_TS[f, j], sum(p for t, p in pmf.items() if t[f] == j))
    frame_0 = [0.42872, 0.221875, 0.137798, 0.093155, 0.067113, 0.051339]
    frame_1 = [0.22247, 0.197173, 0.174107, 0.153274, 0.134673, 0.118304]
    np.testing.assert_allclose(p_TS[:2], [frame_0, frame_1], atol=1e-6)
    np.testing.assert_allclose(p_TS[2:], [frame_1[::-1], frame_0[::-1]], atol=1e-6)


OFFICIAL_MEAN = [105.542, 181.817, 244.563, 299.133, 348.300, 393.825, 436.984, 478.806]
OFFICIAL_STD = [167.525, 210.542, 234.541, 249.660, 259.594, 266.077, 270.014, 271.880]


def moments(p_TS):
    t_S = np.arange(p_TS.shape[1])
    mean_T = p_TS @ t_S
    return mean_T, np.sqrt(p_TS @ t_S**2 - mean_T**2)


def test_official_large_marginals():
    p_TS = fopp_marginals(16, 1000)
    mean_T, std_T = moments(p_TS)
    mirrored = [999 - m for m in reversed(OFFICIAL_MEAN)]
    np.testing.assert_allclose(mean_T, [*OFFICIAL_MEAN, *mirrored], atol=1e-3)
    np.testing.assert_allclose(std_T, [*OFFICIAL_STD, *reversed(OFFICIAL_STD)], atol=1e-3)
    np.testing.assert_allclose(p_TS[0, [0, 999]], [0.035605, 6.3e-5], rtol=1e-2)


def p_value(t_BT, pmf):
    """Chi-square of the sampled vectors of timesteps < 6 against their probabilities."""
    codes = 6 ** np.arange(t_BT.shape[1])
    counts = np.bincount(t_BT @ codes, minlength=codes[-1] * 6)[np.array(list(pmf)) @ codes]
    assert counts.sum() == len(t_BT), "a vector outside the support"
    expected = np.array([float(p) for p in pmf.values()]) * len(t_BT)
    assert expected.min() > 5
    return stats.chisquare(counts, expected).pvalue


def test_fopp_has_the_exact_distribution():
    t_BT, pmf = draw(timesteps.fopp, 100_000, 4, 6), fopp_pmf(4, 6)
    assert p_value(t_BT, pmf) > 1e-3
    mirrored = dict(zip(pmf, reversed(pmf.values())))
    equal = dict.fromkeys(pmf, Fraction(1, 126))
    assert max(p_value(t_BT, mirrored), p_value(t_BT, equal)) < 1e-9, "the test has no power"


def test_uniform_has_the_exact_distribution():
    t_BT, pmf = draw(timesteps.uniform, 100_000, 4, 6), fopp_pmf(4, 6)
    assert p_value(t_BT, dict.fromkeys(pmf, Fraction(1, 126))) > 1e-3
    assert p_value(t_BT, pmf) < 1e-9


def test_iid_and_full_sequence_have_the_exact_distribution():
    pairs = dict.fromkeys(itertools.product(range(6), repeat=2), Fraction(1, 36))
    assert p_value(draw(timesteps.iid, 50_000, 2, 6), pairs) > 1e-3
    equal = {(t, t): Fraction(1, 6) for t in range(6)}
    assert p_value(draw(timesteps.full_sequence, 50_000, 2, 6), equal) > 1e-3


@pytest.mark.parametrize("frames, batch", [(16, 8_192), (128, 2_048)])
def test_fopp_marginals_at_full_size(frames, batch):
    """The mean of every frame and its law in 12 bins, at T = 1000; Bonferroni over the frames."""
    t_BT, p_TS = draw(timesteps.fopp, batch, frames, 1000), fopp_marginals(frames, 1000)
    mean_T, std_T = moments(p_TS)
    assert (np.abs(t_BT.mean(axis=0) - mean_T) < 4.5 * std_T / math.sqrt(batch)).all()
    for f in range(frames):
        edges = np.searchsorted(np.cumsum(p_TS[f]), np.linspace(0, 1, 13)[1:-1])
        starts = np.unique([0, *(edges + 1)])
        starts = starts[starts < 1000]
        expected = np.add.reduceat(p_TS[f], starts)
        counts = np.add.reduceat(np.bincount(t_BT[:, f], minlength=1000), starts)
        assert stats.chisquare(counts, expected / expected.sum() * batch).pvalue > 1e-3 / frames


def test_uniform_mean():
    for frames, num_steps in ((16, 1000), (128, 3)):
        t_BT = draw(timesteps.uniform, 4096, frames, num_steps)
        expected_T = (np.arange(frames) + 1) * (num_steps - 1) / (frames + 1)
        error_T = np.abs(t_BT.mean(axis=0) - expected_T)
        assert (error_T < 4.5 * t_BT.std(axis=0) / math.sqrt(4096) + 1e-3).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shape_dtype_range_order_and_one_compilation(sampler):
    for frames, num_steps in ((1, 1000), (128, 1000), (128, 1), (5, 2)):
        t_BT = draw(sampler, 64, frames, num_steps)
        assert t_BT.shape == (64, frames) and t_BT.dtype == np.int32
        assert t_BT.min() >= 0 and t_BT.max() < num_steps
        assert sampler is timesteps.iid or (np.diff(t_BT, axis=1) >= 0).all()

    traces = []

    @jax.jit
    def step(rng):
        traces.append(rng)
        return sampler(rng, 8, 16, 1000)

    a, b, again = (np.asarray(step(jax.random.key(seed))) for seed in (0, 1, 0))
    assert len(traces) == 1
    assert (a != b).any()
    np.testing.assert_array_equal(a, again)


def test_one_frame_is_uniform():
    for sampler in (timesteps.fopp, timesteps.uniform):
        t_B = draw(sampler, 50_000, 1, 7)[:, 0]
        assert stats.chisquare(np.bincount(t_B, minlength=7)).pvalue > 1e-3


def test_clean_prefix():
    t_BT = 1 + jnp.asarray(draw(timesteps.iid, 40_000, 6, 999))
    clean_prefix = jax.jit(timesteps.clean_prefix)
    result_BT, prefix_B = map(np.asarray, clean_prefix(jax.random.key(1), t_BT, 0.3))
    assert result_BT.dtype == prefix_B.dtype == np.int32
    expected = np.where(np.arange(6) < prefix_B[:, None], 0, t_BT)
    np.testing.assert_array_equal(result_BT, expected)
    counts = np.bincount(prefix_B)
    assert len(counts) == 6, "at least one frame is left to denoise"
    assert stats.chisquare(counts, 40_000 * np.array([0.7, *[0.06] * 5])).pvalue > 1e-3
    for frames, probability, lengths in ((6, 0.0, {0}), (2, 1.0, {1}), (1, 1.0, {0})):
        _, prefix_B = clean_prefix(jax.random.key(0), jnp.full((64, frames), 5), probability)
        assert set(prefix_B.tolist()) == lengths
