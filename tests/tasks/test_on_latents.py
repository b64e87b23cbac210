"""AR-Diffusion on the latents of a trained tokenizer, encoded in the step or before."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ar_diffusion
from jaxvid import data
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError
from jaxvid.evaluators.held_out import open_held_out
from jaxvid.models.tokenizer import moments, update_moments
from jaxvid.runs import make_task, open_run, open_tokenizer
from jaxvid.train import train
from tests.tokenizer_runs import (
    FAST,
    coded,
    encoded,
    gaussian,
    prepared,
    tokenizer_config,
    write_run,
)
from tests.videos import data_config

pytestmark = pytest.mark.slow


def diffusion_config(workdir, options="", **changes):
    """A model of the latents of the tokenizer in `workdir`."""
    config = ar_diffusion.get_config(options)
    model = {"model.width": 16, "model.depth": 1, "model.heads": 2, "given": 3, "train_frames": 5}
    sampler = {"sampler.steps": 2, "sampler.s": 2, "tokenizer": str(workdir)}
    config.update_from_flattened_dict(
        FAST
        | {f"task.{name}": value for name, value in (model | sampler).items()}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.lock()


def clips_of(name, path, **changes):
    """Fields of config.data for the whole clips of a set."""
    fields = dict(name=name, path=str(path), crop="center") | changes
    return {f"data__{field}": value for field, value in fields.items()}


def test_moments_are_those_of_all_batches():
    rng = np.random.default_rng(0)
    z_SBTNZ = 0.3 * rng.standard_normal((5, 2, 3, 4, 6)).astype(np.float32) + 7 * np.arange(6.0)
    measured, update = moments(6), jax.jit(update_moments)
    for z_BTNZ in z_SBTNZ:
        measured = update(measured, z_BTNZ)
    np.testing.assert_allclose(measured["mean_Z"], z_SBTNZ.mean((0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(measured["var"], z_SBTNZ.var((0, 1, 2, 3)).mean(), rtol=1e-4)


def test_moments_forget_old_batches():
    measured, update = moments(2), jax.jit(update_moments)
    for scale in [10.0] * 5 + [0.5] * 900:
        measured = update(measured, scale * jnp.array([[[[-1.0, 1.0], [1.0, -1.0]]]]))
    np.testing.assert_allclose(measured["var"], 0.25, rtol=0.02)


def test_latents_have_unit_scale_and_decode_alike():
    frozen = open_tokenizer(str(gaussian()))
    batch = next(data.make_iterator(tokenizer_config().data, split="train", seed=1, batch_size=16))
    video = normalize(batch["video"])
    z_BTNZ, _ = jax.jit(frozen.encode)(frozen.params, video)
    np.testing.assert_allclose(z_BTNZ.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.square(z_BTNZ).mean(), 1, rtol=1e-4)
    plain, _ = jax.jit(frozen.tokenizer.encode)(frozen.params, video)
    assert np.abs(plain.mean((0, 1, 2))).max() > 0.5  # the scale does change them
    decoded, _ = jax.jit(frozen.decode, static_argnums=2)(frozen.params, z_BTNZ, (3, 3))
    expected, _ = jax.jit(frozen.tokenizer.decode, static_argnums=2)(frozen.params, plain, (3, 3))
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


def test_from_pixels_to_a_stream(tmp_path):
    config = diffusion_config(gaussian())
    state = train(config, str(tmp_path))
    assert state.params["model"]["head"]["kernel"].shape[-1] == 8
    assert config.task.tokenizer_digest == open_tokenizer(str(gaussian())).digest
    run = open_run(str(tmp_path))
    cond = {"num": 2, "first_frames": np.zeros((2, 3, 12, 12, 3), np.uint8)}
    rng = jax.random.key(0)
    with jax.set_mesh(run.mesh):
        video = run.task.sample(run.params, rng, cond, frozen=run.frozen, frames=9)
        pieces, state = [], None
        for z_BTNC in run.task.stream(run.params, rng, cond, frozen=run.frozen, frames=9):
            piece, state = run.task.decode(run.frozen, z_BTNC, state)
            pieces.append(piece)
    assert [piece.shape[1] for piece in pieces] == [3, 2, 2, 2]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), video, atol=1e-5)


def test_weights_of_the_tokenizer_are_an_argument():
    """A captured weight would be a constant of the compiled program."""
    config = diffusion_config(gaussian())
    task = make_task(config.task)
    batch = data.batch_shapes(config.data, 2)
    params, _ = jax.eval_shape(functools.partial(task.init, jax.random.key(0)), batch)

    def loss(params, frozen, batch):
        return task.loss(params, batch, jax.random.key(0), step=0, frozen=frozen, extra={})[0]

    closed = jax.make_jaxpr(loss)(params, task.frozen(), batch)
    weights = {leaf.shape for leaf in jax.tree.leaves(task.frozen()) if leaf.size > 100}
    assert weights.isdisjoint(np.shape(constant) for constant in closed.consts)
    gradient = jax.eval_shape(jax.grad(loss), params, task.frozen(), batch)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


@pytest.mark.parametrize("tokenizer", [gaussian, coded])
def test_the_loss_is_that_of_pixels(tokenizer):
    """Batch by batch, for whole clips of a prepared set."""
    losses, ids, params = [], [], None
    for fields in (
        clips_of("array_record", prepared(), batch_size=2),
        clips_of("latents", encoded(tokenizer()), batch_size=2),
    ):
        config = diffusion_config(tokenizer(), "cond=class", **fields)
        task = make_task(config.task)
        task.check(data.make_source(config.data, "train"))
        clips = data.make_iterator(config.data, split="train", seed=3, batch_size=2)
        batches = [next(clips) for _ in range(3)]
        ids.append([batch["id"].tolist() for batch in batches])
        assert ("video" in batches[0]) == (fields["data__name"] == "array_record")
        if params is None:
            # Added to the zeros of the initialisation, so that the output depends on the input.
            params = jax.tree.map(
                lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape),
                jax.jit(task.init)(jax.random.key(0), batches[0])[0],
            )
        loss = jax.jit(functools.partial(task.loss, step=0, extra={}))
        rng, frozen = jax.random.key(5), task.frozen()
        losses.append([float(loss(params, batch, rng, frozen=frozen)[0]) for batch in batches])
    assert ids[0] == ids[1]
    assert len(set(losses[0])) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6 if tokenizer is coded else 1e-4)


def test_trains_and_scores_from_stored_tokens(tmp_path):
    train(diffusion_config(coded(), **clips_of("latents", encoded(coded()))), str(tmp_path))
    run = open_run(str(tmp_path))
    with jax.set_mesh(run.mesh), open_held_out(run) as clips:
        [psnr] = clips.scores(run.params, run.frozen, 1)["psnr"]
    np.testing.assert_array_equal(np.isnan(psnr), [True] * 3 + [False] * 2)


# Refusals


@pytest.fixture
def copied(tmp_path):
    """A copy of the tokenizer's folder, to be damaged."""
    return shutil.copytree(gaussian(), tmp_path / "tokenizer")


