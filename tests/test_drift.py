"""Drift of long streams: what goes wrong late in them shows in its own column."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.common import get_config
from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.bench.runs import random_batch
from jaxvid.data.transforms import normalize, to_uint8
from jaxvid.errors import UserError
from jaxvid.evaluators import drift
from jaxvid.parallel.mesh import make_mesh
from jaxvid.runs import make_task
from jaxvid.tasks import base
from jaxvid.training.state import EVALUATE, step_rng

FILE = str(Path(__file__).parents[1] / "configs" / "ar_diffusion.py")
CLIPS, GIVEN, BREAK = 4, 4, 40
NAMES = ("frozen", "faded", "replaced")


class Streams(base.Generator):
    """A task that is not trained and only streams."""

    def init(self, rng, batch):
        return {}, {}

    def loss(self, params, batch, rng, *, step, frozen, extra):
        return 0.0, ({}, extra, 1)

    def evaluate(self, params, batch, rng, *, frozen):
        return {}

    def sample(self, params, rng, cond, *, frozen, frames=None):
        raise NotImplementedError


class Task(Streams):
    """Continues held-out clips as they are up to frame BREAK, and by `later` from there on."""

    given = GIVEN

    def __init__(self, later=None, source=None):
        self.later, self.source = later, source

    def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
        clips = np.stack([self.source.read(index)["video"] for index in range(cond["num"])])
        np.testing.assert_array_equal(cond["first_frames"], clips[:, :GIVEN])
        video = clips[:, :frames].astype(float)
        if self.later:
            video[:, BREAK:] = self.later(video)[:, BREAK:]
        lengths = itertools.chain([GIVEN], itertools.cycle([1, 7, 30]))
        stops = itertools.takewhile(lambda stop: stop < frames, itertools.accumulate(lengths))
        return Pieces(np.split(video.round().astype(np.uint8), list(stops), axis=1))

    def decode(self, frozen, z, state=None):
        return normalize(z), state


class Pieces:
    """An iterator with the attributes of a stream."""

    carry, is_whole = (), True

    def __init__(self, pieces):
        self.pieces = iter(pieces)

    def __next__(self):
        return next(self.pieces)


def frozen(video_BTHWC):
    return np.repeat(video_BTHWC[:, BREAK - 1 : BREAK], video_BTHWC.shape[1], axis=1)


def faded(video_BTHWC):
    grey = video_BTHWC.mean((1, 2, 3, 4), keepdims=True)
    return grey + 0.3 * (video_BTHWC - grey)


def replaced(video_BTHWC):
    """The sprites of the next clip, steady too."""
    return np.roll(video_BTHWC, 1, axis=0)


@pytest.fixture(scope="module")
def run():
    """A run on single sprites, which the oracle reads without error, whose task is to be set."""
    config = get_config().copy_and_resolve_references()
    config.data.update(size=32, max_sprites=1, frames=16)
    config.task = dict(name="stand_in")
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    return base.Run(config, Task(), {}, {}, 7, mesh)


def source_of(run, frames):
    fields = ConfigDict(run.config.data.to_dict())
    fields.frames = frames
    return data.make_source(fields, "validation")


@pytest.fixture(scope="module")
def found(run):
    """{name: the figures of a stream that is so after frame BREAK}, and "real" for the data."""
    source = source_of(run, 128)
    streams = {"real": None} | {later.__name__: later for later in (frozen, faded, replaced)}
    return {
        name: drift.measure(run._replace(task=Task(later, source)), [16, 40, 96], CLIPS)
        for name, later in streams.items()
    }


def test_the_real_clips_are_their_own_ceiling(found, run):
    """All figures against numpy on the clips themselves."""
    assert {name: x["real_frames"] for name, x in found.items()} == dict.fromkeys(found, 96)
    clips = np.stack([source_of(run, 96).read(index)["video"] for index in range(CLIPS)]) / 255
    for frames, row in found["real"]["by_length"].items():
        window = clips[:, max(int(frames) - 16, GIVEN) : int(frames)]
        wanted = {
            "psnr": 100,
            "steady": 1,
            "same": 1,
            "mean": window.mean(),
            "std": np.mean([frame.std() for clip in window for frame in clip]),
            "motion": np.abs(window[:, 1:] - window[:, :-1]).mean(),
        }
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-4), (frames, name)
            assert row.get(f"{name}_real", row[name]) == row[name]
        last = clips[:, GIVEN - 1 : GIVEN]
        mse = np.square(last - window).mean((2, 3, 4))
        assert row["psnr_guess"] >= -10 * np.log10(mse).mean() - 1e-3  # of repeating that frame
        assert row["psnr_guess"] < 40 and row["guess"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_shows_before_it_happens(found, name):
    for frames in ("16", "40"):
        assert found[name]["by_length"][frames] == found["real"]["by_length"][frames]


def test_what_goes_wrong_shows_in_its_column(found):
    real, still, pale, other = (found[n]["by_length"]["96"] for n in ("real", *NAMES))
    assert still["motion"] == 0 < real["motion"] == still["motion_real"]
    assert still["steady"] == still["same"] == 1  # the oracle alone would not see it
    assert pale["std"] == pytest.approx(0.3 * real["std"], rel=0.02)
    assert pale["steady"] == 0 and pale["mean"] == pytest.approx(real["mean"], abs=2e-3)
    assert (other["steady"], other["same"], other["same_real"]) == (1, 0, 1)
    for name in ("mean", "std", "motion"):
        assert other[name] == pytest.approx(real[name], rel=1e-5)
    assert max(x["psnr"] for x in (still, pale, other)) < 30 < real["psnr"]


def test_beyond_the_end_of_the_real_clips_nothing_is_compared(found, run, monkeypatch):
    """Clips of 64 frames, a stream of 96."""
    make_source = data.make_source

    def short(fields, split):
        if fields.frames > 64:
            raise UserError("frames: no clip is so long")
        return make_source(fields, split)

    task = Task(faded, source_of(run, 96))
    monkeypatch.setattr(data, "make_source", short)
    figures = drift.measure(run._replace(task=task), [16, 64, 96], CLIPS)
    assert figures["real_frames"] == 64
    row = figures["by_length"]["96"]
    assert row["psnr"] is row["psnr_guess"] is row["guess"] is None
    whole = found["faded"]["by_length"]["96"]
    assert [row[n] for n in ("mean", "std", "motion")] == [
        whole[n] for n in ("mean", "std", "motion")
    ]
    assert row["std_real"] == figures["by_length"]["64"]["std_real"]
    head, *rows = drift.table(figures).splitlines()[1:5]
    assert head.split()[:4] == ["frames", "psnr", "psnr_guess", "guess"]
    assert head.split()[4:8] == ["steady", "steady_real", "same", "same_real"]
    assert [len(line.split()) for line in rows] == [len(head.split())] * 2 + [len(head.split()) - 3]
    note = "at greater lengths than their 64 frames, of the last of these"
    assert note in drift.table(figures) and "greater" not in drift.table(found["real"])
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize(
    "lengths, words",
    [
        (["5"], "--frames=5: 4 frames are given .*use 6 or more$"),
        (["-5"], "--frames=-5: write numbers of frames"),
        (["64", "9"], r"--frames=9: cannot be streamed: frames=9: use even ones$"),
        (["66"], r"--frames=66: cannot be streamed: task\.sampler\.s=1: too small$"),
        (["999998"], "the pixels of a real clip, in float32, take about .* GiB"),
    ],
)
def test_lengths_that_cannot_be_done_are_refused_in_one_line(run, lengths, words, monkeypatch):
    class Even(Task):
        def split_frames(self, frames):
            if frames % 2:
                raise UserError(f"frames={frames}: use even ones")

        def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
            if frames == 66:
                raise UserError("sampler.s=1: too small")
            return SimpleNamespace(carry=jax.numpy.zeros(3))

    monkeypatch.setattr(drift.memory, "host_bytes", lambda: 2**30)
    run = run._replace(task=Even())
    assert drift.check(run, ["64", "8", "8"], CLIPS) == [8, 64]
    with pytest.raises(UserError, match=words) as error:
        drift.check(run, lengths, CLIPS)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_stream_of_ar_diffusion_is_scored_as_its_sample():
    config = config_lib.read(FILE)
    config.data.update(frames=6, size=16)
    config.task.model.update(width=16, depth=1, heads=2)
    config.task.sampler.update(steps=2, s=1)
    config.task.update(patch=8, given=2)
    task, mesh = make_task(config.task), make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    params, _ = jax.jit(task.init)(jax.random.key(0), random_batch(config, 2))
    run = base.Run(config, task, params, task.frozen(), 0, mesh)
    with jax.set_mesh(mesh):
        compiled = task._begin._cache_size()
        lengths = drift.check(run, ["6", "30"], 2)
        assert task._begin._cache_size() == compiled  # nothing has run
        found = drift.measure(run, lengths, 2)
        first = np.stack([source_of(run, 30).read(index)["video"][:2] for index in range(2)])
        cond, rng = {"num": 2, "first_frames": first}, step_rng(config.seed, EVALUATE)
        video = to_uint8(np.asarray(task.sample(params, rng, cond, frozen={}, frames=30))) / 255
    for frames, begin in ((6, 2), (30, 14)):
        window, row = video[:, begin:frames], found["by_length"][str(frames)]
        assert row["mean"] == pytest.approx(window.mean(), abs=1e-3)
        assert row["std"] == pytest.approx(window.std((2, 3, 4)).mean(), abs=1e-3)
        assert row["motion"] == pytest.approx(np.abs(np.diff(window, axis=1)).mean(), abs=1e-3)
        assert 0 < row["psnr"] < row["psnr_guess"] < 100
    tight = ConfigDict(config.task.to_dict())
    tight.sampler.memory = "none"
    with pytest.raises(UserError, match=r"^--frames=30: cannot .*task\.sampler\.memory='none'"):
        drift.check(run._replace(task=make_task(tight)), ["30"], 2)
