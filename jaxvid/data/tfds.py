"""A set of TensorFlow Datasets that contains video, read through `as_data_source`.

`path` is the directory of a built version (with its dataset_info.json) or the name of a set in the
data directory of tfds. The video is encoded bytes, decoded here, or frames [T, H, W, 1 or 3].
"""

import io
import os

import numpy as np

from jaxvid.data import source, video
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError


class Source(source.Source):
    """Windows of the examples of a tfds split.

    The validation split is "validation", or else "test", or else the last tenth of "train".
    """

    def __init__(self, config, split):
        self._window, self._path = Window.of(config), config.path
        builder = _builder(config.path)
        features = dict(builder.info.features.items())
        self._video = _video_feature(config.path, features)
        try:
            self._examples = builder.as_data_source(_split(builder.info.splits, split))
        except (ValueError, NotImplementedError, ImportError) as error:
            raise UserError(
                f"path={config.path!r}: cannot be read without TensorFlow "
                f"({_first_line(error)}); build it with file_format='array_record'"
            ) from error
        sizes = {name: (s.num_examples, s.num_bytes) for name, s in builder.info.splits.items()}
        self.digest = source.digest_of([builder.info.full_name, sizes])
        self._classes = list(getattr(features.get("label"), "names", None) or [])
        self.num_classes = len(self._classes)
        self.captions = bool(self._classes) or "caption" in features

    def __len__(self):
        return len(self._examples)

    def name(self, index):
        return self._name(index, self._examples[index])

    def _name(self, index, example):
        return _text(example.get("name", f"example {index}"))

    def read(self, index, rng=None):
        """A window of example `index`: its start drawn with `rng`, or the middle without."""
        example = self._examples[index]
        try:
            video_THWC = self._frames(example, rng)
        except video.VideoError as error:
            name = self._name(index, example)
            raise UserError(f"clip={name}: {error}; rebuild {self._path} without it") from error
        return {
            "video": self._window.augment(video_THWC, rng),
            "label": int(example["label"]) if self._classes else 0,
            "caption": self._caption(example),
        }

    def caption(self, index):
        return self._caption(self._examples[index])

    def _caption(self, example):
        of_class = self._classes[int(example["label"])] if self._classes else ""
        return _text(example.get("caption", of_class))

    def _frames(self, example, rng):
        """The frames of the window, scaled so that the shorter side has its size."""
        stored = example[self._video]
        if isinstance(stored, bytes):
            file = io.BytesIO(stored)
            info = _info(example) or video.probe(file)
            return video.read(file, self._numbers(info.frames, rng), self._window.size, info)
        numbers = self._numbers(len(stored), rng)
        frames_THWC = np.broadcast_to(stored[numbers], (*stored[numbers].shape[:3], 3))
        return video.resize(np.ascontiguousarray(frames_THWC, np.uint8), self._window.size)

    def _numbers(self, frames, rng):
        if frames < self._window.span:
            raise video.VideoError(f"has {frames} frames, a window spans {self._window.span}")
        start = self._window.start(frames, rng)
        return range(start, start + self._window.span, self._window.stride)


def _builder(path):
    import tensorflow_datasets as tfds  # slow to import; only this source needs it

    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        return tfds.builder_from_directory(path)
    if not path or os.path.exists(path):
        raise UserError(
            f"path={path!r}: holds no dataset_info.json; name the directory of a version, "
            "such as DIR/video_folder/1.0.0, or a set of tfds"
        )
    try:
        return tfds.builder(path)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        raise UserError(
            f"path={path!r}: no such directory, and no such tfds set ({_first_line(error)})"
        ) from error


def _split(splits, split):
    """The tfds split, or part of one, to use as "train" or "validation"."""
    for name in ("validation", "test"):
        if name in splits:
            return name if split == "validation" else "train"
    return "train[90%:]" if split == "validation" else "train[:90%]"


def _video_feature(path, features):
    """The name of the feature with the frames."""
    if "video" in features:
        return "video"
    shapes = {name: feature.shape for name, feature in features.items()}
    candidates = [name for name, s in shapes.items() if isinstance(s, tuple) and len(s) == 4]
    if not candidates:
        raise UserError(
            f"path={path!r}: no video among its features {sorted(features)}; name another set"
        )
    return candidates[0]


def _info(example):
    """The Info that our builder stores with a file; None for sets of other builders."""
    if "step" not in example:
        return None
    return video.Info(
        int(example["num_frames"]),
        int(example["height"]),
        int(example["width"]),
        float(example["fps"]),
        int(example["start"]),
        float(example["step"]),
    )


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def _first_line(error):
    return str(error).strip().split("\n")[0]
