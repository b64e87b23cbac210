"""The neural memory for TPUs, compiled ahead of time, and its FLOPs by formula."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxvid.kernels.neural_memory import Memory, neural_memory
from jaxvid.mixers import make_mixer
from jaxvid.training import flops

TOPOLOGY, MEMORY = "v5e:2x2", 16  # GB of a chip, the least of those that are built today
WIDTH, HEADS, FRAMES, SIDE = 1024, 16, 128, 16  # 32,768 tokens


def counted(T, N, gradient=False, **own):
    """FLOPs per token and head, with heads of 64 and a hidden layer four times as wide."""
    A, K = 2, 64
    shapes = (
        [(1, T, N, A, K)] * 3 + [(1, T, N, A)] + [(1, T, A)] * 2 + [(A, K, 4 * K), (A, 4 * K, K)]
    )
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def run(*operands):
        *operands, first, second = operands
        options = dict(memory=Memory(**own), weights=(first, second))
        return neural_memory(*operands, **options)[0].sum()

    run = jax.grad(run, argnums=tuple(range(len(operands)))) if gradient else run
    return flops.count(run, *operands) / (T * N * A)


def test_flops_are_those_of_the_formulas():
    """P is the parameters of a memory, each a product and a sum per token.

    A frame takes 3 P for its gradients, 2 P to write, 2 P to read, and as much again and twice more
    for the outer gradients; with remat the gradients and the reads of most chunks once more. Tokens
    of a chunk of C read weights and momentum, and write both, and the products of all pairs.
    """
    K, C = 64, 128
    P = 8 * K**2
    frame = dict(chunk=1, read="after")
    assert counted(8, 64, **frame) == pytest.approx(7 * P, rel=1e-3)
    assert counted(8, 64, gradient=True, **frame) == pytest.approx(28 * P, rel=1e-3)
    assert counted(8, 64, gradient=True, remat=4, **frame) == pytest.approx(33 * P, rel=1e-3)
    pairs = 20 * C * K + 2 * C**2 + 2 * C
    assert counted(512, 1, chunk=C) == pytest.approx(11 * P + pairs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_the_gradient_over_32k_tokens_fits_into_a_chip(tpu_devices):
    """titans_mag at width 1024 on 128 frames of 256 tokens, in bfloat16."""
    sharding = SingleDeviceSharding(tpu_devices(TOPOLOGY)[0])
    options = {"name": "titans_mag", "local": 4}
    shared = dict(width=WIDTH, heads=HEADS, grid=(SIDE, SIDE), dtype=jnp.bfloat16)
    mixer = make_mixer(options, **shared)
    shape = (1, FRAMES, SIDE**2, WIDTH)
    x_BTND = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
        jax.eval_shape(mixer.init, jax.random.key(0), x_BTND),
    )

    def loss(params, x_BTND):
        return jnp.square(mixer.apply(params, x_BTND)[0].astype(jnp.float32)).mean()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    found = gradient.lower(params, x_BTND).compile().memory_analysis()
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    assert 0 < sum(sizes) < MEMORY * 1e9
