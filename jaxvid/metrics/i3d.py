"""I3D (Carreira and Zisserman 2017), the feature network of FVD. Users bring the weights.

Inception v1 inflated over time, trained on Kinetics-400. The features are its 400 logits, averaged
over time (Unterthiner et al. 2018).
"""

import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.weights import take

SIZE, MIN_FRAMES, CLASSES = 224, 9, 400
BATCH_NORM_EPSILON = 1e-3

# Channels of the branches: 1 x 1; 1 x 1 then 3 x 3 x 3; 1 x 1 then 3 x 3 x 3; pooling then 1 x 1.
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


class Unit3D(nn.Module):
    """Convolution, batch norm with fixed statistics and ReLU.

    The norm is a scale and a shift per channel; `convert` computes them from its four vectors.
    side: of the cubic kernel.
    """

    features: int
    side: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x_BTHWC):
        x_BTHWC = nn.Conv(
            self.features,
            (self.side,) * 3,
            (self.stride,) * 3,
            use_bias=False,
            precision="highest",
            name="conv",
        )(x_BTHWC)
        scale_C = self.param("scale", nn.initializers.ones, (self.features,))
        shift_C = self.param("shift", nn.initializers.zeros, (self.features,))
        return nn.relu(x_BTHWC * scale_C + shift_C)


