"""Softmax attention under a mask of positions."""

from collections.abc import Callable

import jax

from jaxvid import memory
from jaxvid.kernels import dispatch
from jaxvid.kernels.attention import cudnn, gpu, reference, tpu, xla

IMPLEMENTATIONS = {
    "cudnn": cudnn.attention,
    "gpu": gpu.attention,
    "tpu": tpu.attention,
    "xla": xla.attention,
    "reference": reference.attention,
}


def attention(
    q_BLAK: jax.Array,
    k_BMAK: jax.Array,
    v_BMAK: jax.Array,
    *,
    q_position_L,
    k_position_M,
    allow: Callable,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of L queries to M >= 1 keys where allow(q_position, k_position) holds -> y_BLAK.

    softmax(scale q k^T) v (Vaswani et al. 2017, eq. 1), with scale K^-1/2 unless given. y has the
    dtype of v; softmax and sums are float32. A query without an allowed key gets zeros. Positions
    are integers: numpy arrays if known while tracing, so that masked pairs can be skipped, or
    traced arrays. `allow` broadcasts over both kinds. implementation: a name of IMPLEMENTATIONS, or
    "auto" for the fastest one that applies. Raises UserError for an unknown name, and
    NotImplementedError if the named implementation does not apply.
    """
    L, M = q_BLAK.shape[1], k_BMAK.shape[1]
    remedy = "use fewer frames, fewer pixels, larger patches or arrangement=factorised"
    memory.require(f"attention of {L} tokens to {M}", "masks", L * M, remedy=remedy)
    return dispatch.run(
        IMPLEMENTATIONS,
        implementation,
        _fastest(q_position_L, k_position_M, allow),
        q_BLAK,
        k_BMAK,
        v_BMAK,
        q_position_L=q_position_L,
        k_position_M=k_position_M,
        allow=allow,
        scale=q_BLAK.shape[-1] ** -0.5 if scale is None else scale,
    )


def _fastest(q_position_L, k_position_M, allow):
    """Names of the implementations, fastest first. The last one always applies.

    cuDNN computes masked pairs too, and reads a mask from memory.
    """
    whole = cudnn.sees_everything(q_position_L, k_position_M, allow)
    return ("tpu", "cudnn", "gpu", "xla") if whole else ("tpu", "gpu", "cudnn", "xla")
