"""Parallel decoding, beside a loop over steps in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.masking import schedules
from jaxvid.masking.decoding import Sampler, decode, digits, from_digits, guided

V, MASK = 11, 11


def keys(clips, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(clips))


def network(seed=0, length=24):
    """A stand-in for a network: logits [B, L, 1, V] that depend on the tokens to both sides."""
    rng = np.random.default_rng(seed)
    own_LV = rng.standard_normal((length, V)).astype(np.float32)
    other = rng.standard_normal((V + 1, V)).astype(np.float32)

    def logits(ids_BL):
        xp = np if isinstance(ids_BL, np.ndarray) else jnp
        table = xp.asarray(other)
        left, right = table[xp.roll(ids_BL, 1, 1)], table[xp.roll(ids_BL, -1, 1)]
        return (xp.asarray(own_LV) + left + right)[:, :, None]

    return logits


def looped(logits, ids_BL, is_free_BL, steps, rounding):
    """Greedy decoding without noise, one clip after another, in numpy."""
    ids_BL, L = ids_BL.copy(), ids_BL.shape[1]
    table = schedules.decoding_counts("cosine", steps, L, rounding)
    for ids_L, is_free_L in zip(ids_BL, is_free_BL):
        masked = list(np.flatnonzero(is_free_L))
        for step in range(steps):
            seen = ids_L.copy()
            seen[masked] = MASK
            score_LV = logits(seen[None])[0, :, 0].astype(np.float64)
            log_LV = score_LV - np.log(np.exp(score_LV).sum(-1, keepdims=True))
            ids_L[masked] = log_LV[masked].argmax(-1)
            masked.sort(key=lambda place: log_LV[place].max())
            masked = masked[: table[step, is_free_L.sum()]]
    return ids_BL


@pytest.mark.parametrize("rounding", schedules.ROUNDINGS)
def test_greedy_decoding_is_the_loop(rounding):
    rng = np.random.default_rng(1)
    ids_BL = rng.integers(0, V, (3, 24)).astype(np.int32)
    is_free_BL = rng.random((3, 24)) < [[1.0], [0.6], [0.1]]
    sampler = Sampler(steps=5, rounding=rounding, temperature=0.0, noise=0.0)
    logits = network()
    found = jax.jit(
        lambda ids, free: decode(
            lambda x, _: logits(x), ids, jnp.full_like(ids, MASK), free, keys(3), sampler
        )
    )(ids_BL, is_free_BL)
    np.testing.assert_array_equal(found, looped(logits, ids_BL, is_free_BL, 5, rounding))


@pytest.mark.parametrize("scored", [False, True])
def test_known_tokens_never_change_and_nothing_stays_masked(scored):
    rng = np.random.default_rng(2)
    ids_BL = rng.integers(0, V, (4, 24)).astype(np.int32)
    is_free_BL = rng.random((4, 24)) < [[0.0], [0.3], [0.9], [1.0]]
    logits, seen = network(), []

    def predict(ids_BL, is_masked_BL):
        jax.debug.callback(lambda *x: seen.append(tuple(map(np.array, x))), ids_BL, is_masked_BL)
        return logits(ids_BL)

    score = (lambda ids_BL: jnp.sin(ids_BL * 1.0)) if scored else None
    start = jnp.where(is_free_BL, 0, ids_BL)
    fill = jnp.full_like(start, MASK)
    found = decode(predict, start, fill, is_free_BL, keys(4), Sampler(steps=6), score)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.where(is_free_BL, 0, found), np.where(is_free_BL, 0, ids_BL))
    assert found.min() >= 0 and found.max() < V
    table = schedules.decoding_counts("cosine", 6, 24, "floor")
    free_B = is_free_BL.sum(1)
    expected = [free_B, *(row[free_B] for row in table[:-1])]
    assert len(seen) == 6  # one evaluation per step
    for (inputs, is_masked), counts in zip(seen, expected):
        np.testing.assert_array_equal(is_masked.sum(1), counts)
        np.testing.assert_array_equal(inputs == MASK, is_masked)
        assert not (is_masked & ~is_free_BL).any()


def test_a_clip_depends_on_its_own_key_alone():
    ids = jnp.zeros((3, 24), jnp.int32)
    logits, sampler = network(), Sampler(steps=4)

    def run(rows):
        rows = jnp.array(rows)
        return decode(
            lambda x, _: logits(x),
            ids[rows],
            jnp.full_like(ids[rows], MASK),
            ids[rows] == 0,
            keys(3)[rows],
            sampler,
        )

    whole = run([0, 1, 2])
    np.testing.assert_array_equal(run([2, 0]), whole[jnp.array([2, 0])])
    assert (whole[0] != whole[1]).any()


def test_tokens_follow_the_distribution_of_the_temperature():
    """One step on independent tokens draws from softmax(logits / temperature), within 5 sigma."""
    logits_V = np.random.default_rng(3).standard_normal(V)
    L = 40_000
    ids = jnp.zeros((1, L), jnp.int32)

    def shares(**options):
        sampler = Sampler(steps=1, noise=0.0, **options)
        logits = jnp.broadcast_to(jnp.float32(logits_V), (1, L, 1, V))
        ids_BL = decode(lambda *_: logits, ids, ids, ids == 0, keys(1), sampler)
        return np.bincount(ids_BL[0], minlength=V) / L

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    for options, expected in [
        ({}, softmax(logits_V)),
        ({"temperature": 0.5}, softmax(logits_V / 0.5)),
        ({"top_k": 3}, softmax(np.where(logits_V < np.sort(logits_V)[-3], -np.inf, logits_V))),
        ({"top_p": 0.4}, None),
        ({"temperature": 0.0}, np.eye(V)[logits_V.argmax()]),
        ({"cooling": True}, np.eye(V)[logits_V.argmax()]),  # of one step, the last
    ]:
        if expected is None:  # the fewest likeliest values that reach 0.4
            order = np.argsort(-softmax(logits_V))
            kept = order[: 1 + np.searchsorted(np.cumsum(softmax(logits_V)[order]), 0.4)]
            expected = np.zeros(V)
            expected[kept] = softmax(logits_V[kept])
        sigma = np.sqrt(expected * (1 - expected) / L)
        assert (np.abs(shares(**options) - expected) <= 5 * sigma).all(), options


def test_the_noise_of_the_confidence_ends_before_the_last_step():
    """With much noise the order is random, but the last step and its tokens are not."""
    logits = network()
    ids = jnp.zeros((1, 24), jnp.int32)

    def run(noise, seed):
        sampler = Sampler(steps=3, temperature=0.0, noise=noise)
        fill = jnp.full_like(ids, MASK)
        return decode(lambda x, _: logits(x), ids, fill, ids == 0, keys(1, seed), sampler)

    np.testing.assert_array_equal(run(0.0, 0), run(0.0, 1))
    assert (run(1e5, 0) != run(1e5, 1)).any()


@pytest.mark.parametrize("scored", [False, True])
def test_the_noise_falls_with_the_steps(scored):
    """After step i of 4 it has the scale noise (1 - (i + 1) / 4): Gumbel, of a critic uniform."""
    L, scale = 400, 1.0
    logits_LV = np.random.default_rng(4).standard_normal((L, V))
    logits = jnp.float32(logits_LV)[None, :, None]
    seen, start = [], jnp.zeros((1, L), jnp.int32)

    def predict(_, is_masked_BL):
        jax.debug.callback(lambda x: seen.append(np.array(x[0])), is_masked_BL)
        return logits

    sampler = Sampler(steps=4, temperature=0.0, noise=scale)
    score = (lambda ids_BL: 0.001 * jnp.arange(L)[None]) if scored else None
    decode(predict, start, start + MASK, start == 0, keys(1), sampler, score)
    jax.effects_barrier()
    assert len(seen) == 4
    is_masked_L = np.ones(L, bool)
    for i, found_L in enumerate(seen):
        np.testing.assert_array_equal(found_L, is_masked_L)
        rng = jax.random.split(jax.random.fold_in(keys(1)[0], i))[1]
        draw = jax.random.uniform(rng, (L,)) - 0.5 if scored else jax.random.gumbel(rng, (L,))
        log_LV = logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))
        own_L = 0.001 * np.arange(L) if scored else log_LV.max(-1)
        confidence_L = own_L + scale * (1 - (i + 1) / 4) * np.asarray(draw, np.float64)
        order = np.argsort(np.where(is_masked_L, confidence_L, np.inf), kind="stable")
        left = schedules.decoding_counts("cosine", 4, L, "floor")[i, L]
        is_masked_L = np.isin(np.arange(L), order[:left])


def test_digits_of_large_vocabularies():
    ids = jnp.array([0, 511, 512, 2**18 - 1])
    parts = digits(ids, 2, 512)
    np.testing.assert_array_equal(parts, [[0, 0], [511, 0], [0, 1], [511, 511]])
    np.testing.assert_array_equal(from_digits(parts, 512), ids)


def test_guidance():
    cond, null = jnp.array([1.0, -2.0, 0.3]), jnp.array([0.1, 0.7, -5.0])
    np.testing.assert_allclose(guided(cond, null, 1.0), cond, atol=1e-6)
    np.testing.assert_array_equal(guided(cond, null, 0.0), null)
    np.testing.assert_allclose(guided(cond, null, 3.0), null + 3 * (cond - null), rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "^steps=0: must be at least 1"),
        ({"schedule": "sine"}, "^schedule='sine': unknown"),
        ({"rounding": "up"}, "^rounding='up': unknown"),
        ({"temperature": -1.0}, "^temperature=-1.0: must be at least 0"),
        ({"noise": float("nan")}, "^noise=nan: must be"),
        ({"top_p": 1.5}, "^top_p=1.5: must lie between 0 and 1"),
        ({"top_k": -1}, "^top_k=-1: must be at least 0"),
    ],
)
def test_bad_samplers(options, message):
    with pytest.raises(UserError, match=message):
        Sampler(**options)
