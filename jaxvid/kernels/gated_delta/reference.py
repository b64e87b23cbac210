"""The gated delta rule by its definition, token by token."""

import jax
import jax.numpy as jnp


def gated_delta(q_BLAK, k_BLAK, v_BLAV, beta_BLA, log_decay, *, scale, state_BAKV, chunk):
    """S_t = R_t + beta_t k_t^T (v_t - k_t R_t) with R_t = exp(g_t) S_{t-1}; y_t = scale q_t S_t.

    log_decay: None or [B, L, A]. Returns (y_BLAV, state_BAKV). Float32 inside.
    """
    del chunk
    if log_decay is None:
        log_decay = jnp.zeros(beta_BLA.shape)

    def step(state_BAKV, token):
        q_BAK, k_BAK, v_BAV, beta_BA, decay_BA = token
        state_BAKV = decay_BA[..., None, None] * state_BAKV
        read_BAV = jnp.sum(k_BAK[..., None] * state_BAKV, axis=-2)
        new_BAV = beta_BA[..., None] * (v_BAV - read_BAV)
        state_BAKV += k_BAK[..., None] * new_BAV[..., None, :]
        return state_BAKV, jnp.sum(q_BAK[..., None] * state_BAKV, axis=-2)

    inputs = (scale * q_BLAK.astype(jnp.float32), k_BLAK, v_BLAV, beta_BLA, jnp.exp(log_decay))
    tokens = [x.astype(jnp.float32).swapaxes(0, 1) for x in inputs]
    state_BAKV, y_LBAV = jax.lax.scan(step, state_BAKV, tokens)
    return y_LBAV.swapaxes(0, 1).astype(v_BLAV.dtype), state_BAKV
