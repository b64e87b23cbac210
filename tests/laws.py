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


def streaming(layer, x, plans=PLANS, tolerance=1e-5):
    """However the stream is cut, the outputs are the same, values and gradients."""
    compiled = jax.jit(layer)
    whole = run(compiled, x, [x.shape[1]])
    for plan in plans:
        np.testing.assert_allclose(run(compiled, x, plan), whole, atol=tolerance, err_msg=f"{plan}")

    def loss(x, plan):
        y = run(layer, x, plan)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    in_one, in_two = (gradient(x, plan) for plan in ((x.shape[1],), (1, x.shape[1] - 1)))
    np.testing.assert_allclose(in_two, in_one, atol=10 * tolerance)


def causality(layer, x, reach=2):
    """No output depends on a later frame, exactly; each depends on its own and `reach - 1` before.

    Proved twice: by perturbing a frame, after which earlier outputs are bit-identical, and by the
    gradient of one frame's output, which is exactly zero at later frames.
    """
    T = x.shape[1]
    forward = jax.jit(lambda x: layer(x, None)[0])
    y = np.asarray(forward(x))
    for k in range(T):
        changed = np.asarray(forward(x.at[:, k].add(1.0)))
        np.testing.assert_array_equal(changed[:, :k], y[:, :k], err_msg=f"frame {k} leaks back")
        for later in range(k, min(k + reach, T)):
            assert np.abs(changed[:, later] - y[:, later]).max() > 0, f"{later} ignores {k}"

    @jax.jit
    def gradient(x, frame):
        return jax.grad(lambda x: jnp.square(layer(x, None)[0][:, frame]).sum())(x)

    for k in range(T):
        moved = np.abs(gradient(x, k)).reshape(x.shape[0], T, -1).max((0, 2))
        np.testing.assert_array_equal(moved[k + 1 :], 0, err_msg=f"frame {k} sees the future")
        assert (moved[max(k - reach + 1, 0) : k + 1] > 0).all(), f"frame {k} ignores its past"


def gradients(layer, params, x):
    """layer(params, x, state): all gradients are finite and none is zero."""

    def loss(params, x):
        return jnp.square(layer(params, x, None)[0]).mean()

    by_params, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path((by_params, by_x)):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), f"gradient of {name} is not finite"
        assert np.abs(leaf).max() > 0, f"gradient of {name} is zero"
