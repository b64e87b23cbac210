"""LightNet: linear attention whose keys are a softmax over all of the past, in one scan."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.layers.embed import rotary_angles
from jaxvid.mixers.linear_attention import Recurrent, over_frames
from jaxvid.parallel.sharding import shard

GATE_RANK = 128  # of the output's gate, or the width if that is less
_NOTHING = -1e30  # the logarithm of an empty sum; -inf would make NaN of differences
_SLOWEST = 4.0  # logit of the slowest decay of MD-TPE at the start: 0.98 a step


class State(NamedTuple):
    """memory: float32 [B, A, 2 K, V] (K without positions). log_sum: float32 [B, A, K], log of the
    sum of exp(k) over all tokens read. before_BNDE: what MD-TPE remembers of each location, float32
    (D is 0 without it). frames: int32, how many were read."""

    memory_BAKV: Any
    log_sum_BAK: Any
    before_BNDE: Any
    frames: Any


class LightNet(Recurrent):
    """Linear attention with an additive recurrence (Qin et al. 2024, LightNet, 2405.21022).

    x_BTND -> y_BTND in `dtype`. A channel of a key weighs a token by its softmax over all tokens up
    to the end of the frame, so old weights shrink as new ones come: that is the decay of GLA with
    g_t = z_{t-1} - z_t, z_t the logarithm of the sum of exp(k) so far. A softmax over all positions
    has no direction, so time, rows and columns need no scans of their own: one, over frames, is
    all. Heads' outputs are normalised and gated by silu of a product of low rank.

    Positions: `lrpe` turns queries and weighted keys into [x cos, x sin], the angle of a channel
    growing along one of (t, h, w), so that a product falls with the cosine of the distance
    (MD-LRPE); the context has angle 0. `tpe` adds to the input, over each axis in turn of its
    direction, a sum of that many decaying exponentials per channel, normalised and projected
    (MD-TPE; 0 leaves it out). The papers' network does so once, at its entrance; here every layer
    does, since layers are what carries a stream forward. The product of their q and k, which is
    all that matters of these, is one learned number, `tpe_weight`.
    """

    lrpe: bool = True
    tpe: int = 2

    def prefill(self, context_BMD, tokens):
        """Read the context as a frame without positions -> (y_BMD, state); it sees only itself."""
        y_B1MD, state = self(context_BMD[:, None], context=True)
        return y_B1MD[:, 0], self._start(context_BMD.shape[0], tokens)._replace(
            memory_BAKV=state.memory_BAKV, log_sum_BAK=state.log_sum_BAK
        )

    def _start(self, B, tokens):
        """The state of a stream of frames of `tokens` tokens before anything is read."""
        A, K = self.heads, self.width // self.heads
        return State(
            jnp.zeros((B, A, (1 + self.lrpe) * K, K)),
            jnp.full((B, A, K), _NOTHING),
            jnp.zeros((B, tokens, self.width if self.tpe else 0, self.tpe)),
            np.int32(0),  # in numpy, so that the angles of a whole clip are constants
        )

    @nn.compact
    def __call__(self, x_BTND, state=None, context=False):
        """context: the frame is the context, which has no positions."""
        B, T, N, D = x_BTND.shape
        state = self._start(B, N) if state is None else state
        before_BNDE = state.before_BNDE
        if self.tpe and not context:
            y_BTND, before_BNDE = self._toeplitz(x_BTND, before_BNDE)
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
            q, k = spread(q, angle_TNK), spread(k, angle_TNK)
            g_BTAK = jnp.concatenate([g_BTAK] * 2, axis=-1)
        y_BTNAK, memory_BAKV = over_frames(q, k, v, g_BTAK, state.memory_BAKV, scale=1.0)
        rank_BTNR = self._dense(min(GATE_RANK, D), "gate_in")(x_BTND)
        y_BTND = self._gated_out(y_BTNAK, rank_BTNR, nn.silu)
        return y_BTND, State(memory_BAKV, log_sum_BAK, before_BNDE, state.frames + np.int32(T))

    def _toeplitz(self, x_BTND, before_BNDE):
        """MD-TPE, normalised and projected -> (y_BTND, before_BNDE)."""
        x_BTND = x_BTND.astype(jnp.float32)
        B, T, _, D = x_BTND.shape
        x_BTHWD = x_BTND.reshape(B, T, *self.grid, D)
        total_BTND, before_BNDE = self._exponentials("t", shard(x_BTND, "B_ND"), before_BNDE)
        for axis, letter in ((2, "h"), (3, "w")):
            if x_BTHWD.shape[axis] > 1:
                y, _ = self._exponentials(letter, jnp.moveaxis(x_BTHWD, axis, 1), 0.0)
                total_BTND += jnp.moveaxis(y, 1, axis).reshape(x_BTND.shape)
        normalised_BTND = self._norm("tpe_norm")(total_BTND)
        return self._dense(self.width, "tpe_out")(normalised_BTND), before_BNDE

    def _exponentials(self, letter, x, state):
        """`exponentials` with parameters of an axis of its own, named by its letter."""
        shape = (self.width, self.tpe)
        weight_DE = self.param(f"tpe_weight_{letter}", nn.initializers.normal(), shape)
        logit_DE = self.param(f"tpe_decay_{letter}", _slower_and_slower, shape)
        state = jnp.broadcast_to(state, (x.shape[0], *x.shape[2:], self.tpe))
        return exponentials(x, weight_DE, logit_DE, state)


def softmax_keys(k_BTNAK, log_sum_BAK):
    """Keys as a softmax over all tokens up to the end of the frame, per channel, float32.

    -> (weights_BTNAK, g_BTAK, log_sum_BAK): exp(k - z_t), the decay z_{t-1} - z_t <= 0 that turns
    the weights of earlier frames into those of frame t, and z after the last frame.
    """
    k = k_BTNAK.astype(jnp.float32)
    frame_BTAK = shard(jax.nn.logsumexp(k, axis=2), "B_AK")
    z_BTAK = jax.lax.cumlogsumexp(frame_BTAK, axis=1)
    z_BTAK = jnp.logaddexp(z_BTAK, log_sum_BAK[:, None])
    z_BTAK = jnp.concatenate([log_sum_BAK[:, None], z_BTAK], axis=1)
    # Not z_{t-1} - z_t itself, which loses the small decays of a long stream to rounding.
    g_BTAK = -nn.softplus(frame_BTAK - z_BTAK[:, :-1])
    return jnp.exp(k - z_BTAK[:, 1:, None]), g_BTAK, z_BTAK[:, -1]


def spread(x_BTNAK, angle_TNK):
    """[x cos | x sin], twice as wide, so that products fall with the cosine of the distance."""
    xp = np if isinstance(angle_TNK, np.ndarray) else jnp
    cos, sin = (
        part[:, :, None].astype(x_BTNAK.dtype) for part in (xp.cos(angle_TNK), xp.sin(angle_TNK))
    )
    return jnp.concatenate([x_BTNAK * cos, x_BTNAK * sin], axis=-1)


def exponentials(x, weight_DE, logit_DE, state):
    """y_i = sum_j<=i sum_e weight_e decay_e^(i - j) x_j along axis 1 -> (y, state), float32.

    x [B, L, ..., D], decay the logistic of logit_DE. State: sum_j decay_e^(i - j) x_j after the
    last i, [B, ..., D, E]: a Toeplitz matrix by a recurrence (Qin et al. 2024, TPE).
    """
    decay_DE = nn.sigmoid(logit_DE)

    def step(state, x):
        state = decay_DE * state + x[..., None]
        return state, (weight_DE * state).sum(-1)

    state, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state


def _slower_and_slower(rng, shape):
    """Logits of the decays of every channel, from 0.5 a step to that of _SLOWEST."""
    del rng
    return jnp.broadcast_to(jnp.linspace(0, _SLOWEST, shape[1]), shape)
