"""Quantizers: what stands between an encoder and a decoder, all under one signature.

    z_q, ids, aux = quantizer(z, codebook=None, rng=None)

z [..., features] of any float dtype -> z_q [..., channels] float32, through which gradients pass
to z; ids [...] int32 in [0, size), None for `KL`; aux: float32 scalars, among them `loss`, to be
added to that of the reconstruction, and the perplexity of the ids, the share of the codes that
they use and the number that they do not (`dead`). Only `KL` draws from `rng`. Only `VQ` has a
codebook, which it wants as an argument, since it is state and no quantizer holds any; for all
others `quantizer(z)` is enough. Around the call:

    trained, carried = quantizer.init(rng)          # parts of the codebook, {} where there is none
    carried = quantizer.update(codebook, z, ids, rng)
    z_q = quantizer.lookup(ids, codebook)

`trained` moves by gradient; `carried` is training state, which `update` brings forward by plain
reductions over all tokens: under jit they span the global batch, so every device holds the same.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.errors import UserError

_HIGHEST = jax.lax.Precision.HIGHEST  # bfloat16 products would flip ids


def usage(ids, size):
    """Perplexity exp(H) of the ids, the share of `size` codes in use and the number that are not.

    By sorting, so that no array is as long as the vocabulary.
    """
    ids = jnp.sort(ids.reshape(-1))
    last, first = (jnp.searchsorted(ids, ids, side=side) for side in ("right", "left"))
    perplexity = jnp.exp(-jnp.log((last - first) / ids.size).mean())
    used = 1.0 + (ids[1:] != ids[:-1]).sum()
    size = float(size)  # one more than the last id, and so perhaps than int32 holds
    return {"perplexity": perplexity, "usage": used / size, "dead": size - used}


def straight_through(z, z_q):
    """Exactly `z_q`, with the gradient of `z` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(z_q) + (z - jax.lax.stop_gradient(z))


def rotation(z, z_q):
    """Exactly `z_q`, with the gradient of turning and scaling z onto it (Fifty et al. 2024).

    z_q = |z_q| / |z| R z with R the reflections that carry z / |z| to z_q / |z_q|, held constant.
    A token shorter than a thousandth of its code has no direction to turn from, and scaling it
    would blow its gradient up: there it is that of `straight_through`.
    """
    z_fixed, z_q = jax.lax.stop_gradient((z, z_q))
    u, q = _unit(z_fixed), _unit(z_q)
    w = _unit(u + q)
    short, long = _norm(z_fixed), _norm(z_q)
    is_turned = short > 1e-3 * long
    scale = long / jnp.where(is_turned, short, 1.0)
    turned = z - 2 * w * _dot(w, z) + 2 * q * _dot(u, z)
    return straight_through(jnp.where(is_turned, scale * turned, z), z_q)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}


class _NoCodebook:
    """The codes follow from the numbers alone."""

    def init(self, rng):
        """({}, {}): nothing is trained and nothing carried."""
        del rng
        return {}, {}

    def update(self, codebook, z, ids, rng):
        """{}: there is nothing to carry."""
        del codebook, z, ids, rng
        return {}


