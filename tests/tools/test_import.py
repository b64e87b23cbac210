"""Imported tokenizers against their forward pass written out in numpy, on random weights.

`Peer` follows the published networks layer by layer, in PyTorch's layouts, and shares no code with
`PeerTokenizer`.
"""

import functools

import jax
import numpy as np
import pytest
from scipy.special import erf

from jaxvid.errors import UserError
from jaxvid.models.tokenizer import FrozenTokenizer, Tokenizer
from jaxvid.tools.weights import import_tokenizer

D, HEADS, K, HIDDEN, CODES, P, T = 16, 2, 8, 10, 12, 2, 2
SIDE = 8  # of a frame: 4 x 4 tokens
FRAMES = 5


class Arrays(dict):
    """A state dict of random arrays."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def add(self, name, *shape, scale=0.4, mean=0.0):
        self[name] = (mean + scale * self.rng.standard_normal(shape)).astype(np.float32)

    def linear(self, name, inputs, outputs, bias=True):
        self.add(f"{name}.weight", outputs, inputs)
        if bias:
            self.add(f"{name}.bias", outputs)

    def norm(self, name, width, fixed=False):
        weight, bias = ("gamma", "beta") if fixed else ("weight", "bias")
        self.add(f"{name}.{weight}", width, mean=1.0)
        self.add(f"{name}.{bias}", width, scale=0.0 if fixed else 0.4)

    def position(self, name):
        self.linear(f"{name}.net.0.0", 2, D)
        self.linear(f"{name}.net.1.0", D, D)
        self.linear(f"{name}.net.2", D, HEADS)

    def stack(self, name, letters, peg, bias=False):
        for index, letter in enumerate(letters):
            layer = f"{name}.layers.{index}"
            if peg and letter == "t":
                self.add(f"{layer}.0.dsconv.weight", D, 1, 3, 3, 3)
                self.add(f"{layer}.0.dsconv.bias", D)
            self.norm(f"{layer}.1.norm", D, fixed=True)
            if letter == "w":
                self.linear(f"{layer}.1.qkv", D, 3 * D, bias=False)
                self.add(f"{layer}.1.relative_position_bias_table", 9, HEADS)
                self[f"{layer}.1.relative_position_index"] = np.array(
                    [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
                )
                self.linear(f"{layer}.1.proj", D, D)
            else:
                self.norm(f"{layer}.1.context_norm", D, fixed=True)
                self.add(f"{layer}.1.null_kv", HEADS, 0, K)
                self.linear(f"{layer}.1.to_q", D, HEADS * K, bias=False)
                self.linear(f"{layer}.1.to_kv", D, 2 * HEADS * K, bias=False)
                self.add(f"{layer}.1.q_scale", K, mean=1.0)
                self.add(f"{layer}.1.k_scale", K, mean=1.0)
                self.linear(f"{layer}.1.to_out", HEADS * K, D, bias=False)
                if bias:
                    self.position(f"{layer}.1.spatial_rel_pos_bias")
            self.norm(f"{layer}.3.0", D)
            self.linear(f"{layer}.3.1", D, 2 * HIDDEN, bias=False)
            self.linear(f"{layer}.3.4", HIDDEN, D, bias=False)
        self.norm(f"{name}.norm_out", D, fixed=True)

    def ends(self, encoder, decoder):
        for kind, t in (("_first_frame", 1), ("", T)):
            cells = 3 * t * P * P
            self.norm(f"{encoder}to_patch_emb{kind}.1", cells)
            self.linear(f"{encoder}to_patch_emb{kind}.2", cells, D)
            self.norm(f"{encoder}to_patch_emb{kind}.3", D)
            self.linear(f"{decoder}to_pixels{kind}.0", D, cells)


def phenaki(lookup_free=False, obvious=False):
    """A file of C-ViViT; obvious: that of obvious-research, with the networks of its losses."""
    arrays = Arrays()
    arrays.ends("", "")
    arrays.position("spatial_rel_pos_bias")
    for side in ("enc", "dec"):
        arrays.stack(f"{side}_spatial_transformer", "tt", peg=obvious)
        arrays.stack(f"{side}_temporal_transformer", "tt", peg=True)
    arrays.linear("vq.project_in", D, 4)
    arrays.linear("vq.project_out", 4, D)
    if lookup_free:
        arrays["vq.mask"] = np.array([8, 4, 2, 1])
    else:
        arrays.add("vq._codebook.embed", 1, CODES, 4)
        arrays["vq._codebook.embed"] /= np.linalg.norm(
            arrays["vq._codebook.embed"], axis=-1, keepdims=True
        )
        arrays.add("vq._codebook.cluster_size", 1, CODES)
    arrays.add("discr.blocks.0.conv_res.weight", 3, 3)
    if obvious:
        arrays.add("loss_fn_lpips.lin0.model.1.weight", 1, 3, 1, 1)
        arrays.add("i3d.logits.conv3d.weight", 4, 3, 1, 1, 1)
    return arrays


def omni(spatial="rope", gaussian=False):
    arrays = Arrays()
    arrays.ends("encoder.", "decoder.")
    rel = spatial == "rel"
    arrays.stack("encoder.enc_spatial_transformer", "tw", peg=True, bias=rel)
    arrays.stack("encoder.enc_temporal_transformer", "t", peg=True, bias=True)
    arrays.stack("decoder.dec_temporal_transformer", "t", peg=True, bias=True)
    arrays.stack("decoder.dec_spatial_transformer", "tt", peg=True, bias=rel)
    arrays.linear("pre_vq_conv.1", D, 8 if gaussian else 4)
    arrays.linear("post_vq_conv.1", 4, D)
    arrays.add("codebook.embeddings", CODES, 4)
    arrays.add("codebook.N", CODES)
    return arrays


# The forward pass, written out


def layer_norm(x, weight, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Peer:
    """The published network on the arrays of a state dict; clips are [B, C, T, H, W] in [0, 1]."""

    def __init__(self, arrays, omni, spatial, biased, scrambled):
        self.a, self.omni, self.spatial = arrays, omni, spatial
        self.biased, self.scrambled = biased, scrambled
        self.causal = omni or "enc_spatial_transformer.layers.0.0.dsconv.weight" not in arrays
        self.encoder, self.decoder = ("encoder.", "decoder.") if omni else ("", "")

    def linear(self, name, x):
        y = x @ self.a[f"{name}.weight"].T.astype(np.float64)
        return y + self.a[f"{name}.bias"] if f"{name}.bias" in self.a else y

    def bias(self, name, h, w):
        cells = [(y, x) for y in range(h) for x in range(w)]
        found = np.zeros((HEADS, len(cells), len(cells)))
        for i, q in enumerate(cells):
            for j, k in enumerate(cells):
                r = np.array(q) - np.array(k)
                r = np.sign(r) * np.log(np.abs(r) + 1)
                for layer in ("net.0.0", "net.1.0"):
                    r = self.linear(f"{name}.{layer}", r)
                    r = np.where(r > 0, r, 0.1 * r)
                found[:, i, j] = self.linear(f"{name}.net.2", r)
        return found

    def rotate(self, x, h, w):
        """x [A, N, K] as complex numbers of neighbouring channels."""
        z = x[..., ::2] + 1j * x[..., 1::2]
        for n in range(h * w):
            for pair in range(K // 2):
                place = n % w if pair % 2 == 0 else n // w
                z[:, n, pair] *= np.exp(1j * place * 10000 ** (-4 * (pair // 2) / K))
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    def attention(self, name, x, bias, grid=None):
        """x [L, D] of one frame or one place."""
        q = self.linear(f"{name}.to_q", layer_norm(x, self.a[f"{name}.norm.gamma"]))
        k, v = np.split(self.linear(f"{name}.to_kv", x), 2, axis=-1)
        q, k, v = (y.reshape(len(x), HEADS, K).transpose(1, 0, 2) for y in (q, k, v))
        if grid:
            q, k = self.rotate(q, *grid), self.rotate(k, *grid)
        q, k = unit(q) * self.a[f"{name}.q_scale"], unit(k) * self.a[f"{name}.k_scale"]
        y = softmax(8 * q @ k.transpose(0, 2, 1) + bias) @ v
        return self.linear(f"{name}.to_out", y.transpose(1, 0, 2).reshape(len(x), -1))

    def window(self, name, x_HWD):
        h = layer_norm(x_HWD, self.a[f"{name}.norm.gamma"])
        y = np.zeros_like(x_HWD)
        cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
        table = self.a[f"{name}.relative_position_bias_table"]
        for top in range(0, 4, 2):
            for left in range(0, 4, 2):
                x = np.stack([h[top + i, left + j] for i, j in cells])
                q, k, v = np.split(self.linear(f"{name}.qkv", x), 3, axis=-1)
                q, k, v = (z.reshape(4, HEADS, -1).transpose(1, 0, 2) for z in (q, k, v))
                score = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
                for a, (i, j) in enumerate(cells):
                    for b, (m, n) in enumerate(cells):
                        score[:, a, b] += table[(i - m + 1) * 3 + j - n + 1]
                out = (softmax(score) @ v).transpose(1, 0, 2).reshape(4, -1)
                for (i, j), z in zip(cells, self.linear(f"{name}.proj", out)):
                    y[top + i, left + j] = z
        return y

    def conv(self, name, x_THWD):
        kernel, bias = self.a[f"{name}.weight"], self.a[f"{name}.bias"]
        t, h, w, _ = x_THWD.shape
        padded = np.pad(x_THWD, ((2, 0), (1, 1), (1, 1), (0, 0)))
        y = np.zeros_like(x_THWD) + bias
        for i, j, m in np.ndindex(3, 3, 3):
            y += padded[i : i + t, j : j + h, m : m + w] * kernel[:, 0, i, j, m]
        return y

    def feed_forward(self, name, x):
        h = layer_norm(x, self.a[f"{name}.0.weight"], self.a[f"{name}.0.bias"])
        value, gate = np.split(self.linear(f"{name}.1", h), 2, axis=-1)
        return self.linear(f"{name}.4", value * gate * (1 + erf(gate / np.sqrt(2))) / 2)

    def space(self, name, x_THWD):
        h, w = x_THWD.shape[1:3]
        for index in range(2):
            layer = f"{name}.layers.{index}"
            if f"{layer}.0.dsconv.weight" in self.a:
                x_THWD = x_THWD + self.conv(f"{layer}.0.dsconv", x_THWD)
            if f"{layer}.1.qkv.weight" in self.a:
                y = np.stack([self.window(f"{layer}.1", x) for x in x_THWD])
            else:
                bias, grid = 0.0, (h, w) if self.spatial == "rope" else None
                if self.biased and not self.omni:
                    bias = self.bias("spatial_rel_pos_bias", h, w)
                if self.biased and self.spatial == "rel":
                    bias = self.bias(f"{layer}.1.spatial_rel_pos_bias", h, w)
                y = [self.attention(f"{layer}.1", x.reshape(h * w, D), bias, grid) for x in x_THWD]
                y = np.stack(y).reshape(x_THWD.shape)
            x_THWD = x_THWD + y
            x_THWD = x_THWD + self.feed_forward(f"{layer}.3", x_THWD)
        return layer_norm(x_THWD, self.a[f"{name}.norm_out.gamma"])

    def time(self, name, x_THWD):
        t, h, w, _ = x_THWD.shape
        distance = np.arange(t)[:, None] - np.arange(t)
        slopes = 2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)
        bias = -slopes[:, None, None] * distance * (1.0 if self.biased else 0.0)
        bias = np.where(distance < 0, -np.inf, bias) if self.causal else 0.0
        lanes = x_THWD.transpose(1, 2, 0, 3).reshape(h * w, t, D)
        for index in range(1 if self.omni else 2):
            layer = f"{name}.layers.{index}"
            if self.scrambled:
                seen = self.conv(f"{layer}.0.dsconv", lanes.reshape(t, h, w, D))
                lanes = lanes + seen.reshape(lanes.shape)
            else:
                x = lanes.reshape(h, w, t, D).transpose(2, 0, 1, 3)
                seen = self.conv(f"{layer}.0.dsconv", x)
                lanes = lanes + seen.transpose(1, 2, 0, 3).reshape(lanes.shape)
            lanes = lanes + np.stack([self.attention(f"{layer}.1", x, bias) for x in lanes])
            lanes = lanes + self.feed_forward(f"{layer}.3", lanes)
        lanes = layer_norm(lanes, self.a[f"{name}.norm_out.gamma"])
        return lanes.reshape(h, w, t, D).transpose(2, 0, 1, 3)

    def patches(self, video_CTHW, t):
        """[C, T, H, W] -> [T / t, h, w, C t p p], channel by channel."""
        c, frames, h, w = video_CTHW.shape
        x = video_CTHW.reshape(c, frames // t, t, h // P, P, w // P, P)
        return x.transpose(1, 3, 5, 0, 2, 4, 6).reshape(frames // t, h // P, w // P, -1)

    def encode(self, video_CTHW):
        """Features before they are quantized, [T, H, W, Z]."""
        parts = []
        for kind, x in (
            ("_first_frame", self.patches(video_CTHW[:, :1], 1)),
            ("", self.patches(video_CTHW[:, 1:], T)),
        ):
            name = f"{self.encoder}to_patch_emb{kind}"
            x = layer_norm(x, self.a[f"{name}.1.weight"], self.a[f"{name}.1.bias"])
            x = self.linear(f"{name}.2", x)
            parts.append(layer_norm(x, self.a[f"{name}.3.weight"], self.a[f"{name}.3.bias"]))
        x = self.space(f"{self.encoder}enc_spatial_transformer", np.concatenate(parts))
        x = self.time(f"{self.encoder}enc_temporal_transformer", x)
        return self.linear("pre_vq_conv.1" if self.omni else "vq.project_in", x)

    def decode(self, z_THWZ):
        """[C, T, H, W] in the network's own range."""
        x = self.linear("post_vq_conv.1" if self.omni else "vq.project_out", z_THWZ)
        x = self.time(f"{self.decoder}dec_temporal_transformer", x)
        x = self.space(f"{self.decoder}dec_spatial_transformer", x)
        frames = []
        for kind, part, t in (("_first_frame", x[:1], 1), ("", x[1:], T)):
            y = self.linear(f"{self.decoder}to_pixels{kind}.0", part)
            n, h, w, _ = y.shape
            y = y.reshape(n, h, w, 3, t, P, P).transpose(3, 0, 4, 1, 5, 2, 6)
            frames.append(y.reshape(3, n * t, h * P, w * P))
        return np.concatenate(frames, axis=1)


