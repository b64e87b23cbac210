"""A directory of videos as a TensorFlow Datasets set that stores the files' own bytes.

    python -m jaxvid.data.tfds_builders.video_folder --src DIR --out DATA_DIR

Classes are the directories below DIR, a tenth of the scenes is the validation split, and files
that cannot be decoded are skipped, counted and named. Train on it with data.name=tfds and
data.path=DATA_DIR/video_folder/1.0.0. TensorFlow is never imported: `tfds.features.Video` would.
"""

import argparse
import os
import sys

import numpy as np
import tensorflow_datasets as tfds

from jaxvid.data import clips
from jaxvid.errors import UserError


class VideoFolder(tfds.core.GeneratorBasedBuilder):
    """Encoded bytes and what decoding has shown of them (see `video.Info`), as array_record."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so no checksums lie beside this file; tfds would look for them with
    # importlib_resources, which it does not install.
    code_path = None

    def __init__(self, src, **options):
        self._src = src
        names = clips.find(src, "--src")
        self._infos, self.skipped = clips.index(src, names)
        if not self._infos:
            raise UserError(f"--src={src}: {clips.report(self.skipped, len(names))}")
        self._classes = clips.classes_of(self._infos)
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
        splits = clips.split_of(self._infos)
        return {
            split: self._generate_examples([name for name in splits if splits[name] == split])
            for split in sorted(set(splits.values()))
        }

    def _generate_examples(self, names):
        for name in names:
            info = self._infos[name]
            with open(os.path.join(self._src, name), "rb") as file:
                example = {"video": file.read(), "name": name, "num_frames": info.frames}
            for field in ("height", "width", "fps", "start", "step"):
                example[field] = getattr(info, field)
            if self._classes:
                example["label"] = clips.class_of(name)
            yield name, example


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help="directory of videos")
    parser.add_argument("--out", required=True, help="tfds data directory")
    args = parser.parse_args(argv)
    try:
        builder = VideoFolder(args.src, data_dir=args.out)
        if os.path.exists(builder.data_dir):
            raise UserError(f"--out={args.out}: holds {builder.data_dir} already; remove it")
        builder.download_and_prepare()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for split, info in builder.info.splits.items():
        print(f"{split}: {info.num_examples} clips")
    if builder.skipped:
        print(clips.report(builder.skipped, len(builder.skipped) + len(builder._infos)))
    print(f"data.path={builder.data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
