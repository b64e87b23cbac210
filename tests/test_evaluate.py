"""Scores of held-out clips: every clip counts once, NaN never, and the tables can be read."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.common import get_config
from jaxvid import evaluate
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.evaluators import codec, fvd, report, sprites
from jaxvid.evaluators.held_out import HeldOut, mean, open_held_out
from jaxvid.metrics import frechet
from jaxvid.parallel.mesh import make_mesh
from jaxvid.runs import open_run
from jaxvid.tasks import base
from jaxvid.tasks import tokenizer as tokenizer_task
from tests.tokenizer_runs import tokenizer_config, write_run
from tests.videos import write_clip

pytestmark = pytest.mark.slow


class Task(base.Task):
    """Scores that are simple functions of the clip's id."""

    def init(self, rng, batch):
        return {}, {}

    def loss(self, params, batch, rng, *, step, frozen, extra):
        return 0.0, ({}, extra, 1)

    def sample(self, params, rng, cond, *, frozen, frames=None):
        return cond["video"]

    def evaluate(self, params, batch, rng, *, frozen):
        curve_BF = batch["id"][:, None] + jnp.arange(3.0)
        return {
            "loss_by_level": curve_BF[:, :2] * params * frozen,
            "psnr": jnp.where(jnp.arange(3) >= 1, curve_BF, jnp.nan),
            "psnr_copy_last": jnp.where(jnp.arange(3) >= 1, 4.5, jnp.nan) + 0 * curve_BF,
            "noise": jax.random.normal(rng, batch["id"].shape),
        }


class Clips:
    """An iterator over batches of four of five clips; "video" [B, 2] holds the id and zero."""

    def __init__(self):
        self.place = 0

    def get_state(self):
        return self.place

    def set_state(self, place):
        self.place = place

    def __next__(self):
        ids = np.arange(self.place, self.place + 4, dtype=np.int32) % 5
        self.place += 4
        return {"id": ids, "video": np.stack([ids, 0 * ids], axis=1)}


@pytest.fixture
def run():
    """A run on a split of five clips, in batches of four."""
    data = {"name": "sprites", "batch_size": 4, "frames": 5, "size": 8, "stride": 1}
    return base.Run(
        config=ConfigDict(
            {"seed": 0, "data": data, "task": {}, "evaluate": {"batches": 50}, "sample": {"num": 1}}
        ),
        task=Task(),
        params=jnp.float32(3),
        frozen=jnp.float32(0.5),
        mesh=make_mesh({"data": 1, "fsdp": -1, "tensor": 1}),
        step=7,
    )


@pytest.fixture
def clips(run):
    return HeldOut(run.task, run.config, run.mesh, Clips())


def scores_of(run, clips, batches):
    return {n: mean(v) for n, v in clips.scores(run.params, run.frozen, batches).items()}


def test_every_clip_counts_once_in_training_and_in_evaluate(run, clips):
    scores = clips.scores(run.params, run.frozen, 50)
    assert len(scores["psnr"]) == 5
    scores = scores_of(run, clips, 50)
    np.testing.assert_allclose(scores["psnr"], [np.nan, 3, 4])  # mean id 2, plus the frame
    np.testing.assert_allclose(scores["loss_by_level"], [3, 4.5])
    in_training = clips.evaluate(run.params, run.frozen)
    assert in_training["psnr"] == pytest.approx(3.5)
    assert in_training["loss_by_level"] == pytest.approx(3.75)


def test_batches_limit_the_work_and_differ_in_noise(run, clips):
    one = scores_of(run, clips, 1)
    np.testing.assert_allclose(one["psnr"][1:], [2.5, 3.5])
    two, again = (scores_of(run, clips, 2) for _ in range(2))
    assert one["noise"] != pytest.approx(two["noise"])
    assert two["noise"] == again["noise"]


