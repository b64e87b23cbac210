"""The gated delta rule: linear attention that replaces the value stored under a key."""

import jax

from jaxvid import checks
from jaxvid.kernels import dispatch
from jaxvid.kernels.gated_delta import chunked, reference, tpu

IMPLEMENTATIONS = {
    "tpu": tpu.gated_delta,
    "chunked": chunked.gated_delta,
    "reference": reference.gated_delta,
}


def gated_delta(
    q_BLAK: jax.Array,
    k_BLAK: jax.Array,
    v_BLAV: jax.Array,
    beta_BLA,
    log_decay=None,
    *,
    scale: float | None = None,
    initial_state=None,
    segment_ids=None,
    return_state: bool = False,
    chunk: int | None = None,
    implementation: str = "auto",
):
    """The gated delta rule over L tokens -> y_BLAV, or (y_BLAV, state_BAKV) with return_state.

        R_t = exp(g_t) S_{t-1},    S_t = R_t + beta_t k_t^T (v_t - k_t R_t),    y_t = scale q_t S_t

    (Yang et al. 2025, Gated Delta Networks, eq. 10; without decay the delta rule, Schlag et al.
    2021.) Keys should have norm 1, and beta should lie in (0, 1), or in (0, 2) to allow negative
    eigenvalues; neither is checked. The rule is stable if beta |k|^2 stays below 2. In bfloat16
    leave a margin of 0.005, because keys and writes are rounded. log_decay: None, [A] or [B, L, A].
    Only the reference supports forward mode (jax.jvp, jax.linearize); all implementations have
    reverse-mode gradients. All other arguments, and errors, are as in `kernels.linear_attention`; a
    mesh splits no sequence.
    """
    beta_BLA, log_decay, initial_state, segment_ids = dispatch.as_arrays(
        beta_BLA, log_decay, initial_state, segment_ids
    )
    dispatch.check_recurrence(q_BLAK, k_BLAK, v_BLAV, log_decay, initial_state, segment_ids, chunk)
    dispatch.check_shape("beta", beta_BLA, q_BLAK.shape[:3])
    if log_decay is not None:
        remedy = "a decay per channel is not supported; use [A] or [B, L, A]"
        checks.require(log_decay.ndim < 4, "log_decay.shape", list(log_decay.shape), remedy)
    y_BLAV, state_BAKV = dispatch.run(
        dispatch.split_kernels(IMPLEMENTATIONS),
        implementation,
        dispatch.fastest(q_BLAK, IMPLEMENTATIONS),
        q_BLAK,
        k_BLAK,
        v_BLAV,
        beta_BLA,
        dispatch.resolve_decay(log_decay, segment_ids, q_BLAK.shape[:3]),
        scale=q_BLAK.shape[-1] ** -0.5 if scale is None else scale,
        state_BAKV=dispatch.resolve_state(initial_state, q_BLAK, v_BLAV),
        chunk=chunk,
    )
    return (y_BLAV, state_BAKV) if return_state else y_BLAV
