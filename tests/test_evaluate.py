"""Scores of held-out clips: every clip once, NaN nowhere, tables that can be read."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import evaluate
from jaxvid.errors import UserError
from jaxvid.inference import open_run, pieces
from jaxvid.metrics import frechet
from jaxvid.parallel.mesh import make_mesh
from tests.data.conftest import write_clip
from tests.test_latents import tokenizer_config, write_run


class Task:
    """Scores that are simple functions of the clip's id."""

    def evaluate(self, params, batch, rng, *, frozen):
        curve_BF = batch["id"][:, None] + jnp.arange(3.0)
        return {
            "loss_by_level": curve_BF[:, :2] * params * frozen,
            "psnr": jnp.where(jnp.arange(3) >= 1, curve_BF, jnp.nan),
            "psnr_copy_last": jnp.where(jnp.arange(3) >= 1, 4.5, jnp.nan) + 0 * curve_BF,
            "noise": jax.random.normal(rng, batch["id"].shape),
        }


@pytest.fixture
def run(monkeypatch):
    """A run on a split of five clips, in batches of four."""

    def held_out(run):
        places = iter(range(100))
        while True:
            yield {"id": np.array([next(places) % 5 for _ in range(4)], np.int32)}

    monkeypatch.setattr(evaluate, "_held_out", held_out)
    return SimpleNamespace(
        config=ConfigDict({"seed": 0, "data": {"name": "sprites"}, "task": {}}),
        task=Task(),
        params=jnp.float32(3),
        frozen=jnp.float32(0.5),
        mesh=make_mesh({"data": 1, "fsdp": -1, "tensor": 1}),
        step=7,
    )


def test_every_clip_counts_once(run):
    scores, clips = evaluate.score(run, batches=50)
    assert clips == 5
    np.testing.assert_allclose(scores["psnr"], [np.nan, 3, 4])  # mean id 2, plus the frame
    np.testing.assert_allclose(scores["loss_by_level"], [3, 4.5])


def test_batches_bound_the_work_and_differ_in_noise(run):
    one, clips = evaluate.score(run, batches=1)
    assert clips == 4
    np.testing.assert_allclose(one["psnr"][1:], [2.5, 3.5])
    two, _ = evaluate.score(run, batches=2)
    assert one["noise"] != pytest.approx(two["noise"])
    again, _ = evaluate.score(run, batches=2)
    assert two["noise"] == again["noise"]


def test_codes_are_counted_over_all_clips_together(run, monkeypatch):
    """Clip i is two tokens of code i and one of code 7, out of ten."""

    def held_out(run):
        for ids in ([0, 1, 2, 3], [4, 0, 1, 2], [0, 1, 2, 3]):
            yield {"id": np.array(ids, np.int32), "video": np.array(ids)[:, None, None]}

    monkeypatch.setattr(evaluate, "_held_out", held_out)
    monkeypatch.setattr(evaluate, "normalize", lambda video: video)
    run.config.data.update(frames=5, size=8)
    tokenizer = SimpleNamespace(
        quantizer=SimpleNamespace(size=10),
        grid=lambda size: (1, size // 8),
        latents_for_frames=lambda frames: 3,
        tokens=lambda params, x: (jnp.concatenate([x, x, jnp.full_like(x, 7)], axis=2), None),
    )
    run.task = SimpleNamespace(tokenizer=tokenizer)
    found = evaluate.codes(run, batches=3)
    share = np.array([2 / 15] * 5 + [1 / 3])
    assert found["usage"] == pytest.approx(0.6) and found["dead"] == 4
    assert found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert found["tokens_per_frame"] == pytest.approx(3 / 5)
    tokenizer.quantizer = SimpleNamespace()
    assert set(evaluate.codes(run, batches=3)) == {"tokens_per_frame"}


def test_report(run):
    scores, _ = evaluate.score(run, batches=50)
    lines = evaluate.report(scores).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["noise", "level", "loss"],
        ["0.0", "-", "0.5", "3.00000"],
        ["0.5", "-", "1.0", "4.50000"],
    ]
    table = lines[4:8]
    assert [line.split() for line in table] == [
        ["frame", "psnr", "psnr_copy_last"],
        ["1", "3.000", "4.500"],
        ["2", "4.000", "4.500"],
        ["mean", "3.500", "4.500"],
    ]
    assert len({len(line) for line in table}) == 1
    assert "psnr beats psnr_copy_last at frames: none" in lines
    ragged = {"motion": np.array([np.nan, 2.0]), "psnr": np.array([5.0, 6.0]), "dead": np.array(7)}
    lines = evaluate.report(ragged).splitlines()
    assert lines[1] == "    0          5.000" and lines[-1] == "dead  7"
    scores["psnr"] += 1
    assert "psnr beats psnr_copy_last at frames: 2\n" in evaluate.report(scores)


