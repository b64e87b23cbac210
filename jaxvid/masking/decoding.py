"""Parallel decoding of masked tokens (MaskGIT, Chang et al. 2022, section 3.2), without a network.

Tokens are flat, ids_BL int32. An id may be split into P digits of V values each, which a network
predicts side by side: logits_BLPV. The first digit is the lowest.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxvid.checks import at_least, between, choose
from jaxvid.masking import schedules

MAX_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How masked tokens are decoded; one loop serves the dialects of MaskGIT, MAGVIT and Phenaki.

    steps: evaluations of the network. schedule: of `schedules.SCHEDULES`. rounding: see
    `schedules.decoding_counts`. temperature: of the distribution that tokens are drawn from.
    cooling: the temperature falls linearly to 0 at the last step (Phenaki). noise: scale of the
    Gumbel noise on the confidence, which falls linearly to 0 (MaskGIT 4.5); for a critic, of
    uniform noise. top_k: draw from that many likeliest values, 0 = all. top_p: draw from the
    likeliest values whose probabilities first reach this sum, 1 = all. Raises UserError for values
    that cannot work.
    """

    steps: int = 12
    schedule: str = "cosine"
    rounding: str = "floor"
    temperature: float = 1.0
    cooling: bool = False
    noise: float = 4.5
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        at_least("steps", self.steps, 1, at_most=MAX_STEPS)
        choose("schedule", self.schedule, schedules.SCHEDULES)
        choose("rounding", self.rounding, schedules.ROUNDINGS)
        at_least("temperature", self.temperature, 0, at_most=1000)
        at_least("noise", self.noise, 0, at_most=1e6)
        at_least("top_k", self.top_k, 0)
        between("top_p", self.top_p, 0, 1)


def digits(ids: jax.Array, parts: int, values: int) -> jax.Array:
    """ids [...] -> [..., P] digits in base `values`, the lowest first; int32."""
    return ids[..., None] // values ** jnp.arange(parts, dtype=jnp.int32) % values


def from_digits(digits_P: jax.Array, values: int) -> jax.Array:
    """[..., P] digits -> ids [...] int32; undoes `digits`."""
    return (digits_P * values ** jnp.arange(digits_P.shape[-1], dtype=jnp.int32)).sum(-1)


def guided(logits_cond, logits_null, scale):
    """Classifier-free guidance of logits: null + scale (cond - null)."""
    return logits_null + scale * (logits_cond - logits_null)


def decode(
    predict: Callable,
    ids_BL: jax.Array,
    fill_BL: jax.Array,
    is_free_BL: jax.Array,
    rng_B: jax.Array,
    sampler: Sampler,
    score: Callable | None = None,
) -> jax.Array:
    """Generate the free tokens in `sampler.steps` steps -> ids_BL; the others keep their ids.

    predict: (ids_BL with `fill_BL` at masked tokens, is_masked_BL) -> logits_BLPV float32, called
    once per step. fill_BL: the mask id, or for a token whose condition is known, that of the
    condition (COMMIT). is_free_BL: tokens to generate; all are masked at first. Each step draws the
    masked tokens, then masks the least confident of them again. The confidence is the log
    probability of the drawn token, with noise, or that of `score`: ids_BL -> [B, L], higher for
    tokens that look real (Token-Critic, Lezama et al. 2022). Tokens that were kept stay.
    rng_B: a key per clip, so that a clip does not depend on the others of its batch.
    """
    L = ids_BL.shape[1]
    counts_SN = jnp.asarray(
        schedules.decoding_counts(sampler.schedule, sampler.steps, L, sampler.rounding)
    )
    free_B = is_free_BL.sum(1)
    steps = sampler.steps

    def step(carry, i):
        ids_BL, is_masked_BL = carry
        logits_BLPV = predict(jnp.where(is_masked_BL, fill_BL, ids_BL), is_masked_BL)
        P, V = logits_BLPV.shape[2:]
        keys_B3 = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, i)))(rng_B)
        temperature = sampler.temperature * jnp.where(sampler.cooling, (steps - 1 - i) / steps, 1.0)
        gumbel_BLPV = jax.vmap(lambda rng: jax.random.gumbel(rng, (L, P, V)))(keys_B3[:, 0])
        drawn_BLP = _draw(logits_BLPV, gumbel_BLPV, temperature, sampler)
        ids_BL = jnp.where(is_masked_BL, from_digits(drawn_BLP, V), ids_BL)

        left = 1 - (i + 1) / steps
        if score is None:
            log_BLPV = jax.nn.log_softmax(logits_BLPV)
            confidence_BL = jnp.take_along_axis(log_BLPV, drawn_BLP[..., None], -1)[..., 0].sum(-1)
            noise = jax.random.gumbel
        else:
            confidence_BL = score(ids_BL)
            noise = _centred
        noise_BL = jax.vmap(lambda rng: noise(rng, (L,)))(keys_B3[:, 1])
        confidence_BL = confidence_BL + sampler.noise * left * noise_BL
        confidence_BL = jnp.where(is_masked_BL, confidence_BL, jnp.inf)
        rank_BL = jnp.argsort(jnp.argsort(confidence_BL, axis=1), axis=1)
        return (ids_BL, rank_BL < counts_SN[i, free_B][:, None]), None

    (ids_BL, _), _ = jax.lax.scan(step, (ids_BL, is_free_BL), jnp.arange(steps))
    return ids_BL


def _centred(rng, shape):
    return jax.random.uniform(rng, shape) - 0.5


def _draw(logits, gumbel, temperature, sampler):
    """Values drawn from softmax(logits / temperature), of those that top_k and top_p leave."""
    V = logits.shape[-1]
    if 0 < sampler.top_k < V:
        least = jax.lax.top_k(logits, sampler.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampler.top_p < 1:
        probability = jax.nn.softmax(logits / jnp.maximum(temperature, 1e-6))
        ordered = -jnp.sort(-probability, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        # The likeliest value always stays, as nothing comes before it.
        count = jnp.maximum((before < sampler.top_p).sum(-1, keepdims=True), 1)
        least = jnp.take_along_axis(ordered, count - 1, -1)
        logits = jnp.where(probability < least, -jnp.inf, logits)
    return (logits + temperature * gumbel).argmax(-1)
