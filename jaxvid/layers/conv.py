"""Convolution over time under the contract of a stream."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class CausalConv(nn.Module):
    """Convolution over frames, each channel and location alone: y_t = sum_i kernel_i x_{t-i}.

    x_BTND -> y_BTND in `dtype`. State: the last `width - 1` frames, [B, width - 1, N, D] in
    `dtype`; None is a stream of zeros.
    """

    width: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTND, state=None):
        B, T, N, D = x_BTND.shape
        kernel_ID = self.param("kernel", nn.initializers.lecun_normal(), (self.width, D))
        kernel_ID, x_BTND = kernel_ID.astype(self.dtype), x_BTND.astype(self.dtype)
        if state is None:
            state = jnp.zeros((B, self.width - 1, N, D), self.dtype)
        seen_BTND = jnp.concatenate([state, x_BTND], axis=1)
        taps = range(self.width)
        y_BTND = sum(kernel_ID[i] * seen_BTND[:, self.width - 1 - i :][:, :T] for i in taps)
        return y_BTND, seen_BTND[:, T:]
