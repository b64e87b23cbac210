"""Mixers whose state is a matrix of constant size: linear attention, Lightning, GLA.

They are causal by frame. A frame adds the key-value products of all its tokens to the state before
any of its tokens reads the state, and the state decays once per frame:

    S_t = exp(g_t) S_{t-1} + sum_n k_tn^T v_tn,    y_tn = q_tn S_t

With one token per frame this is the recurrence of the papers. The state is one array, float32
[B, A, K, V]. There are no positions, and nothing bounds the length of a stream.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, between, choose, require
from jaxvid.kernels.linear_attention import linear_attention
from jaxvid.layers import pairs
from jaxvid.layers.bias import alibi_slopes
from jaxvid.layers.linear import Linear
from jaxvid.mixers.recurrent import Recurrent
from jaxvid.parallel.sharding import shard

FEATURES = ("none", "silu")
DECAY_RANK = 16  # of the projection to GLA's decays
DECAY_DIVISOR = 16  # of the logarithm of GLA's decays
_EPSILON = 1e-6


class _MatrixMemory(Recurrent):
    """A mixer that is `_layer` of a rule: that of a stream or that of teacher forcing."""

    def __call__(self, x_BTND, state=None):
        return self._layer(x_BTND, state, linear_attention_by_frame)

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) in one pass over the clean frames."""
        x_BTND = pairs.join(clean_BTND, noisy_BTND)
        y_BTND, state = self._layer(x_BTND, state, linear_attention_teacher_forced)
        return *pairs.split(y_BTND), state


class LinearAttention(_MatrixMemory):
    """Attention with the kernel phi(q) phi(k)^T, phi = elu + 1 (Katharopoulos et al. 2020).

    x_BTND -> y_BTND in `dtype`: the mean of the values of all tokens up to the end of the frame,
    weighted by the kernel. V of the state is K + 1; its last column is the sum of the weights.
    """

    @nn.compact
    def _layer(self, x_BTND, state, rule):
        q, k, v = self._qkv(x_BTND)
        q, k = nn.elu(q) + 1, nn.elu(k) + 1
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        y_BTNAV, state = rule(q, k, v, None, state)
        y_BTNAK = y_BTNAV[..., :-1] / (y_BTNAV[..., -1:] + _EPSILON)
        return self._dense(self.width, "out")(y_BTNAK.reshape(x_BTND.shape)), state


class Lightning(_MatrixMemory):
    """Lightning Attention-2 in the block of TransNormerLLM (Qin et al. 2024).

    x_BTND -> y_BTND in `dtype`. silu on q, k, v; a constant decay exp(-slope) per head and frame;
    the output of a head is normalised and gated by a sigmoid.

    slopes: the name of a published rule (see `decay_slopes`), or one number >= 0 per head: a tuple,
    or text, as in a config: "0.5,0.25". layer, layers: the layer whose slopes the rule gives, and
    the number of layers that the rule counts. A model gives the same options to all of its layers,
    so all of them have the slopes of this one layer. Raises UserError for other slopes and for
    `layer` outside 0 to `layers` - 1.
    """

    slopes: str | tuple[float, ...] = "lightning"
    layer: int = 0
    layers: int = 1

    def __post_init__(self):
        at_least("layers", self.layers, 1, at_most=2**20)
        between("layer", self.layer, 0, self.layers - 1)
        decay_slopes(self.slopes, self.heads, self.layer, self.layers)
        super().__post_init__()

    @nn.compact
    def _layer(self, x_BTND, state, rule):
        q, k, v = (nn.silu(part) for part in self._qkv(x_BTND))
        slope_A = decay_slopes(self.slopes, self.heads, self.layer, self.layers)
        g_A = -jnp.asarray(slope_A, jnp.float32)
        y_BTNAK, state = rule(q, k, v, g_A, state)
        return self._gated_out(y_BTNAK, x_BTND, nn.sigmoid), state


