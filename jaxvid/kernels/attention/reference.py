"""Attention by its definition, with one matrix of all scores."""

import jax.numpy as jnp


def attention(q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale):
    """softmax(scale q k^T) v over the allowed keys, float32 inside; zero if there are none."""
    score_BALM = jnp.einsum("BLAK,BMAK->BALM", q_BLAK, k_BMAK, preferred_element_type=jnp.float32)
    mask_LM = allow(q_position_L[:, None], k_position_M[None, :])
    score_BALM = jnp.where(mask_LM, scale * score_BALM, -jnp.inf)
    peak = jnp.max(score_BALM, axis=-1, keepdims=True)
    p_BALM = jnp.exp(score_BALM - jnp.where(jnp.isfinite(peak), peak, 0))
    total = p_BALM.sum(-1, keepdims=True)
    p_BALM = p_BALM / jnp.where(total > 0, total, 1)
    return jnp.einsum("BALM,BMAK->BLAK", p_BALM.astype(v_BMAK.dtype), v_BMAK)
