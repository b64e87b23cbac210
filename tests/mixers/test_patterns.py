"""Every mixer in the four patterns of attention: {self, cross} x {causal, non-causal}.

After CAB (Zhang et al. 2023). The contract has one pattern, frames that see themselves and what
came before; the others are made of it:

    causal self         a stream of frames
    non-causal self     the clip as one frame, whose tokens all see each other
    causal cross        the source read by `prefill`, then a stream of frames
    non-causal cross    the source read by `prefill`, then the clip as one frame

so they are defined for every mixer. What is not: cross attention that sees the source alone and not
the target. Nothing here offers that, since a state holds both and a reading cannot tell them apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.mixers import MIXERS
from tests.mixers.test_mixers import disturbed

FRAMES, SOURCE, WIDTH = 5, 3, 16

# Mixers of one frame that tell in which order its tokens come, and by what.
ORDERED = {
    "softmax": "rotary positions by row and column",
    "lightnet": "MD-TPE and MD-LRPE by row and column",
    "gated_delta": "tokens write in order, each correcting what is there",
}


@functools.cache
def build(name, causal):
    """(run, start, step, x, source): a clip x of FRAMES tokens, all apart if causal and else in one
    frame. start reads the source, step frames; run does both, or reads no source if it is None."""
    mixer = MIXERS[name](width=WIDTH, heads=2, grid=(1, 1) if causal else (1, FRAMES))
    rng = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(rng[0], (1, FRAMES, WIDTH))
    frames = (1, FRAMES, 1, WIDTH) if causal else (1, 1, FRAMES, WIDTH)
    params = disturbed(jax.jit(mixer.init)(rng[1], x.reshape(frames)))

    @jax.jit
    def start(source):
        return mixer.apply(params, source, frames[2], method="prefill")

    @jax.jit
    def step(x, state):
        return mixer.apply(params, x, state)

    def run(x, source):
        state = None if source is None else start(source)[1]
        return step(x.reshape(frames), state)[0].reshape(x.shape)

    return run, start, step, x, jax.random.normal(rng[2], (1, SOURCE, WIDTH))


def moved(f, x):
    """bool [token of x, token of f(x)]: whether the second changes with the first."""
    y = np.asarray(f(x))
    changed = [np.asarray(f(x.at[:, i].add(1.0))) != y for i in range(x.shape[1])]
    return np.stack(changed).any(axis=(1, 3))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_causal(name, cross):
    """Token by token equals all at once; a target sees the source, itself and what came before."""
    run, start, step, x, source = build(name, causal=True)
    source = source if cross else None
    whole = run(x, source)
    state, parts = start(source)[1] if cross else None, []
    for i in range(FRAMES):
        y, state = step(x[:, i].reshape(1, 1, 1, WIDTH), state)
        parts.append(y.reshape(1, WIDTH))
    np.testing.assert_allclose(jnp.stack(parts, 1), whole, atol=1e-5)
    sees = moved(lambda x: run(x, source), x)
    if name == "routing":  # whether it sees an earlier token is decided by content
        assert np.diag(sees).all() and not np.tril(sees, -1).any()
    else:
        np.testing.assert_array_equal(sees, np.tri(FRAMES, dtype=bool).T)
    if cross:
        assert moved(lambda source: run(x, source), source).any(axis=1).all()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_non_causal(name, cross):
    """Every target sees every other; their order matters where ORDERED says so, and only there."""
    run, _, _, x, source = build(name, causal=False)
    source = source if cross else None
    assert moved(lambda x: run(x, source), x).all()
    if cross:
        assert moved(lambda source: run(x, source), source).any(axis=1).all()
    backward = run(x[:, ::-1], source)[:, ::-1]
    difference = np.abs(backward - run(x, source)).max()
    assert (difference > 1e-3) if name in ORDERED else (difference < 1e-5), difference
