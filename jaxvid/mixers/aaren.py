"""Aaren: attention as a recurrent network, with one learned query and a state of constant size."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.mixers.linear_attention import Recurrent
from jaxvid.parallel.sharding import shard

_NOTHING = -1e30  # the highest score of no token at all; -inf would make NaN of differences


class Aaren(Recurrent):
    """Softmax attention of a query that does not depend on the input (Feng et al. 2024, Aaren).

    x_BTND -> y_BTND in `dtype`. Every head has one learned query, so what it has read of a stream
    is three things: the highest score so far, the sum of the weights below it, and the weighted sum
    of the values. Two such readings join into one, associatively, and a scan in parallel gives all
    prefixes. The tokens of a frame have the same past and the same query, hence the same output:
    in the joint arrangement a layer adds one summary of the stream to all tokens of a frame.

    State: (score float32 [B, A], weight [B, A], value [B, A, K]). qk_norm: of the keys.
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
            state = start(B, self.heads, heads[-1])
        y_BTAK, state = over_frames(score_BTNA, v.astype(jnp.float32), state)
        y_BTND = jnp.broadcast_to(y_BTAK.reshape(B, T, 1, D), x_BTND.shape)
        return self._dense(self.width, "out")(y_BTND), state


def start(B, A, K):
    """The reading of no token."""
    return jnp.full((B, A), _NOTHING), jnp.zeros((B, A)), jnp.zeros((B, A, K))


def over_frames(score_BTNA, v_BTNAK, state):
    """softmax over all tokens up to the end of a frame -> (y_BTAK, state), float32.

    Weights are relative to the highest score, which is a unit and no quantity: what it is does not
    change the output, so no gradient passes through it.
    """
    peak_BTA = jax.lax.stop_gradient(score_BTNA.max(axis=2))
    weight_BTNA = jnp.exp(score_BTNA - peak_BTA[:, :, None])
    value_BTAK = jnp.einsum("BTNA,BTNAK->BTAK", weight_BTNA, v_BTNAK)
    frames = (shard(peak_BTA, "B_A"), shard(weight_BTNA.sum(axis=2), "B_A"))
    frames += (shard(value_BTAK, "B_AK"),)
    readings = [jnp.concatenate([part[:, None], new], 1) for part, new in zip(state, frames)]
    readings = jax.lax.associative_scan(join, readings, axis=1)
    _, weight_BTA, value_BTAK = (part[:, 1:] for part in readings)
    return value_BTAK / weight_BTA[..., None], tuple(part[:, -1] for part in readings)


def join(left, right):
    """The reading of what `left` has read and then `right`."""
    peak = jnp.maximum(left[0], right[0])
    keep, add = jnp.exp(left[0] - peak), jnp.exp(right[0] - peak)
    weight = left[1] * keep + right[1] * add
    return peak, weight, left[2] * keep[..., None] + right[2] * add[..., None]
