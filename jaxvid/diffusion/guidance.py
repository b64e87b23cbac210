"""Guidance: combinations of predictions that steer a sampler towards its condition."""

from collections.abc import Callable

import jax.numpy as jnp


def classifier_free(predict: Callable, scale: float) -> Callable:
    """Classifier-free guidance (Ho and Salimans 2022): uncond + scale (cond - uncond).

    Takes and returns predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state). The given `predict`
    is called on a doubled batch, conditional half first, so the state must have read the contexts
    [condition; null]. Exact for every prediction type, since x0, eps and v are affine in each
    other.
    """

    def guided(x_BTNC, t_BT, state):
        both, state = predict(jnp.concatenate([x_BTNC] * 2), jnp.concatenate([t_BT] * 2), state)
        cond_BTNC, uncond_BTNC = jnp.split(both, 2)
        return uncond_BTNC + scale * (cond_BTNC - uncond_BTNC), state

    return guided
