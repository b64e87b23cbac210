"""Attention by cuDNN's flash kernel, on NVIDIA GPUs since Ampere."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.kernels.dispatch import FLOPS, Flops, are_known
from jaxvid.parallel.devices import cuda_capability


def _flops(q_BLAK, k_BMAK, *_):
    """FLOPs of both products. cuDNN computes masked pairs too."""
    return 4 * q_BLAK.size * k_BMAK.shape[1]


# The primitives of jax.nn.dot_product_attention, whose products are not in the jaxpr.
for _name in ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper"):
    FLOPS[_name] = Flops(all_pairs=_flops, executed=_flops)


def sees_everything(q_position_L, k_position_M, allow) -> bool:
    """Whether it is known while tracing that every query sees every key."""
    known = are_known(q_position_L, k_position_M)
    return known and bool(np.all(allow(np.unique(q_position_L)[:, None], np.unique(k_position_M))))


def attention(q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale):
    """As `reference.attention`. Raises NotImplementedError if cuDNN does not support it."""
    L, M, K = q_BLAK.shape[1], k_BMAK.shape[1], q_BLAK.shape[3]
    if (cuda_capability() or 0) < 8:
        raise NotImplementedError("cuDNN's flash attention needs an NVIDIA GPU of Ampere or later")
    if not q_BLAK.dtype == k_BMAK.dtype == v_BMAK.dtype or q_BLAK.dtype.itemsize != 2:
        raise NotImplementedError("cuDNN's flash attention needs bfloat16 or float16")
    if K % 8 or K > 128 or L % 2 or M % 2:
        raise NotImplementedError("cuDNN needs head widths of 8, 16 .. 128 and even L and M")
    everything = sees_everything(q_position_L, k_position_M, allow)
    # Compared at run time: as a constant, the mask would be a large part of the program.
    q_position_L, k_position_M = jax.lax.optimization_barrier((q_position_L, k_position_M))
    mask_LM = allow(q_position_L[:, None], k_position_M[None, :])
    try:
        y_BLAK = jax.nn.dot_product_attention(
            q_BLAK,
            k_BMAK,
            v_BMAK,
            mask=None if everything else jnp.broadcast_to(mask_LM, (1, 1, L, M)),
            scale=scale,
            implementation="cudnn",
        )
    except RuntimeError as error:  # "cuDNN is not detected."
        raise NotImplementedError(str(error)) from error
    seen_L111 = mask_LM.any(axis=-1)[:, None, None]
    return y_BLAK if everything else jnp.where(seen_L111, y_BLAK, 0)