@dataclasses.dataclass(frozen=True)
class VQ:
    """Nearest of `codes` learned vectors (van den Oord et al. 2017), low-dimensional and of unit
    length unless told otherwise (ViT-VQGAN, Yu et al. 2021).

    loss = commitment mean (z - sg(e))^2, and mean (sg(z) - e)^2 where codes move by gradient.

    channels: Z. ema: memory of the running means that the codes follow; 0 trains them by gradient.
    normalize: compare directions; False compares places. restart: a code that stands for fewer
    tokens of a batch than this, in the running mean, becomes a random token; 0 never restarts.
    kmeans: iterations of k-means on the first batch to start from; 0 starts from random codes.
    estimator: of the gradient, "straight_through" or "rotation". Restart and k-means move codes
    from outside of the gradient and so need `ema` (UserError).
    """

    codes: int = 8192
    channels: int = 8
    ema: float = 0.99
    commitment: float = 0.25
    normalize: bool = True
    restart: float = 0.0
    kmeans: int = 0
    estimator: str = "straight_through"

    def __post_init__(self):
        _require(self.codes > 1, f"codes={self.codes}: use 2 or more")
        _require(self.channels > 0, f"channels={self.channels}: use 1 or more")
        _require_weights(self, "commitment")
        _require(0 <= self.ema < 1, f"ema={self.ema}: use 0 (by gradient) to below 1")
        _require(
            self.estimator in ESTIMATORS,
            f"estimator={self.estimator!r}: unknown; use one of {', '.join(ESTIMATORS)}",
        )
        for name in ("restart", "kmeans"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}={value}: use 0 (never) or more")
            _require(
                not value or self.ema,
                f"{name}={value}: codes trained by gradient are not moved otherwise; "
                f"use {name}=0 or ema=0.99",
            )

    @property
    def features(self):
        """Numbers that a token has before it is quantized."""
        return self.channels

    @property
    def size(self):
        """Size of the vocabulary."""
        return self.codes

    def init(self, rng):
        """code_VZ is trained, or carried with what it is the mean of: count_V and sum_VZ."""
        code_VZ = self._place(jax.random.normal(rng, (self.codes, self.channels)))
        if not self.ema:
            return {"code_VZ": code_VZ}, {}
        return {}, {
            "code_VZ": code_VZ,
            "count_V": jnp.ones(self.codes),
            "sum_VZ": code_VZ,
            "updates": jnp.zeros((), jnp.int32),
        }

    def __call__(self, z, codebook, rng=None):
        """See the module; `codebook` is trained and carried parts together."""
        del rng
        z = self._place(z)
        ids = self._nearest(z, codebook["code_VZ"])
        z_q = self.lookup(ids, codebook)
        loss = self.commitment * _mse(z, jax.lax.stop_gradient(z_q))
        if not self.ema:
            loss += _mse(jax.lax.stop_gradient(z), z_q)
        return ESTIMATORS[self.estimator](z, z_q), ids, {"loss": loss, **usage(ids, self.size)}

    def lookup(self, ids, codebook):
        """ids [...] -> z_q [..., Z]."""
        return self._place(jnp.take(codebook["code_VZ"], ids, axis=0))

    def update(self, codebook, z, ids, rng):
        """The carried part after one more batch of tokens and their ids.

        n <- ema n + (1 - ema) count, s <- ema s + (1 - ema) sum z, code = s / n with n smoothed by
        Laplace (van den Oord et al. 2017, appendix A.1).
        """
        if not self.ema:
            return {}
        rng_start, rng_restart = jax.random.split(rng)
        z_LZ = jax.lax.stop_gradient(self._place(z)).reshape(-1, self.channels)
        means = self._average(codebook, z_LZ, ids.reshape(-1))
        if self.kmeans:
            means = jax.lax.cond(
                codebook["updates"] == 0, lambda: self._k_means(z_LZ, rng_start), lambda: means
            )
        if self.restart:
            means = self._restart(means, z_LZ, rng_restart)
        return {**means, "updates": codebook["updates"] + 1}

    def _average(self, codebook, z_LZ, ids_L):
        count_V, sum_VZ = self._totals(z_LZ, ids_L)
        count_V = self.ema * codebook["count_V"] + (1 - self.ema) * count_V
        sum_VZ = self.ema * codebook["sum_VZ"] + (1 - self.ema) * sum_VZ
        total = count_V.sum()
        smoothed_V = (count_V + 1e-5) / (total + self.codes * 1e-5) * total
        return {
            "code_VZ": self._place(sum_VZ / smoothed_V[:, None]),
            "count_V": count_V,
            "sum_VZ": sum_VZ,
        }

    def _k_means(self, z_LZ, rng):
        """Lloyd's iterations from random tokens; a centre without tokens stays where it is."""

        def iterate(_, code_VZ):
            count_V, sum_VZ = self._totals(z_LZ, self._nearest(z_LZ, code_VZ))
            mean_VZ = self._place(sum_VZ / jnp.maximum(count_V, 1)[:, None])
            return jnp.where(count_V[:, None] > 0, mean_VZ, code_VZ)

        code_VZ = jax.lax.fori_loop(0, self.kmeans, iterate, _pick(z_LZ, self.codes, rng))
        count_V, _ = self._totals(z_LZ, self._nearest(z_LZ, code_VZ))
        count_V = jnp.maximum(count_V, 1)
        return {
            "code_VZ": code_VZ,
            "count_V": count_V,
            "sum_VZ": code_VZ * count_V[:, None],
        }

    def _restart(self, means, z_LZ, rng):
        token_VZ = _pick(z_LZ, self.codes, rng)
        dead_V = means["count_V"] < self.restart
        dead_V1 = dead_V[:, None]
        return {
            "code_VZ": jnp.where(dead_V1, token_VZ, means["code_VZ"]),
            "count_V": jnp.where(dead_V, self.restart, means["count_V"]),
            "sum_VZ": jnp.where(dead_V1, self.restart * token_VZ, means["sum_VZ"]),
        }

    def _place(self, z):
        """Where tokens and codes are compared: on the unit sphere, or where they are."""
        z = z.astype(jnp.float32)
        return _unit(z) if self.normalize else z

    def _nearest(self, z, code_VZ):
        """argmin |z - e|^2 = argmax z e - |e|^2 / 2."""
        closeness = jnp.matmul(z, code_VZ.T, precision=_HIGHEST) - jnp.square(code_VZ).sum(1) / 2
        closeness = jax.lax.stop_gradient(closeness)
        return jax.lax.platform_dependent(closeness, cpu=_argmax_in_two, default=_argmax)

    def _totals(self, z_LZ, ids_L):
        """(tokens, sum of tokens) of each code."""
        ones_L = jnp.ones(ids_L.shape)
        return tuple(jax.ops.segment_sum(x, ids_L, self.codes) for x in (ones_L, z_LZ))


