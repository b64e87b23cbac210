"""Runs that start from the weights of other runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.models.stem import Head, Stem, inflate
from jaxvid.runs import make_task, open_weights
from jaxvid.training.adopt import adopt
from jaxvid.training.state import TrainState
from tests.tokenizer_runs import tokenizer_config, write_run

pytestmark = pytest.mark.slow

rng = np.random.default_rng(0)


@pytest.mark.parametrize("share", ["average", "first"])
@pytest.mark.parametrize("norm", [False, True])
def test_inflated_weights_treat_a_still_group_as_its_image(share, norm):
    video = np.repeat(rng.standard_normal((1, 1, 8, 8, 3), np.float32), 4, axis=1)
    stem = Stem(6, patch=4, t_patch=4, patch_norm=norm)
    head = Head(patch=4, t_patch=4)
    both = np.concatenate([video[:, :1], video], axis=1)

    def random_params(module, *arguments):
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))["params"]
        return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)

    def apply(module, params, *arguments):
        return jax.jit(module.apply, static_argnums=2)({"params": params}, *arguments)

    embed = inflate("embed", random_params(stem, both, True), share)
    image, group = apply(stem, embed, video[:, :1], True), apply(stem, embed, video, False)
    np.testing.assert_allclose(group, image, atol=2e-5)
    x_BTHWD = rng.standard_normal((1, 1, 2, 2, 6), np.float32)
    pixels = inflate("pixels", random_params(head, np.repeat(x_BTHWD, 2, axis=1), True), share)
    still, moving = apply(head, pixels, x_BTHWD, True), apply(head, pixels, x_BTHWD, False)
    assert moving.shape[1] == 4
    np.testing.assert_allclose(moving, np.repeat(still, 4, axis=1), atol=1e-6)


def first_state(config):
    """The state that a run of this config would start with."""
    task = make_task(config.task)
    params, extra = jax.jit(lambda: task.init(jax.random.key(5), None))()
    return task, TrainState(*[jnp.zeros((), jnp.int32)] * 2, params, {}, params, extra)


def start_from(workdir, config):
    """(weights of the run, state of a run of `config` that starts from them, what was taken)."""
    task, state = first_state(config)
    fields, _, weights = open_weights(str(workdir), config.task.name, "init_from")
    return weights, *adopt(state, task.inflate(weights, fields))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Work folder of a tokenizer of images, with a codebook."""
    workdir = tmp_path_factory.mktemp("images")
    options = {"data__frames": 1, "task__quantizer__codes": 16}
    write_run(workdir, tokenizer_config("quantizer=vq", **options))
    return workdir


def test_clips_start_from_images_with_inflated_weights(images):
    config = tokenizer_config("quantizer=vq", task__quantizer__codes=16)
    weights, state, line = start_from(images, config)
    network = jax.device_get(state.params["network"])
    for name in ("encode_space", "decode_time", "to_latent"):
        jax.tree.map(np.testing.assert_array_equal, network[name], weights["network"][name])
    image, group = (network["embed"][part]["kernel"] for part in ("image", "group"))
    halves = group.reshape(3, 2, 16, -1)
    np.testing.assert_array_equal(halves[:, 0], halves[:, 1])
    np.testing.assert_allclose(halves.sum(1).reshape(image.shape), image, rtol=1e-6)
    np.testing.assert_array_equal(
        state.extra["codebook"]["code_VZ"], weights["codebook"]["code_VZ"]
    )
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert "all but" not in line


@pytest.mark.parametrize("stem", ["shared", "split"])
def test_haar_bands_of_time_cannot_be_inflated(stem):
    options = {"task__network__patchify": "haar", "task__network__stem": stem}
    alone = tokenizer_config(data__frames=1, **options)
    task = make_task(tokenizer_config(**options).task)
    if stem == "shared":
        shapes, _ = jax.eval_shape(lambda: make_task(alone.task).init(jax.random.key(0), None))
        assert task.inflate(shapes, alone.task) is shapes
    else:
        with pytest.raises(UserError, match=r"^inflation=average: .* Haar bands .* use none"):
            task.inflate({"network": {}}, alone.task)


def test_gaussian_latents_start_from_codes_with_a_new_last_layer(images):
    config = tokenizer_config("quantizer=kl", data__frames=1)
    weights, state, line = start_from(images, config)
    network = state.params["network"]
    assert network["to_latent"]["kernel"].shape == (16, 16)
    assert line.endswith("all but network/to_latent/bias, network/to_latent/kernel")
    np.testing.assert_array_equal(
        network["embed"]["image"]["kernel"], weights["network"]["embed"]["image"]["kernel"]
    )
    _, before = first_state(config)
    np.testing.assert_array_equal(
        network["to_latent"]["kernel"], before.params["network"]["to_latent"]["kernel"]
    )


def test_the_stages_of_omnitokenizer_chain(tmp_path):
    """Images, then clips, then Gaussian latents: each from the weights of the stage before."""
    before, weights = "", None
    for stage in ("image", "joint", "kl"):
        changes = {"data__frames": 1 if stage == "image" else 5, "task__gan__width": 8}
        if stage != "image":
            changes["task__sizes"] = (8,)
        if stage != "kl":
            changes["task__quantizer__codes"] = 16
        config = tokenizer_config(f"arch=omnitokenizer,stage={stage}", **changes)
        if before:
            weights, state, line = start_from(before, config)
            network = jax.device_get(state.params["network"])
        if stage == "joint":
            for name in ("embed", "pixels"):
                grown = inflate(name, weights["network"][name], "average")
                jax.tree.map(np.testing.assert_array_equal, network[name], grown)
            assert "discriminator/video" in line and "network" not in line
        if stage == "kl":
            old = dict(weights["network"])
            assert network.pop("to_latent")["kernel"].shape != old.pop("to_latent")["kernel"].shape
            jax.tree.map(np.testing.assert_array_equal, network, old)
            assert line.endswith("all but network/to_latent/bias, network/to_latent/kernel")
        before = tmp_path / stage
        write_run(before, config)


def test_another_task_or_weights_that_do_not_fit_are_refused(images):
    with pytest.raises(UserError, match=r"init_from=.*: holds a run of task 'tokenizer'"):
        open_weights(str(images), "ar_diffusion", "init_from")
    _, state = first_state(tokenizer_config("quantizer=kl"))
    with pytest.raises(UserError, match="no array of that run has a name and shape"):
        adopt(state, {"other": np.zeros(3)})
