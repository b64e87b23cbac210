"""The dense layer of all models."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.parallel.sharding import frames_are_split


class Linear(nn.Module):
    """x [..., D] -> x kernel + bias [..., features], float32 parameters, computed in `dtype`.

    use_bias: False leaves the bias out. transposed: the kernel is stored as [features, D] instead
    of [D, features]. This suits layers with fewer outputs than inputs: the kernel's gradient
    contracts the rows of its left operand, which XLA on CPU does faster the narrower it is.
    """

    features: int
    use_bias: bool = True
    transposed: bool = False
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        def init(rng, shape):
            kernel = self.kernel_init(rng, shape)
            return kernel.T if self.transposed else kernel

        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        # Leading axes are merged: XLA on CPU copies an operand of a gradient over several axes.
        # On a mesh that splits frames they stay separate, else every device would get all frames.
        shape = x.shape[:-1] if frames_are_split() else (math.prod(x.shape[:-1]),)
        contracted = (len(shape),), (int(self.transposed),)
        rows = x.reshape(*shape, x.shape[-1])
        y = jax.lax.dot_general(rows, kernel, (contracted, ((), ())))
        if self.use_bias:
            y += self.param("bias", self.bias_init, (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)
