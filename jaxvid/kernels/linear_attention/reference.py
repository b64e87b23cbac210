"""Linear attention by its definition, token by token."""

import jax
import jax.numpy as jnp


def linear_attention(q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t and y_t = scale q_t S_t -> (y_BLAV, state_BAKV).

    log_decay: None, [B, L, A] or [B, L, A, K]. Float32 inside.
    """
    del chunk
    if log_decay is None:
        log_decay = jnp.zeros(k_BLAK.shape[:3])
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(state_BAKV, token):
        q_BAK, k_BAK, v_BAV, decay_BAK = token
        state_BAKV = decay_BAK[..., None] * state_BAKV + k_BAK[..., None] * v_BAV[..., None, :]
        return state_BAKV, jnp.sum(q_BAK[..., None] * state_BAKV, axis=-2)

    inputs = (scale * q_BLAK.astype(jnp.float32), k_BLAK, v_BLAV, jnp.exp(log_decay))
    tokens = [x.astype(jnp.float32).swapaxes(0, 1) for x in inputs]
    state_BAKV, y_LBAV = jax.lax.scan(step, state_BAKV, tokens)
    return y_LBAV.swapaxes(0, 1).astype(v_BLAV.dtype), state_BAKV
