"""Tokenizers: networks that compress video to a few latents or tokens and reconstruct it."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxvid import schema, weights
from jaxvid.checks import at_least, between, choose, require, whole_numbers
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.layers.quantize import QUANTIZERS, usage
from jaxvid.metrics import i3d, lpips, quality
from jaxvid.models.ar_vae import ARVAE
from jaxvid.models.cvivit import CViViT
from jaxvid.models.omnitokenizer import OmniTokenizer
from jaxvid.models.stem import INFLATIONS, inflate
from jaxvid.models.tokenizer import Tokenizer, moments, update_moments
from jaxvid.tasks.adversarial import Adversary
from jaxvid.tasks.base import Autoencoder

ARCHITECTURES = {"cvivit": CViViT, "omnitokenizer": OmniTokenizer, "ar_vae": ARVAE}
ERRORS = {"l1": jnp.abs, "l2": jnp.square}
PERCEPTUAL = {"lpips": lpips, "i3d": i3d}
PERCEPTUAL_FIELDS = {"lpips?": str, "lpips_weight?": float, "i3d?": str, "i3d_weight?": float}
DTYPES = ("float32", "bfloat16")


class Task(Autoencoder):
    """Train a causal tokenizer to reconstruct its video.

    The loss is the error of the pixels and the loss of the quantizer. Optional terms are distances
    in the features of pretrained networks and adversarial losses, whose discriminators are trained
    in the same step.

    size, frames: pixels and frames of the training clips. sizes: resolutions of which every step
    draws one at random and resizes its clips to it; () for `size` alone. arch: a name of
    ARCHITECTURES. network: its options. quantizer: a name in `layers.quantize.QUANTIZERS` and its
    options. error: of pixels in [-1, 1], "l1" or "l2". images: share of a clip's frames that are
    also drawn at random and reconstructed as images, because the weights of first frames see few
    examples otherwise. inflation: how `init_from` makes the weights of frame groups from those of
    first frames. perceptual: files with the weights of "lpips" (on a random frame of every clip and
    image) and "i3d" (on clips), "" for none, and the weight of each in the loss, `<name>_weight`.
    gan: options of `tasks.adversarial.Adversary`, None for no discriminators.
    """

    def __init__(
        self,
        *,
        size: int,
        frames: int,
        arch: str,
        network: Mapping,
        quantizer: Mapping,
        error: str,
        images: float,
        sizes: tuple[int, ...] = (),
        inflation: str = "average",
        perceptual: Mapping | None = None,
        gan: Mapping | None = None,
    ):
        choose("arch", arch, ARCHITECTURES)
        choose("error", error, ERRORS)
        choose("inflation", inflation, ("none", *INFLATIONS))
        between("images", images, 0, 1)
        self.frames, self.size = frames, (size, size)
        self.sizes = tuple(sizes)
        self.error, self.num_images = ERRORS[error], round(images * frames)
        self.perceptual, self.inflation = dict(perceptual or {}), inflation
        schema.check("perceptual", self.perceptual, PERCEPTUAL_FIELDS)
        with within("perceptual"):
            for name in PERCEPTUAL:
                at_least(f"{name}_weight", self.perceptual.get(f"{name}_weight", 0.0), 0)
        self.tokenizer = self._make_tokenizer(arch, network, quantizer)
        self._check_sizes(size, arch, gan)
        with within("network"):
            for pixels in (size, *self.sizes):
                self.tokenizer.grid(pixels)
        self.tokenizer.latents_for_frames(frames)
        if self.perceptual.get("lpips"):
            at_least("size", min(size, *self.sizes, size), lpips.MIN_SIZE)
        if self.perceptual.get("i3d") and frames > 1:
            at_least("frames", frames, i3d.MIN_FRAMES)
        self.adversary = self._make_adversary(gan) if gan else None

    def _make_tokenizer(self, arch, network, quantizer) -> Tokenizer:
        options = dict(quantizer)
        with within("quantizer"):
            name = options.pop("name", "")
            choose("name", name, QUANTIZERS)
            known = [option.name for option in dataclasses.fields(QUANTIZERS[name])]
            for option, value in options.items():
                remedy = "choose a quantizer behind the colon of --config, as in quantizer"
                has_none = f"{name} has no such option; {remedy}={name}"
                require(option in known, option, value, has_none)
            quantizer = schema.build(QUANTIZERS[name], options)
        with within("network"):
            choose("dtype", network.get("dtype"), DTYPES)
            options = {**network, "dtype": jnp.dtype(network["dtype"])}
            given = {"features": quantizer.features, "channels": quantizer.channels}
            if arch == "ar_vae":
                given["size"] = self.size
            network = schema.build(ARCHITECTURES[arch], options, **given)
        return Tokenizer(network, quantizer)

    def _check_sizes(self, size, arch, gan):
        sizes = self.sizes
        whole_numbers("sizes", sizes)
        too_large = f"clips are not enlarged; use at most data.size={size}, or raise it"
        require(max(sizes, default=0) <= size, "sizes", sizes, too_large)
        one_size = "arch=ar_vae has latents for one size; leave sizes empty"
        require(not sizes or arch != "ar_vae", "sizes", sizes, one_size)
        is_stylegan = gan and gan.get("kind") == "stylegan"
        one_size = "gan=stylegan takes frames of one size; use gan=patch"
        require(not sizes or not is_stylegan, "sizes", sizes, one_size)

    def _make_adversary(self, options) -> Adversary:
        with within("gan"):
            adversary = schema.build(Adversary, options)
            kind = min(self._discriminator_inputs())
            require(
                any(options[kind] for kind in self._discriminator_inputs()),
                kind,
                options[kind],
                "leaves no discriminator to train; use more than 0, or choose gan=none behind the "
                "colon of --config",
            )
        return adversary

    def check(self, source):
        """Raise UserError if there is no video."""
        if source.tokenizer:
            raise UserError(
                "name=tokenizer: learns from video, and data.name=latents has none; use another "
                "source"
            )

    def init(self, rng, batch):
        """(params, extra): extra has the moments of latents and the carried part of a codebook."""
        del batch
        params, carried = self.tokenizer.init(rng, self.size)
        extra = {"latents": moments(self.tokenizer.channels)}
        if carried:
            extra["codebook"] = carried
        if self.adversary:
            params["discriminator"], extra["verdicts"] = self.adversary.init(
                jax.random.fold_in(rng, 1), self._discriminator_inputs()
            )
        return params, extra

    def _discriminator_inputs(self):
        """Shapes of what discriminators see: clips, images or both."""
        shapes = {"video": (1, self.frames, *self.size, 3)} if self.frames > 1 else {}
        if self.num_images or self.frames == 1:
            shapes["image"] = (1, *self.size, 3)
        return shapes

    def frozen(self):
        """The weights of the networks of perceptual distances, from their files."""
        frozen = {}
        for name, network in PERCEPTUAL.items():
            if path := self.perceptual.get(name):
                with within("perceptual"):
                    frozen[name] = network.convert(weights.read(path, name), f"{name}={path}")
        return frozen

    def inflate(self, weights, fields):
        """Weights of an image run (one frame) with group weights grown from those of first frames.

        fields: config.task of that run. Other runs have trained the group weights themselves, and a
        shared stem has no others: their weights are returned unchanged.
        """
        network, is_shared = weights["network"], fields.network.get("stem") == "shared"
        if fields.frames > 1 or self.frames == 1 or self.inflation == "none" or is_shared:
            return weights
        if fields.network.get("patchify") == "haar":
            raise UserError(
                f"inflation={self.inflation}: an image has no Haar bands over time; use none"
            )
        grown = {
            name: inflate(name, network[name], self.inflation)
            for name in ("embed", "pixels")
            if {"image", "group"} <= set(network[name])
        }
        return {**weights, "network": {**network, **grown}}

    def loss(self, params, batch, rng, *, step, frozen, extra):
        """Error of the clips and of their images, every frame with the same weight."""
        video_BTHWC = normalize(batch["video"])
        run = functools.partial(self._loss, params, step=step, frozen=frozen, extra=extra)
        if not self.sizes:
            return run(video_BTHWC, rng)

        def shrunk(size):
            shape = (*video_BTHWC.shape[:2], size, size, video_BTHWC.shape[-1])
            return lambda rng: run(jax.image.resize(video_BTHWC, shape, "linear"), rng)

        # One program with a branch for every size, so that no step compiles.
        rng, rng_size = jax.random.split(rng)
        drawn = jax.random.randint(rng_size, (), 0, len(self.sizes))
        return jax.lax.switch(drawn, [shrunk(size) for size in self.sizes], rng)

    def _loss(self, params, video_BTHWC, rng, *, step, frozen, extra):
        """The loss on clips of any size."""
        rng_images, rng_latent, rng_codebook, rng_frame = jax.random.split(rng, 4)
        params = {**params, **extra}
        parts = [video_BTHWC]
        if self.num_images:
            parts.append(self._images(video_BTHWC, rng_images))

        # One quantizer call sees all tokens. Row b holds clip b and its images, so a loss that is
        # summed per row weighs a clip the same for any number of images.
        B = video_BTHWC.shape[0]
        features = [self.tokenizer.features(params, part)[0] for part in parts]
        rows = [z_BTNZ.reshape(B, -1, z_BTNZ.shape[-1]) for z_BTNZ in features]
        z_BLZ = jnp.concatenate(rows, axis=1)
        quantizer = self.tokenizer.quantizer
        q_BLZ, ids_BL, aux = quantizer(z_BLZ, params["codebook"], rng=rng_latent)
        # The moments are of latents as `encode` gives them. Gaussian latents are then means: only
        # training draws.
        fixed_BLZ = quantizer(z_BLZ, params["codebook"])[0] if ids_BL is None else q_BLZ
        fixed_BLZ = jax.lax.stop_gradient(fixed_BLZ)
        fixed_BTNZ = fixed_BLZ[:, : rows[0].shape[1]].reshape(*features[0].shape[:3], -1)
        extra = {**extra, "latents": update_moments(params["latents"], fixed_BTNZ)}
        if "codebook" in extra:
            extra["codebook"] = quantizer.update(params["codebook"], z_BLZ, ids_BL, rng_codebook)

        clips_BLZ = jnp.split(q_BLZ, [rows[0].shape[1]], axis=1)
        latents = [q.reshape(*z.shape[:3], -1) for q, z in zip(clips_BLZ, features)]

        def reconstruct(last_layer):
            weights = {**params, "network": {**params["network"], "pixels": last_layer}}
            return [self._decode(weights, z, video_BTHWC.shape[2:4]) for z in latents]

        def distance(guesses):
            return self._distance(guesses, parts, frozen, rng_frame)

        guesses, last_layer_vjp = jax.vjp(reconstruct, params["network"]["pixels"])

        def last_layer_grad_norm(loss):
            by_guesses = jax.grad(loss)(jax.lax.stop_gradient(guesses))
            return optax.tree.norm(last_layer_vjp(by_guesses))

        total, metrics = distance(guesses)
        metrics |= {"quantizer_loss": aux.pop("loss"), **aux}
        total += metrics["quantizer_loss"]
        if self.adversary:
            adversarial, found, extra["verdicts"] = self._adversarial_loss(
                params, guesses, parts, step, last_layer_grad_norm, distance
            )
            total, metrics = total + adversarial, metrics | found
        return total, (metrics, extra, B)  # every clip counts as many frames

    def _distance(self, guesses, parts, frozen, rng):
        """(loss, metrics) of rebuilt clips and images: of pixels and of features."""
        frames = sum(part.shape[0] * part.shape[1] for part in parts)
        errors = [
            self.error(guess - part).mean((-3, -2, -1)).sum() for guess, part in zip(guesses, parts)
        ]
        total = sum(errors) / frames
        metrics = {"error": total}
        if "lpips" in frozen:
            pairs = [_random_frame(pair, rng) for pair in zip(guesses, parts)]
            pictures = (jnp.concatenate(side) for side in zip(*pairs))
            metrics["lpips"] = lpips.distance(frozen["lpips"], *pictures).mean()
        if "i3d" in frozen and self.frames > 1:
            guess, truth = (i3d.features(frozen["i3d"], x[0]) for x in (guesses, parts))
            metrics["i3d"] = jnp.square(guess - truth).mean()
        for name in PERCEPTUAL:
            total += self.perceptual.get(f"{name}_weight", 0.0) * metrics.get(name, 0.0)
        return total, metrics

    def _adversarial_loss(self, params, guesses, parts, step, last_layer_grad_norm, distance):
        """(loss of generator and discriminators, metrics, their state); zeros before the start.

        last_layer_grad_norm: loss of the guesses -> the norm of its gradient in the decoder's last
        layer. Metrics: `generator` is unweighted, `adaptive` is its adaptive weight.
        """
        adversary, extra = self.adversary, params["verdicts"]
        real, fake = _by_kind(parts), _by_kind(guesses)

        def generator_loss(guesses):
            return adversary.generator_loss(params["discriminator"], real, _by_kind(guesses))

        def losses():
            generator = generator_loss(guesses)
            weight = jnp.ones(())
            if adversary.adaptive:
                # Of unweighted losses: the ratio would cancel their weights.
                task_norm = last_layer_grad_norm(lambda guesses: distance(guesses)[0])
                generator_norm = last_layer_grad_norm(
                    lambda guesses: sum(generator_loss(guesses).by_kind.values())
                )
                weight = task_norm / (generator_norm + 1e-4)
                weight = jax.lax.stop_gradient(jnp.clip(weight, 0, 1e4))
            total = weight * sum(
                adversary.weights[kind] * loss for kind, loss in generator.by_kind.items()
            )
            total += adversary.feature_matching * generator.feature_matching
            discriminator, metrics, after = adversary.discriminator_loss(
                params["discriminator"], real, fake, extra
            )
            metrics |= {
                "generator": sum(generator.by_kind.values()),
                "discriminator": discriminator,
                "adaptive": weight,
            }
            return total + discriminator, metrics, after

        def zeros():
            shapes = jax.eval_shape(losses)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return *nothing[:2], extra

        return jax.lax.cond(step >= adversary.start, losses, zeros)

    def _images(self, video_BTHWC, rng):
        """Random frames of every clip as clips of one frame, [B images, 1, H, W, C]."""
        B, T, *frame = video_BTHWC.shape
        order_BT = jax.random.uniform(rng, (B, T)).argsort(axis=1)
        index = order_BT[:, : self.num_images, None, None, None]
        return jnp.take_along_axis(video_BTHWC, index, axis=1).reshape(-1, 1, *frame)

    def _decode(self, params, z_BTNZ, size):
        return self.tokenizer.decode(params, z_BTNZ, self.tokenizer.grid(size))[0]

    def evaluate(self, params, batch, rng, *, frozen):
        """Quality of the rebuilt clips.

        psnr, ssim [B, F], and motion_error [B, F], the mean error of the change from the frame
        before (NaN at the first); lpips [B, F] where there are weights; for codes ids [B, ...],
        which `pool` turns into perplexity, usage and dead [B].
        """
        del rng
        video_BTHWC = normalize(batch["video"])
        z_BTNZ, _ = self.tokenizer.features(params, video_BTHWC)
        q_BTNZ, ids, aux = self.tokenizer.quantizer(z_BTNZ, params["codebook"])
        guess_BTHWC = jnp.clip(self._decode(params, q_BTNZ, self.size), -1, 1)
        change = jnp.diff(guess_BTHWC - video_BTHWC, axis=1)
        motion_BT = jnp.abs(change).mean((-3, -2, -1))
        metrics = {
            "psnr": quality.psnr(guess_BTHWC, video_BTHWC),
            "ssim": quality.ssim(guess_BTHWC, video_BTHWC),
            "motion_error": jnp.pad(motion_BT, ((0, 0), (1, 0)), constant_values=jnp.nan),
        }
        if "lpips" in frozen:
            pictures = (x.reshape(-1, *x.shape[2:]) for x in (guess_BTHWC, video_BTHWC))
            lpips_L = lpips.distance(frozen["lpips"], *pictures)
            metrics["lpips"] = lpips_L.reshape(video_BTHWC.shape[:2])
        if "kl" in aux:
            metrics["kl"] = jnp.full(video_BTHWC.shape[0], aux["kl"])
        if ids is not None:
            metrics["ids"] = ids
        return metrics

    def pool(self, scores):
        """The scores, with the use of the codebook by all clips in the place of their ids."""
        if "ids" not in scores:
            return scores
        scores = dict(scores)
        ids = scores.pop("ids")
        use = usage(ids, self.tokenizer.quantizer.size)
        use["dead"] = use["dead"].astype(jnp.int32)
        return scores | {name: jnp.full(len(ids), value) for name, value in use.items()}

    def sample(self, params, rng, cond, *, frozen, frames=None):
        """The clip `cond["video"]` uint8 [B, T, H, W, 3] rebuilt, float32 in [-1, 1]."""
        del rng, frozen, frames
        return self._reconstruct(params, cond["video"])

    @functools.partial(jax.jit, static_argnames="self")
    def _reconstruct(self, params, video_u8):
        z_BTNZ, _ = self.tokenizer.encode(params, normalize(video_u8))
        return jnp.clip(self._decode(params, z_BTNZ, self.size), -1, 1)


def _by_kind(parts):
    """{"video": clips, "image": pictures [B, H, W, C]}: all clips of one frame are pictures."""
    clips = [part for part in parts if part.shape[1] > 1]
    pictures = [part[:, 0] for part in parts if part.shape[1] == 1]
    kinds = {"video": clips, "image": pictures}
    return {kind: jnp.concatenate(those) for kind, those in kinds.items() if those}


def _random_frame(clips, rng):
    """The same random frame of both of two clips [B, T, H, W, C], one draw for each row."""
    B, T = clips[0].shape[:2]
    index = jax.random.randint(rng, (B, 1, 1, 1, 1), 0, T)
    return [jnp.take_along_axis(clip, index, axis=1)[:, 0] for clip in clips]
