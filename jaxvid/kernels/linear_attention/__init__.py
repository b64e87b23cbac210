"""Linear attention with decay: attention without softmax, with a state of constant size."""

import jax

from jaxvid.kernels import dispatch
from jaxvid.kernels.linear_attention import chunked, gpu, reference, sharded, tpu

IMPLEMENTATIONS = {
    "tpu": tpu.linear_attention,
    "gpu": gpu.linear_attention,
    "chunked": chunked.linear_attention,
    "reference": reference.linear_attention,
}


def linear_attention(
    q_BLAK: jax.Array,
    k_BLAK: jax.Array,
    v_BLAV: jax.Array,
    log_decay=None,
    *,
    scale: float | None = None,
    initial_state=None,
    segment_ids=None,
    return_state: bool = False,
    chunk: int | None = None,
    implementation: str = "auto",
):
    """Causal attention over L tokens without softmax -> y_BLAV, or (y_BLAV, state_BAKV).

        S_t = exp(g_t) S_{t-1} + k_t^T v_t,    y_t = scale q_t S_t

    (Katharopoulos et al. 2020; with one decay per head RetNet, Sun et al. 2023, and Lightning
    Attention-2, Qin et al. 2024; with one per channel GLA, Yang et al. 2024.) y has the dtype of v.
    The state is float32 [B, A, K, V] and is returned with return_state. All inputs have gradients.

    log_decay: g <= 0. None is no decay, [A] one per head, [B, L, A] one per head and token,
    [B, L, A, K] also one per channel of the key. Minus infinity erases the state. scale: K^-1/2
    unless given. initial_state: S before the first token, zero unless given. segment_ids: int
    [B, L] of packed sequences. The state restarts from zero where the id changes; the first segment
    starts from initial_state, and the state of the last segment is returned. chunk: tokens per
    chunk, which changes speed only; values over 2048 count as 2048, as longer sums of decays are
    not exact in float32. implementation: a name of IMPLEMENTATIONS, or "auto" for the fastest one
    that applies on this platform.

    On a mesh, batch and heads are split by the sharding table, and L over the axis `seq`.

    Raises UserError for wrong shapes, chunk or implementation, and NotImplementedError where the
    named implementation does not apply.
    """
    log_decay, initial_state, segment_ids = dispatch.as_arrays(
        log_decay, initial_state, segment_ids
    )
    dispatch.check_recurrence(q_BLAK, k_BLAK, v_BLAV, log_decay, initial_state, segment_ids, chunk)
    y_BLAV, state_BAKV = dispatch.run(
        sharded.split(IMPLEMENTATIONS),
        implementation,
        dispatch.fastest(q_BLAK, IMPLEMENTATIONS),
        q_BLAK,
        k_BLAK,
        v_BLAV,
        dispatch.resolve_decay(log_decay, segment_ids, q_BLAK.shape[:3]),
        scale=q_BLAK.shape[-1] ** -0.5 if scale is None else scale,
        state_BAKV=dispatch.resolve_state(initial_state, q_BLAK, v_BLAV),
        chunk=chunk,
    )
    return (y_BLAV, state_BAKV) if return_state else y_BLAV
