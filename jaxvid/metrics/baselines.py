"""Guesses of a continuation without a network, from its given frames alone."""

import jax
import jax.numpy as jnp
import numpy as np

# Shares of the last frame, of the mean and of the ground in a blend: all in quarters.
BLENDS_K3 = np.array(
    [(a, b, 4 - a - b) for a in range(5) for b in range(5 - a)], np.float32
) / np.float32(4)
NAMES = ("copy_last", "mean_given", "median_given", "ground")
BLEND = "blend"


def guesses(given_BPHWC: jax.Array) -> dict[str, jax.Array]:
    """{name: [B, 1, H, W, 3]}: a guess of every later frame for each of NAMES.

    copy_last: the last given frame. mean_given, median_given: over the given frames, per pixel.
    ground: one colour, the median over the pixels of all given frames.
    """
    found = (
        given_BPHWC[:, -1:],
        given_BPHWC.mean(1, keepdims=True),
        jnp.median(given_BPHWC, axis=1, keepdims=True),
        jnp.broadcast_to(
            jnp.median(given_BPHWC, axis=(1, 2, 3), keepdims=True), given_BPHWC[:, :1].shape
        ),
    )
    return dict(zip(NAMES, found))


def blends(found: dict[str, jax.Array]) -> jax.Array:
    """[K, B, 1, H, W, 3]: `guesses` blended by the shares in BLENDS_K3."""
    parts = jnp.stack([found[name] for name in ("copy_last", "mean_given", "ground")])
    return jnp.einsum("kp,pbthwc->kbthwc", BLENDS_K3, parts, precision="highest")


def best_blend(scores_BKF: jax.Array) -> jax.Array:
    """int [] index k of the blend with the best mean score over clips and frames, without NaN."""
    return jnp.nanmean(scores_BKF, axis=(0, 2)).argmax()
