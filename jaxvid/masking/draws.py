"""The masks of training, drawn at random."""

import jax
import jax.numpy as jnp


def after_prefix(rng, shape: tuple[int, int, int], share: float) -> jax.Array:
    """Free tokens bool [B, T, N]: in a share of the clips, those after 1 to T - 1 first latents."""
    B, T, _ = shape
    rng_share, rng_length = jax.random.split(rng)
    length_B = jax.random.randint(rng_length, (B,), 1, T)
    length_B *= jax.random.bernoulli(rng_share, share, (B,))
    return jnp.broadcast_to((jnp.arange(T) >= length_B[:, None])[..., None], shape)


def masked_at(rng, is_free_BTN: jax.Array, share_B: jax.Array) -> jax.Array:
    """A random mask bool [B, T, N] over a share of the free tokens of each clip, at least one."""
    is_free_BL = is_free_BTN.reshape(len(is_free_BTN), -1)
    free_B = is_free_BL.sum(1)
    count_B = jnp.clip(jnp.round(share_B * free_B), 1, free_B)
    order_BL = jnp.where(is_free_BL, jax.random.uniform(rng, is_free_BL.shape), 2)
    rank_BL = jnp.argsort(jnp.argsort(order_BL, axis=1), axis=1)
    return (rank_BL < count_B[:, None]).reshape(is_free_BTN.shape)
