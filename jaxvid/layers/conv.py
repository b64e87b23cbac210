"""Convolutions of every channel alone: over time under the contract of a stream, and over video."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.layers import pairs

MAX_CONV = 256  # frames of a CausalConv, each of which is a product in the program


class CausalConv(nn.Module):
    """Convolution over frames, each channel and location alone: y_t = sum_i kernel_i x_{t-i}.

    x_BTND -> y_BTND in `dtype`. State: the last `width - 1` frames, [B, width - 1, N, D] in
    `dtype`; None is a stream of zeros. paired: x holds clean frames and their noisy copies
    (`layers.pairs`), and both read the clean frames before them.
    """

    width: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTND, state=None, paired=False):
        B, _, N, D = x_BTND.shape
        kernel_ID = self.param("kernel", nn.initializers.lecun_normal(), (self.width, D))
        kernel_ID, x_BTND = kernel_ID.astype(self.dtype), x_BTND.astype(self.dtype)
        if state is None:
            state = jnp.zeros((B, self.width - 1, N, D), self.dtype)
        stream_BTND = pairs.split(x_BTND)[0] if paired else x_BTND
        seen_BTND, T = jnp.concatenate([state, stream_BTND], axis=1), stream_BTND.shape[1]
        y_BTND = kernel_ID[0] * x_BTND
        for i in range(1, self.width):
            past_BTND = kernel_ID[i] * seen_BTND[:, self.width - 1 - i :][:, :T]
            y_BTND += pairs.join(past_BTND, past_BTND) if paired else past_BTND
        return y_BTND, seen_BTND[:, T:]


@jax.custom_vjp
def depthwise_conv3d(x_BTHWD: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depth-wise 3 x 3 x 3 convolution with zeros around the frames but not around time.

    x [B, T + 2, H, W, D], kernel [3, 3, 3, 1, D] -> y [B, T, H, W, D]. As in other convolutional
    networks the kernel is not flipped: y_t reads x_t, x_t+1 and x_t+2.
    """
    return _correlate(_pad(x_BTHWD, time=0), kernel)


def _forward(x_BTHWD, kernel):
    return depthwise_conv3d(x_BTHWD, kernel), (x_BTHWD, kernel)


def _backward(residuals, dy_BTHWD):
    """dx as a convolution; the gradient of slices would be a sum of 27 padded arrays."""
    x_BTHWD, kernel = residuals
    # Without the barrier XLA fuses an array into its 27 uses and computes it as often.
    x, dy, dy_padded = jax.lax.optimization_barrier(
        (_pad(x_BTHWD, time=0), dy_BTHWD, _pad(dy_BTHWD, time=2))
    )
    dx_BTHWD = _correlate(dy_padded, kernel[::-1, ::-1, ::-1])
    taps = [(dy * window).sum((0, 1, 2, 3)) for window in _windows(x)]
    return jax.lax.optimization_barrier((dx_BTHWD, jnp.stack(taps).reshape(kernel.shape)))


depthwise_conv3d.defvjp(_forward, _backward)


def _correlate(padded, kernel):
    """Sum over the 27 taps of the kernel, each times the window that it covers, BTHWD."""
    return sum(tap_D * window for tap_D, window in zip(kernel.reshape(27, -1), _windows(padded)))


def _windows(padded):
    """The 27 views of [B, T + 2, H + 2, W + 2, D] under the taps of the kernel, each BTHWD."""
    T, H, W = (size - 2 for size in padded.shape[1:4])
    for t, h, w in itertools.product(range(3), repeat=3):
        yield padded[:, t : t + T, h : h + H, w : w + W]


def _pad(x_BTHWD, time):
    """Zeros one cell wide around the frames, and `time` frames of zeros before and after."""
    return jnp.pad(x_BTHWD, ((0, 0), (time, time), (1, 1), (1, 1), (0, 0)))
