"""Linear attention with decay: attention without softmax, by a state of constant size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.kernels.linear_attention import chunked, gpu, reference, sharded, tpu

IMPLEMENTATIONS = {
    "tpu": tpu.linear_attention,
    "gpu": gpu.linear_attention,
    "chunked": chunked.linear_attention,
    "reference": reference.linear_attention,
}

# A decay that leaves nothing: exp(FORGET) is zero in float32. Implementations count on g >= FORGET.
FORGET = -128.0


def linear_attention(
    q_BLAK,
    k_BLAK,
    v_BLAV,
    log_decay=None,
    *,
    scale=None,
    initial_state=None,
    segment_ids=None,
    return_state=False,
    chunk=None,
    implementation="auto",
):
    """Causal attention of L tokens without softmax -> y_BLAV, or (y_BLAV, state_BAKV) if asked.

        S_t = exp(g_t) S_{t-1} + k_t^T v_t,    y_t = scale q_t S_t

    (Katharopoulos et al. 2020; with one decay per head RetNet, Sun et al. 2023, and Lightning
    Attention-2, Qin et al. 2024; with one per channel GLA, Yang et al. 2024.) y has the dtype of
    v, the state is float32 [B, A, K, V]; all inputs have gradients.

    log_decay: g <= 0; None is no decay, [A] one per head, [B, L, A] one per head and token,
    [B, L, A, K] one per channel of the key too; minus infinity forgets. scale: K^-1/2 unless
    given. initial_state: S before the first token, zero unless given. segment_ids: int [B, L];
    where it changes from one token to the next, the state starts anew from zero, so that sequences
    can be packed; the first segment sees the initial state, the last one's state is returned.
    chunk: tokens that are worked on at once, which changes the speed alone; more than 2048 count as
    2048, as the decays of more do not add up exactly in float32. implementation: a name
    of IMPLEMENTATIONS, which raises NotImplementedError where it does not apply, or "auto", the
    fastest for the platform that applies. Raises ValueError where shapes do not fit.

    On a mesh, batch and heads are split as everywhere, and L over an axis `seq` if there is one.
    """
    log_decay, initial_state, segment_ids = as_arrays(log_decay, initial_state, segment_ids)
    check(q_BLAK, k_BLAK, v_BLAV, log_decay, initial_state, segment_ids, chunk)
    if implementation not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}: use auto, {known}")
    B, L, A, K = q_BLAK.shape
    if initial_state is None:
        initial_state = jnp.zeros((B, A, K, v_BLAV.shape[-1]))
    arguments = dict(
        scale=K**-0.5 if scale is None else scale,
        state_BAKV=initial_state.astype(jnp.float32),
        chunk=chunk,
    )
    log_decay = resolve(log_decay, segment_ids, (B, L, A))
    for name in fastest(q_BLAK, IMPLEMENTATIONS) if implementation == "auto" else (implementation,):
        attend = IMPLEMENTATIONS[name]
        if _on_mesh(name):
            attend = functools.partial(sharded.linear_attention, attend)
        try:
            y_BLAV, state_BAKV = attend(q_BLAK, k_BLAK, v_BLAV, log_decay, **arguments)
        except NotImplementedError:
            if implementation != "auto":
                raise
        else:
            return (y_BLAV, state_BAKV) if return_state else y_BLAV


def fastest(q_BLAK, implementations):
    """Names of implementations by the platform of the program; the last always applies."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # that of a mesh not of this machine
    platform = device.platform if device else jax.default_backend()
    if q_BLAK.shape[1] == 1:
        return ("reference",)
    if platform == "gpu" and q_BLAK.dtype == jnp.float32:
        return ("chunked",)  # full float32 has no tensor cores; XLA takes TF32
    return (platform, "chunked") if platform in implementations else ("chunked",)


def _on_mesh(name):
    """Whether to split the work by hand: sequences always, kernels that XLA cannot split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return False
    return mesh.shape.get(sharded.SEQUENCE, 1) > 1 or name not in ("chunked", "reference")


def resolve(log_decay, segment_ids, shape_BLA):
    """None, or float32 [B, L, A] or [B, L, A, K] from FORGET, where a segment starts, to 0."""
    if log_decay is None and segment_ids is None:
        return None
    g = jnp.zeros(()) if log_decay is None else jnp.asarray(log_decay, jnp.float32)
    g = jnp.maximum(g if g.ndim == 4 else jnp.broadcast_to(g, shape_BLA), FORGET)
    if segment_ids is None:
        return g
    starts_BL = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts_BL = jnp.pad(starts_BL, ((0, 0), (1, 0)))  # the first token goes on from the state
    return jnp.where(starts_BL.reshape(*starts_BL.shape, *(1,) * (g.ndim - 2)), FORGET, g)


def as_arrays(*given):
    """Each as an array, which may be a list, of traced numbers too; None stays."""
    return [x if x is None else jnp.asarray(x) for x in given]


def check(q, k, v, log_decay, initial_state, segment_ids, chunk):
    """Raise ValueError, one line that names the argument, for what cannot be meant."""
    if q.ndim != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or 0 in q.shape + v.shape:
        raise ValueError(
            f"q, k, v of shapes {q.shape}, {k.shape}, {v.shape}: "
            "must be [B, L, A, K] twice and [B, L, A, V], with all of them at least 1"
        )
    B, L, A, K = q.shape

    def require(name, x, *shapes):
        if x is not None and x.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} of shape {list(x.shape)}: must be {wanted}")

    require("log_decay", log_decay, (A,), (B, L, A), (B, L, A, K))
    require("initial_state", initial_state, (B, A, K, v.shape[-1]))
    require("segment_ids", segment_ids, (B, L))
    if chunk is not None and (not isinstance(chunk, int | np.integer) or chunk < 1):
        raise ValueError(f"chunk={chunk}: must be at least 1 and whole")