def test_distance_of_videos_comes_with_its_protocol(run, monkeypatch, tmp_path):
    """Features that are known: those of true clips by id, of samples shifted by 3."""
    rng = np.random.default_rng(0)
    table_ND = rng.standard_normal((5, 6))

    def features(params, video):
        return params * table_ND[np.asarray(video)[:, 0]] + 3 * (np.asarray(video)[:, 1:2] > 0)

    def held_out(run):
        while True:
            for ids in ([0, 1, 2, 3], [4, 0, 1, 2]):
                ids = np.array(ids, np.int32)
                yield {"id": ids, "video": np.stack([ids, 0 * ids], axis=1)}

    monkeypatch.setattr(evaluate, "_held_out", held_out)
    monkeypatch.setattr(evaluate, "normalize", lambda video: video)
    monkeypatch.setattr(evaluate, "_samples", lambda run, batch, rng: batch["video"] + [0, 1])
    monkeypatch.setattr(evaluate.i3d, "features", features)
    monkeypatch.setattr(evaluate.jax, "jit", lambda function: function)
    run.config.data.update(frames=9, stride=1, size=24)
    (tmp_path / "i3d.npz").write_bytes(b"weights")
    found = evaluate.video_distance(run, 10, 1.0, tmp_path / "i3d.npz")
    assert found["fvd"] == pytest.approx(6 * 9, rel=1e-6)
    assert found["protocol"]["clips"] == 5 and found["real_against_real"]["clips"] == 2
    for name, distance in evaluate.DISTANCES.items():
        wanted = frechet.floor(table_ND[:5], distance, np.random.default_rng(0))
        floor = found["real_against_real"][name]
        assert (floor["mean"], floor["std"]) == pytest.approx(wanted)
    needed = {"frames", "stride", "size", "resize", "split", "features", "ddof", "repeats"}
    assert needed | {"weights_sha256"} <= set(found["protocol"])
    json.dumps(found)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Work folder of a tokenizer of 27 tokens for 5 frames of sprites."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_run(folder, tokenizer_config("quantizer=fsq"))
    return folder


def test_long_videos_are_rebuilt_as_streams(workdir, monkeypatch):
    """At the length of training, the scores of whole clips; any other cut, the same scores."""
    run = open_run(str(workdir))
    videos = evaluate.long_videos(run, ["5", "23"])
    with jax.set_mesh(run.mesh):
        scores, clips = evaluate.score(run, batches=1)
        short = evaluate.rebuild_long(run, videos[5], 5, most=clips)
        long = evaluate.rebuild_long(run, videos[23], 23, most=2)
        monkeypatch.setattr(evaluate, "pieces", lambda *a: pieces(*a, about=4))
        cut = evaluate.rebuild_long(run, videos[23], 23, most=2)
    for name in ("psnr", "ssim"):
        np.testing.assert_allclose(short[f"{name}_by_frame"], scores[name], atol=1e-4)
        np.testing.assert_allclose(cut[f"{name}_by_frame"], long[f"{name}_by_frame"], atol=1e-4)
        assert len(long[f"{name}_by_frame"]) == 23
        assert long[name] == pytest.approx(np.mean(long[f"{name}_by_frame"]))
    assert (short["clips"], long["clips"]) == (8, 2)
    assert (long["frames_at_once"], cut["frames_at_once"]) == (23, 5)


@pytest.mark.parametrize(
    "lengths, words",
    [
        (["5", "6"], "--frames=6: .* use 5 or 7"),
        (["0"], "--frames=0: write numbers"),
        (["-5"], "--frames=-5: write numbers"),
        (["many"], "--frames=many: write numbers"),
        (["1" * 5000], r"--frames=1{20}: write numbers .* up to 1000000$"),
        (["1000001"], "--frames=1000001: write numbers"),
    ],
)
def test_lengths_that_cannot_be_are_refused(workdir, lengths, words):
    with pytest.raises(UserError, match=words):
        evaluate.long_videos(open_run(str(workdir)), lengths)