class Codes(Task):
    """Clip i is two tokens of code i and one of code 7, out of ten."""

    tokenizer = SimpleNamespace(quantizer=SimpleNamespace(size=10))
    pool = tokenizer_task.Task.pool

    def evaluate(self, params, batch, rng, *, frozen):
        id_B1 = batch["id"][:, None]
        return {"ids": jnp.concatenate([id_B1, id_B1, jnp.full_like(id_B1, 7)], axis=1)}


def test_codes_are_counted_over_all_clips_together(run):
    clips = HeldOut(Codes(), run.config, run.mesh, Clips())
    in_training = clips.evaluate(run.params, run.frozen)
    share = np.array([2 / 15] * 5 + [1 / 3])
    assert in_training == {
        "perplexity": pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5),
        "usage": pytest.approx(0.6),
        "dead": 4,
    }
    assert type(in_training["dead"]) is int
    assert scores_of(run, clips, 50) == pytest.approx(in_training)


def test_of_the_baselines_training_shows_the_strongest(run):
    class Guesses(Task):
        baselines = ("weak", "strong")

        def evaluate(self, params, batch, rng, *, frozen):
            one_B = jnp.ones(batch["id"].shape)
            names = ("psnr", "psnr_weak", "psnr_strong", "share_strong", "ssim", "ssim_strong")
            scores = {name: i * one_B for i, name in enumerate(names)}
            return scores | {"ssim_weak": 9 * one_B}  # of this metric it is the strongest

    clips = HeldOut(Guesses(), run.config, run.mesh, Clips())
    found = clips.evaluate(run.params, run.frozen)
    assert found == {"psnr": 0, "psnr_strong": 2, "ssim": 4, "ssim_weak": 9}


def test_tables(run, clips):
    scores = scores_of(run, clips, 50)
    scores["psnr_ground"] = scores["psnr_copy_last"] - 1
    baselines = ("ground", "copy_last")
    lines = report.tables(scores, baselines).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["noise", "level", "loss"],
        ["0.0", "-", "0.5", "3.00000"],
        ["0.5", "-", "1.0", "4.50000"],
    ]
    table = lines[4:8]
    assert [line.split() for line in table] == [
        ["frame", "psnr", "ground", "copy_last*"],
        ["1", "3.000", "3.500", "4.500"],
        ["2", "4.000", "3.500", "4.500"],
        ["mean", "3.500", "3.500", "4.500"],
    ]
    assert len({len(line) for line in table}) == 1
    assert "psnr beats copy_last, the strongest baseline (*), at frames: none" in lines
    ragged = {"motion": np.array([np.nan, 2.0]), "psnr": np.array([5.0, 6.0]), "dead": np.array(7)}
    lines = report.tables(ragged).splitlines()
    assert lines[1] == "    0          5.000" and lines[-1] == "dead  7"
    scores["psnr"] += 1
    text = report.tables(scores, baselines)
    assert "psnr beats copy_last, the strongest baseline (*), at frames: 2\n" in text


def test_distance_of_videos_comes_with_its_protocol(run, clips, monkeypatch, tmp_path):
    """Known features: those of real clips by id, those of samples shifted by 3."""
    table_ND = np.random.default_rng(0).standard_normal((5, 6))

    def features(params, video):
        return params * table_ND[np.asarray(video)[:, 0]] + 3 * (np.asarray(video)[:, 1:2] > 0)

    monkeypatch.setattr(fvd, "normalize", lambda video: video)
    monkeypatch.setattr(fvd, "samples", lambda run, batch, rng: batch["video"] + [0, 1])
    monkeypatch.setattr(fvd.i3d, "features", features)
    monkeypatch.setattr(fvd.jax, "jit", lambda function: function)
    (tmp_path / "i3d.npz").write_bytes(b"weights")
    found = fvd.video_distance(run, clips, 10, 1.0, tmp_path / "i3d.npz")
    assert found["fvd"] == pytest.approx(6 * 9, rel=1e-6)
    assert found["protocol"]["clips"] == 5 and found["real_against_real"]["clips"] == 2
    for name, distance in fvd.DISTANCES.items():
        wanted = frechet.floor(table_ND[:5], distance, np.random.default_rng(0))
        floor = found["real_against_real"][name]
        assert (floor["mean"], floor["std"]) == pytest.approx(wanted)
    needed = {"frames", "stride", "size", "resize", "split", "features", "ddof", "repeats"}
    assert needed | {"weights_sha256"} <= set(found["protocol"])
    json.dumps(found)
    assert fvd.unavailable({}, 4) == "" and "at least 4" in fvd.unavailable({}, 3)


