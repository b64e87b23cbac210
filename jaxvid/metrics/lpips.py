"""LPIPS: distance of pictures in the features of VGG-16 (Zhang et al. 2018), weights by the user.

`convert` takes the arrays of a state dict of the public `lpips` package (version 0.1, net="vgg"),
or those of torchvision's VGG-16 with the linear heads beside them.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.errors import UserError
from jaxvid.weights import take

# Channels of the convolutions between one pooling and the next; features are of each last one.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# The heads were trained on pictures in [-1, 1], brought to the statistics of ImageNet like this.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def distance(params, a_BHWC, b_BHWC):
    """Perceptual distance of pictures in [-1, 1] of 16 pixels a side or more -> float32 [B].

    Sum over stages of the mean over places of head . (u_a - u_b)^2, u the features of unit length.
    """
    total_B = 0.0
    for head_C, a, b in zip(params["heads"], features(params, a_BHWC), features(params, b_BHWC)):
        apart = jnp.square(_unit(a) - _unit(b))
        total_B += (apart * head_C).sum(-1).mean((1, 2))
    return total_B


def features(params, image_BHWC):
    """Activations of the last layer of every stage, [B, h, w, C] each."""
    if min(image_BHWC.shape[1:3]) < 16:
        raise UserError(f"data.size={min(image_BHWC.shape[1:3])}: LPIPS needs 16 pixels or more")
    x = (image_BHWC.astype(jnp.float32) - np.float32(SHIFT)) / np.float32(SCALE)
    found, layers = [], iter(params["layers"])
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
        found.append(x)
    return found


def convert(arrays, path="weights"):
    """{name: array} as PyTorch has them -> params; UserError where something is missing."""
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
            index, inputs = index + 2, outputs  # a ReLU behind each
        index += 1  # and the pooling
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
    return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-20) + 1e-10)
