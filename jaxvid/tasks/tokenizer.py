"""Tokenizers: video compressed to a few latents or tokens that streams are rebuilt from."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from absl import logging

from jaxvid import weights
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.layers import masks
from jaxvid.layers.quantize import QUANTIZERS
from jaxvid.metrics import i3d, lpips, quality
from jaxvid.mixers import check as check_mixer
from jaxvid.models.ar_vae import ARVAE
from jaxvid.models.blocks import INFLATIONS, PATCHIFY, POSITIONS, STEMS, inflate
from jaxvid.models.cvivit import CViViT
from jaxvid.models.omnitokenizer import OmniTokenizer
from jaxvid.models.tokenizer import Tokenizer, moments, update_moments
from jaxvid.tasks.adversarial import Adversary

ARCHITECTURES = {"cvivit": CViViT, "omnitokenizer": OmniTokenizer, "ar_vae": ARVAE}
ERRORS = {"l1": jnp.abs, "l2": jnp.square}
PERCEPTUAL = {"lpips": lpips, "i3d": i3d}
DTYPES = ("float32", "bfloat16")


class Task:
    """Train a causal tokenizer to rebuild its video: error of the pixels and the quantizer's loss.

    And, as asked, distances in the features of networks that know how things look, and the verdict
    of discriminators that are trained in the same step.

    size, frames: of the training clips, pixels and frames. sizes: of which every step draws one at
    random and shrinks its clips to it, to learn many resolutions; () for `size` alone. arch: a name
    of ARCHITECTURES. network: its options. quantizer: name in `layers.quantize.QUANTIZERS` and its
    options. error: of pixels in [-1, 1], "l1" or "l2". images: share of a clip's frames that are
    also drawn at random and rebuilt as images, so that the weights of first frames, which are few,
    learn as the others do. inflation: how `init_from` makes the maps of groups of frames from those
    of first frames. perceptual: files with the weights of "lpips" (of a random frame of every clip
    and image) and of "i3d" (of clips), "" for none, and the weight of each in the loss,
    `<name>_weight`. gan: options of `tasks.adversarial.Adversary`, None for none; pictures are the
    images, clips the clips.
    """

    sharding_rules = (
        (r"/(q|k|v|up|gate|down)/kernel", ("fsdp", "tensor")),
        (r"/out/kernel", ("tensor", "fsdp")),
        (r"/(q|k|v)/bias", ("tensor",)),
    )

    def __init__(
        self,
        *,
        size,
        frames,
        arch,
        network,
        quantizer,
        error,
        images,
        sizes=(),
        inflation="average",
        perceptual=None,
        gan=None,
    ):
        choices = dict(arch=arch, error=error, images=images, inflation=inflation)
        _check(
            {
                "task": choices,
                "task.network": network,
                "task.quantizer": quantizer,
                "task.perceptual": perceptual or {},
            }
        )
        _check_network(network)
        _check_sizes(sizes, size, arch, gan)
        self.frames, self.size = frames, (size, size)
        self.sizes = tuple(sizes)
        self.error, self.num_images = ERRORS[error], round(images * frames)
        options = dict(quantizer)
        quantizer = QUANTIZERS[options.pop("name")](**options)
        options = {**network, "dtype": jnp.dtype(network["dtype"])}
        if arch == "ar_vae":
            options["size"] = self.size
        network = ARCHITECTURES[arch](
            features=quantizer.features, channels=quantizer.channels, **options
        )
        self.tokenizer = Tokenizer(network, quantizer)
        with within("task.network", ("patch",)), within("task", ("frames",)):
            for pixels in (size, *sizes):
                self.tokenizer.grid(pixels)
            self.tokenizer.latents_for_frames(frames)
        self.perceptual, self.inflation = dict(perceptual or {}), inflation
        self.adversary = Adversary(**gan) if gan else None
        if gan and not any(gan[kind] for kind in self._judged()):
            kind = min(self._judged())
            raise UserError(
                f"task.gan.{kind}={gan[kind]}: leaves no discriminator to train; use more than 0, "
                "or choose gan=none behind the colon of --config"
            )

    def check(self, source):
        """Raise UserError where there is no video; say which losses are off for want of weights."""
        if getattr(source, "tokenizer", None):
            raise UserError("data.name='latents': tokenizers learn from video; use another source")
        for name in PERCEPTUAL:
            if self.perceptual.get(f"{name}_weight") and not self.perceptual[name]:
                logging.warning(
                    "%s is off: task.perceptual.%s names no file of weights", name.upper(), name
                )

    def init(self, rng, batch):
        """(params, extra): extra has the moments of latents and the moving part of a codebook."""
        del batch
        params, carried = self.tokenizer.init(rng, self.size)
        extra = {"latents": moments(self.tokenizer.channels)}
        if carried:
            extra["codebook"] = carried
        if self.adversary:
            params["discriminator"], extra["verdicts"] = self.adversary.init(
                jax.random.fold_in(rng, 1), self._judged()
            )
        return params, extra

    def _judged(self):
        """Shapes of what there is for discriminators to judge: clips, pictures or both."""
        shapes = {"video": (1, self.frames, *self.size, 3)} if self.frames > 1 else {}
        if self.num_images or self.frames == 1:
            shapes["image"] = (1, *self.size, 3)
        return shapes

    def frozen(self):
        """The weights of the networks of perceptual distances, as their files have them."""
        frozen = {}
        for name, network in PERCEPTUAL.items():
            if path := self.perceptual.get(name):
                field = f"task.perceptual.{name}"
                frozen[name] = network.convert(weights.read(path, field), f"{field}={path}")
        return frozen

    def inflate(self, weights, fields):
        """Weights of a run with these `config.task`, its maps of first frames grown to groups.

        Only of a run of images (one frame), in which nothing has trained the maps of groups; a
        shared stem has no others.
        """
        network, is_shared = weights["network"], fields.network.get("stem") == "shared"
        if fields.frames > 1 or self.frames == 1 or self.inflation == "none" or is_shared:
            return weights
        if fields.network.get("patchify") == "haar":
            raise UserError(
                f"task.inflation={self.inflation}: Haar bands of time are none of an image; "
                "use none"
            )
        grown = {
            name: inflate(name, network[name], self.inflation)
            for name in ("embed", "pixels")
            if {"image", "group"} <= set(network[name])
        }
        return {**weights, "network": {**network, **grown}}

    def loss(self, params, batch, rng, *, step, frozen, extra):
        """Error of the clips and of the images among them, a frame counting as a frame."""
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

        # One quantizer sees all tokens: rows of clips, each with those of its images behind. So a
        # sample, to a loss that sums over it, is a clip with its images, as the frames that the
        # error averages over are: more images do not loosen the pull on a clip's latents.
        B = video_BTHWC.shape[0]
        features = [self.tokenizer.features(params, part)[0] for part in parts]
        rows = [z_BTNZ.reshape(B, -1, z_BTNZ.shape[-1]) for z_BTNZ in features]
        z_BLZ = jnp.concatenate(rows, axis=1)
        quantizer = self.tokenizer.quantizer
        q_BLZ, ids_BL, aux = quantizer(z_BLZ, params["codebook"], rng=rng_latent)
        # Latents as `encode` gives them, which draws none: Gaussian ones, without ids, are means.
        fixed_BLZ = quantizer(z_BLZ, params["codebook"])[0] if ids_BL is None else q_BLZ
        fixed_BLZ = jax.lax.stop_gradient(fixed_BLZ)
        fixed_BTNZ = fixed_BLZ[:, : rows[0].shape[1]].reshape(*features[0].shape[:3], -1)
        extra = {**extra, "latents": update_moments(params["latents"], fixed_BTNZ)}
        if "codebook" in extra:
            extra["codebook"] = quantizer.update(params["codebook"], z_BLZ, ids_BL, rng_codebook)

        clips_BLZ = jnp.split(q_BLZ, [rows[0].shape[1]], axis=1)
        latents = [q.reshape(*z.shape[:3], -1) for q, z in zip(clips_BLZ, features)]

        def rebuild(last):
            weights = {**params, "network": {**params["network"], "pixels": last}}
            return [self._decode(weights, z, video_BTHWC.shape[2:4]) for z in latents]

        def distance(guesses):
            return self._distance(guesses, parts, frozen, rng_frame)

        guesses, pull = jax.vjp(rebuild, params["network"]["pixels"])
        total, metrics = distance(guesses)
        metrics |= {"quantizer_loss": aux.pop("loss"), **aux}
        total += metrics["quantizer_loss"]
        if self.adversary:
            verdict, found, extra["verdicts"] = self._verdict(
                params, guesses, parts, step, lambda loss: _felt(loss, guesses, pull), distance
            )
            total, metrics = total + verdict, metrics | found
        return total, (metrics, extra)

    def _distance(self, guesses, parts, frozen, rng):
        """(loss, metrics) of rebuilt clips and images: of pixels and of features."""
        frames = sum(part.shape[0] * part.shape[1] for part in parts)
        errors = [
            self.error(guess - part).mean((-3, -2, -1)).sum() for guess, part in zip(guesses, parts)
        ]
        total = sum(errors) / frames
        metrics = {"error": total}
        if "lpips" in frozen:
            pairs = [_a_frame(pair, rng) for pair in zip(guesses, parts)]
            pictures = (jnp.concatenate(side) for side in zip(*pairs))
            metrics["lpips"] = lpips.distance(frozen["lpips"], *pictures).mean()
        if "i3d" in frozen and self.frames > 1:
            guess, truth = (i3d.features(frozen["i3d"], x[0]) for x in (guesses, parts))
            metrics["i3d"] = jnp.square(guess - truth).mean()
        for name in PERCEPTUAL:
            total += self.perceptual.get(f"{name}_weight", 0.0) * metrics.get(name, 0.0)
        return total, metrics

    def _verdict(self, params, guesses, parts, step, felt, distance):
        """(loss of generator and discriminators, metrics, their state); nothing before the start.

        felt: loss of the guesses -> the norm of its gradient in the decoder's last layer. Of the
        metrics, `generator` is without weights and `adaptive` what multiplies them.
        """
        adversary, verdicts = self.adversary, params["verdicts"]
        real, fake = _by_kind(parts), _by_kind(guesses)

        def persuade(guesses):
            return adversary.generator(params["discriminator"], real, _by_kind(guesses))

        def judge():
            losses, apart = persuade(guesses)
            weight = jnp.ones(())
            if adversary.adaptive:
                # Of the bare verdicts: of weighted ones the quotient would undo the weights.
                ours = felt(lambda guesses: distance(guesses)[0])
                weight = ours / (felt(lambda guesses: sum(persuade(guesses)[0].values())) + 1e-4)
                weight = jax.lax.stop_gradient(jnp.clip(weight, 0, 1e4))
            total = weight * sum(adversary.weights[name] * loss for name, loss in losses.items())
            total += adversary.matching * apart
            discriminator, found, after = adversary.discriminator(
                params["discriminator"], real, fake, verdicts
            )
            found |= {"generator": sum(losses.values()), "discriminator": discriminator}
            return total + discriminator, found | {"adaptive": weight}, after

        def pass_over():
            shapes = jax.eval_shape(judge)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return *nothing[:2], verdicts

        return jax.lax.cond(step >= adversary.start, judge, pass_over)

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
        before (NaN at the first); lpips [B, F] where there are weights; for codes perplexity, usage
        and dead [B], of the whole batch.
        """
        del rng
        video_BTHWC = normalize(batch["video"])
        z_BTNZ, _ = self.tokenizer.features(params, video_BTHWC)
        q_BTNZ, _, aux = self.tokenizer.quantizer(z_BTNZ, params["codebook"])
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
        whole = {name: aux[name] for name in ("perplexity", "usage", "dead", "kl") if name in aux}
        B = video_BTHWC.shape[0]
        return metrics | {name: jnp.full(B, value) for name, value in whole.items()}

    def sample(self, params, rng, cond, *, frozen, frames=None):
        """The clip `cond["video"]` uint8 [B, T, H, W, 3] rebuilt, float32 in [-1, 1]."""
        del rng, frozen, frames
        return self._rebuild(params, cond["video"])

    @functools.partial(jax.jit, static_argnums=0)
    def _rebuild(self, params, video_u8):
        z_BTNZ, _ = self.tokenizer.encode(params, normalize(video_u8))
        return jnp.clip(self._decode(params, z_BTNZ, self.size), -1, 1)