def test_steady_sprites_are_counted_in_samples_and_in_the_data(run):
    """A task whose samples are real clips in the even rows and grey in the odd ones."""

    class Copies(Task):
        def sample(self, params, rng, cond, *, frozen, frames=None):
            is_even = jnp.arange(cond["num"]) % 2 == 0
            return jnp.where(is_even[:, None, None, None, None], normalize(cond["video"]), 0)

    data = {**get_config().data, "max_sprites": 1, "sizes": 1}
    run = run._replace(task=Copies(), config=ConfigDict({**run.config.to_dict(), "data": data}))
    with jax.set_mesh(run.mesh):
        assert sprites.steady(run) == {"clips": 64, "samples": 0.5, "data": 1.0}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Work folder of a tokenizer of 27 tokens for 5 frames of sprites."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_run(folder, tokenizer_config("quantizer=fsq"))
    return folder


@pytest.fixture(scope="module")
def opened(workdir):
    """(run, its held-out clips)."""
    run = open_run(str(workdir))
    with jax.set_mesh(run.mesh), open_held_out(run) as clips:
        yield run, clips


def test_long_videos_are_reconstructed_as_streams(opened, monkeypatch):
    """At the training length, the scores of whole clips; pieces of another length, the same."""
    run, clips = opened
    videos = codec.long_videos(run, ["5", "23"])
    with jax.set_mesh(run.mesh):
        scores = clips.scores(run.params, run.frozen, 1)
        short = codec.reconstruct_long(run, videos[5], 5, limit=8)
        long = codec.reconstruct_long(run, videos[23], 23, limit=2)
        pieces = run.task.tokenizer.pieces
        monkeypatch.setattr(run.task.tokenizer, "pieces", lambda frames: pieces(frames, about=4))
        cut = codec.reconstruct_long(run, videos[23], 23, limit=2)
    for name in ("psnr", "ssim"):
        np.testing.assert_allclose(short[f"{name}_by_frame"], scores[name].mean(0), atol=1e-4)
        np.testing.assert_allclose(cut[f"{name}_by_frame"], long[f"{name}_by_frame"], atol=1e-4)
        assert len(long[f"{name}_by_frame"]) == 23
        assert long[name] == pytest.approx(np.mean(long[f"{name}_by_frame"]))
    assert (short["clips"], long["clips"]) == (8, 2)
    assert (long["frames_at_once"], cut["frames_at_once"]) == (23, 5)


@pytest.mark.parametrize(
    "lengths, words",
    [
        (["5", "6"], "--frames=6: .* use 5 or 7"),
        (["-5"], "--frames=-5: write numbers"),
        (["many"], "--frames=many: write numbers"),
        (["1" * 5000], r"--frames=1{20}: write numbers .* up to 1000000$"),
        (["1000001"], "--frames=1000001: write numbers"),
    ],
)
def test_bad_lengths_are_refused(opened, lengths, words):
    with pytest.raises(UserError, match=words):
        codec.long_videos(opened[0], lengths)


def test_lengths_that_no_clip_has_are_refused(workdir, tmp_path):
    run = open_run(str(workdir))
    with run.config.unlocked():
        run.config.data.update(name="folder", path=str(tmp_path))
    for name in "ab":
        write_clip(tmp_path / f"{name}.mp4", 6, height=12, width=16)
    assert set(codec.long_videos(run, ["5"])) == {5}
    with pytest.raises(UserError, match=r"--frames=7: no held-out clips of .*has 6 frames"):
        codec.long_videos(run, ["7"])


