"""A builder of TensorFlow Datasets for a directory of videos; see `jaxvid.tools.build_tfds`.

It never imports TensorFlow; `tfds.features.Video` would.
"""

import os

import numpy as np
import tensorflow_datasets as tfds

from jaxvid.data import clips
from jaxvid.errors import UserError


class VideoFolder(tfds.core.GeneratorBasedBuilder):
    """The bytes of each video file and its `video.Info`, in ArrayRecord files.

    skipped: (name, reason) of the files that cannot be decoded. infos: {name: Info} of the others.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums beside this file. tfds would search for them
    # with importlib_resources, which it does not install.
    code_path = None

    def __init__(self, src, **options):
        self._src = src
        names = clips.find(src, "src")
        self.infos, self.skipped = clips.index(src, names)
        if not self.infos:
            report = clips.report(self.skipped, len(names))
            raise UserError(f"src={src}: {report}; give readable videos")
        self._classes = clips.classes_of(self.infos)
        super().__init__(file_format="array_record", **options)

    def _info(self):
        features = {
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
            "name": tfds.features.Text(),
            "num_frames": np.int64,
            "height": np.int64,
            "width": np.int64,
            "fps": np.float64,
            "start": np.int64,
            "step": np.float64,
        }
        if self._classes:
            features["label"] = tfds.features.ClassLabel(names=self._classes)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        splits = clips.split_of(self.infos)
        return {
            split: self._generate_examples([name for name in splits if splits[name] == split])
            for split in sorted(set(splits.values()))
        }

    def _generate_examples(self, names):
        for name in names:
            info = self.infos[name]
            with open(os.path.join(self._src, name), "rb") as file:
                example = {"video": file.read(), "name": name, "num_frames": info.frames}
            for field in ("height", "width", "fps", "start", "step"):
                example[field] = getattr(info, field)
            if self._classes:
                example["label"] = clips.class_of(name)
            yield name, example
