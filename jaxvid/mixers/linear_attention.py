"""Mixers that remember a stream in a matrix of constant size: linear attention, Lightning, GLA.

They are causal by frame. A frame adds the key-value products of all its tokens to the state before
any of its tokens reads it, and the state decays once per frame:

    S_t = exp(g_t) S_{t-1} + sum_n k_tn^T v_tn,    y_tn = q_tn S_t

which at one token per frame is the recurrence of the papers. The state is one array, float32
[B, A, K, V]. Time enters by it alone, so there are no positions, and nothing bounds the length of
a stream.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.errors import UserError
from jaxvid.kernels.linear_attention import linear_attention
from jaxvid.layers.bias import alibi_slopes
from jaxvid.layers.linear import Linear
from jaxvid.parallel.sharding import shard

FEATURES = ("none", "silu")
GATE_RANK = 16  # of GLA's decays, and the divisor of their logarithm
_EPSILON = 1e-6
_ONE_OF_SILU = 1.2784645427610738  # silu of it is 1


class Recurrent(nn.Module):
    """What mixers with a state of constant size share: fields, projections, and the context.

    width: D. heads: A, divides D. grid: (H, W) of a frame's tokens, without meaning here. qk_norm:
    RMS-normalise queries and keys per head.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    qk_norm: bool = True
    dtype: Any = jnp.float32

    def prefill(self, context_BMD, tokens):
        """Read the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        del tokens
        y_B1MD, state = self(context_BMD[:, None])
        return y_B1MD[:, 0], state

    def _dense(self, features, name):
        init = nn.initializers.xavier_uniform()
        return Linear(features, dtype=self.dtype, kernel_init=init, name=name)

    def _norm(self, name):
        return nn.RMSNorm(dtype=self.dtype, name=name)

    def _qkv(self, x_BTND):
        """x_BTND -> q, k, v [B, T, N, A, K], queries and keys normalised."""
        heads = (*x_BTND.shape[:3], self.heads, self.width // self.heads)
        q, k, v = (self._dense(self.width, name)(x_BTND).reshape(heads) for name in "qkv")
        return (self._norm("q_norm")(q), self._norm("k_norm")(k), v) if self.qk_norm else (q, k, v)

    def _gated_out(self, y_BTNAK, x_BTND, gate):
        """Normalise every head, multiply by a gate from the input, join the heads.

        The gate starts within a hundredth of a constant: silu of 1, the sigmoid of 1/2. As noise it
        multiplies all that a layer recalls by a sign, or nearly none, for every input and channel,
        which for long hides from training what is worth recalling.
        """
        y_BTND = self._norm("out_norm")(y_BTNAK).reshape(*y_BTNAK.shape[:3], self.width)
        logit_BTND = Linear(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal"),
            bias_init=nn.initializers.constant(_ONE_OF_SILU if gate is nn.silu else 0.0),
            name="gate",
        )(x_BTND)
        return self._dense(self.width, "out")(y_BTND * gate(logit_BTND))


class LinearAttention(Recurrent):
    """Attention with the kernel phi(q) phi(k)^T, phi = elu + 1 (Katharopoulos et al. 2020).

    x_BTND -> y_BTND in `dtype`: the mean of the values of all tokens up to the end of the frame,
    weighted by the kernel. V of the state is K + 1, the last column being the sum of the weights.
    """

    @nn.compact
    def __call__(self, x_BTND, state=None):
        q, k, v = self._qkv(x_BTND)
        q, k = nn.elu(q) + 1, nn.elu(k) + 1
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        y_BTNAV, state = over_frames(q, k, v, None, state, scale=1.0)
        y_BTNAK = y_BTNAV[..., :-1] / (y_BTNAV[..., -1:] + _EPSILON)
        return self._dense(self.width, "out")(y_BTNAK.reshape(x_BTND.shape)), state


class Lightning(Recurrent):
    """Lightning Attention-2 in the block of TransNormerLLM (Qin et al. 2024).

    x_BTND -> y_BTND in `dtype`. silu on q, k, v; a constant decay exp(-slope) per head and frame;
    the output of a head is normalised and gated by a sigmoid.

    slopes: the name of one of the published laws, see `slopes`, or one number >= 0 per head, as a
    tuple or, since that is what a config holds, in words: "0.5,0.25". layer, layers: which of how
    many layers a law is for. Models give all their layers the same options, as one program may
    stand for all of them, and so all decay as the one named here, by default the only one. Raises
    UserError for slopes that are neither.
    """

    slopes: str | tuple[float, ...] = "lightning"
    layer: int = 0
    layers: int = 1

    @nn.compact
    def __call__(self, x_BTND, state=None):
        q, k, v = (nn.silu(part) for part in self._qkv(x_BTND))
        slope_A = slopes(self.slopes, self.heads, self.layer, self.layers)
        g_A = -jnp.asarray(slope_A, jnp.float32)
        y_BTNAK, state = over_frames(q, k, v, g_A, state, scale=1.0)
        return self._gated_out(y_BTNAK, x_BTND, nn.sigmoid), state


class GLA(Recurrent):
    """Gated linear attention (Yang et al. 2024, section 4.4): a decay per channel from the input.

    x_BTND -> y_BTND in `dtype`. The decay's logarithm is log sigmoid(low-rank projection) / 16,
    that of a frame the mean over its tokens; heads' outputs are normalised and gated by silu.
    feature: "none", or "silu" of queries and keys. The paper has none; products of either sign add
    up to noise before training has found what to match, so that a model learns to recall later.
    """

    feature: str = "none"

    @nn.compact
    def __call__(self, x_BTND, state=None):
        q, k, v = self._qkv(x_BTND)
        if self.feature == "silu":
            q, k = nn.silu(q), nn.silu(k)
        elif self.feature not in FEATURES:
            raise UserError(
                f"mixer.feature={self.feature!r}: unknown; use one of {', '.join(FEATURES)}"
            )
        rank_BTNR = self._dense(GATE_RANK, "decay_in")(x_BTND)
        logit_BTND = Linear(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=self._spread,
            name="decay_out",
        )(rank_BTNR).astype(jnp.float32)
        g_BTD = (nn.log_sigmoid(logit_BTND) / GATE_RANK).mean(axis=2)
        K = q.shape[-1]
        g_BTAK = g_BTD.reshape(*g_BTD.shape[:2], self.heads, K)
        y_BTNAK, state = over_frames(q, k, v, g_BTAK, state, scale=K**-0.5)
        return self._gated_out(y_BTNAK, x_BTND, nn.silu), state

    def _spread(self, rng, shape):
        """Biases of the decays: a head's channels forget in 23 frames to 6,500 at the start.

        Without, all forget in 23, and some runs never find out what lies further back.
        """
        del rng
        channels_K = jnp.linspace(0.0, 6.0, self.width // self.heads)
        return jnp.tile(channels_K, self.heads).reshape(shape)


def over_frames(q_BTNAK, k_BTNAK, v_BTNAV, log_decay, state_BAKV, *, scale):
    """Linear attention, causal by frame -> (y_BTNAV, state_BAKV), the state float32.

    log_decay: None, [A] or [B, T, A, K]; a state of None is zero. A frame of one token is a token
    of the kernel, which on a mesh with an axis `seq` leaves frames where they are. Of more, each
    has a state of its own, which its tokens read by one product; these states are gathered.
    """
    B, T, N, A, K = q_BTNAK.shape
    V = v_BTNAV.shape[-1]
    if state_BAKV is None:
        state_BAKV = jnp.zeros((B, A, K, V))
    if N == 1 and T > 0:
        q, k, v = (shard(x[:, :, 0], "BTAK") for x in (q_BTNAK, k_BTNAK, v_BTNAV))
        if log_decay is not None and log_decay.ndim == 4:
            log_decay = shard(log_decay, "BTAK")
        options = dict(scale=scale, initial_state=state_BAKV, return_state=True)
        y_BTAV, state_BAKV = linear_attention(q, k, v, log_decay, **options)
        return y_BTAV[:, :, None], state_BAKV

    def step(state_BAKV, frame):
        written_BAKV, decay_BAK1 = frame
        state_BAKV = decay_BAK1 * state_BAKV + written_BAKV
        return state_BAKV, state_BAKV

    written_TBAKV = jnp.einsum(
        "BTNAK,BTNAV->TBAKV", k_BTNAK, v_BTNAV, preferred_element_type=jnp.float32
    )
    g = jnp.zeros(A) if log_decay is None else log_decay
    g_BTAK = jnp.broadcast_to(g[:, None] if g.ndim == 1 else g, (B, T, A, K))
    decay_TBAK1 = jnp.exp(g_BTAK).swapaxes(0, 1)[..., None]
    frames = [shard(part, "_BAKV") for part in (written_TBAKV, decay_TBAK1)]
    state_BAKV, seen_TBAKV = jax.lax.scan(step, state_BAKV, frames)
    y_BTNAV = jnp.einsum("BTNAK,TBAKV->BTNAV", q_BTNAK * scale, seen_TBAKV.astype(q_BTNAK.dtype))
    return y_BTNAV, state_BAKV


def slopes(law, heads, layer=0, layers=1):
    """The decay per step of every head, -log lambda >= 0 -> numpy [A].

    law: a published one by name, or the numbers themselves, see `Lightning`. layer: 0 is the first
    of `layers`.

    lightning: that of ALiBi (Press et al. 2022), 2^(-8 (a + 1) / A) for heads a = 0 .. A - 1, less
    in deeper layers (Lightning Attention-2, TransNormerLLM). fla: 8 a / A (1 - layer / layers) of
    flash-linear-attention, whose first head never forgets. sglang: as lightning, with layers
    counted from one less. A layer that is alone decays as ALiBi does, whoever counts.

    Raises UserError for a name that is none, and for numbers that are not one per head.
    """
    step = max(layers - 1, 1)
    laws = {
        "lightning": lambda: alibi_slopes(heads) * (1 - layer / step + 1e-5),
        "fla": lambda: 8 / heads * (1 - layer / layers) * np.arange(heads),
        "sglang": lambda: alibi_slopes(heads) * (1 - (layer - (layers > 1)) / step + 1e-5),
    }
    if isinstance(law, str) and law in laws:
        return laws[law]()
    try:
        slope_A = np.array([float(x) for x in (law.split(",") if isinstance(law, str) else law)])
    except (TypeError, ValueError):
        raise UserError(
            f"slopes={law!r}: unknown; use one of {', '.join(laws)}, or a number per head"
        ) from None
    if len(slope_A) != heads:
        raise UserError(f"slopes={law!r}: {len(slope_A)} numbers; give {heads}, one per head")
    if not (np.isfinite(slope_A) & (slope_A >= 0)).all():
        raise UserError(f"slopes={law!r}: would let a head grow; use numbers from 0 on")
    return slope_A
