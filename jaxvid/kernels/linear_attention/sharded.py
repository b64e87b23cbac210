"""Linear attention with the sequence split over the mesh axis `seq`.

The state after a part of the sequence is the decayed incoming state plus what the part adds. So
every device starts from a state of zero, all devices exchange what they added and how much they
decayed, and each device then adds what came before its part (sequence parallelism of Lightning
Attention, Sun et al. 2024, with decays per token). The exchange is one state per head and device,
whatever the length of the sequence.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxvid.kernels import dispatch
from jaxvid.kernels.dispatch import SEQUENCE


def split(implementations):
    """The table of implementations, wrapped for the ambient mesh.

    A sequence that the axis `seq` splits evenly is split; else kernels are split by head.
    """
    mesh = dispatch.mesh_to_split()
    if mesh is None or mesh.shape.get(SEQUENCE, 1) == 1:
        return dispatch.split_kernels(implementations)
    return {
        name: functools.partial(linear_attention, attend)
        for name, attend in implementations.items()
    }


def linear_attention(attend, q_BLAK, k_BLAK, v_BLAV, log_decay, *, scale, state_BAKV, chunk):
    """`attend`, one of the implementations, on this device's part of the ambient mesh."""
    inputs = (q_BLAK, k_BLAK, v_BLAV, log_decay)
    if q_BLAK.shape[1] % jax.sharding.get_abstract_mesh().shape[SEQUENCE]:
        return dispatch.by_head(attend, *inputs, scale=scale, state_BAKV=state_BAKV, chunk=chunk)
    batch, heads = dispatch.batch_and_head_axes(q_BLAK.shape)
    tokens, state = PartitionSpec(batch, SEQUENCE, heads), PartitionSpec(batch, heads)

    @functools.partial(
        jax.shard_map,
        in_specs=(tokens, tokens, tokens, tokens, state),
        out_specs=(tokens, state),
        check_vma=False,  # a pallas_call does not say over which axes its outputs vary
    )
    def run(q, k, v, g, state):
        zero = jnp.zeros_like(state)
        y, added = attend(q, k, v, g, scale=scale, state_BAKV=zero, chunk=chunk)
        before, state = _combine(state, added, _decay_of_part(g))
        until = 1.0 if g is None else jnp.exp(jnp.cumsum(g, axis=1))
        until = until[..., None] if jnp.ndim(until) == 3 else until
        y += jnp.einsum("BLAK,BAKV->BLAV", scale * q * until, before).astype(y.dtype)
        return y, state

    return run(*inputs, state_BAKV)


def _decay_of_part(g):
    """The decay of a state over all tokens of this part: [B, A, K or 1, 1], or 1."""
    if g is None:
        return jnp.ones(())
    decay = jnp.exp(g.sum(axis=1))
    return decay[..., None] if g.ndim == 4 else decay[..., None, None]


def _combine(state_BAKV, added_BAKV, decay):
    """The states before this device's part and after the last device's part."""
    added, decay = jax.lax.all_gather((added_BAKV, decay), SEQUENCE)
    before = []
    for part in range(len(added)):
        before.append(state_BAKV)
        state_BAKV = decay[part] * state_BAKV + added[part]
    return jnp.stack(before)[jax.lax.axis_index(SEQUENCE)], state_BAKV
