"""Build a TensorFlow Datasets set from a directory of videos.

    python -m jaxvid.tools.build_tfds --src=DIR --out=DATA_DIR
    python -m jaxvid.train --config=configs/ar_diffusion.py:data=tfds \\
        --config.data.path=DATA_DIR/video_folder/1.0.0

The directories directly below --src are the classes, a tenth of the scenes is the validation split,
and files that cannot be decoded are skipped, counted and named. The set stores the bytes of the
files. TensorFlow is not needed.
"""

import os

from absl import flags

from jaxvid import cli
from jaxvid.data import clips
from jaxvid.data.tfds_builders.video_folder import VideoFolder
from jaxvid.errors import UserError

FLAGS = flags.FLAGS


def main():
    """Entry point."""
    builder = build(FLAGS.src, FLAGS.out)
    for split, info in builder.info.splits.items():
        print(f"{split}: {info.num_examples} clips")
    if builder.skipped:
        print(clips.report(builder.skipped, len(builder.skipped) + len(builder.infos)))
    print(f"data.path={builder.data_dir}")


def build(src: str, out: str) -> VideoFolder:
    """Build the set of the videos below `src` in the tfds data directory `out`."""
    builder = VideoFolder(src, data_dir=out)
    if os.path.exists(builder.data_dir):
        raise UserError(f"out={out}: holds {builder.data_dir} already; remove it")
    builder.download_and_prepare()
    return builder


if __name__ == "__main__":
    cli.define_path("src", "Directory of videos.", required=True)
    flags.DEFINE_string("out", None, "Data directory of tfds.", required=True)
    cli.run(main)
