"""Adversarial training in one step: losses of a generator and of its discriminators.

Both are terms of one loss. The generator's sees the discriminators' parameters held constant, and
the discriminators' sees the fakes held constant, so each moves by its own term alone.
"""

import math

import jax
import jax.numpy as jnp

from jaxvid.errors import UserError
from jaxvid.models.discriminator import PatchDiscriminator, StyleDiscriminator

KINDS = {"patch": PatchDiscriminator, "stylegan": StyleDiscriminator}
LECAM_MEMORY = 0.99


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


class Adversary:
    """The discriminators of a task and what they add to its loss.

    kind: "patch" or "stylegan", of width `width`. loss: "hinge" or "non_saturating". image, video:
    weights of the generator's loss by the discriminator of pictures and by that of clips; 0 leaves
    one out. start: first step with any of it. adaptive: also weigh these losses by how strongly the
    last layer feels the task's others and them, taken without weights (Esser et al. 2021). r1,
    lecam: weights of regularizers of the discriminators. feature_matching: of the mean difference
    of activations, for the generator, whatever the weights of the verdicts.

    Pictures and clips are {"image": [B, H, W, C], "video": [B, T, H, W, C]}, either or both.
    """

    def __init__(
        self, *, kind, width, loss, image, video, start, adaptive, r1, lecam, feature_matching
    ):
        _choose("kind", kind, KINDS)
        _choose("loss", loss, LOSSES)
        self.weights = {"image": image, "video": video}
        named = dict(self.weights, start=start, r1=r1, lecam=lecam)
        for name, value in (named | {"feature_matching": feature_matching}).items():
            if not 0 <= value < math.inf:
                raise UserError(f"task.gan.{name}={value}: use 0 or a positive number")
        if width < 8:
            raise UserError(f"task.gan.width={width}: use 8 channels or more")
        self.module = KINDS[kind](width=width)
        self.judge, self.persuade = LOSSES[loss]
        self.start, self.adaptive = start, adaptive
        self.r1, self.lecam, self.matching = r1, lecam, feature_matching

    def init(self, rng, shapes):
        """(params, extra) for {name: shape} of pictures and clips."""
        params, extra = {}, {}
        for name, key in zip(sorted(shapes), jax.random.split(rng, len(shapes))):
            if self.weights[name]:
                params[name] = self.module.init(key, jnp.zeros(shapes[name]))["params"]
                extra[name] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        return params, extra

    def generator(self, params, real, fake):
        """Losses of the generator by discriminators that stand still; no gradient for `params`.

        ({name: loss}, sum over names of the mean difference of activations), both unweighted; the
        second is 0 where nothing asks for it.
        """
        params, real = jax.lax.stop_gradient((params, real))
        losses, apart = {}, jnp.zeros(())
        for name in params:
            logits, felt = self._look(params[name], fake[name])
            losses[name] = self.persuade(logits)
            if self.matching:
                _, wanted = self._look(params[name], real[name])
                apart += sum(jnp.abs(a - b).mean() for a, b in zip(felt, wanted)) / len(felt)
        return losses, apart

    def discriminator(self, params, real, fake, extra):
        """(loss of the discriminators by fakes that stand still, metrics, extra)."""
        real, fake = jax.lax.stop_gradient((real, fake))
        total, metrics, extra = jnp.zeros(()), {}, dict(extra)
        for name in params:

            def logits(x, name=name):
                return self._look(params[name], x)[0]

            true, false = logits(real[name]), logits(fake[name])
            total += self.judge(true, false)
            if self.r1:
                total += self.r1 * gradient_penalty(logits, real[name])
            if self.lecam:
                total += self.lecam * lecam(true, false, extra[name])
            means = jax.lax.stop_gradient({"real": true.mean(), "fake": false.mean()})
            metrics |= {f"{name}_{side}": mean for side, mean in means.items()}
            extra[name] = jax.tree.map(
                lambda old, new: LECAM_MEMORY * old + (1 - LECAM_MEMORY) * new, extra[name], means
            )
        return total, metrics, extra

    def _look(self, params, x):
        return self.module.apply({"params": params}, x)


def _choose(field, value, choices):
    if value not in choices:
        raise UserError(f"task.gan.{field}={value!r}: unknown; use one of {', '.join(choices)}")
