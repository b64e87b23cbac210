"""The convolutions against numpy's and XLA's, and as streams."""

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxvid.layers.conv import CausalConv, depthwise_conv3d
from tests import laws


@pytest.mark.parametrize("width", [1, 4])
def test_causal_convolution_is_numpys_and_streams(width):
    conv = CausalConv(width)
    x = np.random.default_rng(0).standard_normal((2, laws.FRAMES, 3, 5), np.float32)
    params = conv.init(jax.random.key(1), x)
    layer = Partial(conv.apply, params)
    laws.streaming(layer, x, gradients=False)
    y, state = layer(x)
    kernel_ID = params["params"]["kernel"]
    for b, n, d in np.ndindex(2, 3, 5):
        expected = np.convolve(x[b, :, n, d], kernel_ID[:, d])[: laws.FRAMES]
        np.testing.assert_allclose(y[b, :, n, d], expected, atol=1e-5)
    np.testing.assert_array_equal(state, x[:, laws.FRAMES - width + 1 :])


def test_depthwise_convolution_and_its_gradients_are_xlas():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, T, 3, 5, 6), np.float32) for T in (6, 4))
    kernel = rng.standard_normal((3, 3, 3, 1, 6), np.float32)

    def xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1, 1),
            padding=((0, 0), (1, 1), (1, 1)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            feature_group_count=6,
        )

    @jax.jit
    def both(x, kernel, dy):
        pairs = (jax.vjp(convolve, x, kernel) for convolve in (depthwise_conv3d, xla))
        return [(y, *pull(dy)) for y, pull in pairs]

    for ours, theirs in zip(*both(x, kernel, dy)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
