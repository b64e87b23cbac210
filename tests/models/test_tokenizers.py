"""Tokenizers are causal streams, and an image is a video of one frame."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxvid.errors import UserError
from jaxvid.layers.conv import depthwise_conv3d
from jaxvid.layers.quantize import BSQ, FSQ, KL, LFQ, VQ
from jaxvid.models.ar_vae import ARVAE
from jaxvid.models.blocks import PEG, WindowAttention
from jaxvid.models.cvivit import CViViT
from jaxvid.models.discriminator import PatchDiscriminator, StyleDiscriminator
from jaxvid.models.omnitokenizer import OmniTokenizer
from jaxvid.models.pixels import PixelTokenizer
from jaxvid.models.stem import Head, Stem
from jaxvid.models.tokenizer import Codec, FrozenTokenizer, Tokenizer
from tests import laws

SIZE = (6, 10)  # of frames: grids of 3 x 5
SMALL = dict(features=8, channels=4, width=16, heads=2)
VIT = dict(patch=2, temporal_depth=1, encode_blocks="t", decode_blocks="t", **SMALL)

HYBRID = {"name": "linear", "every": 2, "attention": {"window": 3}}

# name -> (network, frames in a latent). One mixer with a cache, and one with a recurrent state in
# turn with softmax.
NETWORKS = {
    "cvivit": (CViViT(**VIT | dict(mixer={"name": "alibi", "window": 3})), 2),
    "omnitokenizer": (
        OmniTokenizer(
            **VIT | dict(encode_blocks="tw", window=2, temporal_depth=2, mixer=HYBRID),
            stem="shared",
            patchify="haar",
            patch_norm=True,
        ),
        4,
    ),
    "ar_vae": (ARVAE(size=SIZE, patch=2, tokens=3, depth=1, window=2, **SMALL), 1),
}
QUANTIZED = {
    "vq": ("cvivit", VQ(codes=64, channels=4)),
    "lfq": ("cvivit", LFQ(channels=4)),
    "bsq": ("cvivit", BSQ(channels=4)),
    "fsq": ("omnitokenizer", FSQ(levels=(8, 8, 8, 5))),
    "kl": ("ar_vae", KL(channels=4)),
}


PLAN = [0, 1, 4, 8]  # frames of the pieces of a clip


def plan_of_latents(latents):
    """An empty piece, a long one that fills every window, and single latents after it."""
    return [1, 0, latents - 3, 1, 1]


def apply(network, method, params, x, state):
    return network.apply(params, x, state, method=method)


@functools.cache
def streams(name):
    """(encode, decode, video, z): both directions with random weights as layers, and inputs."""
    network, _ = NETWORKS[name]
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, laws.FRAMES, *SIZE, 3)).astype(np.float32)
    T, (H, W) = network.latents_for_frames(laws.FRAMES), network.grid(SIZE)
    z = rng.standard_normal((1, T, H, W, network.channels), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), video)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    methods = (functools.partial(apply, network, method) for method in ("encode", "decode"))
    return *(Partial(method, params) for method in methods), video, z


@pytest.mark.parametrize("name", NETWORKS)
def test_encoding_is_a_causal_stream(name):
    """A latent ends with the last frame of its group and depends on all of them."""
    encode, _, video, z = streams(name)
    assert jax.eval_shape(encode, video, None)[0].shape[:-1] == z.shape[:-1]
    laws.streaming(encode, video, plans=[PLAN], gradients=False)
    laws.image(encode, video)
    t = NETWORKS[name][1]
    laws.causality(encode, video, reach=t, first=lambda k: -(-k // t), gradients=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_decoding_is_a_causal_stream(name):
    _, decode, video, z = streams(name)
    assert jax.eval_shape(decode, z, None)[0].shape == video.shape
    T, t = z.shape[1], NETWORKS[name][1]
    laws.streaming(decode, z, plans=[plan_of_latents(T)], gradients=False)
    laws.image(decode, z)
    laws.causality(decode, z, first=lambda k: max(1 + (k - 1) * t, 0), gradients=False)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_are_a_causal_stream(name):
    """In pieces a clip has the same codes and pixels; a change leaves those before it as they are.

    Features are spread around zero, so that they do not all fall to one code.
    """
    arch, quantizer = QUANTIZED[name]
    encode, decode, video, _ = streams(arch)
    encode, decode = (functools.partial(laws.call, layer) for layer in (encode, decode))
    network, t = NETWORKS[arch]
    features = np.asarray(encode(video, None)[0])
    mean_Z, std_Z = features.mean((0, 1, 2, 3)), features.std((0, 1, 2, 3))
    trained, carried = jax.jit(quantizer.init)(jax.random.key(0))

    @jax.jit
    def quantize(z):
        z = (z - mean_Z) / std_Z
        return quantizer(z[..., : quantizer.features], {**trained, **carried})[:2]

    z, ids = quantize(features)
    pixels, T = decode(z, None)[0], z.shape[1]
    assert (ids is None) == (name == "kl")

    found, found_ids = quantize(laws.run(encode, video, PLAN))
    np.testing.assert_allclose(found, z, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found_ids, ids)
    np.testing.assert_allclose(laws.run(decode, z, plan_of_latents(T)), pixels, atol=1e-5)

    changes = []  # a code of few bits may not change with one frame
    for frame in (1, 6, 12):
        changed = video.copy()
        changed[:, frame] *= -1
        other, other_ids = quantize(encode(changed, None)[0])
        group = -(-frame // t)
        first = network.frames_for_latents(group)
        np.testing.assert_array_equal(other[:, :group], z[:, :group])
        if ids is not None:
            np.testing.assert_array_equal(other_ids[:, :group], ids[:, :group])
        rebuilt = decode(other, None)[0]
        np.testing.assert_array_equal(rebuilt[:, :first], pixels[:, :first])
        is_changed = np.abs(other[:, group] - z[:, group]).max() > 0
        assert is_changed == (np.abs(rebuilt - pixels)[:, first : first + t].max() > 0)
        changes.append(is_changed)
    assert any(changes)


class Patches(CViViT):
    """A network without layers between its ends; its state says that the first frame is past."""

    def setup(self):
        self.embed, self.pixels = Stem(self.features, 2, 2), Head(2, 2)

    def encode(self, video_BTHWC, state=None):
        return self.embed(video_BTHWC, is_first=state is None), ()

    def decode(self, z_BTHWZ, state=None):
        return self.pixels(z_BTHWZ, is_first=state is None), ()


def test_tokenizers_of_one_network_agree():
    """Codec, tokenizer in pieces, stored ids and latents, frozen tokenizer: one encoding."""
    network, quantizer = Patches(4, 4, patch=2), QUANTIZED["vq"][1]
    codec, tokenizer = Codec(network, quantizer), Tokenizer(network, quantizer)
    video = streams("cvivit")[2][:, :5]
    params = jax.jit(codec.init)(jax.random.key(0), video)["params"]
    shapes, carried = jax.eval_shape(lambda: tokenizer.init(jax.random.key(0), SIZE))
    shapes["codebook"] |= carried
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    grid = tokenizer.grid(SIZE)
    measured = {"mean_Z": np.arange(4, dtype=np.float32), "var": np.float32(9)}
    frozen = FrozenTokenizer(tokenizer, {**params, "latents": measured}, "digest")

    def in_pieces(method, params, x, *grid):
        first, state = method(params, x[:, :1], *grid)
        return jnp.concatenate([first, method(params, x[:, 1:], *grid, state)[0]], axis=1)

    @jax.jit
    def run(params, unit_params, video):
        z = in_pieces(tokenizer.encode, params, video)
        ids = in_pieces(tokenizer.tokens, params, video)
        stored = [tokenizer.from_stored(params, x) for x in (z, ids)]
        unit = frozen.encode(unit_params, video)[0]
        units = [unit, *(frozen.from_stored(unit_params, x) for x in (z, ids))]
        encoded = codec.apply({"params": params}, video, method="encode")
        videos = [
            in_pieces(tokenizer.decode, params, z, grid),
            frozen.decode(unit_params, unit, grid)[0],
            *(
                codec.apply({"params": params}, latents, method="decode")
                for latents in (encoded, encoded.z_BTHWZ)
            ),
        ]
        return z, ids, encoded, stored, units, videos

    z, ids, encoded, stored, units, videos = run(params, frozen.params, video)
    assert z.shape == (1, tokenizer.latents_for_frames(5), 15, tokenizer.channels)
    assert ids.shape == z.shape[:3] and ids.dtype == jnp.int32
    np.testing.assert_array_equal(encoded.ids_BTHW, ids.reshape(1, 3, 3, 5))
    for found in (encoded.z_BTHWZ.reshape(z.shape), *stored):
        np.testing.assert_allclose(found, z, atol=1e-6)
    for found in units:
        np.testing.assert_allclose(found, (z - np.arange(4)) / 3, atol=1e-6)
    assert videos[0].shape == video.shape
    for found in videos[1:]:
        np.testing.assert_allclose(found, videos[0], atol=1e-5)
    assert (frozen.grid(SIZE), frozen.channels, frozen.digest) == (grid, 4, "digest")
    for each in (tokenizer, frozen):
        assert (each.latents_for_frames(5), each.frames_for_latents(3)) == (3, 5)


def test_pixels_are_tokens_and_back():
    tokenizer = PixelTokenizer(2)
    video = np.random.default_rng(0).uniform(-1, 1, (2, 3, *SIZE, 3))
    z, state = tokenizer.encode({}, video)
    assert z.shape == (2, 3, 15, tokenizer.channels) and state is None
    np.testing.assert_array_equal(z[1, 2, 6], video[1, 2, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(tokenizer.decode({}, z, tokenizer.grid(SIZE))[0], video)
    assert tokenizer.grid(8) == (4, 4) and tokenizer.from_stored({}, z) is z
    assert tokenizer.latents_for_frames(5) == tokenizer.frames_for_latents(5) == 5
    assert (dict(tokenizer.params), tokenizer.digest) == ({}, "")


@pytest.mark.parametrize(
    "frames, t, about, pieces",
    [
        (1, 2, 32, [1]),
        (9, 2, 4, [5, 4]),
        (11, 2, 4, [5, 4, 2]),
        (9, 2, 5, [5, 4]),
        (9, 4, 1, [5, 4]),
        (100, 1, 32, [33, 32, 32, 3]),
    ],
)
def test_streams_are_cut_between_latents(frames, t, about, pieces):
    tokenizer = PixelTokenizer(2) if t == 1 else Tokenizer(CViViT(8, 8, t_patch=t), VQ())
    assert tokenizer.pieces(frames, about) == pieces


def test_the_papers_sizes():
    """Tokens of a clip in both papers, and the 51.3 M parameters of the public C-ViViT."""
    for frames, size, t_patch, tokens in ((11, 128, 2, 1536), (17, 256, 4, 5120)):
        tokenizer = Tokenizer(CViViT(features=8, channels=8, t_patch=t_patch), VQ())
        assert tokenizer.latents_for_frames(frames) * np.prod(tokenizer.grid(size)) == tokens
    network = CViViT(features=8, channels=8, patch_norm=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 3, 16, 16, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - 51.3) < 0.1


def test_windows_are_independent_of_each_other_and_of_the_padding():
    """A grid of 3 x 5 in windows of 2: the odd row and column make windows of their own."""
    layer = WindowAttention(heads=2, window=2)
    x = np.random.default_rng(0).standard_normal((1, 3, 5, 8), np.float32)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    apply = jax.jit(layer.apply)
    y = apply(params, x)
    rows, columns = np.mgrid[:3, :5]
    for row, column in ((0, 0), (1, 3), (2, 4)):
        changed = x.copy()
        changed[0, row, column, 0] += 1
        is_changed = np.abs(apply(params, changed) - y)[0].max(-1) > 0
        in_window = (rows // 2 == row // 2) & (columns // 2 == column // 2)
        np.testing.assert_array_equal(is_changed, in_window)
    np.testing.assert_allclose(apply(params, x[:, :2, 4:]), y[:, :2, 4:], atol=1e-6)


def test_position_generator_reads_two_frames_of_the_past():
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((2, 4, 3, 5, 6), np.float32), np.arange(6, dtype=np.float32)
    kernel = rng.standard_normal((3, 3, 3, 1, 6), np.float32)
    y, state = PEG().apply({"params": {"kernel": kernel, "bias": bias}}, x)
    seen = np.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
    np.testing.assert_allclose(y, bias + depthwise_conv3d(seen, kernel), atol=1e-5)
    np.testing.assert_array_equal(state, x[:, 2:])


def test_latents_of_ar_vae_begin_near_their_places():
    """Before training a corner moves the latents around it most, and these the corner's pixels."""
    small = dict(patch=4, tokens=16, depth=1, width=32, heads=2, features=4, channels=4)
    network = ARVAE(size=(24, 24), **small)
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (8, 1, 24, 24, 3)).astype(np.float32)
    params = jax.jit(network.init)(jax.random.key(0), video)
    encode, decode = (
        jax.jit(lambda x, method=method: network.apply(params, x, method=method)[0])
        for method in ("encode", "decode")
    )
    to_corner = np.linalg.norm(params["params"]["bias"]["place"], axis=1)
    near, far = to_corner.argsort()[:4], to_corner.argsort()[-4:]

    changed = video.copy()
    changed[:, :, :8, :8] *= -1
    z = encode(video)
    change_M = np.abs(encode(changed) - z).mean((0, 1, 2, 4))
    assert change_M[near].mean() > 2 * change_M[far].mean()

    changed = np.array(z)
    changed[..., near, :] *= -1
    change_HW = np.abs(decode(changed) - decode(z)).mean((0, 1, 4))
    assert change_HW[:8, :8].mean() > 2 * change_HW[-8:, -8:].mean()


