"""LPIPS against a plain loop in float64, on random weights in the names of the public file."""

import numpy as np
import pytest
import scipy.signal

from jaxvid import weights
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


def plain(state, a_HWC, b_HWC):
    """The distance of two pictures, one convolution of one channel at a time."""
    by_index = {int(n.split(".")[2]): n for n in state if n.startswith("net") and "weight" in n}
    feature_maps = []
    for picture in (a_HWC, b_HWC):
        x = ((picture - np.array(lpips.SHIFT)) / np.array(lpips.SCALE)).transpose(2, 0, 1)
        found, index = [], 0
        for stage, channels in enumerate(lpips.STAGES):
            if stage:
                C, H, W = x.shape
                x = x.reshape(C, H // 2, 2, W // 2, 2).max((2, 4))
                index += 1
            for _ in channels:
                name = by_index[index]
                kernel = state[name].astype(np.float64)
                flipped = kernel[:, :, ::-1, ::-1]
                x = np.stack(
                    [
                        sum(scipy.signal.convolve2d(c, k, "same") for c, k in zip(x, kernels))
                        for kernels in flipped
                    ]
                )
                x = np.maximum(x + state[name.replace("weight", "bias")][:, None, None], 0)
                index += 2
            found.append(x / (np.sqrt(np.square(x).sum(0)) + 1e-10))
        feature_maps.append(found)
    return sum(
        (np.square(u - v) * state[f"lin{stage}.model.1.weight"][0]).sum(0).mean()
        for stage, (u, v) in enumerate(zip(*feature_maps))
    )


@pytest.mark.slow
def test_distance_is_that_of_a_plain_loop(state):
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)
    params = lpips.convert(state)
    wanted = [plain(state, *pair) for pair in zip(a[:1], b[:1])]
    np.testing.assert_allclose(lpips.distance(params, a, b)[:1], wanted, rtol=1e-3)


def test_equal_pictures_are_no_distance_apart_and_names_may_be_torchvisions(state):
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
    renamed = {
        (f"features.{n.split('.')[2]}.{n.split('.')[3]}" if n.startswith("net") else n): x
        for n, x in state.items()
    }
    params = lpips.convert(renamed)
    apart = lpips.distance(params, np.concatenate([a, a]), np.concatenate([a, b]))
    assert apart[0] == 0 and apart[1] > 0.01
    assert len(params["layers"]) == 13 and len(params["heads"]) == 5
    count = sum(layer["kernel"].size + layer["bias"].size for layer in params["layers"])
    assert count == 14_714_688  # the convolutions of VGG-16


def test_files_are_read_and_others_refused(state, tmp_path):
    np.savez(tmp_path / "w.npz", **state)
    lpips.convert(weights.read(tmp_path / "w.npz"))
    with pytest.raises(UserError, match=r"file: holds no 'lin2\.model\.1\.weight'"):
        lpips.convert({n: x for n, x in state.items() if "lin2" not in n}, "file")
    with pytest.raises(UserError, match="has shape"):
        lpips.convert({**state, "lin0.model.1.weight": np.zeros((1, 3, 1, 1))})
    with pytest.raises(UserError, match=r"data\.size=12: LPIPS needs 16"):
        lpips.features({"layers": [], "heads": []}, np.zeros((1, 12, 12, 3)))
