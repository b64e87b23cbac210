"""Scores of held-out clips: every clip once, NaN nowhere, tables that can be read."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import evaluate
from jaxvid.parallel.mesh import make_mesh


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
    assert found["real_against_real"]["mean"] > 0
    needed = {"frames", "stride", "size", "resize", "split", "features", "ddof", "repeats"}
    assert needed | {"weights_sha256"} <= set(found["protocol"])
    json.dumps(found)


def test_json_has_no_nan():
    document = json.dumps({"psnr": evaluate._json(np.array([np.nan, 1.5]))})
    assert document == '{"psnr": [null, 1.5]}'
