"""Gated DeltaNet: a matrix state whose writes correct what it holds."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from jaxvid.checks import at_least
from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.gated_delta.chunked import by_halves, inverted
from jaxvid.layers import pairs
from jaxvid.layers.conv import MAX_CONV
from jaxvid.mixers.recurrent import Recurrent, decay_biases, unit_length
from jaxvid.parallel.sharding import shard


class GatedDelta(Recurrent):
    """The gated delta rule in the block of Gated DeltaNet (Yang et al. 2025, section 3.4).

    x_BTND -> y_BTND in `dtype`. q, k, v pass a convolution over `conv` frames and silu. Queries and
    keys have unit length, so `qk_norm` changes nothing. The decay of a head is
    exp(-a softplus(x w + b)) as in Mamba-2; its logarithm is averaged over the tokens of a frame.
    The output of a head is normalised and gated by silu.

    A frame decays the matrix once. Then its tokens write in order, row by row: each removes the
    value that its key reads at that moment. When all have written, all of them read. Writing in
    order keeps the rule stable, because every write is then a contraction for any keys. Tokens that
    corrected the same matrix at once would overshoot where their keys agree.

    State: (float32 [B, A, K, V], the past of each convolution [B, conv - 1, N, D]). The context is
    written to the matrix as a frame is; the convolutions do not reach back into it. Raises
    UserError for conv below 1.
    """

    conv: int = 4

    def __post_init__(self):
        at_least("conv", self.conv, 1, at_most=MAX_CONV)
        super().__post_init__()

    def prefill(self, context_BMD, tokens: int):
        """Write the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        y_BMD, (state_BAKV, _) = super().prefill(context_BMD, tokens)
        return y_BMD, (state_BAKV, self._empty_pasts(len(context_BMD), tokens))

    def __call__(self, x_BTND, state=None):
        return self._layer(x_BTND, state, gated_delta_by_frame)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) in one pass over the clean frames."""
        x_BTND = pairs.join(clean_BTND, noisy_BTND)
        y_BTND, state = self._layer(x_BTND, state, gated_delta_teacher_forced, paired=True)
        return *pairs.split(y_BTND), state

    @nn.compact
    def _layer(self, x_BTND, state, rule, paired=False):
        state_BAKV, pasts = (None, None) if state is None else state
        (q, k, v), pasts = self._convolved_qkv(x_BTND, pasts, paired)
        beta_BTNA = nn.sigmoid(self._per_head("beta")(x_BTND).astype(jnp.float32))
        rate_A = self.param("log_rate", nn.initializers.zeros, (self.heads,))
        step_A = self.param("step_bias", decay_biases, (self.heads,))
        step_BTNA = self._per_head("step")(x_BTND).astype(jnp.float32) + step_A
        g_BTA = -(jnp.exp(rate_A) * nn.softplus(step_BTNA)).mean(axis=2)
        q, k = unit_length(q), unit_length(k)
        y_BTNAK, state_BAKV = rule(q, k, v, beta_BTNA, g_BTA, state_BAKV)
        return self._gated_out(y_BTNAK, x_BTND, nn.silu), (state_BAKV, pasts)


def gated_delta_by_frame(q_BTNAK, k_BTNAK, v_BTNAV, beta_BTNA, g_BTA, state_BAKV):
    """The gated delta rule, causal by frame -> (y_BTNAV, state_BAKV), the state float32.

    A frame of one token is one token of the kernel. A frame of N > 1 tokens is 2 N tokens of the
    kernel: N that write, then N that read, with beta 0 so that they write nothing.
    """
    if state_BAKV is None:
        state_BAKV = _zero_state(k_BTNAK, v_BTNAV)
    if q_BTNAK.shape[1] == 0:
        return v_BTNAV, state_BAKV
    y_BTNAV, state_BAKV = _by_kernel(
        _writes_and_reads(q_BTNAK, k_BTNAK, v_BTNAV, beta_BTNA, g_BTA), state_BAKV
    )
    return y_BTNAV[:, :, -q_BTNAK.shape[2] :], state_BAKV


def gated_delta_teacher_forced(q, k, v, beta, g, state_BAKV):
    """As `gated_delta_by_frame` for `layers.pairs`: a copy reads the state before its frame.

    Let R = exp(g) S, with the state S after the clean frames before the copy and g of its own. The
    N tokens of a copy write w_n = beta_n (v_n - k_n R - sum_{m < n} (k_n k_m) w_m), a triangular
    system, and read q_n R + sum_m (q_n k_m) w_m. So a copy needs only k_n S and q_n S, which to the
    kernel are 2 N tokens before its frame that write nothing.
    """
    N, scale = q.shape[2], q.shape[-1] ** -0.5
    if state_BAKV is None:
        state_BAKV = _zero_state(k, v)
    clean, copy = zip(*(pairs.split(part) for part in (q, k, v, beta, g)))
    tokens = _writes_and_reads(*clean)
    keys_and_queries = jnp.concatenate([copy[1], copy[0]], axis=2)
    silent = [jnp.zeros_like(jnp.concatenate([part[:, :, :1]] * 2 * N, 2)) for part in tokens[1:]]
    before = (keys_and_queries, *silent)
    tokens = [jnp.concatenate(parts, axis=2) for parts in zip(before, tokens)]
    y_BTNAV, state_BAKV = _by_kernel(tokens, state_BAKV)
    past_BTNAV, y_clean = y_BTNAV[:, :, : 2 * N].astype(jnp.float32), y_BTNAV[:, :, -N:]

    q, k, v, beta = (part.astype(jnp.float32) for part in copy[:4])
    past_BTNAV *= jnp.exp(copy[4])[:, :, None, :, None]
    key_reads, query_reads = past_BTNAV[:, :, :N] / scale, past_BTNAV[:, :, N:]
    exact = functools.partial(jnp.einsum, precision="highest")
    overlap_BTANM = exact("BTNAK,BTMAK->BTANM", k, k)
    beta_BTAN1 = beta.swapaxes(2, 3)[..., None]
    own_BTANV = beta_BTAN1 * (v - key_reads).swapaxes(2, 3)
    # Not solve_triangular: two of its calls at once can wait for each other for ever on two cores.
    inverse_BTANM = inverted(by_halves, beta_BTAN1 * jnp.tril(overlap_BTANM, -1))
    w_BTANV = exact("BTANM,BTAMV->BTANV", inverse_BTANM, own_BTANV)
    read_BTANM = scale * exact("BTNAK,BTMAK->BTANM", q, k)
    y_copy = query_reads + exact("BTANM,BTAMV->BTNAV", read_BTANM, w_BTANV)
    return pairs.join(y_clean, y_copy.astype(y_clean.dtype)), state_BAKV


def _zero_state(k_BTNAK, v_BTNAV):
    B, _, _, A, K = k_BTNAK.shape
    return jnp.zeros((B, A, K, v_BTNAV.shape[-1]))


def _writes_and_reads(q_BTNAK, k_BTNAK, v_BTNAV, beta_BTNA, g_BTA):
    """q, k, v, beta, g of the kernel's tokens, [B, T, tokens, A, ..]; the last N of each read."""
    N = q_BTNAK.shape[2]
    first_BTNA = jnp.pad(g_BTA[:, :, None], ((0, 0), (0, 0), (0, N - 1), (0, 0)))
    if N == 1:
        return q_BTNAK, k_BTNAK, v_BTNAV, beta_BTNA, first_BTNA
    writes = (jnp.zeros_like(q_BTNAK), k_BTNAK, v_BTNAV, beta_BTNA, first_BTNA)
    reads = (q_BTNAK, *(jnp.zeros_like(part) for part in writes[1:]))
    return [jnp.concatenate(parts, axis=2) for parts in zip(writes, reads)]


def _by_kernel(tokens, state_BAKV):
    """(y [B, T, tokens, A, V], state_BAKV) of q, k, v, beta, g, [B, T, tokens, A, ..] each."""
    B, T = tokens[0].shape[:2]
    q, k, v, beta, g = (part.reshape(B, -1, *part.shape[3:]) for part in tokens)
    q, k, v, beta, g = (shard(part, "BLAK"[: part.ndim]) for part in (q, k, v, beta, g))
    y_BLAV, state_BAKV = gated_delta(q, k, v, beta, g, initial_state=state_BAKV, return_state=True)
    return y_BLAV.reshape(B, T, -1, *y_BLAV.shape[2:]), state_BAKV
