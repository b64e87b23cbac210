"""Every tokenizer is a causal stream: no leak, no seam, and an image is a video of one frame."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.layers.quantize import BSQ, FSQ, KL, LFQ, VQ
from jaxvid.models.ar_vae import ARVAE
from jaxvid.models.blocks import PEG, WindowAttention
from jaxvid.models.cvivit import CViViT
from jaxvid.models.omnitokenizer import OmniTokenizer
from jaxvid.models.tokenizer import Codec, Tokenizer
from tests import laws

SIZE = (6, 10)  # of frames: grids of 3 x 5
SMALL = dict(features=8, channels=4, width=16, heads=2)
VIT = dict(patch=2, temporal_depth=1, **SMALL)

# One row per variant: a network and the frames in a latent. A new tokenizer joins by its row.
# With a window, all later pieces of a stream share a compiled program.
ROWS = {
    "cvivit": (
        CViViT(encode_blocks="t", decode_blocks="t", mixer={"name": "alibi", "window": 3}, **VIT),
        2,
    ),
    "omnitokenizer": (
        OmniTokenizer(
            encode_blocks="tw",
            decode_blocks="t",
            window=2,
            stem="shared",
            patchify="haar",
            patch_norm=True,
            mixer={"name": "softmax", "window": 2},
            **VIT,
        ),
        4,
    ),
    "ar_vae": (ARVAE(size=SIZE, patch=2, tokens=3, depth=1, window=2, **SMALL), 1),
}
QUANTIZERS = {
    "vq": VQ(codes=64, channels=4),
    "fsq": FSQ(levels=(8, 8, 8, 5)),
    "lfq": LFQ(channels=4),
    "bsq": BSQ(channels=4),
    "kl": KL(channels=4),
}


@functools.cache
def opened(name):
    """(encode, decode, video, z, params): both sides as stream layers, and what they are given."""
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

    return encode, decode, video, z, params


@pytest.mark.parametrize("name", ROWS)
def test_encoding_is_a_causal_stream(name):
    """A latent ends with the last frame of its group and knows them all."""
    encode, _, video, z, _ = opened(name)
    assert jax.eval_shape(encode, video, None)[0].shape[:-1] == z.shape[:-1]
    laws.streaming(encode, video, gradients=False)
    laws.image(encode, video)
    t = ROWS[name][1]
    laws.causality(encode, video, reach=t, first=lambda k: -(-k // t), gradients=False)


@pytest.mark.parametrize("name", ROWS)
def test_decoding_is_a_causal_stream(name):
    _, decode, video, z, _ = opened(name)
    assert jax.eval_shape(decode, z, None)[0].shape == video.shape
    T, t = z.shape[1], ROWS[name][1]
    laws.streaming(decode, z, plans=([1] * T, [1, 1, 0, T - 2]), gradients=False)
    laws.image(decode, z)
    laws.causality(decode, z, first=lambda k: max(1 + (k - 1) * t, 0), gradients=False)


@functools.cache
def compiled(name):
    """The same for one compilation of every shape, and the features of the whole clip.

    Features are spread around zero, so that not all fall to the same code.
    """
    encode, decode, video, _, _ = opened(name)
    encode, decode = jax.jit(encode), jax.jit(decode)
    whole = np.asarray(encode(video, None)[0])
    mean_Z, std_Z = whole.mean((0, 1, 2, 3)), whole.std((0, 1, 2, 3))

    def spread(x, state):
        y, state = encode(x, state)
        return (np.asarray(y) - mean_Z) / std_Z, state

    return spread, decode, video, (whole - mean_Z) / std_Z


@functools.cache
def quantized(name):
    """A quantizer of the first of 8 features, jitted."""
    quantizer = QUANTIZERS[name]
    trained, carried = jax.jit(quantizer.init)(jax.random.key(0))
    codebook = {**trained, **carried}
    return jax.jit(lambda z: quantizer(z[..., : quantizer.features], codebook)[:2])


@pytest.mark.parametrize("arch", ROWS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_pixels_to_codes_to_pixels_leaks_nothing(name, arch):
    """Latents, ids and pixels before a change are the same to the bit, and it shows from there."""
    encode, decode, video, features = compiled(arch)
    quantize, t = quantized(name), ROWS[arch][1]
    z, ids = quantize(features)
    pixels = decode(z, None)[0]
    shown = []  # a code of few bits may outlive the change of one frame
    for frame in (1, 6, 12):
        changed = video.copy()
        changed[:, frame] *= -1
        group = -(-frame // t)
        other, other_ids = quantize(encode(changed, None)[0])
        np.testing.assert_array_equal(other[:, :group], z[:, :group])
        if ids is not None:
            np.testing.assert_array_equal(other_ids[:, :group], ids[:, :group])
        first = ROWS[arch][0].frames_for_latents(group)
        seen = decode(other, None)[0]
        np.testing.assert_array_equal(seen[:, :first], pixels[:, :first])
        moved = np.abs(other[:, group] - z[:, group]).max() > 0
        assert moved == (np.abs(seen - pixels)[:, first : first + t].max() > 0)
        shown.append(moved)
    assert any(shown)


@pytest.mark.parametrize("arch", ROWS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_pixels_to_codes_to_pixels_is_one_stream(name, arch):
    """In single latents and in uneven pieces: the same codes, and the same pixels of them."""
    encode, decode, video, features = compiled(arch)
    quantize, network = quantized(name), ROWS[arch][0]
    z, ids = quantize(features)
    pixels, T = decode(z, None)[0], z.shape[1]
    for plan in ([1] * T, [1, 0, 2, T - 3]):
        ends = np.cumsum([0, *plan])
        in_frames = np.diff([network.frames_for_latents(end) if end else 0 for end in ends])
        found, found_ids = quantize(laws.run(encode, video, in_frames))
        np.testing.assert_allclose(found, z, atol=1e-5)
        if ids is not None:
            np.testing.assert_array_equal(found_ids, ids)
        np.testing.assert_allclose(laws.run(decode, z, plan), pixels, atol=1e-5)


def test_tokens_say_all_of_a_clip():
    tokenizer = Tokenizer(ROWS["cvivit"][0].clone(features=4), QUANTIZERS["fsq"])
    _, _, video, _, params = opened("cvivit")
    to_latent = jax.tree.map(lambda x: x[..., :4], params["params"]["to_latent"])
    params = {"network": {**params["params"], "to_latent": to_latent}, "codebook": {}}
    shapes, carried = jax.eval_shape(lambda: tokenizer.init(jax.random.key(0), SIZE))
    assert jax.tree.structure(shapes) == jax.tree.structure(params) and carried == {}
    both = jax.jit(lambda x: (tokenizer.tokens(params, x)[0], tokenizer.encode(params, x)[0]))
    ids, z = both(video)
    assert ids.shape == (1, tokenizer.latents_for_frames(13), 15) and ids.dtype == jnp.int32
    np.testing.assert_array_equal(jax.jit(tokenizer.lookup)(params, ids), z)
    assert z.shape[-1] == tokenizer.channels
    shape = jax.eval_shape(lambda z: tokenizer.decode(params, z, tokenizer.grid(SIZE))[0], z).shape
    assert shape == video.shape and tokenizer.frames_for_latents(7) == 13


@pytest.mark.parametrize("name", ["vq", "kl"])
def test_a_codec_is_its_tokenizer_on_whole_clips(name):
    quantizer = QUANTIZERS[name]
    network = ROWS["cvivit"][0].clone(features=quantizer.features, channels=quantizer.channels)
    codec, tokenizer = Codec(network, quantizer), Tokenizer(network, quantizer)
    video = opened("cvivit")[2]
    params = jax.jit(codec.init)(jax.random.key(0), video)["params"]
    shapes, carried = jax.eval_shape(lambda: tokenizer.init(jax.random.key(0), SIZE))
    shapes["codebook"] |= carried
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    @jax.jit
    def both(params, video):
        encoded = codec.apply({"params": params}, video, method="encode")
        pixels = codec.apply({"params": params}, encoded, method="decode")
        z_BTNZ, _ = tokenizer.encode(params, video)
        ids_BTN, _ = tokenizer.tokens(params, video)
        return (*encoded, pixels), (z_BTNZ, ids_BTN, tokenizer.decode(params, z_BTNZ, (3, 5))[0])

    ours, theirs = both(params, video)
    assert ours[0].shape == (1, 7, 3, 5, tokenizer.channels)
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-6)


@pytest.mark.parametrize("frames, size, t_patch, tokens", [(11, 128, 2, 1536), (17, 256, 4, 5120)])
def test_the_papers_token_counts(frames, size, t_patch, tokens):
    network = CViViT(features=8, channels=8, t_patch=t_patch)
    tokenizer = Tokenizer(network, VQ())
    H, W = tokenizer.grid(size)
    assert tokenizer.latents_for_frames(frames) * H * W == tokens


def test_the_papers_network_has_the_peers_parameters():
    """512 wide, 4 + 4 layers a side, patches of 2 x 8 x 8: 51.3 M in the public C-ViViT."""
    network = CViViT(features=8, channels=8, patch_norm=True)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 3, 16, 16, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - 51.3) < 0.1


def test_windows_know_nothing_of_each_other_nor_of_what_lies_beyond_the_grid():
    """A grid of 3 x 5 in windows of 2: the odd row and column make windows of their own."""
    layer = WindowAttention(heads=2, window=2)
    x = np.random.default_rng(0).standard_normal((1, 3, 5, 8), np.float32)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    apply = jax.jit(layer.apply)
    y = apply(params, x)
    for row, column in ((0, 0), (1, 3), (2, 4)):
        changed = x.copy()
        changed[0, row, column, 0] += 1
        moved = np.abs(apply(params, changed) - y)[0].max(-1) > 0
        rows, columns = np.mgrid[:3, :5]
        np.testing.assert_array_equal(
            moved, (rows // 2 == row // 2) & (columns // 2 == column // 2)
        )
    np.testing.assert_allclose(apply(params, x[:, :2, 4:]), y[:, :2, 4:], atol=1e-6)


def test_position_generator_is_a_convolution_padded_with_the_past():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((2, 4, 3, 5, 6), np.float32) for _ in range(2))
    layer = PEG()
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def wanted(params, x):
        return params["params"]["bias"] + jax.lax.conv_general_dilated(
            x,
            params["params"]["kernel"],
            window_strides=(1, 1, 1),
            padding=((2, 0), (1, 1), (1, 1)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            feature_group_count=6,
        )

    def value_and_gradients(convolve):
        y, pull = jax.vjp(convolve, params, x)
        return y, pull(dy)

    found = jax.jit(lambda: value_and_gradients(lambda *given: layer.apply(*given)[0]))()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4),
        found,
        jax.jit(lambda: value_and_gradients(wanted))(),
    )


@pytest.mark.parametrize(
    "shape, started, message",
    [
        ((10, 6, 10), False, "frames=10: .* use 9 or 11"),
        ((3, 6, 10), True, "frames=3: .* use 2 or 4"),
        ((9, 6, 9), False, "patch=2: does not divide frames of 6 x 9"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(shape, started, message):
    encode, _, video, _, _ = opened("cvivit")
    x = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    state = jax.eval_shape(encode, video, None)[1] if started else None
    with pytest.raises(UserError, match=message):
        jax.eval_shape(encode, x, state)


def test_a_tokenizer_of_one_size_refuses_others():
    with pytest.raises(UserError, match=r"size=\(8, 8\)"):
        ROWS["ar_vae"][0].grid((8, 8))


def test_latents_of_ar_vae_begin_near_their_places():
    """Before training a corner moves the latents around it most, and these the corner's pixels."""
    network = ARVAE(
        size=(24, 24), patch=4, tokens=16, depth=1, **SMALL | dict(features=4, width=32)
    )
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
    moved_M = np.abs(encode(changed) - z).mean((0, 1, 2, 4))
    assert moved_M[near].mean() > 2 * moved_M[far].mean()

    changed = np.array(z)
    changed[..., near, :] *= -1
    moved_HW = np.abs(decode(changed) - decode(z)).mean((0, 1, 4))
    assert moved_HW[:8, :8].mean() > 2 * moved_HW[-8:, -8:].mean()
