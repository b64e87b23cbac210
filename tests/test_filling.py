"""Clips that are completed from some of their pixels: figures of a run, and `sample --fill`."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvid import sample
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.evaluators import filling
from jaxvid.evaluators.held_out import open_held_out
from jaxvid.masking import commit
from jaxvid.parallel.mesh import make_mesh
from jaxvid.tasks.base import Run
from tests.tasks.test_masked_transformer import made
from tests.test_sample import Flags
from tests.videos import write_clip

pytestmark = pytest.mark.slow


@functools.cache
def run_of(share=0.5):
    """A run of random weights that was trained with conditions of pixels, as far as it says."""
    config, task, params, _ = made(task__window=5, task__mask__commit=share, task__given=1)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    return Run(config, task, params, task.frozen(), 2, mesh)


def test_figures_are_those_of_the_unknown_pixels():
    run = run_of()
    with jax.set_mesh(run.mesh), open_held_out(run) as clips:
        found = filling.measure(run, clips, 1)
        rng, batch, _ = next(clips.batches(1))
        real = normalize(np.asarray(batch["video"])).astype(np.float64)
        made_clips = np.asarray(
            run.task.fill(run.params, rng, batch, "outpaint_vertical", frozen=run.frozen)
        )
    assert found["clips"] == len(real)
    row = found["by_kind"]["outpaint_vertical"]
    unknown = ~commit.condition("outpaint_vertical", 5, (12, 12)).is_known_THW
    error = np.square(made_clips - real).mean(-1)[:, unknown].mean()
    np.testing.assert_allclose(row["psnr"], 10 * np.log10(4 / error), rtol=1e-4)
    # The seam of this kind lies between rows 2 and 3, and between rows 8 and 9.
    for name, clips in (("seam", made_clips), ("seam_real", real)):
        steps = [np.abs(clips[:, :, at] - clips[:, :, at + 1]).mean() for at in (2, 8)]
        np.testing.assert_allclose(row[name], np.mean(steps), rtol=1e-4)
    text = filling.table(found)
    assert all(kind in text for kind in commit.KINDS)


def test_filling_in_from_the_command_line(monkeypatch, capsys):
    run = run_of()
    folder = Path(tempfile.mkdtemp())
    write_clip(folder / "bars.mp4", 5, width=12, height=12, fps=8)
    flags = dict(fill="inpaint_central", first_frames=folder / "bars.mp4", num=2, seed=0)
    monkeypatch.setattr(sample, "FLAGS", Flags(flags))
    sample.fill(run, folder / "out")
    assert {"0.mp4", "1.mp4", "sheet.png"} <= {path.name for path in (folder / "out").iterdir()}
    assert "2 clips, completed by inpaint_central" in capsys.readouterr().out


@pytest.mark.parametrize(
    "share, options, words",
    [
        (0.0, {}, "^fill=prediction: this run had no conditions of pixels"),
        (0.5, {}, "^fill=prediction: of which clip"),
        (0.5, {"frames": 9}, "^frames=9: --fill completes a whole clip"),
        (0.5, {"story": "s.txt"}, "^story=s.txt: --fill completes a whole clip"),
    ],
)
def test_what_cannot_be_filled_in(share, options, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "FLAGS", Flags(options, fill="prediction", num=1))
    with pytest.raises(UserError, match=words):
        sample.fill(run_of(share), tmp_path)
