"""The laws of a causal stream, as checks of any temporal layer or model.

A layer is `layer(x, state) -> (y, state)` with frames on axis 1 of x and y; the state None starts a
stream. Where a law is about parameters too, the layer is `jax.tree_util.Partial(apply, params)`.
The laws share compiled functions: they compile each (layer, shapes) once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial, keystr, tree_leaves_with_path

PLANS = ([1, 4, 4, 4], [0, 1, 8, 4])
FRAMES = 13
# Mixers that differ from another one by a few lines, and whose tests compile for long.
SLOW = dict.fromkeys(
    ("titans_mac", "titans_mag", "titans_mal", "moneta", "yaad", "memora"), pytest.mark.slow
)


@jax.jit
def call(layer, x, state):
    """layer(x, state), compiled."""
    return layer(x, state)


@functools.partial(jax.jit, static_argnames="plan")
def _gradient(layer, x, weight, plan):
    """d sum(weight y) / d (parameters, x) for a stream that arrives in chunks of `plan` frames."""

    def loss(layer, x):
        return (weight * run(layer, x, plan)).sum()

    return jax.grad(loss, argnums=(0, 1))(layer, x)


def _partial(layer):
    return layer if isinstance(layer, Partial) else Partial(layer)


def run(layer, x, plan):
    """The joined outputs of a stream that arrives in chunks of `plan` frames."""
    state, outputs, first = None, [], 0
    for frames in plan:
        y, state = layer(x[:, first : first + frames], state)
        outputs.append(y)
        first += frames
    assert first == x.shape[1], f"plan {plan} does not cover {x.shape[1]} frames"
    return jnp.concatenate(outputs, axis=1)


def streaming(layer, x, plans=PLANS, tolerance=1e-5, gradients=True):
    """The outputs do not depend on how the stream is cut, nor (if asked) do the gradients."""
    layer, T = _partial(layer), x.shape[1]
    compiled = functools.partial(call, layer)
    whole = run(compiled, x, [T])
    for plan in plans:
        np.testing.assert_allclose(run(compiled, x, plan), whole, atol=tolerance, err_msg=f"{plan}")
    if gradients:
        weight = np.cos(np.arange(whole.size, dtype=np.float32)).reshape(whole.shape)
        in_one, in_two = (_gradient(layer, x, weight, plan)[1] for plan in ((T,), (1, T - 1)))
        np.testing.assert_allclose(in_two, in_one, atol=10 * tolerance)


def causality(layer, x, reach=2, first=lambda k: k, gradients=True):
    """No output depends on a later frame, exactly; each depends on its own and `reach - 1` before.

    first(k): the first output that frame k of the input belongs to, which never decreases.

    There are two proofs. After a change of one frame, earlier outputs are bit-identical. And (if
    asked) the gradient of the output of one frame is exactly zero at later frames.
    """
    layer, T = _partial(layer), x.shape[1]
    y = np.asarray(call(layer, x, None)[0])
    for k in range(T):
        changed = np.array(x)
        changed[:, k] += 1
        changed = np.asarray(call(layer, changed, None)[0])
        begin = first(k)
        np.testing.assert_array_equal(changed[:, :begin], y[:, :begin], f"frame {k} leaks back")
        for later in range(begin, min(first(k + reach), y.shape[1])):
            assert np.abs(changed[:, later] - y[:, later]).max() > 0, f"{later} ignores {k}"
    if not gradients:
        return
    for frame in range(y.shape[1]):
        weight = np.zeros_like(y)
        weight[:, frame] = y[:, frame]  # the gradient of y^2 / 2
        gradient = _gradient(layer, x, weight, (T,))[1]
        changes = np.abs(gradient).reshape(x.shape[0], T, -1).max((0, 2))
        future = [k for k in range(T) if first(k) > frame]
        near = [k for k in range(T) if first(k) <= frame < first(k + reach)]
        np.testing.assert_array_equal(changes[future], 0, f"frame {frame} sees the future")
        assert (changes[near] > 0).all(), f"frame {frame} ignores its past"


def unrolled_scan(step, state, frames):
    """`jax.lax.scan` with a state that grows."""
    outputs = []
    for f in range(len(frames[0])):
        state, y = step(state, [x[f] for x in frames])
        outputs.append(y)
    return state, [jnp.stack(parts) for parts in zip(*outputs)]


def teacher_forcing(layer, forced, clean, noisy, reach=2, tolerance=1e-5, rounding=1.0):
    """Teacher forcing equals the loop over frames that denoises and then commits, with gradients.

    forced(clean, noisy, state) -> (y_clean, y_noisy, state). layer: a Partial of parameters, or a
    pair of them, the layers of noisy and of clean frames. The output of noisy frame f has a
    gradient of exactly zero at clean frames from f on and at other noisy frames; it depends on its
    own noisy frame and on the `reach - 1` clean frames before it. rounding: how many tolerances the
    gradients have.
    """
    denoise, commit = layer if isinstance(layer, tuple) else (layer, layer)
    T = clean.shape[1]
    cuts = (slice(0, 2), slice(2, T))  # the second piece continues a stream

    def by_loop(denoise, commit, clean, noisy):
        def frame(state, frames):
            clean, noisy = (x[:, None] for x in frames)
            y_noisy, _ = denoise(noisy, state)
            y_clean, state = commit(clean, state)
            return state, (y_clean[:, 0], y_noisy[:, 0])

        # The first frame alone: its state may have other shapes than the state of the start.
        state, first = frame(None, (clean[:, 0], noisy[:, 0]))
        frames = [jnp.moveaxis(x[:, 1:], 1, 0) for x in (clean, noisy)]
        scan = jax.lax.scan
        if jax.eval_shape(frame, state, [x[0] for x in frames])[0] != jax.eval_shape(lambda: state):
            scan = unrolled_scan
        later = scan(frame, state, frames)[1]
        return [jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1) for a, b in zip(first, later)]

    def at_once(forced, clean, noisy):
        state, outputs = None, []
        for cut in cuts:
            *y, state = forced(clean[:, cut], noisy[:, cut], state)
            outputs.append(y)
        return [jnp.concatenate(parts, axis=1) for parts in zip(*outputs)]

    @jax.jit
    def both(denoise, commit, forced, clean, noisy):
        y_loop, vjp_loop = jax.vjp(by_loop, denoise, commit, clean, noisy)
        y, vjp = jax.vjp(at_once, forced, clean, noisy)
        weight = [
            jnp.cos(jnp.arange(part.size, dtype=jnp.float32)).reshape(part.shape) for part in y
        ]
        one_frame = jnp.eye(T)[:, None, :, None, None]
        of_clean = vjp([weight[0], 0 * weight[1]])
        of_noisy = jax.vmap(lambda frame: vjp([0 * weight[0], frame * weight[1]]))(one_frame)
        total = jax.tree.map(lambda a, b: a + b.sum(0), of_clean, of_noisy)
        d_denoise, d_commit, *d_frames = vjp_loop(weight)
        d_layer = jax.tree.map(jnp.add, d_denoise.args, d_commit.args)
        return (y_loop, (d_layer, d_frames)), (y, (total[0].args, list(total[1:]))), of_noisy[1:]

    expected, got, by_frame = both(denoise, commit, forced, clean, noisy)
    for (path, want), have in zip(tree_leaves_with_path(expected), jax.tree.leaves(got)):
        scale = max(1.0, np.abs(want).max())  # gradients of parameters are sums over all tokens
        scale *= 1.0 if path[0].idx == 0 else rounding
        np.testing.assert_allclose(have, want, atol=tolerance * scale, err_msg=keystr(path))
    for f in range(T):
        of_clean, of_noisy = (np.abs(part[f]).max((0, 2, 3)) for part in by_frame)
        np.testing.assert_array_equal(of_clean[f:], 0, f"noisy frame {f} sees its future")
        np.testing.assert_array_equal(np.delete(of_noisy, f), 0, f"{f} sees another noisy frame")
        assert of_noisy[f] > 0 and (of_clean[max(f - reach + 1, 0) : f] > 0).all()


def image(layer, x):
    """A stream of one frame equals the beginning of any stream that begins with that frame.

    The tolerance is for rounding: the programs may add in different orders.
    """
    layer = _partial(layer)
    alone, whole = call(layer, x[:, :1], None)[0], call(layer, x, None)[0]
    np.testing.assert_allclose(alone, whole[:, : alone.shape[1]], atol=2e-6)


def gradients(layer, x):
    """The gradients of the parameters and of x are finite, and none is zero."""
    y = call(layer, x, None)[0]
    for path, leaf in tree_leaves_with_path(_gradient(layer, x, y / y.size, (x.shape[1],))):
        assert np.isfinite(leaf).all(), f"gradient of {keystr(path)} is not finite"
        assert np.abs(leaf).max() > 0, f"gradient of {keystr(path)} is zero"


def disturbed(params):
    """Parameters moved off a zero initialisation, so that every path carries a signal."""
    leaves, tree = jax.tree.flatten(params)
    rngs = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(rng, leaf.shape) for leaf, rng in zip(leaves, rngs)]
    return jax.tree.unflatten(tree, noisy)
