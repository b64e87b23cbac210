"""Softmax attention under a mask of positions."""

from jaxvid.kernels.attention import reference


def attention(
    q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale=None, implementation="auto"
):
    """Attention of L queries to those of M >= 1 keys that `allow(q_position, k_position)`."""
    scale = q_BLAK.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention(
        q_BLAK,
        k_BMAK,
        v_BMAK,
        q_position_L=q_position_L,
        k_position_M=k_position_M,
        allow=allow,
        scale=scale,
    )
