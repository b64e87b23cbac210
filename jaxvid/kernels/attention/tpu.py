"""Softmax attention on TPU by jax's splash kernel, which skips masked blocks.

Scores stay in the memory of the core, forward and backward (FlashAttention-2, Dao 2023). The kernel
gets a list of the blocks that are not all masked, and a mask only for those masked in part.
Blocks with the same mask share it, so frames as long as a block have one mask in all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.kernels import dispatch
from jaxvid.kernels.dispatch import FLOPS, Flops

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as splash_mask,
    )
except ImportError:  # a later jax
    splash = None

LANES = 128  # by which the kernel's lengths must be divisible
BLOCK = 512  # tokens of a block; smaller ones keep the matrix unit waiting
FEWEST = 2**16  # pairs of a query and a key for which blocks are worth their padding
WIDEST = 256  # channels of a head


def attention(q_BLAK, k_BMAK, v_BMAK, *, q_position_L, k_position_M, allow, scale):
    """As `reference.attention`. Raises NotImplementedError if the kernel does not apply.

    It needs a TPU, positions that are known while tracing, at least FEWEST pairs, and heads of at
    most WIDEST channels. On a mesh, batch and heads are split by the sharding table.
    """
    L, M, K = q_BLAK.shape[1], k_BMAK.shape[1], q_BLAK.shape[3]
    if splash is None:
        raise NotImplementedError(f"jax {jax.__version__} has no splash attention")
    if dispatch.platform() != "tpu":
        raise NotImplementedError("splash attention needs a TPU")
    if not dispatch.are_known(q_position_L, k_position_M):
        raise NotImplementedError("splash attention needs positions known while tracing")
    if L * M < FEWEST or K > WIDEST:
        raise NotImplementedError(f"splash attention is for {FEWEST} pairs and {WIDEST} channels")
    (rows, block_q), (columns, block_kv) = _whole_blocks(L), _whole_blocks(M)
    mask = FrameMask(allow, q_position_L, k_position_M, (rows, columns))
    sizes = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q) | dict.fromkeys(
        ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"),
        block_kv,
    )

    def attend(q, k, v):
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
            for x, size in zip(((q * scale).astype(q.dtype), k, v), (rows, columns, columns))
        )
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
        )
        y_BLAK = jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :L]
        return jnp.where(mask.seen_L[:, None, None], y_BLAK, 0)

    # A name of its own for the key in FLOPS: a kernel does not say what its blocks cost.
    computed = mask.blocks(block_q, block_kv) * block_q * block_kv
    attend.__name__ = f"splash_attention_{computed}"
    FLOPS.setdefault(attend.__name__, _flops(computed))
    return dispatch.by_batch_and_head(jax.jit(attend), (), q_BLAK, k_BMAK, v_BMAK)


def _flops(computed):
    """Of a call that computes so many pairs: two products forward and seven backward.

    Differentiation splits the call. The forward part has q, k and v, the backward part more arrays
    like them, and what makes the mask has none.
    """

    def executed(*operands):
        tokens = [x for x in operands if x.ndim == 4]
        products = {0: 0, 3: 2}.get(len(tokens), 7)
        return products and products * 2 * computed * tokens[0].size // max(tokens[0].shape[1:3])

    return Flops(all_pairs=lambda q, k, *_: 4 * q.size * k.shape[1], executed=executed)


def _whole_blocks(size):
    """(the size rounded up to whole blocks, the size of a block)."""
    block = min(BLOCK, size + -size % LANES)
    return size + -size % block, block


class FrameMask(splash_mask.Mask if splash else object):
    """The mask of static positions, computed block by block, for lengths padded to `size`.

    Padding sees nothing and is not seen. seen_L: whether a query has a key; what the kernel makes
    of one without is finite, but means nothing.
    """

    def __init__(self, allow, q_position_L, k_position_M, size):
        self.allow, self.size = allow, size
        self.positions = q_position_L, k_position_M
        frames_L, place_L = np.unique(q_position_L, return_inverse=True)
        frames_M = np.unique(k_position_M)
        mask = np.broadcast_to(allow(frames_L[:, None], frames_M), (frames_L.size, frames_M.size))
        self.seen_L = mask.any(axis=1)[place_L]

    @property
    def shape(self):
        return self.size

    def __getitem__(self, index):
        rows, columns = (np.arange(size)[part] for size, part in zip(self.size, index, strict=True))
        L, M = (position.size for position in self.positions)
        mask = np.zeros((rows.size, columns.size), bool)
        inside = rows < L, columns < M
        q, k = (
            position[part[keep]]
            for position, part, keep in zip(self.positions, (rows, columns), inside)
        )
        mask[np.ix_(*inside)] = self.allow(q[:, None], k[None, :])
        return mask

    def blocks(self, rows, columns):
        """The number of blocks in which the mask allows a pair."""
        return sum(
            bool(self[row : row + rows, column : column + columns].any())
            for row in range(0, self.size[0], rows)
            for column in range(0, self.size[1], columns)
        )

    def _key(self):
        return self.allow, self.size, *(position.tobytes() for position in self.positions)

    def __eq__(self, other):
        return isinstance(other, FrameMask) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())