def _by_kind(parts):
    """{"video": clips, "image": pictures [B, H, W, C]}: all clips of one frame are pictures."""
    clips = [part for part in parts if part.shape[1] > 1]
    pictures = [part[:, 0] for part in parts if part.shape[1] == 1]
    kinds = {"video": clips, "image": pictures}
    return {kind: jnp.concatenate(those) for kind, those in kinds.items() if those}


def _a_frame(clips, rng):
    """The same random frame of both of two clips [B, T, H, W, C], one draw for each row."""
    B, T = clips[0].shape[:2]
    index = jax.random.randint(rng, (B, 1, 1, 1, 1), 0, T)
    return [jnp.take_along_axis(clip, index, axis=1)[:, 0] for clip in clips]


def _felt(loss, guesses, pull):
    """Norm of the gradient of a loss of the guesses in the weights that `pull` leads back to."""
    return optax.tree.norm(pull(jax.grad(loss)(jax.lax.stop_gradient(guesses))))


def _one_of(choices):
    return choices.__contains__, f"unknown; use one of {', '.join(choices)}"


_COUNT = (lambda number: number >= 1, "use 1 or more")
_LAYERS = (
    lambda letters: letters and set(letters) <= {"t", "w"},
    "use a letter for each layer, t for all cells or w for windows",
)
_WEIGHT = (lambda weight: 0 <= weight < math.inf, "use 0 or a positive number")

