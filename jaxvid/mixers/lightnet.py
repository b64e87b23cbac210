"""LightNet: linear attention with keys that are a softmax over the past, in one scan."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least
from jaxvid.layers.embed import rotary_angles
from jaxvid.mixers.linear_attention import linear_attention_by_frame
from jaxvid.mixers.recurrent import LOG_ZERO, Recurrent
from jaxvid.parallel.sharding import shard

GATE_RANK = 128  # of the projection to the output gate; the width if that is less
MAX_TPE = 256
_SLOWEST = 4.0  # logit of the slowest decay of MD-TPE at initialisation: 0.98 per step


class State(NamedTuple):
    """The state of a stream; all but `frames` are float32.

    memory_BAKV: [B, A, 2 K, V], without `lrpe` [B, A, K, V]. log_sum_BAK: log of the sum of exp(k)
    over all tokens read. tpe_BNDE: decaying sums of each location over time, D is 0 without MD-TPE.
    frames: int32, the number of frames read.
    """

    memory_BAKV: Any
    log_sum_BAK: Any
    tpe_BNDE: Any
    frames: Any

    def skip(self, frames):
        """The state after as many frames of which it keeps nothing."""
        return self._replace(frames=self.frames + frames)


class LightNet(Recurrent):
    """Linear attention with an additive recurrence (Qin et al. 2024, LightNet, 2405.21022).

    x_BTND -> y_BTND in `dtype`. Each channel of a key weighs a token by a softmax over all tokens
    up to the end of the frame, so old weights shrink as new tokens come. This is the decay of GLA
    with g_t = z_{t-1} - z_t, where z_t is the logarithm of the sum of exp(k) so far. A softmax over
    all positions has no direction, so one scan over frames suffices; rows and columns need none.
    The output of a head is normalised and gated by silu of a low-rank projection.

    Positions: `lrpe` (MD-LRPE) turns queries and weighted keys into [x cos, x sin]. The angle of a
    channel grows along one of (t, h, w), so products fall with the cosine of the distance; the
    context has angle 0. `tpe` (MD-TPE; 0 leaves it out) adds to the input, along each of t, h and
    w, a sum of that many decaying exponentials per channel, normalised and projected. The network
    of the paper does so once, at its input; here every layer does, because layers hold the state of
    a stream. Only the product of the paper's q and k matters there: it is one learned number,
    `tpe_weight`. Raises UserError for negative `tpe`.
    """

    lrpe: bool = True
    tpe: int = 2

    def __post_init__(self):
        at_least("tpe", self.tpe, 0, at_most=MAX_TPE)
        super().__post_init__()

    def prefill(self, context_BMD, tokens: int):
        """Read the context as a frame without positions -> (y_BMD, state); it sees only itself."""
        y_B1MD, state = self(context_BMD[:, None], context=True)
        return y_B1MD[:, 0], self._start(context_BMD.shape[0], tokens)._replace(
            memory_BAKV=state.memory_BAKV, log_sum_BAK=state.log_sum_BAK
        )

    def _start(self, B: int, tokens: int) -> State:
        """The state before any token, for frames of `tokens` tokens."""
        A, K = self.heads, self.width // self.heads
        return State(
            jnp.zeros((B, A, (1 + self.lrpe) * K, K)),
            jnp.full((B, A, K), LOG_ZERO),
            jnp.zeros((B, tokens, self.width if self.tpe else 0, self.tpe)),
            np.int32(0),  # numpy, so the angles of a whole clip are constants of the program
        )

    @nn.compact
    def __call__(self, x_BTND, state=None, context=False):
        """context: whether x is the context, which has no positions."""
        B, T, N, D = x_BTND.shape
        state = self._start(B, N) if state is None else state
        tpe_BNDE = state.tpe_BNDE
        if self.tpe and not context:
            y_BTND, tpe_BNDE = self._toeplitz(x_BTND, tpe_BNDE)
            x_BTND = x_BTND + y_BTND
        q, k, v = self._qkv(x_BTND)
        q = nn.silu(q)
        k, g_BTAK, log_sum_BAK = softmax_keys(k, state.log_sum_BAK)
        k = k.astype(v.dtype)
        if self.lrpe:
            angle_TNK = np.zeros((T, N, D // self.heads), np.float32)
            if not context:
                frame_T = state.frames + np.arange(T, dtype=np.int32)
                angle_TNK = rotary_angles(frame_T, self.grid, 2 * D // self.heads)
            q, k = apply_lrpe(q, angle_TNK), apply_lrpe(k, angle_TNK)
            g_BTAK = jnp.concatenate([g_BTAK] * 2, axis=-1)
        y_BTNAK, memory_BAKV = linear_attention_by_frame(q, k, v, g_BTAK, state.memory_BAKV)
        rank_BTNR = self._dense(min(GATE_RANK, D), "gate_in")(x_BTND)
        y_BTND = self._gated_out(y_BTNAK, rank_BTNR, nn.silu)
        return y_BTND, State(memory_BAKV, log_sum_BAK, tpe_BNDE, state.frames + np.int32(T))

    def _toeplitz(self, x_BTND, tpe_BNDE):
        """MD-TPE, normalised and projected -> (y_BTND, tpe_BNDE)."""
        x_BTND = x_BTND.astype(jnp.float32)
        B, T, _, D = x_BTND.shape
        x_BTHWD = x_BTND.reshape(B, T, *self.grid, D)
        total_BTND, tpe_BNDE = self._decaying_sums("t", shard(x_BTND, "B_ND"), tpe_BNDE)
        for axis, letter in ((2, "h"), (3, "w")):
            if x_BTHWD.shape[axis] > 1:
                y, _ = self._decaying_sums(letter, jnp.moveaxis(x_BTHWD, axis, 1), 0.0)
                total_BTND += jnp.moveaxis(y, 1, axis).reshape(x_BTND.shape)
        normalised_BTND = self._norm("tpe_norm")(total_BTND)
        return self._dense(self.width, "tpe_out")(normalised_BTND), tpe_BNDE

    def _decaying_sums(self, letter, x, state):
        """`decaying_sums` with the parameters of the axis `letter`: t, h or w."""
        shape = (self.width, self.tpe)
        weight_DE = self.param(f"tpe_weight_{letter}", nn.initializers.normal(), shape)
        logit_DE = self.param(f"tpe_decay_{letter}", _decay_logits, shape)
        state = jnp.broadcast_to(state, (x.shape[0], *x.shape[2:], self.tpe))
        return decaying_sums(x, weight_DE, logit_DE, state)


def softmax_keys(k_BTNAK, log_sum_BAK):
    """Keys as a softmax over all tokens up to the end of the frame, per channel, float32.

    -> (weights_BTNAK, g_BTAK, log_sum_BAK): weights exp(k - z_t); the decay z_{t-1} - z_t <= 0,
    which turns the weights relative to frame t - 1 into weights relative to frame t; z after the
    last frame.
    """
    k = k_BTNAK.astype(jnp.float32)
    frame_BTAK = shard(jax.nn.logsumexp(k, axis=2), "B_AK")
    z_BTAK = jax.lax.cumlogsumexp(frame_BTAK, axis=1)
    z_BTAK = jnp.logaddexp(z_BTAK, log_sum_BAK[:, None])
    z_BTAK = jnp.concatenate([log_sum_BAK[:, None], z_BTAK], axis=1)
    # The difference z_{t-1} - z_t would lose the small decays of a long stream to rounding.
    g_BTAK = -nn.softplus(frame_BTAK - z_BTAK[:, :-1])
    return jnp.exp(k - z_BTAK[:, 1:, None]), g_BTAK, z_BTAK[:, -1]


def apply_lrpe(x_BTNAK, angle_TNK):
    """[x cos | x sin], [B, T, N, A, 2 K]: products fall with the cosine of the distance."""
    xp = np if isinstance(angle_TNK, np.ndarray) else jnp
    cos, sin = (
        part[:, :, None].astype(x_BTNAK.dtype) for part in (xp.cos(angle_TNK), xp.sin(angle_TNK))
    )
    return jnp.concatenate([x_BTNAK * cos, x_BTNAK * sin], axis=-1)


def decaying_sums(x, weight_DE, logit_DE, state):
    """y_i = sum_j<=i sum_e weight_e decay_e^(i - j) x_j along axis 1 -> (y, state), float32.

    x [B, L, ..., D]; decay = sigmoid(logit_DE). State: sum_j decay_e^(i - j) x_j at the last i,
    [B, ..., D, E]. This is a Toeplitz matrix as a recurrence (Qin et al. 2024, TPE).
    """
    decay_DE = nn.sigmoid(logit_DE)

    def step(state, x):
        state = decay_DE * state + x[..., None]
        return state, (weight_DE * state).sum(-1)

    state, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state


def _decay_logits(rng, shape):
    """Logits from 0, a decay of 0.5 per step, to _SLOWEST, the same for every channel."""
    del rng
    return jnp.broadcast_to(jnp.linspace(0, _SLOWEST, shape[1]), shape)
