"""Tokenizers from published weights.

    arrays = jaxvid.weights.read("tokenizer.safetensors")
    module, params = import_tokenizer(arrays, "omnitokenizer")
    encoded = module.apply({"params": params}, video_BTHWC, method="encode")
    video_BTHWC = module.apply({"params": params}, encoded, method="decode")

Sizes follow from the shapes of the arrays. Options that the file does not hold are arguments.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from jaxvid import checks
from jaxvid.errors import UserError
from jaxvid.layers.quantize import KL, LFQ, VQ
from jaxvid.models.peers import PEG_LAYOUTS, PeerTokenizer
from jaxvid.models.tokenizer import Codec, moments
from jaxvid.parallel.sharding import path_name
from jaxvid.weights import take

SOURCES = ("phenaki_pytorch", "omnitokenizer")

# Arrays that a file may hold beside those of the tokenizer: discriminators, perceptual networks,
# statistics of codebooks, norms of a context, which self-attention does not have, and constants.
_IGNORED = re.compile(
    r"^(discr|vgg|loss_fn_lpips|i3d)\."
    r"|^(image_discriminator|video_discriminator|perceptual_model|video_perceptual_model)\."
    r"|\.(initted|cluster_size|embed_avg|N|z_avg|codebook_usage)$"
    r"|\.context_norm\.|\.slopes$"
)


def import_tokenizer(
    arrays: Mapping[str, np.ndarray],
    source: str,
    *,
    peg_layout: str = "peer_scrambled",
    biased: bool | None = None,
) -> tuple[Codec, dict]:
    """{name: array} of a state dict -> (`Codec` with a `PeerTokenizer`, its params).

    source: "phenaki_pytorch" (C-ViViT of lucidrains with LFQ or VQ, or of obvious-research, which
    is recognised by its convolutions in space) or "omnitokenizer" (VQ or KL). The codes of LFQ are
    +-1, the default of the source. peg_layout: "causal" is the layout that was intended, with which
    the weights were not trained. biased: add the biases of space and time; None does as the code of
    the source does today: phenaki_pytorch adds them, omnitokenizer does not. Beside the weights,
    params hold the `latents` of a `FrozenTokenizer`, which are not measured: mean 0, variance 1.
    Raises UserError for arrays that are missing, have other shapes, or belong to no layer.
    """
    checks.choose("source", source, SOURCES)
    checks.choose("peg_layout", peg_layout, PEG_LAYOUTS)
    file = _File(arrays, source)
    try:
        return _convert(file, peg_layout, biased)
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{source}: cannot use {file.reading} ({reason}); is it of another network?"
        ) from error


def _convert(file, peg_layout, biased):
    """See `import_tokenizer`. Sizes that do not fit may raise any error of numpy or flax."""
    arrays, omni = file.arrays, file.source == "omnitokenizer"
    encoder, decoder = ("encoder.", "decoder.") if omni else ("", "")
    patch_norm = f"{encoder}to_patch_emb.2.weight" in arrays
    linear = 2 if patch_norm else 1  # index of the map, after a rearrangement and perhaps a norm
    image, group = (
        file.linear(f"{encoder}to_patch_emb{kind}.{linear}") for kind in ("_first_frame", "")
    )
    cells, width = image["kernel"].shape
    stacks = {
        "encode_space": file.stack(f"{encoder}enc_spatial_transformer"),
        "encode_time": file.stack(f"{encoder}enc_temporal_transformer"),
        "decode_space": file.stack(f"{decoder}dec_spatial_transformer"),
        "decode_time": file.stack(f"{decoder}dec_temporal_transformer"),
    }
    over_time = stacks["encode_time"][0]
    head_width = over_time["attention"]["q_norm"]["scale"].size
    in_space = [layer for side in ("encode", "decode") for layer in stacks[f"{side}_space"]]
    position = "rel" if any("bias" in layer for layer in in_space) else "rope"
    network = {"embed": {"image": image, "group": group}, "pixels": {}}
    if not omni:
        position, network["bias"] = "shared", file.position("spatial_rel_pos_bias")
    for part, kind in (("image", "_first_frame"), ("group", "")):
        if patch_norm:
            for index, norm in ((1, "pixels"), (3, "norm")):
                name = f"{encoder}to_patch_emb{kind}.{index}"
                network["embed"][f"{part}_{norm}"] = file.norm(name)
        network["pixels"][part] = file.linear(f"{decoder}to_pixels{kind}.0")
    for name, layers in stacks.items():
        network |= _named(name, layers)
        side = f"{encoder}enc" if name.startswith("encode") else f"{decoder}dec"
        kind = "spatial" if name.endswith("space") else "temporal"
        network[f"norms_{name}"] = file.norm(f"{side}_{kind}_transformer.norm_out")
    quantizer, codebook, latent = (_omni_codes if omni else _phenaki_codes)(file, width)
    file.check_all_taken()
    patch = round((cells / 3) ** 0.5)
    space_peg = any("peg" in layer for layer in in_space)
    windows = [
        _window_side(layer["window"]["bias"]["table"]) for layer in in_space if "window" in layer
    ]
    module = PeerTokenizer(
        features=quantizer.features,
        channels=quantizer.channels,
        patch=patch,
        t_patch=group["kernel"].shape[0] // cells,
        width=width,
        heads=over_time["attention"]["q"]["kernel"].shape[1] // head_width,
        head_width=head_width,
        hidden=over_time["mlp"]["up"]["kernel"].shape[1],
        encode_blocks=_block_letters(stacks["encode_space"]),
        decode_blocks=_block_letters(stacks["decode_space"]),
        encode_depth=len(stacks["encode_time"]),
        decode_depth=len(stacks["decode_time"]),
        window=windows[0] if windows else 8,
        position=position,
        biased=not omni if biased is None else biased,
        # obvious-research builds all four stacks alike: with convolutions, without masks.
        causal=omni or not space_peg,
        peg_layout=peg_layout,
        space_peg=space_peg,
        time_peg="peg" in over_time,
        patch_norm=patch_norm,
        unit=omni and isinstance(quantizer, VQ),
        offset=0.0 if omni else 0.5,
    )
    params = {"network": {**network, **latent}, "codebook": codebook}
    # A file holds biases even if they are not added, and a module has them only if they are.
    side = patch * (windows or [1])[0]
    file.check_shapes(Codec(module.clone(biased=True), quantizer), params, side)
    params["latents"] = jax.device_get(moments(quantizer.channels))
    return Codec(module, quantizer), params


def _named(name, layers):
    """The layers of a stack, named like the parameters of `PeerTokenizer`."""
    return {
        f"stacks_{name}_{index}_{part}": params
        for index, layer in enumerate(layers)
        for part, params in layer.items()
        if part != "bias" or not name.endswith("time")  # stored for both, used in space alone
    }


def _block_letters(layers):
    """`encode_blocks` of a spatial stack: a letter for each layer."""
    return "".join("w" if "window" in layer else "t" for layer in layers)


def _window_side(table):
    """Cells along a side of the window, from its table of biases by offset."""
    return (round(len(table) ** 0.5) + 1) // 2


def _offset_index(side):
    """The row of that table that each pair of cells reads, int [N, N]."""
    row_N, column_N = np.divmod(np.arange(side * side), side)
    down_NN, right_NN = (x[:, None] - x + side - 1 for x in (row_N, column_N))
    return down_NN * (2 * side - 1) + right_NN


def _phenaki_codes(file, width):
    """(LFQ or VQ, codebook, linear maps before and after it) of vector-quantize-pytorch.

    VQ compares directions. The maps are absent where codes are as wide as tokens.
    """
    if "vq.mask" in file.arrays:  # the value of each bit in an id
        quantizer, codebook = LFQ(channels=file.take("vq.mask", ndim=1).size), {}
    else:
        code_VZ = file.take("vq._codebook.embed")
        code_VZ = code_VZ.reshape(code_VZ.shape[-2:])
        quantizer = VQ(codes=len(code_VZ), channels=code_VZ.shape[1])
        codebook = _codebook(code_VZ)
    Z = quantizer.channels

    def linear(name, *shape):
        is_absent = width == Z and f"{name}.weight" not in file.arrays
        return _identity(width) if is_absent else file.linear(name, *shape)

    latent = {
        "to_latent": linear("vq.project_in", Z, width),
        "from_latent": linear("vq.project_out", width, Z),
    }
    return quantizer, codebook, latent


def _omni_codes(file, width):
    """(VQ or KL, codebook, linear maps before and after it); VQ compares codes as they are."""
    del width
    latent = {
        "to_latent": file.linear("pre_vq_conv.1"),
        "from_latent": file.linear("post_vq_conv.1"),
    }
    features, channels = latent["to_latent"]["bias"].size, latent["from_latent"]["kernel"].shape[0]
    # Files with Gaussian latents hold it too, unused.
    code_VZ = file.take("codebook.embeddings", ndim=2)
    if features == 2 * channels:
        return KL(channels=channels), {}, latent
    return VQ(codes=len(code_VZ), channels=channels, normalize=False), _codebook(code_VZ), latent


def _codebook(code_VZ):
    """The state of a codebook of `VQ`, without the unknown running means."""
    ones_V = np.ones(len(code_VZ), np.float32)
    return {"code_VZ": code_VZ, "count_V": ones_V, "sum_VZ": code_VZ, "updates": np.int32(1)}


def _identity(width):
    """Parameters of the identity as a linear map."""
    return {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}


class _File:
    """Arrays of a PyTorch state dict, taken by name as Flax parameters; keeps track of the rest."""

    def __init__(self, arrays, source):
        for name, array in arrays.items():
            if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise UserError(f"{source}: {name!r} is a {type(array).__name__}; use an array")
        self.arrays, self.source, self._untaken = arrays, source, set(arrays)
        self.reading = "this file"  # the subject of the next error

    def take(self, name, *shape, ndim=None):
        """The array as float32; UserError if it is missing, empty, or of another shape."""
        self._untaken.discard(name)
        self.reading = repr(name)
        found = np.shape(self.arrays.get(name))
        array = take(self.arrays, name, shape or found, self.source)
        if ndim is not None and len(found) != ndim:
            raise UserError(f"{self.source}: {name!r} has shape {found}, not one of {ndim} axes")
        if not array.size:
            raise UserError(f"{self.source}: {name!r} is empty, of shape {found}")
        return array

    def linear(self, name, *shape, bias=True):
        """weight [out, in], of `shape` if given -> kernel [in, out], and the bias if `bias`.

        Without `bias`, a bias in the file is not taken, so that `check_all_taken` refuses it.
        """
        params = {"kernel": self.take(f"{name}.weight", *shape, ndim=2).T}
        if bias:
            params["bias"] = self.take(f"{name}.bias", params["kernel"].shape[1])
        return params

    def norm(self, name):
        """A LayerNorm of PyTorch, or one of the peers, whose shift is fixed at zero."""
        if f"{name}.gamma" in self.arrays:
            return {"scale": self.take(f"{name}.gamma", ndim=1)}
        return {
            ours: self.take(f"{name}.{theirs}", ndim=1)
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        }

    def position(self, name):
        """The MLP of a continuous position bias."""
        layers = {"in": "net.0.0", "hidden": "net.1.0", "out": "net.2"}
        return {ours: self.linear(f"{name}.{theirs}") for ours, theirs in layers.items()}

    def stack(self, name):
        """The layers of a transformer, each {part: params}."""
        found = (re.match(rf"{re.escape(name)}\.layers\.(\d+)\.", other) for other in self.arrays)
        depth = 1 + max((int(match[1]) for match in found if match), default=-1)
        if not depth:
            raise UserError(f"{self.source}: holds no {name}.layers; is it of another network?")
        return [self._layer(f"{name}.layers.{index}") for index in range(depth)]

    def _layer(self, name):
        up = self.linear(f"{name}.3.1", bias=False)["kernel"]
        value, gate = np.split(up, 2, axis=1)
        layer = {
            "mlp": {
                "norm": self.norm(f"{name}.3.0"),
                "up": {"kernel": value},
                "gate": {"kernel": gate},
                # `Linear(transposed=True)` stores its kernel as PyTorch does.
                "down": {"kernel": self.take(f"{name}.3.4.weight", ndim=2)},
            }
        }
        if f"{name}.0.dsconv.weight" in self.arrays:
            kernel = self.take(f"{name}.0.dsconv.weight", ndim=5).transpose(2, 3, 4, 1, 0)
            layer["peg"] = {"kernel": kernel, "bias": self.take(f"{name}.0.dsconv.bias")}
        if f"{name}.1.relative_position_bias_table" in self.arrays:
            qkv = np.split(self.linear(f"{name}.1.qkv", bias=False)["kernel"], 3, axis=1)
            table = self.take(f"{name}.1.relative_position_bias_table", ndim=2)
            index = f"{name}.1.relative_position_index"
            if np.array_equal(self.arrays.get(index), _offset_index(_window_side(table))):
                self._untaken.discard(index)  # another index is refused
            layer["window"] = {
                "norm": self.norm(f"{name}.1.norm"),
                **{part: {"kernel": kernel} for part, kernel in zip("qkv", qkv)},
                "bias": {"table": table},
                "out": self.linear(f"{name}.1.proj"),
            }
            return layer
        k, v = np.split(self.linear(f"{name}.1.to_kv", bias=False)["kernel"], 2, axis=1)
        layer["attention"] = {
            "norm": self.norm(f"{name}.1.norm"),
            "q": self.linear(f"{name}.1.to_q", bias=False),
            "k": {"kernel": k},
            "v": {"kernel": v},
            "q_norm": {"scale": self.take(f"{name}.1.q_scale", ndim=1)},
            "k_norm": {"scale": self.take(f"{name}.1.k_scale", ndim=1)},
            "out": self.linear(f"{name}.1.to_out", bias=False),
        }
        if f"{name}.1.spatial_rel_pos_bias.net.2.weight" in self.arrays:
            layer["bias"] = self.position(f"{name}.1.spatial_rel_pos_bias")
        return layer

    def check_all_taken(self):
        """Raise UserError for arrays that no layer has taken and that matter."""
        names = sorted(name for name in self._untaken if not self._is_ignored(name))
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(
                f"{self.source}: no layer takes {', '.join(names[:4])}{more}; "
                "is it of another network?"
            )

    def _is_ignored(self, name):
        """Whether the tokenizer is the same without this array."""
        if _IGNORED.search(name):
            return True
        if name.endswith(".beta"):  # the fixed shift of a norm
            return not np.any(self.arrays[name])
        return name.endswith(".null_kv") and not np.size(self.arrays[name])

    def check_shapes(self, module, params, side):
        """Raise UserError for the first of params that is not as the module makes it.

        side: pixels along the sides of frames that fit the module.
        """
        self.reading = "the sizes of its arrays together"
        video = np.zeros((1, 1 + module.network.t_patch, side, side, 3), np.float32)
        made = _shapes(jax.eval_shape(module.init, jax.random.key(0), video)["params"])
        found = _shapes(params)
        for name in sorted(made | found):
            want, have = (shapes.get(name, "none") for shapes in (made, found))
            if want != have:
                raise UserError(
                    f"{self.source}: {name} has shape {have}, the network needs {want}; "
                    "is it of another network?"
                )


def _shapes(params):
    return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
