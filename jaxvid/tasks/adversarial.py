"""Adversarial training in one step: losses of a generator and of its discriminators.

Both are terms of one loss. The generator's term holds the parameters of the discriminators constant
and the discriminators' term holds the fakes constant, so each side moves by its own term alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvid.checks import at_least, choose
from jaxvid.models.discriminator import PatchDiscriminator, StyleDiscriminator

KINDS = {"patch": PatchDiscriminator, "stylegan": StyleDiscriminator}
LECAM_DECAY = 0.99  # of the running means of the logits


def hinge(real, fake):
    """mean max(0, 1 - D(x)) + mean max(0, 1 + D(x')) (Lim and Ye 2017)."""
    return jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()


def non_saturating(real, fake):
    """Cross entropy, mean -log s(D(x)) - log (1 - s(D(x'))) (Goodfellow et al. 2014)."""
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


# name -> (loss of the discriminator, loss of the generator)
LOSSES = {
    "hinge": (hinge, lambda fake: -fake.mean()),
    "non_saturating": (non_saturating, lambda fake: jax.nn.softplus(-fake).mean()),
}


def gradient_penalty(logits, real):
    """R1, the mean over samples of |d D / d x|^2, D the mean logit of a sample (Mescheder 2018)."""
    per_sample = jax.grad(lambda x: logits(x).reshape(len(x), -1).mean(1).sum())(real)
    return jnp.square(per_sample).reshape(len(real), -1).sum(1).mean()


def lecam(real, fake, average):
    """mean max(0, D(x) - a_fake)^2 + max(0, a_real - D(x'))^2, a running means (Tseng 2021)."""
    above = jnp.square(jax.nn.relu(real - average["fake"])).mean()
    return above + jnp.square(jax.nn.relu(average["real"] - fake)).mean()


class GeneratorLoss(NamedTuple):
    """by_kind: {"image" or "video": loss}, unweighted. feature_matching: mean difference of the
    discriminators' activations, summed over kinds, 0 if its weight is 0."""

    by_kind: dict[str, Any]
    feature_matching: Any


class Adversary:
    """The discriminators of a task and what they add to its loss.

    kind: "patch" or "stylegan", of width `width`. loss: "hinge" or "non_saturating". image, video:
    weights of the generator's loss by the discriminator of images and by that of clips; 0 leaves
    that discriminator out. start: first step with discriminators. adaptive: scale the generator's
    loss by the ratio of the gradient norms, in the last layer of the decoder, of the task's other
    losses and of the unweighted generator's loss (VQGAN, Esser et al. 2021). r1, lecam: weights of
    the regularizers of the discriminators. feature_matching: weight of the mean difference of
    activations in the generator's loss, independent of `image` and `video`.

    Images and clips are {"image": [B, H, W, C], "video": [B, T, H, W, C]}, either or both.
    """

    def __init__(
        self,
        *,
        kind: str,
        width: int,
        loss: str,
        image: float,
        video: float,
        start: int,
        adaptive: bool,
        r1: float,
        lecam: float,
        feature_matching: float,
    ):
        choose("kind", kind, KINDS)
        choose("loss", loss, LOSSES)
        weights = dict(image=image, video=video, start=start, r1=r1, lecam=lecam)
        for name, value in {**weights, "feature_matching": feature_matching}.items():
            at_least(name, value, 0)
        at_least("width", width, 8)
        self.weights = {"image": image, "video": video}
        self.module = KINDS[kind](width=width)
        self.loss_of_discriminator, self.loss_of_generator = LOSSES[loss]
        self.start, self.adaptive = start, adaptive
        self.r1, self.lecam, self.feature_matching = r1, lecam, feature_matching

    def init(self, rng, shapes):
        """(params, extra) for {name: shape} of images and clips."""
        params, extra = {}, {}
        for name, key in zip(sorted(shapes), jax.random.split(rng, len(shapes))):
            if self.weights[name]:
                params[name] = self.module.init(key, jnp.zeros(shapes[name]))["params"]
                extra[name] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        return params, extra

    def generator_loss(self, params, real, fake) -> GeneratorLoss:
        """The generator's losses. The discriminators are constants: `params` get no gradient."""
        params, real = jax.lax.stop_gradient((params, real))
        by_kind, feature_matching = {}, jnp.zeros(())
        for name in params:
            logits, features = self._apply(params[name], fake[name])
            by_kind[name] = self.loss_of_generator(logits)
            if self.feature_matching:
                _, targets = self._apply(params[name], real[name])
                distances = [jnp.abs(a - b).mean() for a, b in zip(features, targets)]
                feature_matching += sum(distances) / len(distances)
        return GeneratorLoss(by_kind, feature_matching)

    def discriminator_loss(self, params, real, fake, extra):
        """(loss of the discriminators, metrics, extra). The fakes are constants."""
        real, fake = jax.lax.stop_gradient((real, fake))
        total, metrics, extra = jnp.zeros(()), {}, dict(extra)
        for name in params:

            def logits(x, name=name):
                return self._apply(params[name], x)[0]

            on_real, on_fake = logits(real[name]), logits(fake[name])
            total += self.loss_of_discriminator(on_real, on_fake)
            if self.r1:
                total += self.r1 * gradient_penalty(logits, real[name])
            if self.lecam:
                total += self.lecam * lecam(on_real, on_fake, extra[name])
            means = jax.lax.stop_gradient({"real": on_real.mean(), "fake": on_fake.mean()})
            metrics |= {f"{name}_{side}": mean for side, mean in means.items()}
            extra[name] = jax.tree.map(
                lambda old, new: LECAM_DECAY * old + (1 - LECAM_DECAY) * new, extra[name], means
            )
        return total, metrics, extra

    def _apply(self, params, x):
        return self.module.apply({"params": params}, x)
