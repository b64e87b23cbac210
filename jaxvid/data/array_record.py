"""A data set of `jaxvid.prepare`: a record is one group of pictures, as `video.encode_chunk` makes.

The header of a record holds name, chunk (its number in the clip) and label; see
`jaxvid.data.shards`.
"""

from jaxvid.data import shards, source, video
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError
from jaxvid.schema import Whole


class Source(source.Source):
    """Windows of the chunks of a prepared set."""

    def __init__(self, config, split):
        self._window = Window.of(config)
        manifest = shards.read_manifest(config.path, "h264")
        if self._window.span > manifest["frames"]:
            raise UserError(
                f"frames={config.frames}: with stride={config.stride} a window spans "
                f"{self._window.span} frames, the set stores {manifest['frames']}; lower them or "
                f"prepare with --frames {self._window.span}"
            )
        if config.size > manifest["size"]:
            raise UserError(
                f"size={config.size}: the set stores {manifest['size']} pixels; lower it or "
                f"prepare with --size {config.size}"
            )
        self._frames, self._classes = manifest["frames"], manifest["classes"]
        labels = Whole(0, max(len(self._classes) - 1, 0))
        self._header = {"name": str, "chunk": Whole(), "label": labels}
        self.fps = float(manifest["fps"])
        self._records = shards.open_split(config.path, manifest, split)
        self.digest = source.digest_of(manifest)
        self.num_classes = len(self._classes)
        self.captions = bool(self._classes)

    def __len__(self):
        return len(self._records)

    def name(self, index):
        header, _ = shards.fetch(self._records, index, self._header)
        return f"{header['name']}#{header['chunk']}"

    def read(self, index, rng=None):
        """A window of chunk `index`: its start drawn with `rng`, or the middle without."""
        start = self._window.start(self._frames, rng)
        numbers = range(start, start + self._window.span, self._window.stride)
        header, chunk = shards.fetch(self._records, index, self._header)
        try:
            video_THWC = video.decode_chunk(chunk, numbers, self._window.size)
        except video.VideoError as error:
            raise UserError(f"clip={header['name']}: {error}; {shards.COPY}") from error
        return {
            "video": self._window.augment(video_THWC, rng),
            "label": header["label"],
            "caption": self._classes[header["label"]] if self._classes else "",
        }