def test_speed_counts_tokens_and_frames_of_a_clip(opened):
    run, clips = opened
    with jax.set_mesh(run.mesh):
        found = codec.speed(run, clips)
    for name in ("encode", "decode"):
        tokens, frames = (found[f"{name}_{unit}_per_s"] for unit in ("tokens", "frames"))
        assert frames > 0 and tokens / frames == pytest.approx(27 / 5)
    assert (found["clips_at_once"], found["frames_of_a_clip"]) == (8, 5) and found["device"]


@pytest.fixture
def options(monkeypatch):
    """Sets the flags of `evaluate.main`."""

    def set_flags(workdir, **changes):
        values = dict(workdir=str(workdir), batches=None, i3d=None, lpips=None, frames=[], gaps=[])
        values |= dict(guidance=[], story=[])
        monkeypatch.setattr(evaluate, "FLAGS", SimpleNamespace(**(values | changes)))

    return set_flags


def test_scores_without_weights_are_unavailable_and_kept_if_fvd_fails(
    workdir, options, monkeypatch, capsys
):
    options(workdir, frames=["5"])
    evaluate.main()
    document, printed = json.loads((workdir / "evaluate.json").read_text()), capsys.readouterr().out
    for name, key in (("fvd", "video_distance"), ("lpips", "lpips")):
        assert document[key].startswith("unavailable: no weights of ")
        assert f"{name}  {document[key]}" in printed
    assert list(document["by_length"]) == ["5"] and document["speed"]["encode_tokens_per_s"]
    assert isinstance(document["dead"], int)

    def video_distance(*arguments):
        raise UserError("features: some are not finite")

    monkeypatch.setattr(evaluate.weights, "read", lambda path, field: {})
    monkeypatch.setattr(evaluate.i3d, "convert", lambda arrays, path: {})
    monkeypatch.setattr(evaluate.i3d, "MIN_FRAMES", 5)
    monkeypatch.setattr(evaluate.fvd, "video_distance", video_distance)
    (workdir / "evaluate.json").unlink()
    options(workdir, i3d="i3d.npz")
    with pytest.raises(UserError, match="not finite"):
        evaluate.main()
    document = json.loads((workdir / "evaluate.json").read_text())
    assert len(document["psnr"]) == 5 and document["speed"]["decode_frames_per_s"] > 0


def test_weights_of_lpips_may_be_given_to_evaluate(workdir, monkeypatch, tmp_path):
    (tmp_path / "vgg.npz").write_bytes(b"weights")
    monkeypatch.setattr(codec.weights, "read", lambda path, field: {})
    with pytest.raises(UserError, match=r"^data\.size=12: must be at least 16"):
        codec.with_lpips(open_run(str(workdir)), tmp_path / "vgg.npz")
    monkeypatch.setattr(codec.lpips, "MIN_SIZE", 12)
    monkeypatch.setattr(codec.lpips, "convert", lambda arrays, path: jnp.float32(3))
    monkeypatch.setattr(
        codec.lpips, "distance", lambda weight, a, b: weight * jnp.abs(a - b).mean((1, 2, 3))
    )
    run = codec.with_lpips(open_run(str(workdir)), tmp_path / "vgg.npz")
    with jax.set_mesh(run.mesh), open_held_out(run) as clips:
        scores = clips.scores(run.params, run.frozen, 1)
    assert scores["lpips"].shape == (8, 5) and (scores["lpips"] > 0).all()


@pytest.mark.parametrize("changes", [{"lpips": "vgg.npz"}, {"frames": ["5"]}, {"gaps": ["5"]}])
def test_options_of_some_runs_are_refused_for_others(run, options, monkeypatch, changes):
    monkeypatch.setattr(evaluate, "open_run", lambda workdir: run)
    run.config.task.name = "ar_diffusion"
    options("nowhere", **changes)
    with pytest.raises(UserError, match=f"--{next(iter(changes))}: is for (token|models)"):
        evaluate.main()


def test_json_has_no_nan():
    document = json.dumps({"psnr": evaluate._json(np.array([np.nan, 1.5]))})
    assert document == '{"psnr": [null, 1.5]}'
