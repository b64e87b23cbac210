"""The base of the mixers whose state has a constant size, and what several of them share."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.layers.conv import CausalConv
from jaxvid.layers.linear import Linear

LOG_ZERO = -1e30  # the logarithm of an empty sum; differences of -inf would be NaN
_SILU_INVERSE_OF_ONE = 1.2784645427610738
_SLOWEST = 1e-3  # -log of the decay per frame of the slowest head at initialisation


class Recurrent(nn.Module):
    """Fields, projections, context and gated output of a mixer with a state of constant size.

    width: D. heads: A, divides D. grid: (H, W) of the tokens of a frame, for mixers with positions.
    qk_norm: RMS-normalise queries and keys per head.
    """

    width: int
    heads: int
    grid: tuple[int, int] = (1, 1)
    qk_norm: bool = True
    dtype: Any = jnp.float32

    window: ClassVar[int | None] = None
    streams: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def prefill(self, context_BMD, tokens: int):
        """Read the context as a frame before the first -> (y_BMD, state); it sees only itself."""
        del tokens
        y_B1MD, state = self(context_BMD[:, None])
        return y_B1MD[:, 0], state

    def teacher_forced(self, clean_BTND, noisy_BTND, state=None):
        """Teacher forcing (see `jaxvid.mixers`) by its definition, in a scan over frames."""
        _, state = self(clean_BTND[:, :0], state)  # in the form that later calls keep

        def step(mixer, state, frame):
            clean_B1ND, noisy_B1ND = (x_BND[:, None] for x_BND in frame)
            y_noisy, _ = mixer(noisy_B1ND, state)
            y_clean, state = mixer(clean_B1ND, state)
            return state, (y_clean[:, 0], y_noisy[:, 0])

        shared = dict(variable_broadcast="params", split_rngs={"params": False})
        scan = nn.scan(step, in_axes=1, out_axes=1, **shared)
        state, (y_clean, y_noisy) = scan(
            self, jax.tree.map(jnp.asarray, state), (clean_BTND, noisy_BTND)
        )
        return y_clean, y_noisy, state

    def _dense(self, features: int, name: str) -> Linear:
        init = nn.initializers.xavier_uniform()
        return Linear(features, dtype=self.dtype, kernel_init=init, name=name)

    def _norm(self, name: str) -> nn.RMSNorm:
        return nn.RMSNorm(dtype=self.dtype, name=name)

    def _qkv(self, x_BTND):
        """x_BTND -> q, k, v [B, T, N, A, K], queries and keys normalised."""
        heads = (*x_BTND.shape[:3], self.heads, self.width // self.heads)
        q, k, v = (self._dense(self.width, name)(x_BTND).reshape(heads) for name in "qkv")
        return (self._norm("q_norm")(q), self._norm("k_norm")(k), v) if self.qk_norm else (q, k, v)

    def _convolved_qkv(self, x_BTND, pasts, paired=False):
        """x_BTND -> (q, k, v [B, T, N, A, K] after a `CausalConv` and silu, the new pasts).

        The width of the convolutions is the field `conv`. pasts: of each, or None at the start.
        """
        heads = (*x_BTND.shape[:3], self.heads, self.width // self.heads)
        qkv, new_pasts = [], []
        for name, past in zip("qkv", pasts or (None,) * 3):
            conv = CausalConv(self.conv, self.dtype, name=f"conv_{name}")
            y_BTND, past = conv(self._dense(self.width, name)(x_BTND), past, paired)
            qkv.append(nn.silu(y_BTND).reshape(heads))
            new_pasts.append(past)
        return qkv, tuple(new_pasts)

    def _empty_pasts(self, B: int, tokens: int):
        """The pasts of `_convolved_qkv` at the start of a stream."""
        return (jnp.zeros((B, self.conv - 1, tokens, self.width), self.dtype),) * 3

    def _per_head(self, name: str) -> Linear:
        """A projection to one number per head, of variance 1/3 at initialisation.

        The released layer of Gated DeltaNet does the same. Xavier's rule would give variance 2. The
        mean of exp(x) is exp(variance / 2), so decays would then be over twice as strong on average
        as their biases say.
        """
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return Linear(self.heads, dtype=self.dtype, kernel_init=init, name=name)

    def _gated_out(self, y_BTNAK, x_BTND, gate: Callable):
        """Normalise each head, join the heads, multiply by a gate of the input, and project.

        At the start of training the gate lies within 1% of a constant: 1 for silu, 1/2 for the
        sigmoid. A gate that starts as noise multiplies the output by random signs and by values
        near zero, and training takes long to find out what is worth recalling.
        """
        y_BTND = self._norm("out_norm")(y_BTNAK).reshape(*y_BTNAK.shape[:3], self.width)
        bias = _SILU_INVERSE_OF_ONE if gate is nn.silu else 0.0
        logit_BTND = Linear(
            self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal"),
            bias_init=nn.initializers.constant(bias),
            name="gate",
        )(x_BTND)
        return self._dense(self.width, "out")(y_BTND * gate(logit_BTND))


def decay_biases(rng, shape, fastest=1.6):
    """Inverse softplus of -log decays per frame that fall by equal factors from head to head.

    They lie below `fastest`, and that of the last head is _SLOWEST. The released layer of Gated
    DeltaNet draws a rate from (0, 16] and a step from [0.001, 0.1] for every head. With few heads
    it is then luck whether any head remembers more than a few frames. Here the last head always
    does, and the others divide the range evenly, as the slopes of ALiBi do.
    """
    del rng
    (heads,) = shape
    step_A = fastest * (_SLOWEST / fastest) ** (jnp.arange(1, heads + 1) / heads)
    return step_A + jnp.log(-jnp.expm1(-step_A))


def unit_length(x):
    """x [..., K] -> x / |x|, computed in float32, in the dtype of x."""
    h = x.astype(jnp.float32)
    return (h * jax.lax.rsqrt(jnp.square(h).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)
