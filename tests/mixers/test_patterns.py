"""Every mixer in the four patterns of attention: {self, cross} x {causal, non-causal}.

After CAB (Zhang et al. 2023). The contract has one pattern: frames see themselves and the past. The
others follow from it, so every mixer has them:

    causal self         a stream of frames
    non-causal self     the clip as one frame, whose tokens all see each other
    causal cross        `prefill` reads the source, then a stream of frames
    non-causal cross    `prefill` reads the source, then the clip as one frame

No mixer offers cross attention to the source alone, without the target: a state holds both, and a
reading cannot tell them apart.
"""

import functools

import jax
import numpy as np
import pytest

from jaxvid.mixers import MIXERS
from tests import laws

FRAMES, SOURCE, WIDTH = 5, 3, 16

# Mixers that distinguish the order of the tokens of a frame, and how.
ORDERED = {
    "softmax": "rotary positions by row and column",
    "lightnet": "MD-TPE and MD-LRPE by row and column",
    "gated_delta": "tokens write in order, each correcting the matrix",
    **dict.fromkeys(("titans_mac", "titans_mag", "titans_mal", "lact"), "rotary, as in softmax"),
}
# Mixers that choose by content which past tokens they read.
BY_CONTENT = ("routing",)
# Mixers with code of their own for frames of one token, whose gradients no other test passes.
ONE_TOKEN = ("linear", "gated_delta")
NAMES = [pytest.param(name, marks=laws.SLOW.get(name, ())) for name in MIXERS]


def build(name, causal):
    """(run, layer, x, source): a clip x [1, FRAMES, WIDTH] of one token per frame if causal, else
    of one frame. run(x, source) reads the source unless it is None, then the clip."""
    mixer = MIXERS[name](width=WIDTH, heads=2, grid=(1, 1) if causal else (1, FRAMES))
    rngs = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(rngs[0], (1, FRAMES, WIDTH))
    frames = (1, FRAMES, 1, WIDTH) if causal else (1, 1, FRAMES, WIDTH)
    params = laws.disturbed(jax.jit(mixer.init)(rngs[1], x.reshape(frames)))

    @jax.jit
    def prefill(source):
        return mixer.apply(params, source, frames[2], method="prefill")[1]

    @jax.jit
    def layer(x, state):
        return mixer.apply(params, x, state)

    def run(x, source):
        state = None if source is None else prefill(source)
        return layer(x.reshape(frames), state)[0].reshape(x.shape)

    return run, layer, x, jax.random.normal(rngs[2], (1, SOURCE, WIDTH))


def dependence(f, x):
    """bool [token of x, token of f(x)]: whether the second changes with the first."""
    y = np.asarray(f(x))
    changed = [np.asarray(f(x.at[:, i].add(1.0))) != y for i in range(x.shape[1])]
    return np.stack(changed).any(axis=(1, 3))


@pytest.mark.parametrize("name", NAMES)
def test_causal(name):
    """Frame by frame equals all at once; a target sees the source, itself and the past."""
    run, layer, x, source = build(name, causal=True)
    laws.streaming(layer, x[:, :, None], [[0] + [1] * FRAMES], gradients=name in ONE_TOKEN)
    for given in (None, source):
        sees = dependence(functools.partial(run, source=given), x)
        assert np.diag(sees).all() and not np.tril(sees, -1).any()
        assert name in BY_CONTENT or np.triu(sees).sum() == FRAMES * (FRAMES + 1) // 2
    assert dependence(functools.partial(run, x), source).any(axis=1).all()


@pytest.mark.parametrize("name", NAMES)
def test_non_causal(name):
    """A target sees the source and all targets; their order matters to ORDERED alone."""
    run, _, x, source = build(name, causal=False)
    for given in (None, source):
        assert dependence(functools.partial(run, source=given), x).all()
        backward = run(x[:, ::-1], given)[:, ::-1]
        difference = np.abs(backward - run(x, given)).max()
        assert (difference > 1e-3) if name in ORDERED else (difference < 1e-5), difference
    assert dependence(functools.partial(run, x), source).any(axis=1).all()
