"""What the operations share: the choice of an implementation, arguments, splitting, FLOPs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxvid import checks
from jaxvid.parallel.sharding import partition_letters

# The log of a decay that leaves nothing: exp(FORGET) is zero in float32. `resolve_decay` clips
# decays here, and implementations rely on it.
FORGET = -128.0

SEQUENCE = "seq"  # the mesh axis that splits sequences
SHORTEST = 128  # tokens of a clip for which a kernel is faster than XLA

SPLIT_BY_XLA = ("chunked", "reference")  # all other implementations are opaque kernels


class Flops(NamedTuple):
    """FLOPs of one call, as functions of the abstract values of its operands.

    all_pairs: every pair of a query and a key counts, also a masked pair that is skipped. executed:
    what the call computes; None if the call has a body whose products can be counted.
    """

    all_pairs: Callable[..., int]
    executed: Callable[..., int] | None = None


# By the name of a jitted function or of a primitive. Each kernel file fills in its own calls;
# `training.flops` reads the table.
FLOPS: dict[str, Flops] = {}


# The choice of an implementation


def run(
    implementations: Mapping[str, Callable],
    implementation: str,
    automatic: Sequence[str],
    *arrays,
    **options,
):
    """The result of one of the implementations, called with `arrays` and `options`.

    implementation: its name, or "auto" for the first name in `automatic` that does not raise
    NotImplementedError. Raises UserError for an unknown name, and NotImplementedError if no
    candidate applies.
    """
    checks.choose("implementation", implementation, ("auto", *implementations))
    *preferred, last = automatic if implementation == "auto" else (implementation,)
    for name in preferred:
        try:
            return implementations[name](*arrays, **options)
        except NotImplementedError:
            pass
    return implementations[last](*arrays, **options)


def fastest(q_BLAK: jax.Array, implementations: Mapping[str, Callable]) -> tuple[str, ...]:
    """Names of a recurrence's implementations, fastest first. The last one always applies."""
    if q_BLAK.shape[1] == 1:
        return ("reference",)
    # Kernels pad tokens to whole blocks, which costs most where clips have few of them.
    kernel = platform() in implementations and q_BLAK.shape[1] >= SHORTEST
    return (platform(), "chunked") if kernel else ("chunked",)


def platform() -> str:
    """The platform that programs are compiled for: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # the target, if compiled ahead
    return device.platform if device else jax.default_backend()


def are_known(*arrays) -> bool:
    """Whether all of the arrays are numpy's, whose values are known while tracing."""
    return all(isinstance(x, np.ndarray) for x in arrays)


# Arguments of the recurrences


def as_arrays(*values) -> list[jax.Array | None]:
    """Every value as an array. A value may be a list, also of traced numbers; None stays None."""
    return [x if x is None else jnp.asarray(x) for x in values]


def check_shape(name: str, x: jax.Array | None, *shapes: tuple[int, ...]):
    """Raise UserError unless the argument is None or has one of `shapes`."""
    if x is not None:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        checks.require(x.shape in shapes, f"{name}.shape", list(x.shape), f"must be {wanted}")


def check_recurrence(q, k, v, log_decay, initial_state, segment_ids, chunk):
    """Raise UserError unless the shapes of a recurrence's arguments fit and `chunk` is valid."""
    fit = q.ndim == 4 and k.shape == q.shape and v.shape[:-1] == q.shape[:-1]
    checks.require(
        fit and all(q.shape + v.shape),
        "q, k, v shapes",
        (q.shape, k.shape, v.shape),
        "must be [B, L, A, K] twice and [B, L, A, V], all sizes at least 1",
    )
    B, L, A, K = q.shape
    check_shape("log_decay", log_decay, (A,), (B, L, A), (B, L, A, K))
    check_shape("initial_state", initial_state, (B, A, K, v.shape[-1]))
    check_shape("segment_ids", segment_ids, (B, L))
    if chunk is not None:
        whole = isinstance(chunk, int | np.integer) and chunk >= 1
        checks.require(whole, "chunk", chunk, "must be a whole number of at least 1")


