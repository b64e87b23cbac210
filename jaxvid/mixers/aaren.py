"""Aaren: attention as a recurrent network, with one learned query and a state of constant size."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.mixers.recurrent import LOG_ZERO, Recurrent
from jaxvid.parallel.sharding import shard


class Aaren(Recurrent):
    """Softmax attention of a query that does not depend on the input (Feng et al. 2024, Aaren).

    x_BTND -> y_BTND in `dtype`. Every head has one learned query, so three things summarise a
    stream: the highest score, the sum of the weights relative to that score, and the weighted sum
    of the values. Merging two summaries is associative, so a parallel scan computes all prefixes.
    The tokens of a frame have the same past and the same query, hence the same output: in the joint
    arrangement a layer adds one summary of the stream to all tokens of a frame.

    State: float32 (score [B, A], weight [B, A], value [B, A, K]). qk_norm normalises the keys.
    """

    @nn.compact
    def __call__(self, x_BTND, state=None):
        B, T, N, D = x_BTND.shape
        heads = (B, T, N, self.heads, D // self.heads)
        k, v = (self._dense(self.width, name)(x_BTND).reshape(heads) for name in "kv")
        if self.qk_norm:
            k = self._norm("k_norm")(k)
        query_AK = self.param("query", nn.initializers.normal(1.0), heads[3:])
        score_BTNA = jnp.einsum("AK,BTNAK->BTNA", query_AK, k.astype(jnp.float32))
        score_BTNA *= heads[-1] ** -0.5
        if state is None:
            state = empty_state(B, self.heads, heads[-1])
        y_BTAK, state = attention_by_frame(score_BTNA, v.astype(jnp.float32), state)
        y_BTND = jnp.broadcast_to(y_BTAK.reshape(B, T, 1, D), x_BTND.shape)
        return self._dense(self.width, "out")(y_BTND), state


def empty_state(B: int, A: int, K: int):
    """The state before any token."""
    return jnp.full((B, A), LOG_ZERO), jnp.zeros((B, A)), jnp.zeros((B, A, K))


def attention_by_frame(score_BTNA, v_BTNAK, state):
    """Softmax attention to all tokens up to the end of a frame -> (y_BTAK, state), float32.

    Weights are relative to the highest score of a frame. That reference does not change the output,
    so no gradient passes through it.
    """
    peak_BTA = jax.lax.stop_gradient(score_BTNA.max(axis=2))
    weight_BTNA = jnp.exp(score_BTNA - peak_BTA[:, :, None])
    value_BTAK = jnp.einsum("BTNA,BTNAK->BTAK", weight_BTNA, v_BTNAK)
    frames = (shard(peak_BTA, "B_A"), shard(weight_BTNA.sum(axis=2), "B_A"))
    frames += (shard(value_BTAK, "B_AK"),)
    summaries = [jnp.concatenate([part[:, None], new], 1) for part, new in zip(state, frames)]
    summaries = jax.lax.associative_scan(merge, summaries, axis=1)
    _, weight_BTA, value_BTAK = (part[:, 1:] for part in summaries)
    return value_BTAK / weight_BTA[..., None], tuple(part[:, -1] for part in summaries)


def merge(left, right):
    """The summary (score, weight, value) of the tokens of `left` and `right` together."""
    peak = jnp.maximum(left[0], right[0])
    keep, add = jnp.exp(left[0] - peak), jnp.exp(right[0] - peak)
    weight = left[1] * keep + right[1] * add
    return peak, weight, left[2] * keep[..., None] + right[2] * add[..., None]