# section -> field -> (what must hold of its value, what is wrong and the remedy)
RULES = {
    "task": {
        "arch": _one_of(ARCHITECTURES),
        "error": _one_of(ERRORS),
        "inflation": _one_of(("none", *INFLATIONS)),
        "images": (lambda share: 0 <= share <= 1, "not a share of the frames; use 0 to 1"),
    },
    "task.network": {
        **dict.fromkeys(("width", "heads", "patch", "t_patch"), _COUNT),
        **dict.fromkeys(("temporal_depth", "depth", "tokens"), _COUNT),
        **dict.fromkeys(("encode_blocks", "decode_blocks"), _LAYERS),
        "mlp_ratio": (lambda ratio: 0 < ratio < math.inf, "use a positive number, as 8 / 3"),
        "dtype": _one_of(DTYPES),
        "stem": _one_of(STEMS),
        "patchify": _one_of(PATCHIFY),
        "position": _one_of(POSITIONS),
    },
    "task.quantizer": {"name": _one_of(QUANTIZERS)},
    "task.perceptual": {f"{name}_weight": _WEIGHT for name in PERCEPTUAL},
}


def _check(sections):
    """Raise UserError for values that `RULES` refuses, before anything is compiled."""
    for section, values in sections.items():
        for name, (holds, remedy) in RULES[section].items():
            if name in values and not holds(values[name]):
                raise UserError(f"{section}.{name}={values[name]!r}: {remedy}")


