"""AR-Diffusion on the latents of a tokenizer that an earlier run has trained."""

import functools
import json
import os
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ar_diffusion, tokenizer
from jaxvid import config as config_lib
from jaxvid import data, evaluate
from jaxvid.data import array_record, clips, prepare, tokenize, video
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.inference import make_task, open_run, open_tokenizer, pieces
from jaxvid.models.tokenizer import moments, update_moments
from jaxvid.train import train
from jaxvid.training.checkpoint import Checkpoints
from jaxvid.training.state import TrainState
from tests.data.conftest import write_clip

FAST = {
    "steps": 2,
    "data.frames": 5,
    "data.size": 12,
    "data.batch_size": 8,
    "data.num_clips": 16,
    "data.threads": 1,
    "evaluate.batches": 1,
    "sample.num": 1,
    "log.tensorboard": False,
    "optim.warmup": 1,
}


def tokenizer_config(options="", **changes):
    """A tokenizer of 3 x 3 tokens; dotted fields, dots written as __."""
    config = tokenizer.get_config(options)
    network = dict(width=16, heads=2, patch=4, temporal_depth=1, encode_blocks="t")
    network["decode_blocks"] = "t"
    config.update_from_flattened_dict(
        FAST
        | {f"task.network.{name}": value for name, value in network.items()}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.lock()


def diffusion_config(workdir, options="", **changes):
    """A model of the latents of the tokenizer in `workdir`."""
    config = ar_diffusion.get_config(options)
    model = {"model.width": 16, "model.depth": 1, "model.heads": 2, "given": 3}
    sampler = {"sampler.steps": 2, "sampler.s": 2, "tokenizer": str(workdir)}
    config.update_from_flattened_dict(
        FAST
        | {f"task.{name}": value for name, value in (model | sampler).items()}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.lock()


def write_run(workdir, config):
    """Leave in `workdir` what a run leaves: weights, moments of the latents of 16 clips, config.

    Training would add a minute of compilation. Latents are made to lie off zero.
    """
    task = make_task(config.task)
    batch = next(data.make_iterator(config.data, split="train", seed=1, batch_size=16))
    params, extra = jax.jit(task.init)(jax.random.key(config.seed), batch)
    params["network"]["to_latent"]["kernel"] *= 0.3
    params["network"]["to_latent"]["bias"] += jnp.linspace(-1, 2, task.tokenizer.quantizer.features)
    weights = {**params, **extra}

    @jax.jit
    def measure(weights, video):
        z_BTNZ, _ = task.tokenizer.encode(weights, normalize(video))
        return update_moments(weights["latents"], z_BTNZ)

    extra = {**extra, "latents": measure(weights, batch["video"])}
    state = TrainState(*[jnp.zeros((), jnp.int32)] * 2, params, {}, params, extra)
    with Checkpoints(str(workdir), config) as checkpoints:
        checkpoints.save(1, state, SimpleNamespace(get_state=dict))
    config_lib.save(config, workdir / "config.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Work folder of a tokenizer of Gaussian latents."""
    workdir = tmp_path_factory.mktemp("tokenizer")
    write_run(workdir, tokenizer_config("quantizer=kl"))
    return workdir


def test_moments_are_those_of_all_batches_so_far():
    rng = np.random.default_rng(0)
    z_SBTNZ = 0.3 * rng.standard_normal((5, 2, 3, 4, 6)).astype(np.float32) + 7 * np.arange(6.0)
    measured = moments(6)
    for z_BTNZ in z_SBTNZ:
        measured = jax.jit(update_moments)(measured, z_BTNZ)
    np.testing.assert_allclose(measured["mean_Z"], z_SBTNZ.mean((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(measured["var"], z_SBTNZ.var((0, 1, 2, 3)).mean(), rtol=1e-4)


def test_moments_forget_what_is_long_past():
    measured, update = moments(2), jax.jit(update_moments)
    for scale in [10.0] * 5 + [0.5] * 900:
        measured = update(measured, scale * jnp.array([[[[-1.0, 1.0], [1.0, -1.0]]]]))
    np.testing.assert_allclose(measured["var"], 0.25, rtol=0.02)


def test_latents_have_unit_scale_and_decode_as_the_tokenizer_does(trained):
    frozen = open_tokenizer(str(trained))
    batch = next(data.make_iterator(tokenizer_config().data, split="train", seed=1, batch_size=16))
    video = normalize(batch["video"])
    z_BTNZ, _ = jax.jit(frozen.encode)(frozen.params, video)
    np.testing.assert_allclose(z_BTNZ.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.square(z_BTNZ).mean(), 1, rtol=1e-4)
    plain, _ = jax.jit(frozen.tokenizer.encode)(frozen.params, video)
    assert np.abs(plain.mean((0, 1, 2))).max() > 0.5  # so that there was something to do
    decoded, _ = jax.jit(frozen.decode, static_argnums=2)(frozen.params, z_BTNZ, (3, 3))
    wanted, _ = jax.jit(frozen.tokenizer.decode, static_argnums=2)(frozen.params, plain, (3, 3))
    np.testing.assert_allclose(decoded, wanted, atol=1e-5)


@pytest.mark.slow
def test_from_pixels_to_a_stream(trained, tmp_path):
    config = diffusion_config(trained)
    state = train(config, str(tmp_path))
    assert state.params["model"]["head"]["kernel"].shape[-1] == 8
    assert config.task.tokenizer_digest == open_tokenizer(str(trained)).digest

    run = open_run(str(tmp_path))
    cond = {"num": 2, "first_frames": np.zeros((2, 3, 12, 12, 3), np.uint8)}
    rng = jax.random.key(0)
    with jax.set_mesh(run.mesh):
        video = run.task.sample(run.params, rng, cond, frozen=run.frozen, frames=9)
        pieces, after = [], None
        for z_BTNC in run.task.stream(run.params, rng, cond, frozen=run.frozen, frames=9):
            piece, after = run.task.decode(run.frozen, z_BTNC, after)
            pieces.append(piece)
        assert [piece.shape[1] for piece in pieces] == [3, 2, 2, 2]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), video, atol=1e-5)

        scores, clips = evaluate.score(run, batches=1)
    assert clips == 8
    np.testing.assert_array_equal(np.isnan(scores["psnr"]), [True] * 3 + [False] * 2)


def test_weights_of_a_tokenizer_are_an_argument_of_the_step(trained):
    """A captured weight would be a constant of the program."""
    config = diffusion_config(trained)
    task = make_task(config.task)
    batch = next(data.make_iterator(config.data, split="train", seed=0, batch_size=2))
    params, _ = jax.eval_shape(functools.partial(task.init, jax.random.key(0)), batch)

    def loss(params, frozen, batch):
        return task.loss(params, batch, jax.random.key(0), step=0, frozen=frozen, extra={})[0]

    closed = jax.make_jaxpr(loss)(params, task.frozen(), batch)
    weights = {leaf.shape for leaf in jax.tree.leaves(task.frozen()) if leaf.size > 100}
    assert weights.isdisjoint(np.shape(constant) for constant in closed.consts)
    gradient = jax.eval_shape(jax.grad(loss), params, task.frozen(), batch)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the tokenizer's folder, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "tokenizer")


def rename_task(workdir):
    document = json.loads((workdir / "config.json").read_text())
    document["task"]["name"] = "ar_diffusion"
    (workdir / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "no such file; is this the folder of a run"),
        (
            rename_task,
            "holds a run of task 'ar_diffusion'; name the folder of a run of 'tokenizer'",
        ),
        (lambda workdir: (workdir / "config.json").write_text("{}"), "holds a run of task None"),
        (lambda workdir: shutil.rmtree(workdir / "ckpt"), "there is no checkpoint yet"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_a_line(copied, spoil, message):
    spoil(copied)
    with pytest.raises(UserError, match=message) as caught:
        make_task(diffusion_config(copied).task)
    assert str(caught.value).startswith(f"task.tokenizer={copied}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__size": 14}, "task.size=14: .*patch=4: does not divide frames of 14 x 14"),
        ({"data__frames": 6}, "task.model.mixer.window=6: .*use 5 or 7"),
        ({"task__given": 2}, "task.given=2: .*use 1 or 3"),
    ],
)
def test_sizes_that_do_not_suit_the_tokenizer_are_refused_in_a_line(trained, changes, message):
    with pytest.raises(UserError, match=message):
        make_task(diffusion_config(trained, **changes).task)


def test_a_run_is_bound_to_the_weights_it_was_made_with(trained, copied):
    config = diffusion_config(trained)
    make_task(config.task)
    digest = config.task.tokenizer_digest
    config.task.tokenizer = str(copied)  # the same weights elsewhere are as good
    make_task(config.task)
    assert config.task.tokenizer_digest == digest
    shutil.rmtree(copied)
    copied.mkdir()
    write_run(copied, tokenizer_config("quantizer=kl", seed=1))
    with pytest.raises(UserError, match=f"are not those that this run was made with, {digest}"):
        make_task(config.task)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Work folder of a tokenizer with 16 codes."""
    workdir = tmp_path_factory.mktemp("coded")
    write_run(workdir, tokenizer_config("quantizer=vq", task__quantizer__codes=16))
    return workdir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared set of clips of 5 frames in two classes: 3 for training, one for validation."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        path = folder / "clips" / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, 6 + number, height=12, width=16)
    with pytest.MonkeyPatch.context() as patch:  # processes take a second to start
        patch.setattr(prepare, "in_processes", lambda work, names, _: zip(names, map(work, names)))
        recipe = prepare.Recipe(size=12, frames=5, fps=0)
        prepare.prepare(folder / "clips", folder / "set", recipe, workers=1)
    return folder / "set"


def encode(workdir, src, out, *options):
    """Status of the command."""
    arguments = ["--workdir", str(workdir), "--src", str(src), "--out", str(out)]
    return tokenize.main([*arguments, *options])


def read_all(config, split="train"):
    source = data.make_source(config, split)
    return {source.name(index): source[index] for index in range(len(source))}


@pytest.mark.parametrize("kind", ["trained", "coded"])
def test_cached_latents_give_the_loss_of_their_pixels(kind, prepared, tmp_path, request):
    """Batch for batch, for the window that is deterministic: the whole of a prepared clip."""
    workdir = request.getfixturevalue(kind)
    assert encode(workdir, prepared, tmp_path / "set", "--batch=2") == 0
    shared = dict(data__batch_size=2, data__crop="center")
    pixels = dict(data__path=str(prepared), data__name="array_record", **shared)
    cached = dict(data__path=str(tmp_path / "set"), data__name="latents", **shared)
    losses, ids = [], []
    for changes in (pixels, cached):
        config = diffusion_config(workdir, "cond=class", **changes)
        task = make_task(config.task)
        task.check(data.make_source(config.data, "train"))
        clips = data.make_iterator(config.data, split="train", seed=3, batch_size=2)
        batches = [next(clips) for _ in range(3)]
        ids.append([batch["id"].tolist() for batch in batches])
        params, _ = jax.jit(task.init)(jax.random.key(0), batches[0])
        # Off the zeros that the network begins with, so that it matters what it sees.
        params = jax.tree.map(
            lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
        )
        loss = jax.jit(
            lambda batch, task=task, params=params: task.loss(
                params, batch, jax.random.key(5), step=0, frozen=task.frozen(), extra={}
            )[0]
        )
        losses.append([float(loss(batch)) for batch in batches])
        assert ("video" in batches[0]) == (changes is pixels)
    assert ids[0] == ids[1]
    assert len(set(losses[0])) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6 if kind == "coded" else 1e-4)


def test_held_out_clips_keep_their_pixels_and_their_scores(trained, prepared, tmp_path):
    assert encode(trained, prepared, tmp_path / "set") == 0
    shared = dict(data__crop="center")
    pixels = diffusion_config(
        trained, data__path=str(prepared), data__name="array_record", **shared
    )
    cached = diffusion_config(
        trained, data__path=str(tmp_path / "set"), data__name="latents", **shared
    )
    (wanted,), (found,) = (list(read_all(c.data, "validation").values()) for c in (pixels, cached))
    np.testing.assert_array_equal(found["video"], wanted["video"])
    assert found["latents"].shape == (3, 9, 8)
    assert found["label"] == wanted["label"] and found["caption"] == wanted["caption"] != ""


def test_a_shorter_window_is_the_beginning(trained, prepared, tmp_path):
    assert encode(trained, prepared, tmp_path / "set") == 0
    options = dict(data__path=str(tmp_path / "set"), data__name="latents", data__crop="center")
    whole = read_all(tokenizer_config(**options).data)
    first = read_all(tokenizer_config(**options, data__frames=3).data)
    for name, example in first.items():
        np.testing.assert_array_equal(example["latents"], whole[name]["latents"][:2])


def test_mirrored_clips_are_the_latents_of_mirrored_pixels(trained, prepared, tmp_path):
    assert encode(trained, prepared, tmp_path / "set", "--flip") == 0
    options = dict(data__name="latents", data__crop="center", data__flip=True)
    source = data.make_source(
        tokenizer_config(data__path=str(tmp_path / "set"), **options).data, "train"
    )
    pixels = data.make_source(
        tokenizer_config(data__path=str(prepared), data__name="array_record").data, "train"
    )
    frozen = open_tokenizer(str(trained))
    video = normalize(pixels[0]["video"])[None]
    plain, turned = (
        jax.jit(frozen.tokenizer.encode)(frozen.params, x)[0][0]
        for x in (video, video[:, :, :, ::-1])
    )
    drawn = [source.read(0, np.random.default_rng(seed))["latents"] for seed in range(12)]
    is_turned = [np.abs(z - turned).max() < 1e-4 for z in drawn]
    assert 0 < sum(is_turned) < 12
    for z, was_turned in zip(drawn, is_turned):
        np.testing.assert_allclose(z, turned if was_turned else plain, atol=1e-4)
    np.testing.assert_allclose(source[0]["latents"], plain, atol=1e-4)


def test_long_clips_in_pieces_are_as_in_one(trained, prepared, tmp_path, monkeypatch, capsys):
    """Videos of 6 .. 9 frames as clips of 7: a stream of pieces of 3, 2 and 2."""
    videos = prepared.parent / "clips"
    found = []
    for piece in (32, 2):
        monkeypatch.setattr(tokenize, "pieces", functools.partial(pieces, about=piece))
        out = tmp_path / f"pieces-{piece}"
        assert encode(trained, videos, out, "--frames=7", "--fps=0", "--batch=2") == 0
        options = dict(data__path=str(out), data__name="latents", data__crop="center")
        fields = tokenizer_config(**options, data__frames=7).data
        found.append(read_all(fields) | read_all(fields, "validation"))
    assert sorted(found[0]) == ["a/2.mp4#0", "b/1.mp4#0", "b/3.mp4#0"]
    for name, example in found[0].items():
        np.testing.assert_allclose(found[1][name]["latents"], example["latents"], atol=1e-5)
    assert "skipped a/0.mp4: has 6 frames, 7 are needed" in capsys.readouterr().out
    by_one, by_four = (
        functools.partial(
            pieces, SimpleNamespace(frames_for_latents=lambda n, g=g: 1 + (n - 1) * g)
        )
        for g in (1, 4)
    )
    assert by_one(7, about=2) == [3, 2, 2] and by_four(9, about=3) == by_four(9, about=7) == [5, 4]
    assert by_four(1001, about=34) == [33, *[32] * 30, 8] and by_one(1, about=2) == [1]


@pytest.mark.parametrize("kind", ["set", "videos"])
def test_a_killed_command_goes_on_where_it_stopped(kind, trained, prepared, tmp_path, monkeypatch):
    """The same bits, whether between items or in the middle of a video; nothing is done twice."""
    src, options = prepared, ("--batch=1",)
    if kind == "videos":
        src, options = tmp_path / "clips", ("--batch=1", "--frames=3", "--fps=0")
        src.mkdir()
        for name in "ab":
            write_clip(src / f"{name}.mp4", 8, height=12, width=16)  # of two clips each
    whole, out = tmp_path / "whole", tmp_path / "set"
    assert encode(trained, src, whole, *options) == 0
    monkeypatch.setattr(tokenize, "SAVE_SECONDS", 0)
    encoded, call = [], tokenize.Encoder.__call__

    def die_at_the_fourth(encoder, stream):
        encoded.append(call(encoder, stream))
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encoded[-1]

    monkeypatch.setattr(tokenize.Encoder, "__call__", die_at_the_fourth)
    assert encode(trained, src, out, *options) == 130
    journal = json.loads((tmp_path / "set.partial" / "journal.json").read_text())
    assert (journal["done"], journal["part"]) == ((3, 0) if kind == "set" else (1, 1))
    (tmp_path / "set.partial" / f"train-{len(journal['records']['train']):05d}").write_bytes(
        b"half"
    )
    assert not out.exists()
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        array_record.read_manifest(tmp_path / "set.partial", "latents")
    assert encode(trained, src, out, *options, "--flip") == 2  # another set
    assert encode(trained, src, out, *options) == 0
    assert len(encoded) == 5 and encoded[3] == encoded[4]  # four clips, one of them twice
    manifests = [array_record.read_manifest(path, "latents") for path in (whole, out)]
    assert manifests[0]["splits"]["train"]["records"] == (3 if kind == "set" else 2)
    for split in ("train", "validation"):
        counts = [manifest["splits"][split]["records"] for manifest in manifests]
        assert counts[0] == counts[1] > 0
        fields = dict(data__name="latents", data__crop="center")
        fields["data__frames"] = manifests[0]["frames"]
        sets = [
            read_all(tokenizer_config(data__path=str(path), **fields).data, split)
            for path in (whole, out)
        ]
        jax.tree.map(np.testing.assert_array_equal, *sets)


def test_the_same_clips_are_held_out_in_latents_and_in_pixels(trained, tmp_path, monkeypatch):
    """Also where those that would be are too short, or break off behind clips that can be read."""
    src = tmp_path / "clips"
    src.mkdir()
    order = clips.Splits([f"{number}.mkv" for number in range(15)]).order
    for place, name in enumerate(order):
        write_clip(src / name, 3 if place == 0 else 10, height=12, width=16, gop=1)
    content = (src / order[1]).read_bytes()
    (src / order[1]).write_bytes(content[: -len(content) // 8] + bytes(len(content) // 8))
    monkeypatch.setattr(
        prepare, "in_processes", lambda work, names, _: zip(names, map(work, names))
    )
    recipe = prepare.Recipe(size=12, frames=5, fps=0)
    skipped = prepare.prepare(src, tmp_path / "pixels", recipe, workers=1)["skipped"]
    assert [entry["name"] for entry in skipped] == order[:2]
    assert encode(trained, src, tmp_path / "latents", "--fps=0") == 0
    found = {}
    for name, path in (("array_record", "pixels"), ("latents", "latents")):
        options = dict(data__name=name, data__path=str(tmp_path / path), data__crop="center")
        fields = tokenizer_config(**options).data
        found[name] = [set(read_all(fields, split)) for split in ("train", "validation")]
    assert found["latents"] == found["array_record"]
    assert {name.partition("#")[0] for name in found["latents"][1]} == set(order[2:4])
    options = dict(data__name="folder", data__path=str(src), data__frames=3)
    held_out = set(read_all(tokenizer_config(**options).data, "validation"))
    assert held_out.isdisjoint(name.partition("#")[0] for name in found["latents"][0])


@pytest.mark.parametrize("lengths, split", [((9,), "validation"), ((9, 3, 3), "train")])
def test_a_set_without_a_split_is_refused_in_a_line(
    trained, tmp_path, monkeypatch, capsys, lengths, split
):
    src = tmp_path / "clips"
    src.mkdir()
    for number, frames in enumerate(lengths):
        write_clip(src / f"{number}.mp4", frames, height=12, width=16)
    monkeypatch.setattr(
        prepare, "in_processes", lambda work, names, _: zip(names, map(work, names))
    )
    options = ["--size=12", "--frames=5", "--fps=0"]
    assert encode(trained, src, tmp_path / "latents", *options) == 2
    arguments = ["--src", str(src), "--out", str(tmp_path / "pixels"), "--workers=1", *options]
    assert prepare.main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert f"--src={src}: gives no clips for {split}; add videos" in errors[0]
    assert not (tmp_path / "latents").exists() and not (tmp_path / "pixels").exists()


def test_names_need_not_be_utf_8(trained, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    for name in (b"\xff.mp4", b"\xfe.mp4"):
        (tmp_path / "clips" / os.fsdecode(name)).write_bytes(b"")
    assert encode(trained, tmp_path / "clips", tmp_path / "latents") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "skipped 2 of 2 files" in error and "\\xff.mp4 is empty" in error


@pytest.fixture(scope="module")
def cached(coded, prepared, tmp_path_factory):
    """The prepared set in tokens of `coded`."""
    out = tmp_path_factory.mktemp("cached") / "set"
    assert encode(coded, prepared, out) == 0
    return out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__frames": 7}, "data.frames=7: the set stores 5 .* use 5"),
        ({"data__frames": 4}, "data.frames=4: .* use 3"),
        ({"data__size": 8}, "data.size=8: the set was encoded at 12"),
        ({"data__stride": 2}, "data.stride=2: .* use 1"),
        ({"data__crop": "random"}, "data.crop='random': .*use center"),
        ({"data__flip": True}, "data.flip=True: the set has no mirror images"),
        ({"data__name": "array_record"}, "holds latents, not h264"),
    ],
)
def test_windows_that_were_not_encoded_are_refused(coded, cached, changes, message):
    options = dict(data__path=str(cached), data__name="latents", data__crop="center")
    with pytest.raises(UserError, match=message):
        data.make_source(tokenizer_config(**{**options, **changes}).data, "train")


def test_latents_of_another_tokenizer_are_refused(trained, cached):
    options = dict(data__path=str(cached), data__name="latents", data__crop="center")
    config = diffusion_config(trained, **options)
    source = data.make_source(config.data, "train")
    with pytest.raises(UserError, match="holds latents of the tokenizer"):
        make_task(config.task).check(source)
    config.task.update(tokenizer="", tokenizer_digest="", patch=4)
    with pytest.raises(UserError, match=r"task\.tokenizer is none"):
        make_task(config.task).check(source)
    with pytest.raises(UserError, match="tokenizers learn from video"):
        make_task(tokenizer_config().task).check(source)


@pytest.mark.slow
def test_trains_and_scores_from_cached_tokens(coded, cached, tmp_path):
    options = dict(data__path=str(cached), data__name="latents", data__crop="center")
    train(diffusion_config(coded, **options), str(tmp_path))
    run = open_run(str(tmp_path))
    with jax.set_mesh(run.mesh):
        scores, clips = evaluate.score(run, batches=1)
    assert clips == 1 and np.isfinite(scores["psnr"][3:]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--frames=6"], "--frames=6: .* use 5 or 7"),
        (["--size=10"], "--size=10.*does not divide frames of 10 x 10"),
        (["--batch=0"], "--batch=0"),
        (["--src=/nowhere"], "--src='/nowhere': no such directory"),
        (["--workdir=/nowhere"], "task.tokenizer=/nowhere: "),
        (["--fps=-1"], "--fps=-1"),
        (["--size=0"], "--size=0: must be at least 1"),
        (["--frames=0"], "--frames=0: must be at least 1"),
    ],
)
def test_bad_options_of_the_command_are_one_line(
    trained, prepared, tmp_path, capsys, options, message
):
    assert encode(trained, prepared, tmp_path / "set", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(f"error: .*{message}", error)
    assert not (tmp_path / "set").exists()


def test_frames_without_loss():
    clip = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    writer = video.ChunkWriter(5, 12, 12, lossless=True)
    writer.write(clip[:3])
    writer.write(clip[3:])
    np.testing.assert_array_equal(video.decode_chunk(writer.finish(), range(5), 12), clip)
