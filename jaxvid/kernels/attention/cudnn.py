"""Attention by cuDNN's flash kernel, on NVIDIA GPUs from Ampere on."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale):
    """As `reference.attention`, half precision only; else NotImplementedError."""
    L, M, K = q_BLAK.shape[1], k_BMAK.shape[1], q_BLAK.shape[3]
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0"; "gfx942" by AMD
    if not capability[:1].isdigit() or float(capability) < 8:
        raise NotImplementedError("cuDNN's flash attention needs an NVIDIA GPU from Ampere on")
    if not q_BLAK.dtype == k_BMAK.dtype == v_BMAK.dtype or q_BLAK.dtype.itemsize != 2:
        raise NotImplementedError("cuDNN's flash attention needs bfloat16 or float16")
    if K % 8 or K > 128 or L % 2 or M % 2:
        raise NotImplementedError("cuDNN wants heads of 8, 16 .. 128 and masks of even sides")
    mask_LM = allow(q_position_L[:, None], k_position_M[None, :])
    everything = isinstance(mask_LM, np.ndarray) and mask_LM.all()
    y_BLAK = jax.nn.dot_product_attention(
        q_BLAK,
        k_BMAK,
        v_BMAK,
        mask=None if everything else jnp.broadcast_to(mask_LM, (1, 1, L, M)),
        scale=scale,
        implementation="cudnn",
    )
    seen_L111 = mask_LM.any(axis=-1)[:, None, None]
    return y_BLAK if everything else jnp.where(seen_L111, y_BLAK, 0)
