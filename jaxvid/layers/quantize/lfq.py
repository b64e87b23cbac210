"""Binary codes: lookup-free and binary spherical quantization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.layers.quantize.base import HIGHEST, Quantizer, mean, mse, straight_through, unit, usage


@dataclasses.dataclass(frozen=True)
class LFQ(Quantizer):
    """The signs of the channels are the code (MAGVIT-v2, Yu et al. 2024): 2^channels of them.

    loss = entropy (E[H(p)] - diversity H(E[p])) + commitment mean (z - sg(z_q))^2, where p is the
    softmax of 2 sharpness z c over all codes c: each token should be certain of its code, and the
    batch should use all codes. p is a product over bits, so the first term is exactly a sum of
    binary entropies. For the second, bits are cut into groups of at most `group` whose joint
    entropies are added: exact with one group, an upper bound with more. No array is as large as
    tokens times codes; a group of g bits costs tokens times 2^(g / 2) and 2^g.
    """

    channels: int = 18
    entropy: float = 0.1
    diversity: float = 1.0
    commitment: float = 0.25
    sharpness: float = 100.0
    group: int = 9

    def __post_init__(self):
        checks.between("channels", self.channels, 1, 30)  # ids are int32
        checks.between("group", self.group, 1, 20)
        checks.positive("sharpness", self.sharpness)
        for name in ("entropy", "diversity", "commitment"):
            checks.at_least(name, getattr(self, name), 0)

    @property
    def features(self) -> int:
        return self.channels

    @property
    def size(self) -> int:
        return 2**self.channels

    def __call__(self, z, codebook=None, rng=None):
        """See `Quantizer`; ids = sum_k [z_k > 0] 2^(channels - 1 - k)."""
        del codebook, rng
        self._check_features(z)
        z = self._project(z.astype(jnp.float32))
        bit = z > 0
        ids = (bit * self._basis).sum(-1)
        z_q = jnp.where(bit, self._amplitude, -self._amplitude)
        # A bit adds 2 sharpness z_k (a - -a) to the log odds, whatever the other bits are.
        logit_LZ = (4 * self.sharpness * self._amplitude * z).reshape(ids.size, self.channels)
        token_entropy = mean(_binary_entropy(logit_LZ).sum(-1))
        batch_entropy = self._batch_entropy(logit_LZ)
        loss = self.entropy * (token_entropy - self.diversity * batch_entropy)
        loss += self.commitment * mse(z, jax.lax.stop_gradient(z_q))
        aux = {"loss": loss, "token_entropy": token_entropy, "batch_entropy": batch_entropy}
        return straight_through(z, z_q), ids, aux | usage(ids, self.size)

    def _codes(self, ids, codebook):
        del codebook
        bit = ids[..., None] // self._basis % 2
        return jnp.where(bit == 1, self._amplitude, -self._amplitude).astype(jnp.float32)

    def _batch_entropy(self, logit_LZ):
        """H(E[p]) summed over groups; E[p] of a group is one product of its two halves."""
        if not len(logit_LZ):
            return jnp.zeros(())
        groups = -(-self.channels // self.group)
        total = 0.0
        for bits in np.array_split(np.arange(self.channels), groups):
            left_LV, right_LV = (
                _joint_probabilities(logit_LZ[:, half]) for half in np.array_split(bits, 2)
            )
            p = jnp.matmul(left_LV.T, right_LV, precision=HIGHEST) / len(logit_LZ)
            # The log of an underflowed p is infinite, and its gradient NaN.
            total -= (p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))).sum()
        return total

    def _project(self, z):
        return z

    @property
    def _amplitude(self):
        return 1.0

    @property
    def _basis(self):
        return 2 ** np.arange(self.channels - 1, -1, -1, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class BSQ(LFQ):
    """Binary codes on the unit sphere (Zhao et al. 2024): `LFQ` of z / |z|, codes +-1 / sqrt Z."""

    def _project(self, z):
        return unit(z)

    @property
    def _amplitude(self):
        return self.channels**-0.5


def _binary_entropy(logit):
    """Entropy of a bit that is 1 with probability sigmoid(logit)."""
    p = jax.nn.sigmoid(logit)
    return jax.nn.softplus(logit) - p * logit


def _joint_probabilities(logit_LZ):
    """Probabilities of all values of Z bits, the first bit highest -> [L, 2^Z]."""
    joint_LV = jnp.ones((len(logit_LZ), 1))
    for logit_L in logit_LZ.T:
        bit_L2 = jax.nn.sigmoid(jnp.stack([-logit_L, logit_L], axis=1))
        joint_LV = (joint_LV[:, :, None] * bit_L2[:, None]).reshape(len(logit_LZ), -1)
    return joint_LV