def _check_network(network):
    """The same for fields of the network that depend on others or have checks elsewhere."""
    masks.check_window(network["window"], "task.network.window")
    width, heads = network["width"], network["heads"]
    if width % heads or width // heads % 2:
        raise UserError(
            f"task.network.heads={heads}: does not divide width={width} into even heads; "
            f"use a divisor of {width // 2}"
        )
    if "mixer" in network:
        check_mixer("task.network.mixer", network["mixer"], heads)
    if network["mlp_ratio"] * width < 1:
        raise UserError(
            f"task.network.mlp_ratio={network['mlp_ratio']}: leaves width={width} no hidden unit; "
            "use 8 / 3"
        )
    if network.get("patchify") == "haar":
        for name in ("patch", "t_patch"):
            if network[name] & (network[name] - 1):
                raise UserError(
                    f"task.network.{name}={network[name]}: Haar bands need powers of two; use "
                    "these, or patchify=linear"
                )


def _check_sizes(sizes, size, arch, gan):
    """The same for the sizes that steps draw from."""
    if any(pixels > size for pixels in sizes):
        raise UserError(
            f"task.sizes={sizes}: clips are not enlarged; use at most data.size={size}, or raise it"
        )
    if sizes and arch == "ar_vae":
        raise UserError(
            f"task.sizes={sizes}: arch=ar_vae has latents for one size; leave sizes empty"
        )
    if sizes and gan and gan["kind"] == "stylegan":
        raise UserError(f"task.sizes={sizes}: gan=stylegan judges one size; use gan=patch")