def test_lengths_that_no_clip_has_are_refused(workdir, tmp_path):
    run = open_run(str(workdir))
    with run.config.unlocked():
        run.config.data.update(name="folder", path=str(tmp_path))
    for name in "ab":
        write_clip(tmp_path / f"{name}.mp4", 6, height=12, width=16)
    assert set(evaluate.long_videos(run, ["5"])) == {5}
    with pytest.raises(UserError, match=r"--frames=7: no held-out clips so long .*has 6 frames"):
        evaluate.long_videos(run, ["7"])


def test_speed_counts_what_a_clip_holds(workdir):
    run = open_run(str(workdir))
    with jax.set_mesh(run.mesh):
        found = evaluate.speed(run)
    for name in ("encode", "decode"):
        tokens, frames = (found[f"{name}_{unit}_per_s"] for unit in ("tokens", "frames"))
        assert frames > 0 and tokens / frames == pytest.approx(27 / 5)
    assert (found["clips_at_once"], found["frames_of_a_clip"]) == (8, 5) and found["device"]


@pytest.fixture
def options(monkeypatch):
    """Sets the flags of `evaluate.main`."""

    def set_flags(workdir, **changes):
        values = dict(workdir=str(workdir), batches=None, i3d=None, lpips=None, frames=[])
        monkeypatch.setattr(evaluate, "FLAGS", SimpleNamespace(**(values | changes)))

    return set_flags


def test_weights_that_are_not_given_are_unavailable(workdir, options, capsys):
    options(workdir, frames=["5", "9"])
    evaluate.main()
    document, printed = json.loads((workdir / "evaluate.json").read_text()), capsys.readouterr().out
    for name, key in (("fvd", "video_distance"), ("lpips", "lpips")):
        assert document[key].startswith("unavailable: no weights of ")
        assert f"{name}  {document[key]}" in printed
    assert list(document["by_length"]) == ["5", "9"] and document["speed"]["encode_tokens_per_s"]
    assert isinstance(document["dead"], int) and document["dead"] <= document["dead_in_a_batch"]


def test_scores_are_kept_where_the_distance_of_videos_fails(workdir, options, monkeypatch):
    def video_distance(*arguments):
        raise UserError("features: some are not finite")

    monkeypatch.setattr(evaluate.weights, "read", lambda path, field: {})
    monkeypatch.setattr(evaluate.i3d, "convert", lambda arrays, path: {})
    monkeypatch.setattr(evaluate, "video_distance", video_distance)
    (workdir / "evaluate.json").unlink(missing_ok=True)
    options(workdir, i3d="i3d.npz")
    with pytest.raises(UserError, match="not finite"):
        evaluate.main()
    document = json.loads((workdir / "evaluate.json").read_text())
    assert len(document["psnr"]) == 5 and document["speed"]["decode_frames_per_s"] > 0
    assert evaluate._lacking({}, 4) == "" and "at least 4" in evaluate._lacking({}, 3)


def test_weights_of_lpips_may_be_given_afterwards(workdir, monkeypatch, tmp_path):
    (tmp_path / "vgg.npz").write_bytes(b"weights")
    monkeypatch.setattr(evaluate.weights, "read", lambda path, field: {})
    monkeypatch.setattr(evaluate.lpips, "convert", lambda arrays, path: jnp.float32(3))
    monkeypatch.setattr(
        evaluate.lpips, "distance", lambda weight, a, b: weight * jnp.abs(a - b).mean((1, 2, 3))
    )
    run = evaluate.with_lpips(open_run(str(workdir)), tmp_path / "vgg.npz")
    with jax.set_mesh(run.mesh):
        scores, _ = evaluate.score(run, batches=1)
    assert scores["lpips"].shape == (5,) and (scores["lpips"] > 0).all()


def test_what_is_for_tokenizers_is_refused_for_others(run, options, monkeypatch):
    monkeypatch.setattr(evaluate, "open_run", lambda workdir: run)
    run.config.task.name = "ar_diffusion"
    for changes in ({"lpips": "vgg.npz"}, {"frames": ["5"]}):
        options("nowhere", **changes)
        with pytest.raises(UserError, match=f"--{next(iter(changes))}: is for tokenizers"):
            evaluate.main()


def test_json_has_no_nan():
    document = json.dumps({"psnr": evaluate._json(np.array([np.nan, 1.5]))})
    assert document == '{"psnr": [null, 1.5]}'
