"""LPIPS against a plain loop in float64, on random weights named as in the public files."""

import jax
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.metrics import lpips

INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions in torchvision


@pytest.fixture(scope="module")
def state():
    """Arrays named as in the state dict of lpips.LPIPS(net="vgg")."""
    rng = np.random.default_rng(0)
    arrays, inputs = {}, 3
    slices = np.repeat([1, 2, 3, 4, 5], [2, 2, 3, 3, 3])
    for index, stage, outputs in zip(INDICES, slices, np.concatenate(lpips.STAGES)):
        kernel = rng.standard_normal((outputs, inputs, 3, 3)) * (2 / inputs / 9) ** 0.5
        arrays[f"net.slice{stage}.{index}.weight"] = kernel.astype(np.float32)
        arrays[f"net.slice{stage}.{index}.bias"] = rng.standard_normal(outputs).astype(np.float32)
        inputs = outputs
    for stage, channels in enumerate(lpips.STAGES):
        head = rng.uniform(0, 1, (1, channels[-1], 1, 1)).astype(np.float32)
        arrays[f"lin{stage}.model.1.weight"] = head
    return arrays


def convolve(x_CHW, kernel):
    """The 3 x 3 convolution with zeros around the image, one tap after another."""
    _, H, W = x_CHW.shape
    padded = np.pad(x_CHW, ((0, 0), (1, 1), (1, 1)))
    taps = np.ndindex(3, 3)
    return sum(
        np.tensordot(kernel[:, :, i, j], padded[:, i : i + H, j : j + W], 1) for i, j in taps
    )


def plain(state, a_HWC, b_HWC):
    """The distance of two images in float64."""
    by_index = {int(n.split(".")[2]): n for n in state if n.startswith("net") and "weight" in n}
    feature_maps = []
    for image in (a_HWC, b_HWC):
        x = ((image - np.array(lpips.SHIFT)) / np.array(lpips.SCALE)).transpose(2, 0, 1)
        stages, index = [], 0
        for stage, channels in enumerate(lpips.STAGES):
            if stage:
                C, H, W = x.shape
                x = x.reshape(C, H // 2, 2, W // 2, 2).max((2, 4))
                index += 1
            for _ in channels:
                name = by_index[index]
                x = convolve(x, state[name].astype(np.float64))
                x = np.maximum(x + state[name.replace("weight", "bias")][:, None, None], 0)
                index += 2
            stages.append(x / (np.sqrt(np.square(x).sum(0)) + 1e-10))
        feature_maps.append(stages)
    return sum(
        (np.square(u - v) * state[f"lin{stage}.model.1.weight"][0]).sum(0).mean()
        for stage, (u, v) in enumerate(zip(*feature_maps))
    )


def test_distance_is_a_plain_loop_for_both_namings(state):
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)
    b[1] = a[1]
    renamed = {
        (f"features.{n.split('.')[2]}.{n.split('.')[3]}" if n.startswith("net") else n): x
        for n, x in state.items()
    }
    params = lpips.convert(state)
    jax.tree.map(np.testing.assert_array_equal, params, lpips.convert(renamed))
    distance_B = jax.jit(lpips.distance)(params, a, b)
    np.testing.assert_allclose(distance_B[0], plain(state, a[0], b[0]), rtol=1e-3)
    assert distance_B[0] > 0.01 and distance_B[1] == 0
    assert len(params["layers"]) == 13 and len(params["heads"]) == 5
    count = sum(layer["kernel"].size + layer["bias"].size for layer in params["layers"])
    assert count == 14_714_688  # the convolutions of VGG-16


def test_refusals(state):
    without = {n: x for n, x in state.items() if "lin2" not in n}
    misshapen = {**state, "lin0.model.1.weight": np.zeros((1, 3, 1, 1))}
    params = {"layers": [], "heads": []}
    for call, message in (
        (lambda: lpips.convert(without, "file"), r"^file: holds no 'lin2\.model\.1\.weight'"),
        (lambda: lpips.convert(misshapen, "file"), r"^file: 'lin0.* has shape \(1, 3, 1, 1\), not"),
        (lambda: lpips.features(params, np.zeros((1, 12, 17, 3))), "^size=12: LPIPS needs 16"),
    ):
        with pytest.raises(UserError, match=message):
            call()