@dataclasses.dataclass(frozen=True)
class FSQ(_NoCodebook):
    """Every channel is rounded to a few levels (Mentzer et al. 2024); no loss, no collapse.

    levels: of each channel, 3 or more. The default's 1,000 codes are for a first success; (8, 8, 8,
    5, 5, 5) are the 64,000 of Cosmos. dialect: "paper", or "vq_pytorch" as vector-quantize-pytorch
    and Cosmos have it, whose bound is a little wider and whose shift is atanh instead of tan.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    dialect: str = "paper"

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))
        _require(
            all(isinstance(count, int) for count in self.levels),
            f"levels={self.levels}: must be whole numbers",
        )
        _require(
            self.levels and min(self.levels) >= 3,
            f"levels={self.levels}: a channel needs 3 levels or more; quantizer lfq has two",
        )
        _require(math.prod(self.levels) <= 2**31, f"levels={self.levels}: more codes than int32")
        _require(
            self.dialect in ("paper", "vq_pytorch"),
            f"dialect={self.dialect!r}: unknown; use paper or vq_pytorch",
        )

    @property
    def features(self):
        """Numbers that a token has before it is quantized."""
        return len(self.levels)

    @property
    def channels(self):
        """Numbers that a token has once it is quantized."""
        return len(self.levels)

    @property
    def size(self):
        """Size of the vocabulary."""
        return math.prod(self.levels)

    def __call__(self, z, codebook=None, rng=None):
        """See the module; z_q lies in [-1, 1], ids = sum_i level_i prod_(j < i) levels_j."""
        del codebook, rng
        z = self._bound(z.astype(jnp.float32))
        level = jnp.round(z)
        # In integers: float32 is not exact beyond 2^24.
        ids = ((level + self._half).astype(jnp.int32) * self._basis).sum(-1)
        aux = {"loss": jnp.zeros(()), **usage(ids, self.size)}
        return straight_through(z, level) / self._half, ids, aux

    def lookup(self, ids, codebook=None):
        """ids [...] -> z_q [..., Z]."""
        del codebook
        level = ids[..., None] // self._basis % np.array(self.levels, np.int32)
        return (level - self._half) / self._half

    def _bound(self, z):
        """tanh that reaches just the outermost levels, shifted where their number is even."""
        levels = np.array(self.levels, np.float32)
        paper = self.dialect == "paper"
        reach = (levels - 1) / 2 * (1 - 1e-3 if paper else 1 + 1e-3)
        offset = np.where(levels % 2 == 0, 0.5, 0.0).astype(np.float32)
        shift = (np.tan if paper else np.arctanh)(offset / reach)
        return jnp.tanh(z + shift) * reach - offset

    @property
    def _half(self):
        return np.array([levels // 2 for levels in self.levels], np.float32)

    @property
    def _basis(self):
        return np.cumprod((1, *self.levels[:-1])).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class LFQ(_NoCodebook):
    """The signs of the channels are the code (MAGVIT-v2, Yu et al. 2024): 2^channels of them.

    loss = entropy (E[H(p)] - diversity H(E[p])) + commitment mean (z - sg(z_q))^2, where p is the
    softmax of 2 sharpness z c over all codes c: a token should be sure of its code, and the batch
    should use them all. p is a product over bits, so the first term is exactly a sum of binary
    entropies. For the second, bits are cut into groups of at most `group`, whose joint entropies
    add up: exact with one group, an upper bound with more. Nothing is as large as tokens times
    codes; a group of g bits costs tokens times 2^(g / 2) and 2^g.
    """

    channels: int = 18
    entropy: float = 0.1
    diversity: float = 1.0
    commitment: float = 0.25
    sharpness: float = 100.0
    group: int = 9

    def __post_init__(self):
        _require(1 <= self.channels <= 30, f"channels={self.channels}: use 1 to 30, ids are int32")
        _require(1 <= self.group <= 20, f"group={self.group}: use 1 to 20 bits")
        _require(0 < self.sharpness < np.inf, f"sharpness={self.sharpness}: use more than 0")
        _require_weights(self, "entropy", "diversity", "commitment")

    @property
    def features(self):
        """Numbers that a token has before it is quantized."""
        return self.channels

    @property
    def size(self):
        """Size of the vocabulary."""
        return 2**self.channels

    def __call__(self, z, codebook=None, rng=None):
        """See the module; ids = sum_k [z_k > 0] 2^(channels - 1 - k)."""
        del codebook, rng
        z = self._place(z.astype(jnp.float32))
        bit = z > 0
        ids = (bit * self._basis).sum(-1)
        z_q = jnp.where(bit, self._magnitude, -self._magnitude)
        # Channel k is worth 2 sharpness z_k (m - -m) in log odds, whatever the other bits are.
        logit_LZ = (4 * self.sharpness * self._magnitude * z).reshape(-1, self.channels)
        sure = _binary_entropy(logit_LZ).sum(-1).mean()
        diverse = self._batch_entropy(logit_LZ)
        loss = self.entropy * (sure - self.diversity * diverse)
        loss += self.commitment * _mse(z, jax.lax.stop_gradient(z_q))
        aux = {"loss": loss, "token_entropy": sure, "batch_entropy": diverse}
        return straight_through(z, z_q), ids, aux | usage(ids, self.size)

    def lookup(self, ids, codebook=None):
        """ids [...] -> z_q [..., Z]."""
        del codebook
        bit = ids[..., None] // self._basis % 2
        return jnp.where(bit == 1, self._magnitude, -self._magnitude).astype(jnp.float32)

    def _batch_entropy(self, logit_LZ):
        """H(E[p]) summed over groups; of each, E[p] as one product of its two halves."""
        groups = -(-self.channels // self.group)
        total = 0.0
        for bits in np.array_split(np.arange(self.channels), groups):
            left_LV, right_LV = (_joint(logit_LZ[:, half]) for half in np.array_split(bits, 2))
            p = jnp.matmul(left_LV.T, right_LV, precision=_HIGHEST) / len(logit_LZ)
            # Of a code that underflows, log p would be infinite and its gradient no number.
            total -= (p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))).sum()
        return total

    def _place(self, z):
        return z

    @property
    def _magnitude(self):
        return 1.0

    @property
    def _basis(self):
        return 2 ** np.arange(self.channels - 1, -1, -1, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class BSQ(LFQ):
    """Binary codes on the unit sphere (Zhao et al. 2024): `LFQ` of z / |z|, codes +-1 / sqrt Z."""

    def _place(self, z):
        return _unit(z)

    @property
    def _magnitude(self):
        return self.channels**-0.5


@dataclasses.dataclass(frozen=True)
class KL(_NoCodebook):
    """Gaussian latents (Kingma and Welling 2014): no codes, but mean and log variance.

    z [B, ..., 2 channels] = (mean, log variance clipped to [-30, 20]). z_q is drawn with `rng`, and
    is the mean without. loss = weight KL, `kl` in nats of a sample: summed over all its tokens and
    channels and averaged over the B samples of the first axis, as the weight of 1e-6 wants it
    (Rombach et al. 2022, Wang et al. 2024).
    """

    channels: int = 16
    weight: float = 1e-6

    def __post_init__(self):
        _require(self.channels > 0, f"channels={self.channels}: use 1 or more")
        _require_weights(self, "weight")

    @property
    def features(self):
        """Numbers that a token has before it is quantized."""
        return 2 * self.channels

    def __call__(self, z, codebook=None, rng=None):
        """See the module."""
        del codebook
        mean, logvar = jnp.split(z.astype(jnp.float32), 2, axis=-1)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        std = jnp.exp(logvar / 2)
        kl = (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum() / 2 / len(z)
        z_q = mean if rng is None else mean + std * jax.random.normal(rng, mean.shape)
        return z_q, None, {"loss": self.weight * kl, "kl": kl, "std": std.mean()}


QUANTIZERS = {"vq": VQ, "fsq": FSQ, "lfq": LFQ, "bsq": BSQ, "kl": KL}


def _require_weights(quantizer, *names):
    for name in names:
        value = getattr(quantizer, name)
        _require(0 <= value < np.inf, f"{name}={value}: use 0 or a positive number")


def _require(holds, message):
    if not holds:
        raise UserError(f"task.quantizer.{message}")


def _dot(a, b):
    return (a * b).sum(-1, keepdims=True)


def _norm(x):
    return jnp.sqrt(_dot(x, x))


def _unit(x):
    """x / |x|, with a finite gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(_dot(x, x), 1e-24))


