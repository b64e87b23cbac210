"""Alignment with text: what samples show of captions, beside real clips and chance."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.common import get_config
from jaxvid.data import text
from jaxvid.data.sprite_oracle import agreement
from jaxvid.data.sprites import Attributes, kind, render, scene
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.evaluators import alignment
from jaxvid.evaluators.held_out import open_held_out
from jaxvid.parallel.mesh import make_mesh
from jaxvid.tasks import base
from tests.test_sample import Pieceless

RED = Attributes("", "red", "square", "left")
BLUE = Attributes("", "blue", "circle", "up")


@pytest.mark.parametrize(
    "told, seen, scores",
    [
        ([RED], [RED], (1, 1, 1, 1)),
        ([RED], [RED._replace(size="large")], (1, 1, 1, 1)),
        ([RED], [], (0, 0, 0, 0)),
        ([RED], [RED._replace(direction="")], (1, 1, 0, 0)),
        ([RED], [RED, BLUE], (1, 1, 1, 0)),
        ([RED], [BLUE, RED._replace(shape="cross")], (1, 0, 1, 0)),
        ([RED, BLUE], [BLUE, RED], (1, 1, 1, 1)),
        ([RED, BLUE], [RED], (0.5, 0.5, 0.5, 0)),
        # Colours of the caption in each other's place: two directions and shapes, or two colours.
        ([RED, BLUE], [RED._replace(colour="blue"), BLUE._replace(colour="red")], (0, 1, 1, 0)),
        # As many agree either way: the matching with both colours counts.
        (
            [RED, BLUE._replace(direction="left")],
            [RED._replace(shape="circle"), BLUE._replace(shape="square", direction="left")],
            (1, 0, 1, 0),
        ),
    ],
)
def test_sprites_are_matched_so_that_most_agrees(told, seen, scores):
    wanted = dict(zip(("colour", "shape", "direction", "caption"), scores))
    assert agreement(told, seen) == wanted
    assert agreement(told[::-1], seen[::-1]) == wanted


class Drawn(Pieceless):
    """Draws the clip whose caption it is given, backwards without guidance."""

    def __init__(self, run, scale):
        self.fields, self.scale = run.config.data, scale
        captions = [self.view(index).description.caption for index in range(8)]
        self.known = np.stack([text.embed(caption, 20, 64) for caption in captions])

    def view(self, index):
        return scene(index, "validation", **kind(self.fields))

    def sample(self, params, rng, cond, *, frozen, frames=None):
        assert set(cond) == {"num", "text"} and frames is None
        videos = []
        for text_ME in np.asarray(cond["text"]):
            index = int(np.argmin(np.abs(self.known - text_ME).sum((1, 2))))
            video = render(self.view(index), 7, 32)  # up to the first bounce
            videos.append(video[::-1] if self.scale == 1 else video)
        return normalize(np.stack(videos))


def told_run():
    """A run on captioned sprites whose task is `Drawn`."""
    config = get_config()
    config.data.update(name="sprites", size=32, batch_size=4, text_tokens=20, max_sprites=1)
    config.data.update(sizes=1, turning=False, threads=1)
    fields = {**config.to_dict(), "task": {"condition": {"kind": "text"}, "name": "ar_diffusion"}}
    fields["task"]["sampler"] = {"guidance": 1.0}
    run = base.Run(ConfigDict(fields), None, {}, {}, 0, make_mesh({}, jax.devices()[:1]))

    return run._replace(task=Drawn(run, 1.0))


@pytest.fixture
def run():
    return told_run()


def test_what_a_caption_tells_is_found_in_the_samples(run):
    """Of clips that run backwards, all but the direction."""
    scales = alignment.check(run, ["3", "1.0", "3.0"])
    assert scales == [1.0, 3.0]
    runs = {scale: run._replace(task=Drawn(run, scale)) for scale in scales}
    with open_held_out(run) as clips:
        found = alignment.measure(runs, clips, 2)
    assert found["clips"] == 8
    assert found["real"] == dict.fromkeys(alignment.SCORES, 1.0) == found["by_guidance"]["3"]
    backwards = {"colour": 1.0, "shape": 1.0, "direction": 0.0, "caption": 0.0}
    assert found["by_guidance"]["1"] == backwards
    expected = {"colour": 1 / 6, "shape": 1 / 4, "direction": 1 / 4, "caption": 1 / 96}
    assert found["chance"] == pytest.approx(expected, abs=0.05)
    lines = alignment.table(found).splitlines()
    assert "8 held-out clips" in lines[0] and lines[1].split() == ["guidance", *alignment.SCORES]
    assert [line.split()[:2] for line in lines[2:4]] == [["1", "1.000"], ["3", "1.000"]]


def test_the_scale_of_the_run_is_the_default_and_other_runs_have_none(run):
    assert alignment.check(run, []) == [1.0]
    fields = run.config.to_dict()
    fields["data"]["name"] = "folder"
    other = run._replace(config=ConfigDict(fields))
    assert alignment.check(other, []) == []
    with pytest.raises(UserError, match="--guidance: scores captions of sprites, and this run"):
        alignment.check(other, ["3"])
    tokenizer = run._replace(task=SimpleNamespace(), config=ConfigDict({"task": {}, "data": {}}))
    assert alignment.check(tokenizer, []) == []


@pytest.mark.parametrize(
    "scales, words",
    [
        (["3", "high"], "^--guidance=high: write scales, such as 1,3,5"),
        (["nan"], "^--guidance=nan: write scales"),
        (["1"] * 65, "^--guidance: has 65 scales; give 64 or fewer"),
    ],
)
def test_scales_that_are_none_are_refused_in_one_line(run, scales, words):
    with pytest.raises(UserError, match=words):
        alignment.check(run, scales)
