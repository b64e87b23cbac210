"""Tokenizers: video compressed to a few latents or tokens that streams are rebuilt from."""

import functools

import jax
import jax.numpy as jnp

from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.layers.quantize import QUANTIZERS
from jaxvid.metrics import quality
from jaxvid.mixers import MIXERS
from jaxvid.models.ar_vae import ARVAE
from jaxvid.models.blocks import PATCHIFY, POSITIONS, STEMS
from jaxvid.models.cvivit import CViViT
from jaxvid.models.omnitokenizer import OmniTokenizer
from jaxvid.models.tokenizer import Tokenizer, moments, update_moments

ARCHITECTURES = {"cvivit": CViViT, "omnitokenizer": OmniTokenizer, "ar_vae": ARVAE}
ERRORS = {"l1": jnp.abs, "l2": jnp.square}


class Task:
    """Train a causal tokenizer to rebuild its video: error of the pixels and the quantizer's loss.

    size, frames: of the training clips, pixels and frames. arch: a name of ARCHITECTURES. network:
    its options. quantizer: name in `layers.quantize.QUANTIZERS` and its options. error: of pixels
    in [-1, 1], "l1" or "l2". images: share of a clip's frames that are also drawn at random and
    rebuilt as images, so that the weights of first frames, which are few, learn as the others do.
    """

    sharding_rules = (
        (r"/(q|k|v|up|gate|down)/kernel", ("fsdp", "tensor")),
        (r"/out/kernel", ("tensor", "fsdp")),
        (r"/(q|k|v)/bias", ("tensor",)),
    )

    def __init__(self, *, size, frames, arch, network, quantizer, error, images):
        _check(arch, network, quantizer, error, images)
        self.frames, self.size = frames, (size, size)
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
        self.tokenizer.grid(size)
        self.tokenizer.latents_for_frames(frames)

    def check(self, source):
        """Raise UserError where there is no video; else any will do."""
        if getattr(source, "tokenizer", None):
            raise UserError("data.name='latents': tokenizers learn from video; use another source")

    def init(self, rng, batch):
        """(params, extra): extra has the moments of latents and the moving part of a codebook."""
        del batch
        params, carried = self.tokenizer.init(rng, self.size)
        extra = {"latents": moments(self.tokenizer.channels)}
        return params, {**extra, "codebook": carried} if carried else extra

    def frozen(self):
        """{}: everything is trained."""
        return {}

    def loss(self, params, batch, rng, *, step, frozen, extra):
        """Error of the clips and of the images among them, a frame counting as a frame."""
        del step, frozen
        rng_images, rng_latent, rng_codebook = jax.random.split(rng, 3)
        params = {**params, **extra}
        video_BTHWC = normalize(batch["video"])
        parts = [video_BTHWC]
        if self.num_images:
            parts.append(self._images(video_BTHWC, rng_images))

        # One quantizer sees all tokens: rows of clips, each with those of its images behind.
        B = video_BTHWC.shape[0]
        features = [self.tokenizer.features(params, part)[0] for part in parts]
        rows = [z_BTNZ.reshape(B, -1, z_BTNZ.shape[-1]) for z_BTNZ in features]
        z_BLZ = jnp.concatenate(rows, axis=1)
        quantizer = self.tokenizer.quantizer
        q_BLZ, ids_BL, aux = quantizer(z_BLZ, params["codebook"], rng=rng_latent)
        extra = {**extra, "latents": self._measure(params, features[0])}
        if "codebook" in extra:
            extra["codebook"] = quantizer.update(params["codebook"], z_BLZ, ids_BL, rng_codebook)

        total = frames = 0
        clips_BLZ = jnp.split(q_BLZ, [rows[0].shape[1]], axis=1)
        for part, z_BTNZ, q in zip(parts, features, clips_BLZ):
            guess = self._decode(params, q.reshape(*z_BTNZ.shape[:3], -1))
            total += self.error(guess - part).mean((-3, -2, -1)).sum()
            frames += part.shape[0] * part.shape[1]
        error = total / frames
        metrics = {"error": error, "quantizer_loss": aux.pop("loss"), **aux}
        return error + metrics["quantizer_loss"], (metrics, extra)

    def _measure(self, params, features_BTNZ):
        """The moments of the latents of clips, as `encode` gives them."""
        z_BTNZ = self.tokenizer.quantizer(features_BTNZ, params["codebook"])[0]
        return update_moments(params["latents"], jax.lax.stop_gradient(z_BTNZ))

    def _images(self, video_BTHWC, rng):
        """Random frames of every clip as clips of one frame, [B images, 1, H, W, C]."""
        B, T, *frame = video_BTHWC.shape
        order_BT = jax.random.uniform(rng, (B, T)).argsort(axis=1)
        index = order_BT[:, : self.num_images, None, None, None]
        return jnp.take_along_axis(video_BTHWC, index, axis=1).reshape(-1, 1, *frame)

    def _decode(self, params, z_BTNZ):
        return self.tokenizer.decode(params, z_BTNZ, self.tokenizer.grid(self.size))[0]

    def evaluate(self, params, batch, rng, *, frozen):
        """Quality of the rebuilt clips.

        psnr, ssim [B, F], and motion_error [B, F], the mean error of the change from the frame
        before (NaN at the first); for codes perplexity, usage and dead [B], of the whole batch.
        """
        del rng, frozen
        video_BTHWC = normalize(batch["video"])
        z_BTNZ, _ = self.tokenizer.features(params, video_BTHWC)
        q_BTNZ, _, aux = self.tokenizer.quantizer(z_BTNZ, params["codebook"])
        guess_BTHWC = jnp.clip(self._decode(params, q_BTNZ), -1, 1)
        change = jnp.diff(guess_BTHWC - video_BTHWC, axis=1)
        motion_BT = jnp.abs(change).mean((-3, -2, -1))
        metrics = {
            "psnr": quality.psnr(guess_BTHWC, video_BTHWC),
            "ssim": quality.ssim(guess_BTHWC, video_BTHWC),
            "motion_error": jnp.pad(motion_BT, ((0, 0), (1, 0)), constant_values=jnp.nan),
        }
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
        return jnp.clip(self._decode(params, z_BTNZ), -1, 1)


def _check(arch, network, quantizer, error, images):
    """Raise UserError for settings that cannot work, before anything is compiled."""

    def choose(field, value, choices):
        if value not in choices:
            raise UserError(f"task.{field}={value!r}: unknown; use one of {', '.join(choices)}")

    choose("arch", arch, ARCHITECTURES)
    choose("quantizer.name", quantizer["name"], QUANTIZERS)
    choose("error", error, ERRORS)
    for name, choices in (("stem", STEMS), ("patchify", PATCHIFY), ("position", POSITIONS)):
        if name in network:
            choose(f"network.{name}", network[name], choices)
    if "mixer" in network:
        choose("network.mixer.name", network["mixer"]["name"], MIXERS)
    width, heads = network["width"], network["heads"]
    if width % heads or width // heads % 2:
        raise UserError(
            f"task.network.heads={heads}: does not divide width={width} into even heads; "
            f"use a divisor of {width // 2}"
        )
    if not 0 <= images <= 1:
        raise UserError(f"task.images={images}: not a share of the frames; use 0 to 1")
