"""The gated delta rule: linear attention whose writes first take out what the key already reads."""

import functools

import jax
import jax.numpy as jnp

from jaxvid.kernels.gated_delta import chunked, reference, tpu
from jaxvid.kernels.linear_attention import as_arrays, check, fastest, resolve, sharded

IMPLEMENTATIONS = {
    "tpu": tpu.gated_delta,
    "chunked": chunked.gated_delta,
    "reference": reference.gated_delta,
}


def gated_delta(
    q_BLAK,
    k_BLAK,
    v_BLAV,
    beta_BLA,
    log_decay=None,
    *,
    scale=None,
    initial_state=None,
    segment_ids=None,
    return_state=False,
    chunk=None,
    implementation="auto",
):
    """The gated delta rule over L tokens -> y_BLAV, or (y_BLAV, state_BAKV) if asked.

        R_t = exp(g_t) S_{t-1},    S_t = R_t + beta_t k_t^T (v_t - k_t R_t),    y_t = scale q_t S_t

    (Yang et al. 2025, Gated Delta Networks, eq. 10; without decay the delta rule, Schlag et al.
    2021.) Keys are meant to have norm 1 and beta to lie in (0, 1), or in (0, 2) to allow negative
    eigenvalues; nothing here enforces it. log_decay: None, [A] or [B, L, A]. Gradients go backward:
    forward mode (jax.jvp, jax.linearize) is defined of the reference alone. All else is as in
    `kernels.linear_attention`.
    """
    beta_BLA, log_decay, initial_state, segment_ids = as_arrays(
        beta_BLA, log_decay, initial_state, segment_ids
    )
    check(q_BLAK, k_BLAK, v_BLAV, log_decay, initial_state, segment_ids, chunk)
    B, L, A, K = q_BLAK.shape
    if beta_BLA.shape != (B, L, A):
        raise ValueError(f"beta of shape {list(beta_BLA.shape)}: must be {[B, L, A]}")
    if log_decay is not None and log_decay.ndim == 4:
        raise ValueError("log_decay by channel: the delta rule takes [A] or [B, L, A]")
    if implementation not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}: use auto, {known}")
    if implementation == "auto":
        implementation, *_ = fastest(q_BLAK, IMPLEMENTATIONS)
    attend = IMPLEMENTATIONS[implementation]
    mesh = jax.sharding.get_abstract_mesh()
    if implementation == "tpu" and not mesh.empty and not mesh.manual_axes:
        attend = functools.partial(sharded.by_head, attend)
    if initial_state is None:
        initial_state = jnp.zeros((B, A, K, v_BLAV.shape[-1]))
    y_BLAV, state_BAKV = attend(
        q_BLAK,
        k_BLAK,
        v_BLAV,
        beta_BLA,
        resolve(log_decay, segment_ids, (B, L, A)),
        scale=K**-0.5 if scale is None else scale,
        state_BAKV=initial_state.astype(jnp.float32),
        chunk=chunk,
    )
    return (y_BLAV, state_BAKV) if return_state else y_BLAV
