"""Linear attention on a mesh: batch and heads apart, and a sequence over the axis `seq` by state.

The state after a part of the sequence is a sum of what came in, decayed, and of what the part adds;
so every device works from a state of zero, all exchange what they added and how much they decayed,
and each takes in what came before it (sequence parallelism of Lightning Attention, Sun et al. 2024,
with decays per token). The exchange is one state per head and device, however long the sequence.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxvid.parallel.sharding import partition_letters

SEQUENCE = "seq"


def linear_attention(attend, q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """`attend`, one of the implementations, on this device's part of the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    batch, heads = _axes(q_BLAK.shape, mesh)
    parts = mesh.shape.get(SEQUENCE, 1)
    sequence = SEQUENCE if parts > 1 and q_BLAK.shape[1] % parts == 0 else None
    tokens, state = PartitionSpec(batch, sequence, heads), PartitionSpec(batch, heads)
    attend = functools.partial(attend, scale=scale, chunk=chunk)

    @functools.partial(
        jax.shard_map,
        in_specs=(tokens, tokens, tokens, tokens, state),
        out_specs=(tokens, state),
        check_vma=False,  # a pallas_call does not say over which axes its outputs vary
    )
    def run(q, k, v, g, state):
        if sequence is None:
            return attend(q, k, v, g, state_BAKV=state)
        y, added = attend(q, k, v, g, state_BAKV=jnp.zeros_like(state))
        before, state = _combine(state, added, _kept(g))
        until = 1.0 if g is None else jnp.exp(jnp.cumsum(g, axis=1))
        until = until[..., None] if jnp.ndim(until) == 3 else until
        y += jnp.einsum("BLAK,BAKV->BLAV", scale * q * until, before).astype(y.dtype)
        return y, state

    return run(q_BLAK, k_BLAK, v_BLAV, log_decay, state_BAKV)


def by_head(attend, *tokens, scale, state_BAKV, chunk):
    """`attend` of `tokens`, arrays [B, L, A, ...] or None, with sequences whole on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    batch, heads = _axes(tokens[0].shape, mesh)
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


def _axes(shape_BLAK, mesh):
    """The axes of the mesh that split batch and heads, without those that this mesh does not have.

    shard_map knows no other names, where a sharding of arrays takes them for axes of one part.
    """

    def known(axes):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for name in axes if name in mesh.shape)

    batch, _, heads, _ = partition_letters("BLAK", shape_BLAK, mesh)
    return known(batch), known(heads)


def _kept(g):
    """What is left of a state after all tokens of this part: [B, A, K or 1, 1], or 1."""
    if g is None:
        return jnp.ones(())
    kept = jnp.exp(g.sum(axis=1))
    return kept[..., None] if g.ndim == 4 else kept[..., None, None]


def _combine(state_BAKV, added_BAKV, kept):
    """The states before this device's part and after the last one's."""
    added, kept = jax.lax.all_gather((added_BAKV, kept), SEQUENCE)
    before = []
    for part in range(len(added)):
        before.append(state_BAKV)
        state_BAKV = kept[part] * state_BAKV + added[part]
    return jnp.stack(before)[jax.lax.axis_index(SEQUENCE)], state_BAKV