def resolve_decay(log_decay, segment_ids, shape_BLA) -> jax.Array | None:
    """The decays of all tokens, float32 [B, L, A] or [B, L, A, K] in [FORGET, 0], or None.

    The start of a segment is a decay of FORGET, so no implementation knows segments.
    """
    if log_decay is None and segment_ids is None:
        return None
    g = jnp.zeros(()) if log_decay is None else jnp.asarray(log_decay, jnp.float32)
    g = jnp.maximum(g if g.ndim == 4 else jnp.broadcast_to(g, shape_BLA), FORGET)
    if segment_ids is None:
        return g
    starts_BL = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts_BL = jnp.pad(starts_BL, ((0, 0), (1, 0)))  # the first token continues from the state
    return jnp.where(starts_BL.reshape(*starts_BL.shape, *(1,) * (g.ndim - 2)), FORGET, g)


def resolve_state(initial_state, q_BLAK, v_BLAV) -> jax.Array:
    """The initial state, float32 [B, A, K, V]; zero unless given."""
    B, _, A, K = q_BLAK.shape
    if initial_state is None:
        initial_state = jnp.zeros((B, A, K, v_BLAV.shape[-1]))
    return initial_state.astype(jnp.float32)


# Splitting over a mesh


def mesh_to_split():
    """The ambient mesh, or None if there is no mesh or the caller has already split the arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def split_kernels(implementations: Mapping[str, Callable]) -> Mapping[str, Callable]:
    """The table, with kernels that XLA cannot split wrapped in `by_head` if there is a mesh."""
    if mesh_to_split() is None:
        return implementations
    return {
        name: attend if name in SPLIT_BY_XLA else functools.partial(by_head, attend)
        for name, attend in implementations.items()
    }


def by_head(attend, *tokens, scale, state_BAKV, chunk):
    """`attend` with batch and heads split over the ambient mesh and every sequence whole.

    tokens: arrays [B, L, A, ...] or None, queries first. Returns (y_BLAV, state_BAKV).
    """
    batch, heads = batch_and_head_axes(tokens[0].shape)
    token, state = PartitionSpec(batch, None, heads), PartitionSpec(batch, heads)

    @functools.partial(
        jax.shard_map,
        in_specs=(state, *(token for _ in tokens)),
        out_specs=(token, state),
        check_vma=False,  # a pallas_call does not say over which axes its outputs vary
    )
    def run(state_BAKV, *tokens):
        return attend(*tokens, scale=scale, state_BAKV=state_BAKV, chunk=chunk)

    return run(state_BAKV, *tokens)


def by_batch_and_head(attend, whole, *tokens):
    """attend(*tokens, *whole) with batch and heads of the tokens split over the ambient mesh.

    tokens: arrays [B, L, A, ...], as is the result. whole: arrays that every device has whole. The
    axis that splits sequences elsewhere splits heads here, if they suffice: an all-to-all before
    and after, in the place of keys from all devices (DeepSpeed Ulysses, Jacobs et al. 2023).
    """
    mesh = mesh_to_split()
    if mesh is None:
        return attend(*tokens, *whole)
    batch, heads = batch_and_head_axes(tokens[0].shape)
    parts = math.prod(mesh.shape[axis] for axis in heads) * mesh.shape.get(SEQUENCE, 1)
    if tokens[0].shape[2] % parts == 0 and SEQUENCE in mesh.shape:
        heads = (*heads, SEQUENCE)
    token = PartitionSpec(batch, None, heads)
    return jax.shard_map(
        attend,
        in_specs=(*(token for _ in tokens), *(PartitionSpec() for _ in whole)),
        out_specs=token,
        check_vma=False,  # a pallas_call does not say over which axes its outputs vary
    )(*tokens, *whole)


def batch_and_head_axes(shape_BLAK) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the ambient mesh that split batch and heads.

    Axes that the mesh lacks are left out: shard_map rejects their names, but a NamedSharding takes
    them for axes of size 1.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def known(axes):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in axes if name in mesh.shape)

    batch, _, heads, _ = partition_letters("BLAK", shape_BLAK, mesh)
    return known(batch), known(heads)
