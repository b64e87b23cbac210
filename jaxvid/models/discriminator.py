"""Discriminators of images and of clips: convolutions in two or three dimensions.

x [B, H, W, C] or [B, T, H, W, C] in [-1, 1] -> (logits, features): logits float32 [B, ...], higher
for real samples; features, the activations of the layers, in order. No layer mixes samples, so
there are no running statistics, and the gradient of a sample's logit is that of the sample alone.
A width below 8 raises UserError at construction.
"""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp

from jaxvid import checks

MAX_WIDTH = 2**14  # channels
_leaky = functools.partial(nn.leaky_relu, negative_slope=0.2)


class PatchDiscriminator(nn.Module):
    """A logit for every overlapping patch (Isola et al. 2017), [B, (t,) h, w].

    1 + `layers` convolutions, 4 cells wide. All but the last halve every axis. GroupNorm replaces
    the batch norm of the paper. width: channels of the first layer.
    """

    width: int = 64
    layers: int = 3

    def __post_init__(self):
        checks.at_least("width", self.width, 8, at_most=MAX_WIDTH)
        super().__post_init__()

    @nn.compact
    def __call__(self, x):
        dims = x.ndim - 2
        features = []
        for layer in range(self.layers + 1):
            channels = self.width * min(2**layer, 8)
            stride = 2 if layer < self.layers else 1
            x = nn.Conv(channels, (4,) * dims, (stride,) * dims, name=f"conv_{layer}")(x)
            if layer:
                x = nn.GroupNorm(math.gcd(8, channels), name=f"norm_{layer}")(x)
            x = _leaky(x)
            features.append(x)
        return nn.Conv(1, (4,) * dims, name="logits")(x)[..., 0], features


class StyleDiscriminator(nn.Module):
    """One logit for each sample, [B]: residual blocks down to 4 cells a side (StyleGAN 2).

    Blurred down-sampling as in MaskGIT and MAGVIT (Karras et al. 2020, Chang et al. 2022). width:
    the largest number of channels. A layer whose longer side is R pixels has at most 16,384 / R.
    """

    width: int = 512

    def __post_init__(self):
        checks.at_least("width", self.width, 8, at_most=MAX_WIDTH)
        super().__post_init__()

    @nn.compact
    def __call__(self, x):
        dims = x.ndim - 2

        def conv(x, channels, side, name):
            return nn.Conv(channels, (side,) * dims, name=name)(x)

        x = _leaky(conv(x, self._channels(x), 3, "in"))
        features = []
        while max(x.shape[1:-1]) > 4:
            name = f"block_{len(features)}"
            h = _leaky(conv(x, x.shape[-1], 3, f"{name}_first"))
            h, x = (_halve(y) for y in (h, x))
            channels = self._channels(x)
            h = _leaky(conv(h, channels, 3, f"{name}_second"))
            x = (h + conv(x, channels, 1, f"{name}_skip")) / math.sqrt(2)
            features.append(x)
        x = _leaky(conv(x, x.shape[-1], 3, "last"))
        x = _leaky(nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(1, name="logits")(x)[:, 0], features

    def _channels(self, x):
        return min(self.width, 16384 // max(x.shape[-3:-1]))


def _halve(x):
    """Blur by (1, 3, 3, 1) / 8 and keep every second cell, along every axis longer than four."""
    for axis in range(1, x.ndim - 1):
        half = x.shape[axis] // 2
        if x.shape[axis] <= 4:
            continue
        line = [(0, 0)] * x.ndim
        line[axis] = (1, 1)
        padded = jnp.moveaxis(jnp.pad(x, line, mode="edge"), axis, 0)
        a, b, c, d = (padded[tap : tap + 2 * half : 2] for tap in range(4))
        x = jnp.moveaxis((a + 3 * b + 3 * c + d) / 8, 0, axis)
    return x
