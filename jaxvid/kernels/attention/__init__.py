"""Softmax attention under a mask of positions."""

from jaxvid.kernels.attention import cudnn, reference, xla

IMPLEMENTATIONS = {
    "cudnn": cudnn.attention,
    "xla": xla.attention,
    "reference": reference.attention,
}


def attention(
    q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale=None, implementation="auto"
):
    """Attention of L queries to the M >= 1 keys that `allow(q_position, k_position)` -> y_BLAK.

    softmax(scale q k^T) v (Vaswani et al. 2017, eq. 1) with scale K^-1/2 unless given; y has the
    dtype of v, softmax and sums are float32. A query that may see no key gets zeros. Positions are
    numpy arrays where they are known while tracing, so that what is masked is not computed, or
    traced integers. `allow` broadcasts over arrays of either kind. implementation: a name of
    IMPLEMENTATIONS, which raises NotImplementedError where it does not apply, or "auto", the first
    that applies.
    """
    arguments = dict(
        q_position_L=q_position_L,
        k_position_M=k_position_M,
        allow=allow,
        scale=q_BLAK.shape[-1] ** -0.5 if scale is None else scale,
    )
    if implementation != "auto":
        return IMPLEMENTATIONS[implementation](q_BLAK, k_BMAK, v_BMAK, **arguments)
    try:
        return cudnn.attention(q_BLAK, k_BMAK, v_BMAK, **arguments)
    except NotImplementedError:
        return xla.attention(q_BLAK, k_BMAK, v_BMAK, **arguments)