class Mixed(nn.Module):
    """Four parallel branches of an Inception block; channels: a row of `MIXED`."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x_BTHWC):
        c = self.channels
        b1a = Unit3D(c[1], name="b1a")(x_BTHWC)
        b2a = Unit3D(c[3], name="b2a")(x_BTHWC)
        branches = [
            Unit3D(c[0], name="b0")(x_BTHWC),
            Unit3D(c[2], side=3, name="b1b")(b1a),
            Unit3D(c[4], side=3, name="b2b")(b2a),
            Unit3D(c[5], name="b3b")(_pool(x_BTHWC, (3, 3, 3), (1, 1, 1))),
        ]
        return jnp.concatenate(branches, axis=-1)


class I3D(nn.Module):
    """video_BTHWC in [-1, 1] at 224 x 224, 9 frames or more -> logits [B, 400] float32."""

    @nn.compact
    def __call__(self, video_BTHWC):
        x = Unit3D(64, side=7, stride=2, name="1a")(video_BTHWC.astype(jnp.float32))
        x = _pool(x, (1, 3, 3), (1, 2, 2))
        x = Unit3D(64, name="2b")(x)
        x = Unit3D(192, side=3, name="2c")(x)
        x = _pool(x, (1, 3, 3), (1, 2, 2))
        for name, channels in MIXED.items():
            if name == "4b":
                x = _pool(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = _pool(x, (2, 2, 2), (2, 2, 2))
            x = Mixed(channels, name=name)(x)
        x = nn.avg_pool(x, (2, *x.shape[2:4]), padding="VALID")
        return nn.Conv(CLASSES, (1, 1, 1), precision="highest", name="logits")(x).mean((1, 2, 3))


def features(params: dict, video_BTHWC: jax.Array) -> jax.Array:
    """Clips in [-1, 1] of any size -> features [B, 400]; UserError for fewer than 9 frames.

    Frames are resized to 224 x 224 whatever their shape, as in the first implementation of FVD.
    """
    frames = video_BTHWC.shape[1]
    remedy = f"I3D needs {MIN_FRAMES} frames or more"
    checks.require(frames >= MIN_FRAMES, "frames", frames, remedy)
    return I3D().apply({"params": params}, resize(video_BTHWC, SIZE))


def resize(video_BTHWC: jax.Array, size: int) -> jax.Array:
    """Bilinear resize to size x size on the grid of TensorFlow 1: pixel i samples at i in / out.

    Unlike jax.image there is no shift by half a pixel and no antialiasing; corners are not aligned.
    """
    down, across = (_interpolation(side, size) for side in video_BTHWC.shape[2:4])
    return jnp.einsum("ih,jw,BThwC->BTijC", down, across, video_BTHWC, precision="highest")


def _interpolation(side, size):
    """Weights [size, side] of the old pixels in each new pixel."""
    position = np.arange(size) * side / size
    low = position.astype(int)
    high = np.minimum(low + 1, side - 1)
    weight = np.zeros((size, side))
    np.add.at(weight, (np.arange(size), low), 1 - (position - low))
    np.add.at(weight, (np.arange(size), high), position - low)
    return jnp.asarray(weight, jnp.float32)


def _pool(x_BTHWC, window, strides):
    return nn.max_pool(x_BTHWC, window, strides, "SAME")


# Import


class _Names(NamedTuple):
    """Names of the parts of a unit in a public copy of the weights, and the order of kernels."""

    kernel: str
    beta: str
    mean: str
    variance: str
    gamma: str
    logits: tuple[str, str]
    transposed: bool  # from (out, in, t, h, w)


_TORCH = _Names(
    kernel="{}.conv3d.weight",
    beta="{}.bn.bias",
    mean="{}.bn.running_mean",
    variance="{}.bn.running_var",
    gamma="{}.bn.weight",
    logits=("logits.conv3d.weight", "logits.conv3d.bias"),
    transposed=True,
)
_TENSORFLOW = _Names(
    kernel="{}/conv_3d/w",
    beta="{}/batch_norm/beta",
    mean="{}/batch_norm/moving_mean",
    variance="{}/batch_norm/moving_variance",
    gamma="{}/batch_norm/gamma",
    logits=("Logits/Conv3d_0c_1x1/conv_3d/w", "Logits/Conv3d_0c_1x1/conv_3d/b"),
    transposed=False,
)
_STEM = {"1a": "Conv3d_1a_7x7", "2b": "Conv3d_2b_1x1", "2c": "Conv3d_2c_3x3"}
_BRANCHES = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
}


def convert(arrays: dict[str, np.ndarray], path: str = "weights") -> dict:
    """{name: array}, named as in TensorFlow's I3D or its usual PyTorch port -> params.

    A prefix of the names is dropped. UserError if an array is missing or has another shape.
    """
    is_torch = any(name.endswith(".conv3d.weight") for name in arrays)
    names = _TORCH if is_torch else _TENSORFLOW
    before = r"^.*?(?=Conv3d_1a|Conv3d_2|Mixed_|[Ll]ogits)"
    arrays = {re.sub(before, "", name): array for name, array in arrays.items()}
    # One branch of the original is named after another kernel size.
    arrays = {
        re.sub("(Mixed_5b.Branch_2.Conv3d_0)a_3x3", r"\1b_3x3", n): a for n, a in arrays.items()
    }

    def unit(name, shape):
        """The params of a `Unit3D`, its norm folded to a scale and a shift."""
        stored = (shape[4], shape[3], *shape[:3]) if names.transposed else shape
        kernel = take(arrays, names.kernel.format(name), stored, path)
        if names.transposed:
            kernel = kernel.transpose(2, 3, 4, 1, 0)
        # TensorFlow keeps its vectors as (1, 1, 1, 1, features).
        flat = {n: np.ravel(arrays[n]) for n in arrays if n.startswith(name)}
        beta, mean, variance = (
            take(flat, part.format(name), shape[-1:], path).astype(np.float64)
            for part in (names.beta, names.mean, names.variance)
        )
        gamma = flat.get(names.gamma.format(name), np.ones(shape[-1]))
        scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
        shift = beta - mean * scale
        return {
            "conv": {"kernel": kernel},
            "scale": scale.astype(np.float32),
            "shift": shift.astype(np.float32),
        }

    params = {
        "1a": unit(_STEM["1a"], (7, 7, 7, 3, 64)),
        "2b": unit(_STEM["2b"], (1, 1, 1, 64, 64)),
        "2c": unit(_STEM["2c"], (3, 3, 3, 64, 192)),
    }
    inputs = 192
    for name, c in MIXED.items():
        sizes = {
            "b0": (1, inputs, c[0]),
            "b1a": (1, inputs, c[1]),
            "b1b": (3, c[1], c[2]),
            "b2a": (1, inputs, c[3]),
            "b2b": (3, c[3], c[4]),
            "b3b": (1, inputs, c[5]),
        }
        params[name] = {}
        for branch, (side, *channels) in sizes.items():
            prefix = f"Mixed_{name}.{branch}" if is_torch else f"Mixed_{name}/{_BRANCHES[branch]}"
            params[name][branch] = unit(prefix, (*(side,) * 3, *channels))
        inputs = c[0] + c[2] + c[4] + c[5]
    shape = (CLASSES, inputs, 1, 1, 1) if is_torch else (1, 1, 1, inputs, CLASSES)
    kernel = take(arrays, names.logits[0], shape, path)
    params["logits"] = {
        "kernel": kernel.transpose(2, 3, 4, 1, 0) if is_torch else kernel,
        "bias": take(arrays, names.logits[1], (CLASSES,), path),
    }
    return params