def _mse(a, b):
    return jnp.square(a - b).mean()


def _argmax(x):
    """The first place of the largest number along the last axis, int32."""
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _argmax_in_two(x):
    """The same for CPU, where XLA makes vectors of two reductions but not of argmax itself."""
    place = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_largest = x == x.max(axis=-1, keepdims=True)
    return jnp.where(is_largest, place, x.shape[-1] - 1).min(axis=-1)


def _pick(z_LZ, number, rng):
    """`number` random tokens, the same on every device."""
    return z_LZ[jax.random.randint(rng, (number,), 0, len(z_LZ))]


def _binary_entropy(logit):
    """Entropy of a bit that is set with probability sigmoid(logit)."""
    p = jax.nn.sigmoid(logit)
    return jax.nn.softplus(logit) - p * logit


def _joint(logit_LZ):
    """Probabilities of all values of some bits, the first bit highest -> [L, 2^Z]."""
    joint_LV = jnp.ones((len(logit_LZ), 1))
    for logit_L in logit_LZ.T:
        pair_L2 = jax.nn.sigmoid(jnp.stack([-logit_L, logit_L], axis=1))
        joint_LV = (joint_LV[:, :, None] * pair_L2[:, None]).reshape(len(logit_LZ), -1)
    return joint_LV
