"""Routed attention: a token reads a bounded number of past tokens of its own cluster."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.checks import at_least
from jaxvid.layers.bias import MASKED
from jaxvid.mixers.recurrent import Recurrent, unit_length
from jaxvid.parallel.sharding import shard

MAX_CLUSTERS, MAX_MEMBERS = 2**12, 2**16


class State(NamedTuple):
    """The readable members of every cluster, in rings of M slots.

    k_BACMK, v_BACMK: float32, keys and values of each of C clusters. bias_BACM: float32, similarity
    of each key to the centroid. count_BAC: int32, tokens that have joined so far.
    """

    k_BACMK: Any
    v_BACMK: Any
    bias_BACM: Any
    count_BAC: Any


class Routing(Recurrent):
    """Attention within clusters found by content, after the Routing Transformer (Roy et al. 2021).

    x_BTND -> y_BTND in `dtype`. Every head has `clusters` centroids on the unit sphere. A key or
    query belongs to the nearest centroid: the largest inner product of directions. A query sees its
    own frame and the last `members` past tokens of its cluster. Memory is constant, and a token
    costs N + `members` scores for any length of the stream. There are no positions. Raises
    UserError for `clusters` or `members` below 1.

    As in the paper, each head has centroids, keys and queries share them, and clusters have a
    bounded size. The differences are:
    - The paper gives every cluster the nearest tokens of the whole sequence. Later tokens decide
      whether a token is among them, so the future leaks. Here each token chooses its cluster alone,
      and a full cluster drops its oldest member.
    - Half of the paper's heads are local. Here every head sees its own frame, so every query has
      something to read.
    - The paper's centroids follow their members by a moving average, which is neither a parameter
      nor the state of a stream. Here they are parameters. The similarities of key and query to
      their centroid are added to the score of a past token, which trains the centroids.
    """

    clusters: int = 4
    members: int = 32

    def __post_init__(self):
        at_least("clusters", self.clusters, 1, at_most=MAX_CLUSTERS)
        at_least("members", self.members, 1, at_most=MAX_MEMBERS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x_BTND, state=None):
        q, k, v = self._qkv(x_BTND)
        B, K = q.shape[0], q.shape[-1]
        shape = (self.heads, self.clusters, K)
        centroid_ACK = unit_length(self.param("centroids", nn.initializers.normal(1.0), shape))
        if state is None:
            empty = jnp.zeros((B, *shape[:2], self.members, K))
            state = State(empty, empty, empty[..., 0], jnp.zeros((B, *shape[:2]), jnp.int32))
        q_BTNAK, k_BTNAK, v_BTNAK = (part.astype(jnp.float32) for part in (q, k, v))
        frames = (q_BTNAK * K**-0.5, k_BTNAK, v_BTNAK, *_nearest(q_BTNAK, centroid_ACK))
        frames += _nearest(k_BTNAK, centroid_ACK)
        frames = [jnp.moveaxis(part, (1, 3), (0, 2)) for part in frames]  # [T, B, A, N, ..]
        frames = [shard(part, "_BANK"[: part.ndim]) for part in frames]
        state, y_TBANK = jax.lax.scan(jax.checkpoint(_frame_step), state, tuple(frames))
        y_BTND = jnp.moveaxis(y_TBANK, (0, 2), (1, 3)).reshape(x_BTND.shape)
        return self._dense(self.width, "out")(y_BTND), state


def _nearest(x_BTNAK, centroid_ACK):
    """(similarity to the nearest centroid [B, T, N, A], its index int32 [B, T, N, A])."""
    similarity_BTNAC = jnp.einsum("BTNAK,ACK->BTNAC", unit_length(x_BTNAK), centroid_ACK)
    return similarity_BTNAC.max(-1), similarity_BTNAC.argmax(-1)


def _frame_step(state, frame):
    """One frame: its tokens read the clusters and each other, then join the clusters in order."""
    q_BANK, k_BANK, v_BANK, q_bias_BAN, q_cluster_BAN, k_bias_BAN, k_cluster_BAN = frame
    clusters, members = state.bias_BACM.shape[2:]

    def of_query_cluster(x_BACX):
        index = q_cluster_BAN.reshape(*q_cluster_BAN.shape, *(1,) * (x_BACX.ndim - 3))
        return jnp.take_along_axis(x_BACX, index, axis=2)

    count_BAN1 = of_query_cluster(state.count_BAC[..., None])
    past_BANM = jnp.einsum("BANK,BANMK->BANM", q_BANK, of_query_cluster(state.k_BACMK))
    past_BANM += of_query_cluster(state.bias_BACM) + q_bias_BAN[..., None]
    past_BANM = jnp.where(jnp.arange(members) < count_BAN1, past_BANM, MASKED)
    own_BANN = jnp.einsum("BANK,BAMK->BANM", q_BANK, k_BANK)
    p_BANM = jax.nn.softmax(jnp.concatenate([past_BANM, own_BANN], axis=-1))
    p_past, p_own = jnp.split(p_BANM, [members], axis=-1)
    y_BANK = jnp.einsum("BANM,BANMK->BANK", p_past, of_query_cluster(state.v_BACMK))
    y_BANK += jnp.einsum("BANM,BAMK->BANK", p_own, v_BANK)

    joins_BANC = jax.nn.one_hot(k_cluster_BAN, clusters, dtype=jnp.int32)
    total_BAC = joins_BANC.sum(axis=2)
    place_BANC = state.count_BAC[:, :, None] + jnp.cumsum(joins_BANC, axis=2) - 1
    dropped_BANC = place_BANC < (state.count_BAC + total_BAC)[:, :, None] - members
    slot_BANC = jnp.where((joins_BANC == 0) | dropped_BANC, members, place_BANC % members)
    slot_BAN = slot_BANC.min(axis=-1)  # past the end for tokens that no later frame may read

    def write(old_CMX, new_NX, cluster_N, slot_N):
        return old_CMX.at[cluster_N, slot_N].set(new_NX, mode="drop")

    write = jax.vmap(jax.vmap(write))
    return State(
        write(state.k_BACMK, k_BANK, k_cluster_BAN, slot_BAN),
        write(state.v_BACMK, v_BANK, k_cluster_BAN, slot_BAN),
        write(state.bias_BACM, k_bias_BAN, k_cluster_BAN, slot_BAN),
        state.count_BAC + total_BAC,
    ), y_BANK
