"""Every tokenizer is a causal stream: no leak, no seam, and an image is a video of one frame."""

import functools

import jax
import numpy as np
import pytest

from jaxvid.layers.quantize import BSQ, FSQ, KL, LFQ, VQ
from jaxvid.models.ar_vae import ARVAE
from jaxvid.models.cvivit import CViViT
from jaxvid.models.omnitokenizer import OmniTokenizer
from tests import laws

SIZE = (6, 10)  # of frames: grids of 3 x 5
SMALL = dict(features=4, channels=4, width=16, heads=2)
VIT = dict(patch=2, temporal_depth=1, **SMALL)

# One row per variant: a network and the frames in a latent. A new tokenizer joins by its row.
# With a window, all later pieces of a stream share a compiled program.
WINDOWED = {"name": "softmax", "window": 2}
ROWS = {
    "cvivit": (
        CViViT(encode_blocks="t", decode_blocks="t", mixer={"name": "alibi", "window": 3}, **VIT),
        2,
    ),
    "cvivit_shared_haar": (
        CViViT(
            encode_blocks="t",
            decode_blocks="t",
            t_patch=4,
            stem="shared",
            patchify="haar",
            patch_norm=True,
            mixer=WINDOWED,
            **VIT,
        ),
        4,
    ),
    "omnitokenizer": (
        OmniTokenizer(encode_blocks="tw", decode_blocks="t", window=2, mixer=WINDOWED, **VIT),
        4,
    ),
    "ar_vae": (ARVAE(size=SIZE, patch=2, tokens=3, depth=1, window=2, **SMALL), 1),
}
QUANTIZERS = {
    "vq": VQ(codes=64, channels=4),
    "fsq": FSQ(levels=(8, 8, 8, 5)),
    "lfq": LFQ(channels=4),
    "bsq": BSQ(channels=4),
    "kl": KL(channels=2),
}


@functools.cache
def opened(name):
    """(encode, decode, video, z): the two sides as stream layers, and what they may be given."""
    network, _ = ROWS[name]
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, laws.FRAMES, *SIZE, 3)).astype(np.float32)
    T, (H, W) = network.latents_for_frames(laws.FRAMES), network.grid(SIZE)
    z = rng.standard_normal((1, T, H, W, network.channels), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), video)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)

    def encode(x, state):
        return network.apply(params, x, state, method="encode")

    def decode(z, state):
        return network.apply(params, z, state, method="decode")

    return encode, decode, video, z


@pytest.mark.parametrize("name", ROWS)
def test_encoding_is_a_causal_stream(name):
    """A latent ends with the last frame of its group and knows them all."""
    encode, _, video, z = opened(name)
    assert jax.eval_shape(encode, video, None)[0].shape == z.shape
    laws.streaming(encode, video, gradients=False)
    laws.image(encode, video)
    t = ROWS[name][1]
    laws.causality(encode, video, reach=t, first=lambda k: -(-k // t), gradients=False)


@pytest.mark.parametrize("name", ROWS)
def test_decoding_is_a_causal_stream(name):
    _, decode, video, z = opened(name)
    assert jax.eval_shape(decode, z, None)[0].shape == video.shape
    T, t = z.shape[1], ROWS[name][1]
    laws.streaming(decode, z, plans=([1] * T, [1, 1, 0, T - 2]), gradients=False)
    laws.image(decode, z)
    laws.causality(decode, z, first=lambda k: max(1 + (k - 1) * t, 0), gradients=False)