def cvivit(**options):
    return lambda: CViViT(**VIT | options)


def ar_vae(**options):
    return lambda: ARVAE(size=SIZE, **SMALL | options)


def encoded(frames, is_first):
    """Shapes of a clip of C-ViViT, or of the next piece of a stream."""
    encode, _, video, _ = streams("cvivit")
    state = None if is_first else jax.eval_shape(encode, video, None)[1]
    return jax.eval_shape(encode, jax.ShapeDtypeStruct((1, frames, *SIZE, 3), jnp.float32), state)


@pytest.mark.parametrize(
    "make, message",
    [
        (cvivit(width=0), "width=0: must be at least 1"),
        (cvivit(heads=0), "heads=0: must be at least 1"),
        (cvivit(heads=3), "heads=3: does not divide width=16 into even heads"),
        (cvivit(heads=16), "heads=16: does not divide width=16 into even heads"),
        (cvivit(mlp_ratio=np.nan), "mlp_ratio=nan: must be a finite"),
        (cvivit(mlp_ratio=0.0), "mlp_ratio=0.0: must be more than 0"),
        (cvivit(mlp_ratio=0.01), "mlp_ratio=0.01: leaves width=16 no hidden unit"),
        (cvivit(patch=0), "patch=0: must be at least 1"),
        (cvivit(t_patch=-2), "t_patch=-2: must be at least 1"),
        (cvivit(temporal_depth=0), "temporal_depth=0: must be at least 1"),
        (cvivit(window=-1), "window=-1: must be at least 1"),
        (cvivit(encode_blocks="tx"), "encode_blocks='tx': .* t for all cells"),
        (cvivit(decode_blocks=""), "decode_blocks='': use a letter"),
        (cvivit(position="shared"), "position='shared': unknown; use one of rel, rope"),
        (cvivit(stem="two"), "stem='two': unknown; use one of split, shared"),
        (cvivit(patchify="dct"), "patchify='dct': unknown; use one of linear, haar"),
        (cvivit(patchify="haar", patch=3), "patch=3: Haar bands need powers of two"),
        (cvivit(patchify="haar", t_patch=6), "t_patch=6: Haar bands need powers of two"),
        (cvivit(mixer={"name": "rnn"}), "mixer.name='rnn': unknown"),
        (cvivit(mixer=HYBRID), "temporal_depth=1: must be a multiple of mixer.every=2"),
        (cvivit(mixer={"name": "gla", "window": 8}), "mixer.window=8: gla has no such option"),
        (ar_vae(heads=3), "heads=3: does not divide width=16 into even heads"),
        (ar_vae(patch=0), "patch=0: must be at least 1"),
        (ar_vae(tokens=0), "tokens=0: must be at least 1"),
        (ar_vae(depth=0), "depth=0: must be at least 1"),
        (ar_vae(window=0), "window=0: must be at least 1"),
        (lambda: PatchDiscriminator(width=7), "width=7: must be at least 8"),
        (lambda: StyleDiscriminator(width=7), "width=7: must be at least 8"),
        (lambda: encoded(10, True), "frames=10: .* use 9 or 11"),
        (lambda: encoded(3, False), "frames=3: .* use 2 or 4"),
        (lambda: cvivit()().grid((6, 9)), "patch=2: does not divide frames of 6 x 9"),
        (lambda: ar_vae()().grid((8, 8)), r"size=\(8, 8\): .* frames of \(6, 10\)"),
        (lambda: PixelTokenizer(4).grid(10), "patch=4: does not divide frames of 10 x 10"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make()
