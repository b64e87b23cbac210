"""Gated DeltaNet: a matrix that is corrected, not only added to."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.layers.conv import CausalConv
from jaxvid.layers.linear import Linear
from jaxvid.mixers.linear_attention import Recurrent
from jaxvid.parallel.sharding import shard

_FASTEST, _SLOWEST = 1.6, 1e-3  # -log of a frame's decay at the start, over all heads


class GatedDelta(Recurrent):
    """The gated delta rule in the block of Gated DeltaNet (Yang et al. 2025, section 3.4).

    x_BTND -> y_BTND in `dtype`. q, k, v pass a convolution over `conv` frames and silu; queries and
    keys have unit length, so `qk_norm` changes nothing. The decay of a head is exp(-a softplus(x w
    + b)) as of Mamba-2, its logarithm that of a frame the mean over its tokens. Heads' outputs are
    normalised and gated by silu.

    A frame decays the matrix once. Then its tokens write in order (row by row), each taking out
    what its key already reads, and when all have written all of them read. Writing in order is what
    keeps the rule stable: every write is a contraction, whatever the keys of the others, while
    tokens that all correct the same matrix at once would overshoot where their keys agree.

    State: (float32 [B, A, K, V], the past of each convolution [B, conv - 1, N, D]). The context is
    written to the matrix, as a frame would be, but the convolutions do not reach back into it.
    """

    conv: int = 4

    def prefill(self, context_BMD, tokens):
        """Write the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        y_BMD, (state_BAKV, _) = super().prefill(context_BMD, tokens)
        B, _, D = context_BMD.shape
        return y_BMD, (state_BAKV, (jnp.zeros((B, self.conv - 1, tokens, D), self.dtype),) * 3)

    @nn.compact
    def __call__(self, x_BTND, state=None):
        B, T, N, D = x_BTND.shape
        state_BAKV, pasts = (None, (None,) * 3) if state is None else state
        mixed, after = [], []
        for name, past in zip("qkv", pasts):
            y_BTND = self._dense(self.width, name)(x_BTND)
            y_BTND, past = CausalConv(self.conv, self.dtype, name=f"conv_{name}")(y_BTND, past)
            mixed.append(nn.silu(y_BTND).reshape(B, T, N, self.heads, D // self.heads))
            after.append(past)
        q, k, v = mixed
        beta_BTNA = nn.sigmoid(self._per_head("beta")(x_BTND).astype(jnp.float32))
        rate_A = self.param("log_rate", nn.initializers.zeros, (self.heads,))
        step_A = self.param("step_bias", _step_biases, (self.heads,))
        step_BTNA = self._per_head("step")(x_BTND).astype(jnp.float32) + step_A
        g_BTA = -(jnp.exp(rate_A) * nn.softplus(step_BTNA)).mean(axis=2)
        q, k = _unit(q), _unit(k)
        y_BTNAK, state_BAKV = over_frames(q, k, v, beta_BTNA, g_BTA, state_BAKV)
        return self._gated_out(y_BTNAK, x_BTND, nn.silu), (state_BAKV, tuple(after))

    def _per_head(self, name):
        """One number for every head, of variance 1/3 at the start, as in the released layer.

        The variance that suits square matrices would make it 2, and so decays on average twice as
        strong as the biases say, the mean of exp(x) being exp(variance / 2).
        """
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return Linear(self.heads, dtype=self.dtype, kernel_init=init, name=name)


def over_frames(q_BTNAK, k_BTNAK, v_BTNAV, beta_BTNA, g_BTA, state_BAKV):
    """The gated delta rule, causal by frame -> (y_BTNAV, state_BAKV), the state float32.

    A frame of one token is a token of the kernel. Of more it is N tokens that write and then N that
    read: what has beta 0 writes nothing.
    """
    B, T, N, A, K = q_BTNAK.shape
    if state_BAKV is None:
        state_BAKV = jnp.zeros((B, A, K, v_BTNAV.shape[-1]))
    if T == 0:
        return v_BTNAV, state_BAKV
    first_BTNA = jnp.pad(g_BTA[:, :, None], ((0, 0), (0, 0), (0, N - 1), (0, 0)))
    writes = (jnp.zeros_like(q_BTNAK), k_BTNAK, v_BTNAV, beta_BTNA, first_BTNA)
    reads = (q_BTNAK, *(jnp.zeros_like(part) for part in writes[1:]))
    tokens = [jnp.concatenate(parts, axis=2) for parts in zip(writes, reads)]
    if N == 1:
        tokens = [q_BTNAK, *writes[1:]]
    q, k, v, beta, g = (part.reshape(B, -1, *part.shape[3:]) for part in tokens)
    q, k, v, beta, g = (shard(part, "BLAK"[: part.ndim]) for part in (q, k, v, beta, g))
    y_BLAV, state_BAKV = gated_delta(q, k, v, beta, g, initial_state=state_BAKV, return_state=True)
    return y_BLAV.reshape(B, T, -1, *y_BLAV.shape[2:])[:, :, -N:], state_BAKV


def _unit(x):
    """x [..., K] -> unit length, in the dtype of x."""
    h = x.astype(jnp.float32)
    return (h * jax.lax.rsqrt(jnp.square(h).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _step_biases(rng, shape):
    """Inverse softplus of steps that fall by equal factors from head to head, down to _SLOWEST.

    The released layer draws a rate from (0, 16] and a step from [0.001, 0.1] for every head. Of few
    heads it is then luck whether any remembers for more than a few frames. Here the last always
    does, the others share out the same range, as ALiBi's slopes do theirs.
    """
    del rng
    (heads,) = shape
    step_A = _FASTEST * (_SLOWEST / _FASTEST) ** (jnp.arange(1, heads + 1) / heads)
    return step_A + jnp.log(-jnp.expm1(-step_A))
