"""TensorFlow Datasets without TensorFlow: our builder of encoded bytes, and sets of frames."""

import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.data.tfds_builders import video_folder
from jaxvid.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tfds_config(path, **changes):
    fields = dict(
        name="tfds", path=str(path), frames=4, size=48, stride=1, batch_size=2, flip=False
    )
    fields |= dict(crop="center", difficulty=0.0, num_clips=0, workers=0, threads=0)
    return ConfigDict(fields | dict(text_tokens=0, text_width=8) | changes)


@pytest.fixture
def built(tmp_path, clip):
    for name in ("cats/1.mp4", "cats/2.avi", "dogs/1.webm", "dogs/bad.mp4"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        clip(path, 14, height=48, width=48)
    (tmp_path / "src/dogs/bad.mp4").write_bytes(b"no video")
    assert video_folder.main(["--src", str(tmp_path / "src"), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out/video_folder/1.0.0"


def test_the_builder_stores_bytes_and_the_source_reads_them(built, numbers, tmp_path):
    sources = [data.make_source(tfds_config(built), split) for split in ("train", "validation")]
    assert [len(source) for source in sources] == [2, 1]
    for source in sources:
        assert (source.num_classes, source.captions) == (2, True)
        for i in range(len(source)):
            example = source[i]
            assert numbers(example["video"], period=12) == [5, 6, 7, 8]
            assert source.name(i).startswith(example["caption"])
            assert example["label"] == ["cats", "dogs"].index(example["caption"])
            stored = source._examples[i]["video"]
            assert stored == (tmp_path / "src" / source.name(i)).read_bytes()
    shown = [sources[0].read(0, np.random.default_rng(seed))["video"] for seed in range(20)]
    assert len({numbers(window, period=12)[0] for window in shown}) > 5


def test_the_builder_names_bad_files_and_never_overwrites(built, tmp_path, capsys):
    capsys.readouterr()
    arguments = ["--src", str(tmp_path / "src"), "--out", str(tmp_path / "again")]
    assert video_folder.main(arguments) == 0
    assert "skipped 1 of 4 files: dogs/bad.mp4 cannot be decoded" in capsys.readouterr().out
    assert video_folder.main(arguments) == 2
    assert "already; remove it" in capsys.readouterr().err


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
    for path, words in [(tmp_path, "holds no dataset_info"), ("no_such_set", "nor a tfds set")]:
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
