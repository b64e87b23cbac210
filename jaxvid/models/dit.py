"""The diffusion transformer of AR-Diffusion: a timestep per frame, causal in time, streaming."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxvid.checks import at_least, choose, require
from jaxvid.errors import within
from jaxvid.layers import pairs
from jaxvid.layers.conv import MAX_CONV, CausalConv
from jaxvid.layers.embed import grid_sincos, sinusoid
from jaxvid.layers.linear import Linear
from jaxvid.mixers import (
    MAX_RATIO,
    cache,
    check_depth,
    check_heads,
    check_options,
    kinds,
    make_mixer,
)
from jaxvid.mixers.attention import Attention
from jaxvid.parallel.sharding import frames_are_split, shard

ARRANGEMENTS = ("joint", "factorised")
TIME_FEATURES = 256


def layer_norm(x):
    """LayerNorm without affine parameters (eps 1e-6), computed in float32, in the dtype of x."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    return (h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class MLP(nn.Module):
    """Two-layer perceptron with tanh-GELU; x [..., D] -> [..., D]."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        h = nn.gelu(Linear(self.hidden, name="up", **dense)(x))
        return Linear(x.shape[-1], transposed=True, name="down", **dense)(h)


class Block(nn.Module):
    """One layer of the DiT: mixing and MLP, each under adaLN-zero with one modulation per frame.

    (context_BMD, x_BTND), state, c_BTD -> (context_BMD, x_BTND), state. The context has no
    modulation and sees only itself, so a layer reads it once, at the start of the stream; the state
    then holds it. Without `factorised` the mixer runs over the tokens of all frames. With
    `factorised` attention mixes each frame (and the context), then the mixer runs over time at
    every location. paired: the frames are clean ones and their noisy copies (`layers.pairs`), and
    the mixer runs with teacher forcing; all else works on single frames.
    """

    heads: int
    grid: tuple[int, int]
    hidden: int
    factorised: bool
    mixer: Mapping[str, Any]
    qk_norm: bool
    dtype: Any
    paired: bool = False

    def _temporal(self, width):
        return make_mixer(
            self.mixer,
            width=width,
            heads=self.heads,
            grid=(1, 1) if self.factorised else self.grid,
            qk_norm=self.qk_norm,
            dtype=self.dtype,
            name="temporal",
        )

    def _over_time(self, temporal, x_BTND, state):
        if not self.paired:
            return temporal(x_BTND, state)
        *both, state = temporal.teacher_forced(*pairs.split(x_BTND), state)
        return pairs.join(*both), state

    @nn.compact
    def __call__(self, carry, state, c_BTD):
        context_BMD, x_BTND = carry
        B, T, N, D = x_BTND.shape
        temporal = self._temporal(D)
        mlp = MLP(self.hidden, dtype=self.dtype, name="mlp")
        sublayers = 3 if self.factorised else 2
        modulation = Linear(
            3 * sublayers * D,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="modulation",
        )(nn.silu(c_BTD))
        modulation = jnp.split(modulation[:, :, None], 3 * sublayers, axis=-1)
        shifts, scales, gates = modulation[0::3], modulation[1::3], modulation[2::3]

        def normalise(i, x_BTND):
            return layer_norm(x_BTND) * (1 + scales[i]) + shifts[i]

        if self.factorised:
            spatial = Attention(
                D, self.heads, self.grid, qk_norm=self.qk_norm, dtype=self.dtype, name="spatial"
            )
            context_kv, state = (None, None) if state is None else state
            if context_BMD is not None:
                y_BMD, read = spatial.prefill(layer_norm(context_BMD), N)
                context_kv = (read.context_k_BMAK, read.context_v_BMAK)
            y_BTND = attend_in_frames(spatial, normalise(0, x_BTND), context_kv)
            x_BTND = x_BTND + gates[0] * y_BTND

            # Locations join the batch: [B N, T, 1, D].
            h = normalise(1, x_BTND).swapaxes(1, 2).reshape(B * N, T, 1, D)
            h, state = self._over_time(temporal, h, state)
            x_BTND = x_BTND + gates[1] * h.reshape(B, N, T, D).swapaxes(1, 2)
            state = (context_kv, state)
        else:
            h_BTND = normalise(0, x_BTND)
            if context_BMD is not None:
                y_BMD, state = temporal.prefill(layer_norm(context_BMD), N)
            h_BTND, state = self._over_time(temporal, h_BTND, state)
            x_BTND = x_BTND + gates[0] * h_BTND
        if context_BMD is not None:
            context_BMD = context_BMD + y_BMD
            context_BMD = context_BMD + mlp(layer_norm(context_BMD))
        x_BTND = shard(x_BTND + gates[-1] * mlp(normalise(-1, x_BTND)), "BTND")
        return (context_BMD, x_BTND), state


def attend_in_frames(spatial: Attention, x_BTND, context_kv):
    """Attention within each frame and to the context -> y_BTND.

    context_kv: (k_BMAK, v_BMAK) of the context, or None. Frames join the batch, unless the mesh
    splits frames: a vmap over frames then keeps each frame on its device.
    """
    B, T, N, D = x_BTND.shape
    if not frames_are_split() or T == 0:
        state = context_kv and cache.start(*(jnp.repeat(x, T, axis=0) for x in context_kv), N)
        return spatial(x_BTND.reshape(B * T, 1, N, D), state)[0].reshape(B, T, N, D)

    def attend(spatial, x_BND):
        return spatial(x_BND[:, None], context_kv and cache.start(*context_kv, N))[0][:, 0]

    shared = dict(variable_axes={"params": None}, split_rngs={"params": False})
    return nn.vmap(attend, in_axes=1, out_axes=1, **shared)(spatial, x_BTND)


_RematBlock = nn.remat(Block, prevent_cse=False)
# Of equal layers, and of programs that call layers of one shape, all share one trace.
_JitBlock, _JitRematBlock = nn.jit(Block), nn.jit(_RematBlock)


class Group(nn.Module):
    """Layers with different mixers, which a scan repeats as one; arguments as those of `Block`.

    mixers: the options of `Block` for the mixer of each. shared: its other options. The state is a
    tuple with that of each layer.
    """

    mixers: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    remat: bool

    @nn.compact
    def __call__(self, carry, states, c_BTD):
        return in_turn(self, self.mixers, self.shared, self.remat, carry, states, c_BTD)


def in_turn(module, mixers, shared, remat, carry, states, c_BTD):
    """Blocks layer_0, layer_1, .. of the module whose method calls this -> (carry, states)."""
    layer, after = (_RematBlock if remat else Block), []
    if not module.is_initializing():  # where each layer draws its own parameters
        layer = _JitRematBlock if remat else _JitBlock
    for i, (mixer, state) in enumerate(zip(mixers, states or (None,) * len(mixers))):
        carry, state = layer(mixer=mixer, **shared, name=f"layer_{i}")(carry, state, c_BTD)
        after.append(state)
    return carry, tuple(after)


class DiT(nn.Module):
    """Diffusion transformer over video tokens with one noise level per frame (AR-Diffusion, 3.2).

    x_BTNC noisy tokens, t_BT integer timesteps, context_BME embeddings (or None) ->
    (prediction_BTNC float32, state). The state None starts a stream and reads the context. A
    returned state continues the stream and holds the context, so later calls pass none. T = 0 is
    allowed and only starts the stream.

    clean_BTNC: teacher forcing. These are the frames of the stream, at timestep 0, and x_BTNC are
    their noisy copies. A copy reads the clean frames before its own and itself, so one call gives
    the prediction of every frame as sampling one frame after another makes it. The state has read
    the clean frames.

    size_BT: with `step_sizes`, the size of the step that a sampler takes with each frame, int32
    (`diffusion.shortcut`); the smallest, 0, unless given.

    width: D. depth: layers. heads: A, divides D into even heads. grid: (H, W) of the tokens of a
    frame, H * W = N. mlp_ratio: hidden width of the MLPs over D. arrangement: "joint" (all tokens
    of all frames mix, as in the paper) or "factorised" (attention per frame, then the temporal
    mixer per location). mixer: the name in `mixers.MIXERS` and the options of that mixer; with
    `every`, each such layer is softmax instead (`jaxvid.mixers`).
    input_skip: adds the input to the output, by a learned share per channel that depends on the
    timestep (after Karras et al. 2022, who use a formula). Layers normalise and so lose the norm of
    a token, which matters little for latents of unit norm and much for pixels. conv: frames that a
    convolution over the embedded tokens of a location spans, so that the first layer already sees
    the frames before; 1 = none. step_sizes: how many
    sizes of a step the model tells apart; 0 = it does not know the size. remat: recomputes each
    layer in the backward pass. scan: compiles one layer for all, or one of each in a `Group`, and
    stacks their parameters along a leading depth axis. Without it each layer has a subtree of its
    own; this compiles more slowly and runs about a tenth faster on CPU. Raises UserError for values
    that cannot work.
    """

    width: int
    depth: int
    heads: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    arrangement: str = "joint"
    mixer: Mapping[str, Any] = FrozenDict(name="softmax", window=16)
    qk_norm: bool = True
    input_skip: bool = False
    step_sizes: int = 0
    conv: int = 1
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = True

    def __post_init__(self):
        at_least("conv", self.conv, 1, at_most=MAX_CONV)
        check_heads(self.width, self.heads)
        at_least("mlp_ratio", self.mlp_ratio, 0, at_most=MAX_RATIO)
        message = f"leaves width={self.width} no hidden unit; use 4"
        require(self.width * self.mlp_ratio >= 1, "mlp_ratio", self.mlp_ratio, message)
        choose("arrangement", self.arrangement, ARRANGEMENTS)
        with within("mixer"):
            check_options(self.mixer, self.heads)
        check_depth("depth", self.depth, self.mixer.get("every", 0))
        super().__post_init__()

    @nn.compact
    def __call__(self, x_BTNC, t_BT, context_BME=None, state=None, clean_BTNC=None, size_BT=None):
        size_BT = jnp.zeros_like(t_BT) if size_BT is None else size_BT
        paired = clean_BTNC is not None
        if paired:
            x_BTNC = pairs.join(clean_BTNC, x_BTNC)
            t_BT, size_BT = (pairs.join(jnp.zeros_like(x), x) for x in (t_BT, size_BT))
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        past, state = (None, None) if state is None else state
        x_BTND = Linear(self.width, name="embed", **dense)(x_BTNC)
        if self.conv > 1:
            y_BTND, past = CausalConv(self.conv, self.dtype, name="conv")(x_BTND, past, paired)
            x_BTND = x_BTND + y_BTND
        x_BTND = shard(x_BTND + grid_sincos(self.grid, self.width).astype(self.dtype), "BTND")
        c_BTD = Linear(self.width, name="time_in", **dense)(sinusoid(t_BT, TIME_FEATURES))
        c_BTD = Linear(self.width, name="time_out", **dense)(nn.silu(c_BTD))
        if self.step_sizes:
            zeros = dict(embedding_init=nn.initializers.zeros, dtype=self.dtype)
            c_BTD += nn.Embed(self.step_sizes, self.width, name="step_size", **zeros)(size_BT)
        context_BMD = None
        if context_BME is not None:
            context_BMD = Linear(self.width, name="context", **dense)(context_BME)
            # Without a constraint its gradient is wrong on a mesh of data, fsdp and tensor
            # (XLA of jax 0.10.2): the tests compare it with that of one device.
            context_BMD = shard(context_BMD, "BMD")

        shared = dict(
            heads=self.heads,
            grid=self.grid,
            hidden=int(self.mlp_ratio * self.width),
            factorised=self.arrangement == "factorised",
            qk_norm=self.qk_norm,
            dtype=self.dtype,
            paired=paired,
        )
        carry, mixers = (context_BMD, x_BTND), kinds(self.mixer)
        if self.scan:
            if len(mixers) == 1:
                layer = _RematBlock if self.remat else Block
                options = dict(mixer=mixers[0], **shared)
            else:
                layer, options = Group, dict(mixers=mixers, shared=shared, remat=self.remat)
            layers = nn.scan(
                layer,
                length=self.depth // len(mixers),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
            )
            carry, state = layers(**options, name="layers")(carry, state, c_BTD)
        else:
            mixers *= self.depth // len(mixers)
            carry, state = in_turn(self, mixers, shared, self.remat, carry, state, c_BTD)
        x_BTND = carry[1]
        if paired:
            x_BTND, x_BTNC, c_BTD = (pairs.split(part)[1] for part in (x_BTND, x_BTNC, c_BTD))
        C, zero = x_BTNC.shape[-1], dict(kernel_init=nn.initializers.zeros, dtype=jnp.float32)
        y_BTNC = Linear(C, name="head", **zero)(layer_norm(x_BTND))
        if self.input_skip:
            share_BTC = Linear(C, name="input_skip", **zero)(nn.silu(c_BTD))
            y_BTNC += share_BTC[:, :, None] * x_BTNC
        return y_BTNC, (past, state)
