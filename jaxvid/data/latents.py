"""A data set of `jaxvid.tokenize`: clips encoded by a trained tokenizer.

A record is one clip: its latents (float32 [T, N, Z]) or tokens (uint16 or int32 [T, N]), then those
of the mirrored clip if the set has them, and, for validation, the frames as raw lossless H.264. The
header holds name, label and caption; see `jaxvid.data.shards`.
"""

import math

import numpy as np

from jaxvid import checks
from jaxvid.data import shards, source, video
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError
from jaxvid.schema import Whole


class Source(source.Source):
    """The first frames of each encoded clip.

    A window starts at the start of its clip: a causal tokenizer encodes the first frame of a stream
    as an image and the others given their past, so latents from the middle would differ from those
    of the same frames as a clip. Crop, stride and rate are fixed by the encoding, as is whether
    there are mirrored clips for `flip`.
    """

    def __init__(self, config, split):
        self._window = Window.of(config)
        manifest = shards.read_manifest(config.path, "latents")
        _check(config, manifest)
        self._flip, self._size, self._frames = config.flip, config.size, config.frames
        self._mirrored, self._dtype = manifest["mirrored"], np.dtype(manifest["dtype"])
        self._shape = (1 + self._mirrored, *manifest["shape"])
        self._latents = 1 + (config.frames - 1) // manifest["frames_per_latent"]
        self._field = "tokens" if self._dtype.kind in "iu" else "latents"
        self._has_frames = split == "validation"
        labels = Whole(0, max(manifest["num_classes"] - 1, 0))
        self._header = {"name": str, "label": labels, "caption": str}
        self.fps = float(manifest["fps"])
        self._records = shards.open_split(config.path, manifest, split)
        self.digest = source.digest_of(manifest)
        self.num_classes, self.captions = manifest["num_classes"], manifest["captions"]
        self.tokenizer = manifest["tokenizer"]

    def __len__(self):
        return len(self._records)

    def name(self, index):
        return shards.fetch(self._records, index, self._header)[0]["name"]

    def read(self, index, rng=None):
        """The start of clip `index`; with `flip` and an rng, half of the clips are mirrored."""
        is_mirrored = self._flip and rng is not None and rng.random() < 0.5
        header, content = shards.fetch(self._records, index, self._header)
        example = {"label": header["label"], "caption": header["caption"]}
        try:
            stored = np.frombuffer(content, self._dtype, math.prod(self._shape))
            frames = content[stored.nbytes :]
            if not np.isfinite(stored).all():
                raise ValueError("holds latents that are not finite")
            if bool(frames) != self._has_frames:
                raise ValueError(f"holds {len(content)} bytes, not those of its kind")
            if frames:
                example["video"] = video.decode_chunk(frames, range(self._frames), self._size)
        except ValueError as error:
            raise UserError(f"clip={header['name']}: {error}; {shards.COPY}") from error
        clip = stored.reshape(self._shape)[int(is_mirrored), : self._latents]
        example[self._field] = clip.astype(np.int32 if self._field == "tokens" else np.float32)
        return example


def _check(config, manifest):
    """Raise UserError if a window needs other frames or pixels than the encoded ones."""
    latents = 1 + (manifest["frames"] - 1) // manifest["frames_per_latent"]
    channels = 1 if manifest["dtype"] == "float32" else 0
    fits = manifest["shape"][:1] == [latents] and len(manifest["shape"]) == 2 + channels
    remedy = f"dataset.json states latents of the shape {manifest['shape']}; {shards.COPY}"
    checks.require(fits, "path", config.path, remedy)
    frames, most, group = config.frames, manifest["frames"], manifest["frames_per_latent"]
    fitting = min(frames, most) - (min(frames, most) - 1) % group
    stored = f"the set stores {most} frames, the first alone and then {group} in a latent"
    checks.require(frames == fitting, "frames", frames, f"{stored}; use {fitting}")
    size = manifest["size"]
    checks.require(
        config.size == size, "size", config.size, f"the set was encoded at {size}; use it"
    )
    remedy = "encoded clips have a fixed rate; use 1, and encode at a lower --fps"
    checks.require(config.stride == 1, "stride", config.stride, remedy)
    remedy = "encoded clips are central crops; use center"
    checks.require(config.crop == "center", "crop", config.crop, remedy)
    remedy = "the set has no mirrored clips; encode with --flip, or use False"
    checks.require(manifest["mirrored"] or not config.flip, "flip", config.flip, remedy)
