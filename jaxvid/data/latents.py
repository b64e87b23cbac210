"""Clips as a frozen tokenizer has encoded them: what `jaxvid.data.tokenize` writes.

A record is as in `array_record`, with one clip in the place of a group of pictures: its latents
(float32 [T, N, Z]) or tokens (uint16 or int32 [T, N]), those of its mirror image behind if the set
has them, and, for validation, the frames as raw H.264 without loss.
"""

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxvid.data import array_record, video
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError


class Source:
    """The first frames of every cached clip; see `jaxvid.data.make_source`.

    A causal tokenizer makes an image of the first frame of a stream, and tubelets that know the
    past of all others, so a window begins where its clip does: encoding it anew would give the
    same. Crop, stride and rate were decided when the clips were encoded, and so was whether there
    are mirror images for `flip`. `tokenizer` is the digest of the tokenizer.
    """

    def __init__(self, config, split):
        self._window = Window.of(config)
        manifest = array_record.read_manifest(config.path, "latents")
        _check(config, manifest)
        self._flip, self._size = config.flip, config.size
        self._mirrored, self._dtype = manifest["mirrored"], np.dtype(manifest["dtype"])
        self._shape = (1 + self._mirrored, *manifest["shape"])
        self._frames = config.frames
        self._latents = 1 + (config.frames - 1) // manifest["frames_per_latent"]
        self._field = "tokens" if self._dtype.kind in "iu" else "latents"
        paths = array_record.shard_paths(config.path, manifest["splits"][split]["shards"])
        self._records = ArrayRecordDataSource(paths) if paths else []
        self.num_classes, self.captions = manifest["num_classes"], manifest["captions"]
        self.tokenizer = manifest["tokenizer"]

    def __len__(self):
        return len(self._records)

    def name(self, index):
        header, _ = array_record.unpack(self._records[index])
        return header["name"]

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, rng=None):
        """The beginning of clip `index`, mirrored in half of the cases if `rng` may choose."""
        is_mirrored = self._flip and rng is not None and rng.random() < 0.5
        header = {"name": f"record {index}"}
        try:
            header, content = array_record.unpack(self._records[index])
            stored = np.frombuffer(content, self._dtype, int(np.prod(self._shape)))
            frames = content[stored.nbytes :]
            example = {"label": header["label"], "caption": header["caption"]}
            if frames:
                example["video"] = video.decode_chunk(frames, range(self._frames), self._size)
        except ValueError as error:
            raise UserError(
                f"clip={header['name']}: {error}; copy the set or encode it again"
            ) from error
        clip = stored.reshape(self._shape)[int(is_mirrored), : self._latents]
        example[self._field] = clip.astype(np.int32 if self._field == "tokens" else np.float32)
        return example


def _check(config, manifest):
    """Raise UserError where a window asks for what encoding has decided otherwise."""
    group = manifest["frames_per_latent"]
    if config.frames > manifest["frames"] or (config.frames - 1) % group:
        most = manifest["frames"]
        fitting = min(config.frames, most) - (min(config.frames, most) - 1) % group
        raise UserError(
            f"data.frames={config.frames}: the set stores {most} frames, the first alone and then "
            f"{group} in a latent; use {fitting}"
        )
    if config.size != manifest["size"]:
        raise UserError(
            f"data.size={config.size}: the set was encoded at {manifest['size']} pixels; use these"
        )
    if config.stride != 1:
        raise UserError(
            f"data.stride={config.stride}: the frames of cached clips are what they are; use 1, "
            "and encode at a lower --fps"
        )
    if config.crop != "center":
        raise UserError(f"data.crop={config.crop!r}: cached clips show the centre; use center")
    if config.flip and not manifest["mirrored"]:
        raise UserError(
            "data.flip=True: the set has no mirror images; encode with --flip, or use False"
        )