def rename_task(workdir):
    document = json.loads((workdir / "config.json").read_text())
    document["task"]["name"] = "ar_diffusion"
    (workdir / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "no such file; is this the folder of a run"),
        (
            rename_task,
            "holds a run of task 'ar_diffusion'; name the folder of a run of 'tokenizer'",
        ),
        (lambda workdir: (workdir / "config.json").write_text("{}"), "config: has no section task"),
        (lambda workdir: shutil.rmtree(workdir / "ckpt"), "there is no checkpoint yet"),
    ],
)
def test_other_folders_are_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=f"^task.tokenizer={copied}: .*{message}") as caught:
        make_task(diffusion_config(copied).task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__size": 14}, "data.size=14: .*patch=4: does not divide frames of 14 x 14"),
        ({"data__frames": 6}, "data.frames=6: .*use 5 or 7"),
        ({"task__model__mixer__window": 4}, "task.model.mixer.window=4: .*use 3 or 5"),
        ({"task__given": 2}, "task.given=2: .*use 1 or 3"),
    ],
)
def test_unsuitable_sizes_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make_task(diffusion_config(gaussian(), **changes).task)


def test_a_run_is_bound_to_its_weights(copied):
    config = diffusion_config(copied)
    digest = open_tokenizer(str(gaussian())).digest
    assert make_task(config.task).binding() == {"tokenizer_digest": digest}  # wherever they are
    config.task.tokenizer_digest = digest
    make_task(config.task)
    shutil.rmtree(copied)
    copied.mkdir()
    write_run(copied, tokenizer_config("quantizer=kl", seed=1))
    with pytest.raises(UserError, match=f"but this run was made with {digest}"):
        make_task(config.task)


def test_latents_of_another_tokenizer_are_refused():
    fields = data_config("latents", encoded(coded()), frames=5, size=12)
    source = data.make_source(fields, "train")
    config = diffusion_config(gaussian())
    with pytest.raises(UserError, match="holds latents of the tokenizer"):
        make_task(config.task).check(source)
    config.task.update(tokenizer="", tokenizer_digest="", patch=4)
    with pytest.raises(UserError, match="tokenizer: is none"):
        make_task(config.task).check(source)
    with pytest.raises(UserError, match="learns from video"):
        make_task(tokenizer_config().task).check(source)
