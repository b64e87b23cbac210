"""Recall by gap: what a run remembers shows in the table, and real clips are its ceiling."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.bench.runs import random_batch
from jaxvid.data.transforms import normalize, to_uint8
from jaxvid.errors import UserError
from jaxvid.evaluators import recall
from jaxvid.parallel.mesh import make_mesh
from jaxvid.runs import make_task
from jaxvid.tasks import base
from tests.test_drift import Pieces, Streams

FILE = str(Path(__file__).parents[1] / "configs" / "recall.py")
CLIPS = 21  # two batches of 8 and a part of one


class Task(Streams):
    """Answers with the frame it was given `reach` frames before the answer, or with the first."""

    given = 2

    def __init__(self, reach=10**6):
        self.reach, self.seen = reach, []

    def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
        first = np.asarray(cond["first_frames"])
        self.seen.append((first, frames))
        answer = first[:, max(first.shape[1] - self.reach, 0)][:, None]
        more = frames - first.shape[1]
        parts = [first] + [answer] * more
        return Pieces(parts)

    def decode(self, frozen, z, state=None):
        return normalize(z), state


def run_of(name, task):
    config = config_lib.read(f"{FILE}:data={name}").copy_and_resolve_references()
    return base.Run(config, task, {}, {}, 7, make_mesh({"data": 1, "fsdp": -1, "tensor": 1}))


@pytest.fixture(scope="module", params=["sprites_recall", "needle"])
def found(request):
    """(name, the figures of a task that knows the shown frame for a gap of 6, its task)."""
    # A sprite stands up to 3 frames before the gap, of which it is on its way in 2.
    reach = {"sprites_recall": 9, "needle": 7}[request.param]
    task = Task(reach)
    return request.param, recall.measure(run_of(request.param, task), [2, 6, 12], CLIPS), task


def test_what_is_remembered_is_right_and_the_rest_is_chance(found):
    name, figures, _ = found
    assert figures["clips"] == CLIPS and figures["trained_gap"] == [2, 8]
    assert json.loads(json.dumps(figures)) == figures
    for gap, row in figures["by_gap"].items():
        assert {f"{score}{end}" for score in figures["chance"] for end in ("", "_real")} == set(row)
        for score, chance in figures["chance"].items():
            assert row[f"{score}_real"] == 1.0
            if gap == "6" or (name, gap) == ("sprites_recall", "2"):
                assert row[score] == 1.0  # of the sprite all frames before are right
            elif name == "sprites_recall":
                assert row[score] == 0.0  # the empty picture
            else:
                assert row[score] < chance + 4 * np.sqrt(chance / CLIPS)  # another card


def test_the_given_frames_end_with_the_gap(found):
    name, _, task = found
    source = data.make_source(run_of(name, task).config.data, "validation")
    assert [len(first) for first, _ in task.seen] == [8, 8, 5] * 3
    for (first, frames), gap in zip(task.seen[::3], (2, 6, 12)):
        asked = source.with_gap(gap)
        given = source.leads[1] + gap
        assert first.shape[1] == given and frames == given + source.answer
        for index in range(8):
            video = asked.read(index)["video"]
            np.testing.assert_array_equal(first[index], video[:given])
            assert asked.back(index) == given


def test_table(found):
    lines = recall.table(found[1]).splitlines()
    assert "21 held-out clips" in lines[0] and "2 to 8" in lines[0]
    head, *rows = (line.split() for line in lines[1:6])
    scores = list(found[1]["chance"])
    assert head == ["gap", *(n for score in scores for n in (score, f"{score}_real"))]
    assert [row[0] for row in rows] == ["2", "6", "12", "chance"]
    assert rows[1][1:] == ["1.000"] * (len(head) - 1)
    assert [float(x) for x in rows[3][1:]] == pytest.approx(
        list(found[1]["chance"].values()), abs=1e-3
    )


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        (["0"], "--gaps=0: write numbers of frames"),
        (["-3"], "--gaps=-3: write numbers of frames"),
        (["4", "900000"], "--gaps=900000, data.batch_size=8, data.size=24: the pixels of clips"),
        (["5", "4"], r"--gaps=5: cannot be streamed: task\.sampler\.s=1: too small$"),
    ],
)
def test_gaps_that_cannot_be_measured_are_refused_in_one_line(gaps, words, monkeypatch):
    class Short(Task):
        def stream(self, params, rng, cond, *, frozen, frames=None, carry=None):
            if cond["first_frames"].shape[1] > 9:
                raise UserError("sampler.s=1: too small")
            return type("Stream", (), {"carry": jax.numpy.zeros(3)})

    monkeypatch.setattr(recall.memory, "host_bytes", lambda: 2**30)
    run = run_of("sprites_recall", Short())
    assert recall.check(run, []) == [] and recall.check(run, ["4", "2", "2"]) == [2, 4]
    with pytest.raises(UserError, match=f"^{words}") as error:
        recall.check(run, gaps)
    assert "\n" not in str(error.value)


def test_other_data_have_no_gaps():
    run = run_of("needle", Task())
    run.config.data.update(name="sprites", difficulty=0.0)
    with pytest.raises(UserError, match=r"^--gaps: is for data that test memory, .* of sprites;"):
        recall.check(run, ["4"])


@pytest.mark.parametrize("name", ["sprites_recall", "needle"])
def test_options_of_the_config_suit_each_other(name):
    """Clips are as long as the longest gap needs, which softmax cannot bridge; all mixers work."""
    for mixer in common.MIXERS:
        config = config_lib.read(f"{FILE}:data={name},mixer={mixer}")
        config_lib.validate(config)
        source = data.make_source(config.data, "train")
        assert config.data.frames == source.frames_for(config.data.gap[1])
        task = make_task(config.task)
        task.check(source)
        assert task.layout.teacher_forced == 1 and task.train_frames == config.data.frames
        if mixer == "softmax":
            reach = config.task.model.depth * (task.mixers.window - 1)
            assert config.data.gap[0] <= reach < config.data.gap[1]


@pytest.mark.slow
def test_a_stream_of_ar_diffusion_is_scored_as_its_sample():
    config = config_lib.read(f"{FILE}:data=needle,mixer=linear")
    config.task.model.update(width=16, depth=1, heads=2)
    config.task.sampler.steps = 2
    task, mesh = make_task(config.task), make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    params, _ = jax.jit(task.init)(jax.random.key(0), random_batch(config, 2))
    run = base.Run(config, task, params, task.frozen(), 0, mesh)
    with jax.set_mesh(mesh):
        assert recall.check(run, ["5"]) == [5]
        figures = recall.measure(run, [5], 3)
        source = data.make_source(config.data, "validation").with_gap(5)
        first = np.stack([source.read(i)["video"][:-1] for i in range(3)])
        rng = jax.random.fold_in(recall.step_rng(config.seed, recall.EVALUATE), 0)
        cond = {"num": 3, "first_frames": first}
        video = to_uint8(np.asarray(task.sample(params, rng, cond, frozen={}, frames=9)))
    wanted = [source.scores(index, video[index, 8:]) for index in range(3)]
    for score in source.chance:
        assert figures["by_gap"]["5"][score] == pytest.approx(np.mean([w[score] for w in wanted]))
