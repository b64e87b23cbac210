"""The causal convolution: a stream layer, and numpy's convolution."""

import functools

import jax
import numpy as np
import pytest

from jaxvid.layers.conv import CausalConv
from tests import laws


@pytest.mark.parametrize("width", [1, 4])
def test_is_a_convolution_and_obeys_the_laws(width):
    conv = CausalConv(width)
    x = jax.random.normal(jax.random.key(0), (2, laws.FRAMES, 3, 5))
    params = conv.init(jax.random.key(1), x)
    layer = functools.partial(conv.apply, params)
    laws.streaming(layer, x)
    laws.causality(layer, x, reach=width)
    laws.gradients(conv.apply, params, x)
    y, state = layer(x)
    kernel_ID = params["params"]["kernel"]
    for b, n, d in np.ndindex(2, 3, 5):
        expected = np.convolve(x[b, :, n, d], kernel_ID[:, d])[: laws.FRAMES]
        np.testing.assert_allclose(y[b, :, n, d], expected, atol=1e-5)
    np.testing.assert_array_equal(state, x[:, laws.FRAMES - width + 1 :])