class GLA(_MatrixMemory):
    """Gated linear attention (Yang et al. 2024, section 4.4): a decay per channel from the input.

    x_BTND -> y_BTND in `dtype`. The log decay is log sigmoid(low-rank projection) / 16,
    averaged over the tokens of a frame. The output of a head is normalised and gated by silu.
    feature: "none", as in the paper, or "silu" of queries and keys. Without it the products of
    queries and keys have both signs and add up to noise early in training, so a model learns to
    recall later. Raises UserError for another feature.
    """

    feature: str = "none"

    def __post_init__(self):
        choose("feature", self.feature, FEATURES)
        super().__post_init__()

    @nn.compact
    def _layer(self, x_BTND, state, rule):
        q, k, v = self._qkv(x_BTND)
        if self.feature == "silu":
            q, k = nn.silu(q), nn.silu(k)
        rank_BTNR = self._dense(DECAY_RANK, "decay_in")(x_BTND)
        logit_BTND = Linear(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=self._decay_biases,
            name="decay_out",
        )(rank_BTNR).astype(jnp.float32)
        g_BTD = (nn.log_sigmoid(logit_BTND) / DECAY_DIVISOR).mean(axis=2)
        K = q.shape[-1]
        g_BTAK = g_BTD.reshape(*g_BTD.shape[:2], self.heads, K)
        y_BTNAK, state = rule(q, k, v, g_BTAK, state, scale=K**-0.5)
        return self._gated_out(y_BTNAK, x_BTND, nn.silu), state

    def _decay_biases(self, rng, shape):
        """Biases from 0 to 6 over the channels of a head: these forget in 23 to 6,500 frames.

        With biases of zero all channels forget in 23 frames, and some runs never learn to use what
        lies further back.
        """
        del rng
        channels_K = jnp.linspace(0.0, 6.0, self.width // self.heads)
        return jnp.tile(channels_K, self.heads).reshape(shape)


def linear_attention_by_frame(q_BTNAK, k_BTNAK, v_BTNAV, log_decay, state_BAKV, *, scale=1.0):
    """Linear attention, causal by frame -> (y_BTNAV, state_BAKV), the state float32.

    log_decay: None, [A] or [B, T, A, K]. A state of None is zero. With one token per frame the
    kernel runs over the frames; on a mesh with an axis `seq` each device keeps its frames. With
    more tokens a scan computes the state after each frame, all tokens of a frame read that state by
    one product, and a mesh gathers the states.
    """
    _, T, N, _, _ = q_BTNAK.shape
    state_BAKV = _given_or_zero(state_BAKV, k_BTNAK, v_BTNAV)
    if N == 1 and T > 0:
        return _by_kernel(q_BTNAK, k_BTNAK, v_BTNAV, log_decay, state_BAKV, scale)
    seen_TBAKV, state_BAKV = _states(k_BTNAK, v_BTNAV, log_decay, state_BAKV)
    return _read(q_BTNAK * scale, seen_TBAKV), state_BAKV


def linear_attention_teacher_forced(q, k, v, log_decay, state_BAKV, *, scale=1.0):
    """As `linear_attention_by_frame` for `layers.pairs`: a copy reads the state before its frame.

    A noisy copy sees exp(g) S + sum_n k_n^T v_n, with the state S after the clean frames before it
    and g, k, v of its own. q, k, v [B, 2 T, N, A, ..] -> (y [B, 2 T, N, A, V], state_BAKV).
    """
    B, frames, N, A, _ = q.shape
    state_BAKV = _given_or_zero(state_BAKV, k, v)
    g_BTAK = jnp.zeros((B, frames, A, 1))
    if log_decay is not None:
        g_BTAK += log_decay[:, None] if log_decay.ndim == 1 else log_decay
    (q, q_copy), (k, k_copy), (v, v_copy) = (pairs.split(x) for x in (q * scale, k, v))
    g, g_copy = pairs.split(g_BTAK)
    own_BTANM = jnp.einsum("BTNAK,BTMAK->BTANM", q_copy, k_copy)
    y_copy = jnp.einsum("BTANM,BTMAV->BTNAV", own_BTANM, v_copy)
    q_copy = (q_copy * jnp.exp(g_copy)[:, :, None]).astype(q.dtype)
    if N > 1:
        seen_TBAKV, last_BAKV = _states(k, v, g, state_BAKV)
        before_TBAKV = jnp.concatenate([state_BAKV[None], seen_TBAKV[:-1]])
        y, y_past = _read(q, seen_TBAKV), _read(q_copy, before_TBAKV)
        return pairs.join(y, y_past + y_copy), last_BAKV
    # To the kernel a copy is a token before its frame that only reads.
    q, k, v = (pairs.join(*two) for two in ((q_copy, q), (0 * k, k), (0 * v, v)))
    g = pairs.join(0 * g, g)
    if log_decay is None or log_decay.ndim == 1:
        g = None if log_decay is None else g[..., 0]
    y, state_BAKV = _by_kernel(q, k, v, g, state_BAKV, 1.0)
    y_past, y = pairs.split(y)
    return pairs.join(y, y_past + y_copy), state_BAKV


def _given_or_zero(state_BAKV, k_BTNAK, v_BTNAV):
    B, _, _, A, K = k_BTNAK.shape
    return jnp.zeros((B, A, K, v_BTNAV.shape[-1])) if state_BAKV is None else state_BAKV


def _by_kernel(q_BT1AK, k_BT1AK, v_BT1AV, log_decay, state_BAKV, scale):
    """(y_BT1AV, state_BAKV) of frames of one token."""
    q, k, v = (shard(x[:, :, 0], "BTAK") for x in (q_BT1AK, k_BT1AK, v_BT1AV))
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = shard(log_decay, "BTAK"[: log_decay.ndim])
    options = dict(scale=scale, initial_state=state_BAKV, return_state=True)
    y_BTAV, state_BAKV = linear_attention(q, k, v, log_decay, **options)
    return y_BTAV[:, :, None], state_BAKV


def _states(k_BTNAK, v_BTNAV, log_decay, state_BAKV):
    """(the state after each frame, float32 [T, B, A, K, V], the last of them)."""
    B, T, _, A, K = k_BTNAK.shape

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
    return seen_TBAKV, state_BAKV


def _read(q_BTNAK, seen_TBAKV):
    """Every token of a frame reads one state."""
    return jnp.einsum("BTNAK,TBAKV->BTNAV", q_BTNAK, seen_TBAKV.astype(q_BTNAK.dtype))


def decay_slopes(
    slopes: str | Sequence[float], heads: int, layer: int = 0, layers: int = 1
) -> np.ndarray:
    """The decay per step of every head, -log lambda >= 0 -> numpy [A].

    slopes: the name of a published rule, or the numbers themselves (see `Lightning`). layer: 0 is
    the first of `layers`.

    lightning: the slopes of ALiBi (Press et al. 2022), 2^(-8 (a + 1) / A) for heads a = 0 .. A - 1,
    smaller in deeper layers (Lightning Attention-2, TransNormerLLM). fla: 8 a / A (1 - layer /
    layers) of flash-linear-attention; its first head never forgets. sglang: as lightning, but the
    count of layers starts one lower. With layers=1 lightning and sglang are ALiBi's.

    Raises UserError for an unknown name, and unless there is one finite number >= 0 per head.
    """
    step = max(layers - 1, 1)
    rules = {
        "lightning": lambda: alibi_slopes(heads) * (1 - layer / step + 1e-5),
        "fla": lambda: 8 / heads * (1 - layer / layers) * np.arange(heads),
        "sglang": lambda: alibi_slopes(heads) * (1 - (layer - (layers > 1)) / step + 1e-5),
    }
    numbers = slopes
    if isinstance(slopes, str):
        if slopes in rules:
            return rules[slopes]()
        numbers = slopes.split(",")
    try:
        slope_A = np.array([float(number) for number in numbers])
    except (TypeError, ValueError):
        slope_A = None
    message = f"unknown; use one of {', '.join(rules)}, or a number per head"
    require(slope_A is not None, "slopes", slopes, message)
    message = f"has {len(slope_A)} numbers; give {heads}, one per head"
    require(len(slope_A) == heads, "slopes", slopes, message)
    bounded = (np.isfinite(slope_A) & (slope_A >= 0)).all()
    require(bounded, "slopes", slopes, "a head would grow; use finite numbers from 0 on")
    return slope_A
