"""The dense layer of all models."""

import math

import flax.linen as nn


class Linear(nn.Dense):
    """x [..., D] -> [..., features]: `nn.Dense` as one product of two matrices.

    With the leading axes apart, the gradient by the kernel contracts several of them at once, for
    which XLA on CPU makes a transposed copy of its operand.
    """

    def __call__(self, x):
        y = super().__call__(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
        return y.reshape(*x.shape[:-1], self.features)
