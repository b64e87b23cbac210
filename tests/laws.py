"""The laws of a causal stream, as checks that any temporal layer or model can be put through.

`layer(x, state) -> (y, state)` with frames on axis 1 of x and y, and state None at the start.
"""

import jax
import jax.numpy as jnp
import numpy as np

PLANS = ([1, 4, 4, 4], [1, 8, 4], [0, 1, 4, 8])
FRAMES = 13


def run(layer, x, plan):
    """The outputs of a stream that arrives in chunks of the planned numbers of frames, joined."""
    state, outputs, first = None, [], 0
    for frames in plan:
        y, state = layer(x[:, first : first + frames], state)
        outputs.append(y)
        first += frames
    assert first == x.shape[1], f"plan {plan} does not cover {x.shape[1]} frames"
    return jnp.concatenate(outputs, axis=1)


def streaming(layer, x, plans=PLANS, tolerance=1e-5, gradients=True):
    """However the stream is cut, the outputs are the same, values and (if asked) gradients."""
    compiled = jax.jit(layer)
    whole = run(compiled, x, [x.shape[1]])
    for plan in plans:
        np.testing.assert_allclose(run(compiled, x, plan), whole, atol=tolerance, err_msg=f"{plan}")

    if not gradients:
        return

    def loss(x, plan):
        y = run(layer, x, plan)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    in_one, in_two = (gradient(x, plan) for plan in ((x.shape[1],), (1, x.shape[1] - 1)))
    np.testing.assert_allclose(in_two, in_one, atol=10 * tolerance)


def causality(layer, x, reach=2, first=lambda k: k, gradients=True):
    """No output depends on a later frame, exactly; each depends on its own and `reach - 1` before.

    first(k): the first output that frame k of the input belongs to, which never decreases.

    Proved twice: by perturbing a frame, after which earlier outputs are bit-identical, and (if
    asked) by the gradient of one frame's output, which is exactly zero at later frames.
    """
    T = x.shape[1]
    forward = jax.jit(layer)
    y = np.asarray(forward(x, None)[0])
    for k in range(T):
        changed = np.array(x)
        changed[:, k] += 1
        changed = np.asarray(forward(changed, None)[0])
        begin = first(k)
        np.testing.assert_array_equal(changed[:, :begin], y[:, :begin], f"frame {k} leaks back")
        for later in range(begin, min(first(k + reach), y.shape[1])):
            assert np.abs(changed[:, later] - y[:, later]).max() > 0, f"{later} ignores {k}"
    if not gradients:
        return

    @jax.jit
    def gradient(x, frame):
        return jax.grad(lambda x: jnp.square(layer(x, None)[0][:, frame]).sum())(x)

    for frame in range(y.shape[1]):
        moved = np.abs(gradient(x, frame)).reshape(x.shape[0], T, -1).max((0, 2))
        future = [k for k in range(T) if first(k) > frame]
        near = [k for k in range(T) if first(k) <= frame < first(k + reach)]
        np.testing.assert_array_equal(moved[future], 0, f"frame {frame} sees the future")
        assert (moved[near] > 0).all(), f"frame {frame} ignores its past"


def image(layer, x):
    """A stream of one frame begins every stream that begins with that frame.

    To rounding: programs for one frame and for more may add in another order.
    """
    forward = jax.jit(layer)
    alone, whole = forward(x[:, :1], None)[0], forward(x, None)[0]
    np.testing.assert_allclose(alone, whole[:, : alone.shape[1]], atol=2e-6)


def gradients(layer, params, x):
    """layer(params, x, state): all gradients are finite and none is zero."""

    def loss(params, x):
        return jnp.square(layer(params, x, None)[0]).mean()

    by_params, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path((by_params, by_x)):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), f"gradient of {name} is not finite"
        assert np.abs(leaf).max() > 0, f"gradient of {name} is zero"