CASES = {
    "phenaki, lookup-free": ("phenaki_pytorch", lambda: phenaki(lookup_free=True), {}),
    "phenaki, causal layout": ("phenaki_pytorch", phenaki, {"peg_layout": "causal"}),
    "phenaki, obvious-research": ("phenaki_pytorch", lambda: phenaki(obvious=True), {}),
    "omni, rope": ("omnitokenizer", omni, {}),
    "omni, rel, gaussian": ("omnitokenizer", lambda: omni("rel", True), {"biased": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_imported_weights_compute_what_the_published_code_does(case):
    source, make, options = CASES[case]
    arrays = make()
    module, params = import_tokenizer(arrays, source, **options)
    is_omni = source == "omnitokenizer"
    spatial = ("rel" if "rel" in case else "rope") if is_omni else "shared"
    biased, is_causal = options.get("biased", not is_omni), "causal" in case
    peer = Peer(arrays, is_omni, spatial, biased, not is_causal)
    video = np.random.default_rng(1).uniform(0, 1, (3, FRAMES, SIDE, SIDE)) - 0.5 * is_omni
    ours = 2 * video.transpose(1, 2, 3, 0)[None].astype(np.float32) - (not is_omni)

    features = peer.encode(video)
    if "gaussian" in case:
        wanted, ids = features[..., :4], None
    elif "lookup-free" in case:
        wanted = np.where(features > 0, 1.0, -1.0)
        ids = ((features > 0) * arrays["vq.mask"]).sum(-1)
    else:
        codes = arrays["codebook.embeddings" if is_omni else "vq._codebook.embed"].reshape(CODES, 4)
        near = np.square(unit(features)[..., None, :] - codes).sum(-1)
        ids = near.argmin(-1)
        wanted = codes[ids]

    @functools.partial(jax.jit, static_argnums=1)
    def apply(params, method, x):
        return module.apply({"params": params}, x, method=method)

    encoded = apply(params, "encode", ours)
    np.testing.assert_allclose(encoded.z_BTHWZ[0], wanted, atol=2e-4)
    if ids is None:
        assert encoded.ids_BTHW is None
    else:
        np.testing.assert_array_equal(encoded.ids_BTHW[0], ids)
    rebuilt = apply(params, "decode", encoded)
    scaled = 2 * peer.decode(wanted).transpose(1, 2, 3, 0) - (not is_omni)
    np.testing.assert_allclose(rebuilt[0], scaled, atol=1e-3)

    # The layout that the weights were trained with leaks the future, the causal one does not.
    ours = np.concatenate([ours[:, :-1], -ours[:, -1:]], axis=1)
    changes_T = np.abs(apply(params, "encode", ours).z_BTHWZ - encoded.z_BTHWZ).max((0, 2, 3, 4))
    assert changes_T[-1] > 0.01
    assert (changes_T[:-1].max() > 0.01) == (not is_causal)
    assert is_causal <= (changes_T[:-1] == 0).all()


def test_a_frozen_tokenizer_cannot_stream():
    module, params = import_tokenizer(omni(gaussian=True), "omnitokenizer")
    frozen = FrozenTokenizer(Tokenizer(module.network, module.quantizer), params, "digest")
    assert (frozen.channels, frozen.grid(SIDE), frozen.latents_for_frames(FRAMES)) == (4, (4, 4), 3)
    video = np.zeros((1, FRAMES, SIDE, SIDE, 3), np.float32)
    z, state = jax.eval_shape(frozen.encode, params, video)
    assert z.shape == (1, 3, 16, 4)
    with pytest.raises(UserError, match="cannot stream"):
        frozen.encode(params, video[:, 1:], state)
    _, state = jax.eval_shape(lambda params, z: frozen.decode(params, z, (4, 4)), params, z)
    with pytest.raises(UserError, match="cannot stream"):
        frozen.decode(params, np.zeros(z.shape, np.float32), (4, 4), state)


def threes(*shape):
    """An array that no layer takes, whatever was there."""
    return lambda x: np.full(shape, 3)


SPACE, OMNI_SPACE = "enc_spatial_transformer.layers.0", "encoder.enc_spatial_transformer.layers.1"
TIME = "enc_temporal_transformer.layers.1"
UNKNOWN = "no layer takes {name};"

# (name of an array, its replacement, None for a file without it, and the message)
REFUSED = [
    # Missing.
    ("vq._codebook.embed", None, "holds no '{name}'"),
    (f"{TIME}.3.4.weight", None, "holds no '{name}'"),
    ("vq.project_in.bias", None, "holds no '{name}'"),
    ("to_pixels.0.bias", None, "holds no '{name}'"),
    # Of layers or terms that the network does not have.
    ("to_logits.weight", threes(3), UNKNOWN),
    (f"{SPACE}.1.norm.beta", threes(D), UNKNOWN),
    (f"{SPACE}.1.null_kv", threes(HEADS, 2, K), UNKNOWN),
    (f"{SPACE}.1.to_q.bias", threes(HEADS * K), UNKNOWN),
    (f"{SPACE}.1.to_kv.bias", threes(2 * HEADS * K), UNKNOWN),
    (f"{SPACE}.1.to_out.bias", threes(D), UNKNOWN),
    (f"{SPACE}.3.1.bias", threes(2 * HIDDEN), UNKNOWN),
    (f"{OMNI_SPACE}.1.qkv.bias", threes(3 * D), UNKNOWN),
    (f"{OMNI_SPACE}.1.relative_position_index", threes(4, 4), UNKNOWN),
    # Of another rank, no array, or empty.
    ("to_patch_emb.2.weight", lambda x: x[None], r"'{name}' .* \(1, 16, 24\), not one of 2 axes"),
    ("to_patch_emb.3.weight", lambda x: x[0], r"'{name}' .* \(\), not one of 1 axes"),
    (f"{SPACE}.1.norm.gamma", lambda x: x[None], "'{name}' .* not one of 1 axes"),
    (f"{SPACE}.1.q_scale", lambda x: x[None], "'{name}' .* not one of 1 axes"),
    (f"{SPACE}.3.4.weight", np.ravel, "'{name}' .* not one of 2 axes"),
    (f"{TIME}.0.dsconv.weight", np.ravel, "'{name}' .* not one of 5 axes"),
    ("to_pixels.0.bias", np.ndarray.tolist, "'{name}' is a list; use an array"),
    ("to_patch_emb.2.weight", lambda x: x[:, :0], r"'{name}' is empty, of shape \(16, 0\)"),
    # Not to be converted, split or reshaped.
    ("to_pixels.0.bias", lambda x: np.full(x.shape, "x"), r"'{name}' \(could not convert"),
    (f"{SPACE}.1.to_kv.weight", lambda x: x[1:], r"'{name}' \(array split"),
    ("vq._codebook.embed", lambda x: np.concatenate([x, x]), r"'{name}' \(cannot reshape"),
    ("vq._codebook.embed", lambda x: x[0, 0], r"'{name}' \(tuple index out of range\)"),
    # Of shapes that do not fit the others.
    (
        f"{SPACE}.1.norm.gamma",
        lambda x: x[1:],
        r"space_0_attention/norm/scale has shape \(15,\), the network needs \(16,\)",
    ),
    (f"{SPACE}.1.to_out.weight", lambda x: x[1:], "space_0_attention/out/kernel has shape"),
    ("to_pixels.0.weight", lambda x: x[:, 1:], "pixels/group/kernel has shape"),
    ("to_patch_emb.2.weight", lambda x: x[:, 1:], "group/kernel has shape"),
    ("to_patch_emb.2.weight", lambda x: x[:, :4], "cannot use the sizes of its arrays"),
    ("spatial_rel_pos_bias.net.2.weight", lambda x: x[:, 1:], "bias/out/kernel has shape"),
    (f"{OMNI_SPACE}.1.relative_position_bias_table", lambda x: x[1:], "bias/table has shape"),
    ("codebook.embeddings", lambda x: x[:, 1:], "codebook/code_VZ has shape"),
    # Codes in several books.
    ("vq.mask", lambda x: x[2:], r"'vq.project_in.weight' has shape \(4, 16\), not \(2, 16\)"),
]


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_refusals(name, change, message):
    """Biases are checked even where they are not added."""
    is_omni = name.startswith(("encoder.", "codebook."))
    arrays = omni() if is_omni else phenaki(lookup_free=name == "vq.mask")
    found = arrays.pop(name, None)
    if change:
        arrays[name] = change(found)
    with pytest.raises(UserError, match=message.replace("{name}", name)):
        import_tokenizer(arrays, "omnitokenizer" if is_omni else "phenaki_pytorch", biased=False)


def test_refusals_of_arguments():
    with pytest.raises(UserError, match="holds no "):
        import_tokenizer({}, "phenaki_pytorch")
    with pytest.raises(UserError, match="source='cosmos': unknown"):
        import_tokenizer(phenaki(), "cosmos")
    with pytest.raises(UserError, match="peg_layout='right': unknown"):
        import_tokenizer(phenaki(), "phenaki_pytorch", peg_layout="right")
