"""LPIPS: distance of images in the features of VGG-16 (Zhang et al. 2018). Users bring the weights.

`convert` takes the arrays of a state dict of the public `lpips` package (version 0.1, net="vgg"),
or of torchvision's VGG-16 together with the linear heads.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.weights import take

# Channels of the convolutions between poolings; the last one of each stage gives features.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MIN_SIZE = 16
# Normalization of images in [-1, 1] to the statistics of ImageNet, as in the published code.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def distance(params: dict, a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """Perceptual distance of images in [-1, 1], 16 pixels a side or more -> float32 [B].

    Sum over stages of the mean over positions of head . (u_a - u_b)^2, u the features at unit
    length. Raises UserError for smaller images.
    """
    total_B = 0.0
    for head_C, a, b in zip(params["heads"], features(params, a_BHWC), features(params, b_BHWC)):
        squared = jnp.square(_unit(a) - _unit(b))
        total_B += (squared * head_C).sum(-1).mean((1, 2))
    return total_B


def features(params: dict, image_BHWC: jax.Array) -> list[jax.Array]:
    """Activations of the last layer of every stage, [B, h, w, C] each. UserError as `distance`."""
    size = min(image_BHWC.shape[1:3])
    checks.require(size >= MIN_SIZE, "size", size, f"LPIPS needs {MIN_SIZE} pixels or more")
    x = (image_BHWC.astype(jnp.float32) - np.float32(SHIFT)) / np.float32(SCALE)
    stages, layers = [], iter(params["layers"])
    for stage, channels in enumerate(STAGES):
        if stage:
            B, H, W, C = x.shape
            x = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).max((2, 4))
        for _ in channels:
            layer = next(layers)
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["bias"])
        stages.append(x)
    return stages


def convert(arrays: dict[str, np.ndarray], path: str = "weights") -> dict:
    """{PyTorch name: array} -> params; UserError if an array is missing or has another shape."""
    names = {}
    for name in arrays:
        if match := re.search(r"(?:^|\.)(?:features|slice\d)\.(\d+)\.(weight|bias)$", name):
            names[int(match[1]), match[2]] = name
        if match := re.search(r"(?:^|\.)(?:lin|lins\.)(\d)\.model\.1\.weight$", name):
            names["head", int(match[1])] = name
    layers, index, inputs = [], 0, 3
    for channels in STAGES:
        for outputs in channels:
            shapes = {"weight": (outputs, inputs, 3, 3), "bias": (outputs,)}
            kernel, bias = (
                take(arrays, names.get((index, part), f"features.{index}.{part}"), shape, path)
                for part, shape in shapes.items()
            )
            layers.append({"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias})
            index, inputs = index + 2, outputs  # each is followed by a ReLU
        index += 1  # the pooling
    heads = [
        take(
            arrays,
            names.get(("head", stage), f"lin{stage}.model.1.weight"),
            (1, channels[-1], 1, 1),
            path,
        ).reshape(-1)
        for stage, channels in enumerate(STAGES)
    ]
    return {"layers": layers, "heads": heads}


def _unit(x):
    """x / |x| with the epsilons of the published code."""
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20) + 1e-10)
