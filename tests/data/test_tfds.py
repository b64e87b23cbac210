"""TensorFlow Datasets without TensorFlow: our builder of encoded bytes, and sets of frames."""

import functools
import subprocess
import sys

import numpy as np
import pytest

from jaxvid import data
from jaxvid.errors import UserError
from jaxvid.tools.build_tfds import build
from tests.videos import data_config, frame_numbers, write_clip

tfds_config = functools.partial(data_config, "tfds")
numbers = functools.partial(frame_numbers, period=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos in src and, in out, the set that the command builds of them."""
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("cats/1.mp4", "cats/2.avi", "dogs/1.webm"):
        write_clip(folder / "src" / name, 14, height=48, width=48)
    (folder / "src/dogs/bad.mp4").write_bytes(b"no video")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def built(folder):
    return build(folder / "src", folder / "out").data_dir


def test_the_builder_stores_bytes_and_the_source_reads_them(built, folder):
    sources = [data.make_source(tfds_config(built), split) for split in ("train", "validation")]
    assert [len(source) for source in sources] == [2, 1]
    for source in sources:
        assert (source.num_classes, source.captions) == (2, True)
        for i in range(len(source)):
            example = source[i]
            assert numbers(example["video"]) == [5, 6, 7, 8]
            assert source.name(i).startswith(example["caption"])
            assert example["label"] == ["cats", "dogs"].index(example["caption"])
            stored = source._examples[i]["video"]
            assert stored == (folder / "src" / source.name(i)).read_bytes()
    shown = [sources[0].read(0, np.random.default_rng(seed))["video"] for seed in range(20)]
    assert len({numbers(window)[0] for window in shown}) > 5


@pytest.mark.slow
def test_the_command(folder):
    command = [sys.executable, "-m", "jaxvid.tools.build_tfds", "--src", str(folder / "src")]
    command += ["--out", str(folder / "again")]
    run = functools.partial(subprocess.run, command, capture_output=True, text=True, timeout=100)
    lines = run().stdout.splitlines()[-4:]  # after those of tfds
    assert lines[:2] == ["train: 2 clips", "validation: 1 clips"]
    assert lines[2].startswith("skipped 1 of 4 files: dogs/bad.mp4 cannot be decoded")
    assert lines[3] == f"data.path={folder / 'again/video_folder/1.0.0'}"
    again = run()  # never overwrites
    assert again.returncode == 2 and again.stderr.splitlines()[-1].endswith("already; remove it")
    assert f"error: --out={folder / 'again'}: holds" in again.stderr


@pytest.fixture
def frames_set(tmp_path):
    """A set by others: grey frames under another name, no labels, a single split."""
    import tensorflow_datasets as tfds

    class GreyFrames(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            frames = tfds.features.Tensor(shape=(None, 32, 32, 1), dtype=np.uint8)
            features = tfds.features.FeaturesDict({"image_sequence": frames})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                grey = np.full((1, 32, 32, 1), 10 * i, np.uint8)
                yield (
                    i,
                    {"image_sequence": grey + np.arange(6, dtype=np.uint8)[:, None, None, None]},
                )

    builder = GreyFrames(data_dir=tmp_path / "out", file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_frames_of_a_set_by_others(frames_set):
    config = tfds_config(frames_set, size=16)
    train, validation = (data.make_source(config, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (9, 1)
    assert (train.num_classes, train.captions) == (0, False)
    assert train.digest == validation.digest != ""
    levels = set()
    for source in (train, validation):
        for i in range(len(source)):
            grey = source[i]["video"].astype(int)
            assert grey.shape == (4, 16, 16, 3)
            assert np.ptp(grey, axis=(1, 2, 3)).max() <= 1
            np.testing.assert_allclose(grey[:, 0, 0, 0] % 10, [1, 2, 3, 4], atol=1)
            levels.add(round(grey.mean() / 10 - 0.25))
    assert levels == set(range(10))
    iterator = data.make_iterator(
        config, split="train", seed=0, batch_size=3, process_index=0, process_count=1
    )
    assert next(iterator)["video"].shape == (3, 4, 16, 16, 3)
    with pytest.raises(UserError, match="has 6 frames, a window spans 8"):
        data.make_source(tfds_config(frames_set, frames=8), "train").read(0)


def test_wrong_paths_are_one_line(tmp_path):
    for path, words in [
        (tmp_path, "holds no dataset_info"),
        ("no_such_set", "and no such tfds set"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            data.make_source(tfds_config(path), "train")
        assert "\n" not in str(caught.value)


def test_tensorflow_is_not_imported(built):
    program = (
        "import sys; from jaxvid.data import tfds; from ml_collections import ConfigDict\n"
        f"config = ConfigDict({tfds_config(built).to_dict()!r})\n"
        "assert tfds.Source(config, 'train')[0]['video'].shape == (4, 48, 48, 3)\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
