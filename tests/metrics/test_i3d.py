"""I3D without its weights: shapes, sizes, import of both public namings, frozen batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.metrics import i3d

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def shapes():
    video = jax.ShapeDtypeStruct((1, 9, 224, 224, 3), jnp.float32)
    return jax.eval_shape(i3d.I3D().init, jax.random.key(0), video)["params"]


def draw(*shape):
    return rng.standard_normal(shape, np.float32)


def units(params):
    """(path, params) of every `Unit3D`."""
    for name, unit in params.items():
        if name == "logits":
            continue
        if "conv" in unit:
            yield (name,), unit
        else:
            yield from (((name, branch), inner) for branch, inner in unit.items())


def stored(shapes, naming):
    """Random arrays as a public file has them."""
    arrays = {}
    for path, unit in units(shapes):
        kernel = draw(*unit["conv"]["kernel"].shape)
        beta, mean, gamma = draw(3, kernel.shape[-1])
        variance = rng.uniform(0.5, 2, kernel.shape[-1]).astype(np.float32)
        if naming == "torch":
            name = i3d._STEM.get(path[0]) or f"Mixed_{path[0]}.{path[1]}"
            arrays[f"{name}.conv3d.weight"] = kernel.transpose(4, 3, 0, 1, 2)
            vectors = dict(bias=beta, running_mean=mean, running_var=variance, weight=gamma)
            arrays |= {f"{name}.bn.{part}": vector for part, vector in vectors.items()}
        else:
            name = i3d._STEM.get(path[0]) or f"Mixed_{path[0]}/{i3d._BRANCHES[path[1]]}"
            if path == ("5b", "b2b"):
                name = name.replace("0b_3x3", "0a_3x3")
            name = f"RGB/inception_i3d/{name}"
            arrays[f"{name}/conv_3d/w"] = kernel
            vectors = dict(beta=beta, moving_mean=mean, moving_variance=variance)
            for part, vector in vectors.items():
                arrays[f"{name}/batch_norm/{part}"] = vector.reshape(1, 1, 1, 1, -1)
    kernel, bias = draw(*shapes["logits"]["kernel"].shape), draw(400)
    if naming == "torch":
        arrays["logits.conv3d.weight"] = kernel.transpose(4, 3, 0, 1, 2)
        arrays["logits.conv3d.bias"] = bias
    else:
        arrays["RGB/inception_i3d/Logits/Conv3d_0c_1x1/conv_3d/w"] = kernel
        arrays["RGB/inception_i3d/Logits/Conv3d_0c_1x1/conv_3d/b"] = bias
    return arrays


def test_the_network_has_the_published_size(shapes):
    """57 convolutions, 12.7 M numbers with three vectors per norm, 400 logits."""
    found = list(units(shapes))
    kernels = sum(unit["conv"]["kernel"].size for _, unit in found)
    vectors = 3 * sum(unit["shift"].size for _, unit in found)
    logits = shapes["logits"]["kernel"].size + 400
    assert len(found) == 57 and shapes["logits"]["kernel"].shape[-2:] == (1024, 400)
    assert round((kernels + vectors + logits) / 1e6, 1) == 12.7


@pytest.mark.parametrize("naming", ["torch", "tensorflow"])
def test_both_namings_are_imported(shapes, naming):
    arrays = stored(shapes, naming)
    params = i3d.convert(arrays)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    needed = [name for name in arrays if not name.endswith("bn.weight")]  # gamma may be left out
    for name in [*needed[:4], *needed[-2:]]:
        with pytest.raises(UserError, match="file: holds no"):
            i3d.convert({other: x for other, x in arrays.items() if other != name}, "file")


def test_folded_norm_is_batch_norm(shapes):
    arrays = stored(shapes, "torch")
    unit = i3d.convert(arrays)["2b"]
    x = draw(1, 2, 3, 3, 64)
    found = jax.jit(i3d.Unit3D(64).apply)({"params": unit}, x)
    kernel = arrays["Conv3d_2b_1x1.conv3d.weight"][:, :, 0, 0, 0].T
    bn = {part: arrays[f"Conv3d_2b_1x1.bn.{part}"] for part in ("weight", "bias")}
    mean, variance = (arrays[f"Conv3d_2b_1x1.bn.running_{part}"] for part in ("mean", "var"))
    expected = (x @ kernel - mean) / np.sqrt(variance + 1e-3) * bn["weight"] + bn["bias"]
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-3)


def test_resize_has_the_grid_of_tensorflow():
    """Twice as large: every second pixel is an old pixel, the others are means."""
    video = draw(1, 1, 3, 4, 1)
    large = i3d.resize(video, 8)[0, 0, :, :, 0]
    picture = video[0, 0, :, :, 0]
    np.testing.assert_allclose(large[0, ::2], picture[0], atol=1e-6)
    np.testing.assert_allclose(large[0, 1], picture[0, :2].mean(), atol=1e-6)
    np.testing.assert_allclose(large[0, 7], picture[0, 3], atol=1e-6)
    np.testing.assert_allclose(
        large[3, 0], picture[1, 0] * 0.875 + picture[2, 0] * 0.125, atol=1e-6
    )
    np.testing.assert_allclose(
        i3d.resize(video, 2)[0, 0, 1, 1, 0], picture[1:3, 2].mean(), atol=1e-6
    )


def test_features_and_refusals(shapes):
    video = jax.ShapeDtypeStruct((2, 16, 48, 64, 3), jnp.float32)
    assert jax.eval_shape(i3d.features, shapes, video).shape == (2, 400)
    with pytest.raises(UserError, match=r"^frames=8: I3D needs 9"):
        i3d.features(None, np.zeros((1, 8, 24, 24, 3)))
