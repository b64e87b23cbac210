"""Linear attention: every implementation against the token recurrence, which has its own oracle."""

import functools
import itertools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from jaxvid.kernels import linear_attention as op
from jaxvid.kernels.linear_attention import gpu, linear_attention, tpu
from jaxvid.training import flops

# name: (tokens, key width, value width, kind of decay, whether sequences are packed)
CASES = {
    "one token": (1, 16, 16, "token", False),
    "no decay": (65, 96, 96, None, False),
    "no decay, packed": (130, 16, 16, None, True),
    "decay of a head": (64, 128, 64, "head", False),
    "decay of a token": (63, 64, 256, "token", False),
    "decay of a token, packed": (63, 64, 64, "token", True),
    "decay of a token, long": (1000, 16, 24, "token", True),
    "decay of a channel": (65, 64, 16, "channel", False),
    "decay of a channel, packed": (150, 24, 16, "channel", True),
    "decay of a channel, long": (150, 24, 16, "channel", False),
}


def inputs(case, strength="mixed", batch=2, heads=2):
    """((q, k, v, log_decay, initial_state), segment_ids) with decays by the name of their strength.

    mixed: some next to nothing, some that forget, most between them.
    """
    L, K, V, kind, packed = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, L, heads, width)) for width in (K, K, V))
    shape = {"head": (heads,), "token": (batch, L, heads), "channel": k.shape}.get(kind)
    decay = None
    if shape:
        weak, strong, some = (
            1e-4 * rng.random(shape),
            np.full(shape, 50.0),
            rng.exponential(0.3, shape),
        )
        mixed = np.choose(rng.integers(0, 6, shape), [weak, weak, strong, some, some, some])
        decay = -{"weak": weak, "strong": strong, "mixed": mixed}[strength]
    state = rng.normal(size=(batch, heads, K, V))
    # Segments of all lengths, one of them a single token, not the same in both rows.
    cuts = np.stack(
        [np.roll(np.isin(np.arange(L), [20, 21, 66, 128]), row) for row in range(batch)]
    )
    segment_ids = jnp.asarray(np.cumsum(cuts, axis=1)) if packed else None
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return cast((q, k, v, decay, state)), segment_ids


@functools.partial(jax.jit, static_argnames=("implementation", "chunk"))
def value_and_grads(arrays, segment_ids=None, *, implementation, chunk=None):
    """{name: array} of the outputs and, under random cotangents, of all gradients."""

    def outputs(q, k, v, log_decay, state):
        y, state = linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            segment_ids=segment_ids,
            return_state=True,
            chunk=chunk,
            implementation=implementation,
        )
        return {"y": y, "state": state}

    values, pull = jax.vjp(outputs, *arrays)
    rng = jax.random.key(1)
    grads = pull({n: jax.random.normal(rng, x.shape).astype(x.dtype) for n, x in values.items()})
    names = ("dq", "dk", "dv", "dlog_decay", "dinitial_state")
    return values | {name: x for name, x in zip(names, grads) if x is not None}


def assert_close(got, wanted, value=1e-5, gradient=1e-4):
    """Errors of outputs and of gradients, each in units of the largest element (1e-6 at least)."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        exact = np.asarray(wanted[name], np.float64)
        error = np.abs(np.asarray(got[name], np.float64) - exact).max()
        error /= max(np.abs(exact).max(), 1e-6)
        assert error <= (gradient if name.startswith("d") else value), f"{name} is off by {error}"


def brute_force(arrays, segment_ids):
    """y_i = scale sum_{j <= i} q_i exp(g_{j+1} + .. + g_i) k_j v_j in float64, pair by pair."""
    q, k, v, g, state = (np.asarray(x, np.float64) for x in arrays)
    g = np.broadcast_to(g[..., None] if g.ndim == 3 else g, k.shape)
    y, last = np.zeros(v.shape), np.zeros(state.shape)
    for b, i, a in np.ndindex(q.shape[:3]):
        segment = np.zeros(q.shape[1], int) if segment_ids is None else np.asarray(segment_ids[b])
        memory = np.exp(g[b, : i + 1, a].sum(0))[:, None] * state[b, a] * (segment[i] == segment[0])
        for j in np.flatnonzero(segment[: i + 1] == segment[i]):
            memory += np.outer(np.exp(g[b, j + 1 : i + 1, a].sum(0)) * k[b, j, a], v[b, j, a])
        y[b, i, a], last[b, a] = q[b, i, a] @ memory * q.shape[3] ** -0.5, memory
    return {"y": y, "state": last}


@pytest.mark.parametrize("case", ["decay of a token", "decay of a channel, packed"])
def test_reference_equals_brute_force(case):
    arrays, segment_ids = inputs(case, batch=1)
    got = value_and_grads(arrays, segment_ids, implementation="reference")
    assert_close({name: got[name] for name in ("y", "state")}, brute_force(arrays, segment_ids))


@pytest.mark.parametrize("implementation", ["chunked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, implementation):
    arrays, segment_ids = inputs(case)
    wanted = value_and_grads(arrays, segment_ids, implementation="reference")
    assert_close(value_and_grads(arrays, segment_ids, implementation=implementation), wanted)


@pytest.mark.parametrize("strength", ["weak", "strong"])
@pytest.mark.parametrize("case", ["decay of a token", "decay of a channel"])
def test_extreme_decays(case, strength):
    arrays, _ = inputs(case, strength)
    wanted = value_and_grads(arrays, implementation="reference")
    assert_close(value_and_grads(arrays, implementation="chunked", chunk=16), wanted)


@pytest.mark.parametrize(
    "case, chunk",
    [("decay of a token", 1), ("decay of a token", 24), ("decay of a channel", 4096)],
)
def test_chunk_changes_no_result(case, chunk):
    arrays, _ = inputs(case)
    wanted = value_and_grads(arrays, implementation="chunked", chunk=16)
    assert_close(value_and_grads(arrays, implementation="chunked", chunk=chunk), wanted)


def test_bfloat16_keeps_its_dtype_and_the_state_of_float32():
    exact, segment_ids = inputs("decay of a token, long")
    arrays = [x.astype(jnp.bfloat16) for x in exact[:3]] + [*exact[3:]]
    exact = [x.astype(jnp.float32) for x in arrays]
    wanted = value_and_grads(exact, segment_ids, implementation="reference")
    got = value_and_grads(arrays, segment_ids, implementation="chunked", chunk=16)
    for name in ("y", "dq", "dk", "dv"):
        assert got[name].dtype == jnp.bfloat16
    assert got["state"].dtype == got["dlog_decay"].dtype == jnp.float32
    assert_close(got, wanted, value=0.01, gradient=0.02)


def test_a_sequence_may_be_cut_anywhere():
    (q, k, v, g, state), _ = inputs("decay of a token")
    run = jax.jit(functools.partial(linear_attention, return_state=True))
    whole = run(q, k, v, g, initial_state=state)
    ys = []
    for part in (slice(0, 1), slice(1, 40), slice(40, None)):
        y, state = run(*(x[:, part] for x in (q, k, v, g)), initial_state=state)
        ys.append(y)
    assert_close(dict(y=jnp.concatenate(ys, 1), state=state), dict(y=whole[0], state=whole[1]))


def test_packed_segments_equal_separate_calls():
    arrays, segment_ids = inputs("decay of a token, long", batch=1)
    (q, k, v, g), segment_ids = jax.tree.map(lambda x: x[:, :60], (arrays[:4], segment_ids))
    state = arrays[4]
    run = jax.jit(linear_attention, static_argnames="implementation")
    packed = run(q, k, v, g, segment_ids=segment_ids, initial_state=state)
    cuts = [0, *(np.flatnonzero(np.diff(segment_ids[0])) + 1), None]
    alone = [
        run(
            *(x[:, start:stop] for x in (q, k, v, g)),
            initial_state=None if start else state,
            implementation="reference",
        )
        for start, stop in itertools.pairwise(cuts)
    ]
    assert_close(dict(y=packed), dict(y=jnp.concatenate(alone, axis=1)))


def test_minus_infinity_is_a_decay():
    """What came before leaves no trace, and no NaN."""
    (q, k, v, g, state), _ = inputs("decay of a token")
    g = jnp.full_like(g, -jnp.inf)
    values = value_and_grads((q, k, v, g, state), implementation="chunked")
    own = jnp.sum(q * k, axis=-1, keepdims=True) * v * q.shape[-1] ** -0.5
    assert_close(dict(y=values["y"]), dict(y=own))
    assert all(np.isfinite(x).all() for x in values.values())
    assert not values["dinitial_state"].any() and not values["dlog_decay"].any()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k_BLAK=jnp.ones((1, 4, 2, 5))), "q, k, v of shapes"),
        (dict(log_decay=jnp.ones((1, 4))), r"log_decay of shape \[1, 4\]: must be \[2\] or \[1, 4"),
        (dict(initial_state=jnp.ones((1, 2, 8))), "initial_state of shape"),
        (dict(segment_ids=jnp.ones((4,), int)), "segment_ids of shape"),
        (dict(chunk=0), "chunk=0: must be at least 1"),
        (dict(implementation="cuda"), "implementation='cuda': use auto, "),
    ],
)
def test_bad_input_is_answered_in_one_line(changes, message):
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message) as error:
        linear_attention(**{**dict(q_BLAK=x, k_BLAK=x, v_BLAV=x), **changes})
    assert "\n" not in str(error.value)


# Pallas kernels for TPU


def interpreter(cores):
    """Programs in any order where axes are parallel; two cores find races, and take longer."""
    return pltpu.InterpretParams(detect_races=True, random_seed=0, num_cores_or_threads=cores)


@pytest.mark.parametrize("same", [False, True])
def test_the_interpreter_finds_races(same, capfd):
    """Programs side by side that write one block: the alarm that other tests listen for."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    block = pl.BlockSpec((8, 128), lambda n: (n, 0))
    run = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((32, 128), jnp.float32),
        grid=(4,),
        in_specs=[block],
        out_specs=pl.BlockSpec((8, 128), lambda n: (0, 0)) if same else block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpreter(cores=2),
    )
    jax.block_until_ready(run(jnp.ones((32, 128))))
    assert ("RACE" in capfd.readouterr().out) == same


@pytest.mark.parametrize(
    "case, strength, chunk, batch, cores",
    [
        ("no decay, packed", None, 128, 2, 2),
        ("decay of a token, long", "mixed", 256, 2, 1),
        ("decay of a token, long", "weak", 256, 1, 1),
        ("decay of a channel, packed", "mixed", 128, 1, 1),
        ("decay of a channel, long", "weak", 128, 1, 1),
    ],
)
def test_tpu_kernels_interpreted(case, strength, chunk, batch, cores, capfd):
    """Chunks in order, heads and rows in any; memory starts as NaN and races are looked for."""
    arrays, segment_ids = inputs(case, strength, batch)
    with pltpu.force_tpu_interpret_mode(interpreter(cores)):
        got = value_and_grads(arrays, segment_ids, implementation="tpu", chunk=chunk)
        jax.block_until_ready(got)
    assert "RACE" not in capfd.readouterr().out
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


def products(chunk, width, per_channel):
    """Multiply-adds per token, whole tiles: forward, and backward with saved states."""
    levels = chunk.bit_length() - 1 if per_channel else 1
    scores = chunk * width
    return scores * (levels + 1) + 2 * width**2, scores * (3 * levels + 2) + 4 * width**2


def kernels(chunk, width, per_channel, sharding=None, length=1024):
    """(forward and backward kernel, its arguments, the multiply-adds and the bytes they take)."""
    B, L, A, K = 2, length, 4, width
    decay = (B, A, L, K) if per_channel else (B, A, 1, L)
    x, g, state = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in [
            ((B, A, L, K), jnp.bfloat16),
            (decay, jnp.float32),
            ((B, A, K, K), jnp.float32),
        ]
    )

    @jax.jit
    def run(inputs, cotangents):
        values, pull = jax.vjp(functools.partial(tpu.attend, chunk), *inputs)
        return values, pull(cotangents)

    # Read q, k, v and write y; read q, k, v, dy and write dq, dk, dv; read the decay twice, write
    # its gradient; states and cotangents at both ends, and between chunks states out and in.
    size = 11 * 2 * B * A * L * K + 3 * 4 * math.prod(decay)
    size += B * A * K * K * (4 * 4 + 2 * 2 * L // chunk)
    return (
        run,
        ((x, x, x, g, state), (x, state)),
        B * A * L * sum(products(chunk, K, per_channel)),
        size,
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_tpu_kernels_estimate_their_cost(per_channel):
    run, arguments, multiply_adds, size = kernels(128, 64, per_channel)
    closed = [run.trace(*arguments).jaxpr]
    estimates = []
    while closed:
        for equation in closed.pop().eqns:
            if equation.primitive.name == "pallas_call":
                estimates.append(equation.params["cost_estimate"])
            else:
                closed += jax.core.jaxprs_in_params(equation.params)
    assert len(estimates) == 2
    assert flops.count(run, *arguments) == 2 * multiply_adds
    assert sum(cost.bytes_accessed for cost in estimates) == size


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def tpu_devices(topology, monkeypatch):
    """Devices to compile for, of a machine that need not be there; skips without libtpu."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask about itself
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def tpu_pod(monkeypatch):
    """Sixteen such devices as a mesh with two along every axis."""
    devices = np.array(tpu_devices("v5e:4x4", monkeypatch)).reshape(2, 2, 2, 2)
    return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_tpu_kernels_compile(topology, monkeypatch):
    sharding = SingleDeviceSharding(tpu_devices(topology, monkeypatch)[0])
    tiles = [(128, 64), (128, 128), (256, 128), (128, 256)]
    for tile in [*((*tile, False) for tile in tiles), (128, 128, True), (128, 96, True)]:
        # Tokens so many that the compiler copies no array into the memory of the chip beforehand.
        run, arguments, multiply_adds, size = kernels(*tile, sharding, length=2**16)
        compiled = run.lower(*arguments).compile()
        program, cost = compiled.as_text(), compiled.cost_analysis()
        assert program.count("tpu_custom_call") == 2
        assert cost["flops"] == pytest.approx(2 * multiply_adds, rel=0.05)
        if tile[1] % tpu.LANES == 0:  # then these are the bytes that the kernels read and write
            assert cost["bytes accessed"] == pytest.approx(size, rel=0.05)
        else:  # arguments are laid out anew for the kernels, which counts three times what they do
            stated = re.findall(r'"bytes_accessed":"?(\d+)', program)
            assert sum(map(int, stated)) == size


@pytest.mark.tpu_aot
def test_tpu_kernels_compile_for_a_pod(monkeypatch):
    """Split by hand over rows, heads and the sequence; devices exchange states and decays alone."""
    mesh = tpu_pod(monkeypatch)
    B, L, A, K = 8, 1024, 4, 128
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "seq", "tensor"))
    x = jax.ShapeDtypeStruct((B, L, A, K), jnp.bfloat16, sharding=split)
    g = jax.ShapeDtypeStruct((B, L, A), jnp.float32, sharding=split)

    def loss(q, k, v, g):
        return jnp.sum(linear_attention(q, k, v, g).astype(jnp.float32))

    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        program = run.lower(x, x, x, g).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2
    exchanged = re.findall(r"(\w+)\[([\d,]*)\]\S* all-(?:gather|reduce|to-all)", program)
    sizes = [math.prod(map(int, shape.split(","))) if shape else 1 for _, shape in exchanged]
    assert sizes and max(sizes) <= 2 * (B // 4) * (A // 2) * K * K


# Pallas kernels for GPU


@pytest.fixture
def launch(monkeypatch):
    """What launches a kernel for GPU where there is none: set `interpret` and other options."""
    options, pallas_call = dict(interpret=True), pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **own: pallas_call(*args, **own | options))
    return options


@pytest.mark.parametrize(
    "case, strength, chunk",
    [
        ("one token", "mixed", None),
        ("no decay", None, 128),
        ("decay of a token, packed", "mixed", None),
        ("decay of a token, long", "mixed", None),
        ("decay of a token, long", "weak", None),
    ],
)
def test_gpu_kernels_interpreted(case, strength, chunk, launch):
    arrays, segment_ids = inputs(case, strength)
    got = value_and_grads(arrays, segment_ids, implementation="gpu", chunk=chunk)
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


def test_gpu_kernels_do_not_depend_on_order(launch, capfd):
    """All programs side by side and in any order; memory starts as NaN and races are looked for."""
    launch["interpret"] = interpreter(cores=2)
    launch["compiler_params"] = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    arrays, segment_ids = inputs("no decay, packed", batch=1)
    got = value_and_grads(arrays, segment_ids, implementation="gpu", chunk=128)
    jax.block_until_ready(got)
    assert "RACE" not in capfd.readouterr().out
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


def test_gpu_kernels_in_bfloat16(launch):
    exact, segment_ids = inputs("decay of a token, packed")
    arrays = [x.astype(jnp.bfloat16) for x in exact[:3]] + [*exact[3:]]
    exact = [x.astype(jnp.float32) for x in arrays]
    wanted = value_and_grads(exact, segment_ids, implementation="reference")
    got = value_and_grads(arrays, segment_ids, implementation="gpu")
    assert got["y"].dtype == got["dv"].dtype == jnp.bfloat16
    assert_close(got, wanted, value=0.01, gradient=0.02)


@pytest.mark.parametrize(
    "K, V, dtype, implementation, calls",
    [
        (64, 128, "bfloat16", "auto", (2, 6)),
        (256, 24, "bfloat16", "auto", (2, 6)),
        (16, 16, "float32", "gpu", (2, 6)),
        (16, 16, "float32", "auto", (0, 0)),
    ],
)
def test_gpu_kernels_lower_without_a_gpu(K, V, dtype, implementation, calls):
    """To the code of Triton, forward and backward; by themselves where they are the fastest."""
    B, L, A = 2, 300, 2
    arrays = [jax.ShapeDtypeStruct((B, L, A, *width), dtype) for width in ((K,), (K,), (V,), ())]

    def loss(q, k, v, log_decay):
        y = linear_attention(q, k, v, log_decay, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        for function, launches in zip((loss, jax.value_and_grad(loss, (0, 1, 2, 3))), calls):
            traced = jax.jit(function).trace(*arrays)
            program = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert program.count("__gpu$xla.gpu.triton") == launches


@pytest.mark.parametrize(
    "K, dtype, kind, capability, message",
    [
        (8, "float32", "channel", "9.0", "a decay per channel"),
        (8, "float16", "head", "9.0", "q, k, v of float16"),
        (136, "float32", "head", "9.0", "width 136 in float32"),
        (8, "float32", "head", "7.5", "compute capability 7.5"),
        (8, "float32", "head", "gfx942", "compute capability gfx942"),
    ],
)
def test_where_the_gpu_kernels_do_not_apply_others_do(
    K, dtype, kind, capability, message, monkeypatch
):
    x = jnp.ones((1, 4, 2, K), dtype)
    g = -jnp.ones(x.shape if kind == "channel" else (2,))
    wanted = linear_attention(x, x, x, g, implementation="chunked")
    monkeypatch.setattr(
        gpu.jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)]
    )
    with pytest.raises(NotImplementedError, match=message):
        linear_attention(x, x, x, g, implementation="gpu")
    monkeypatch.setattr(op, "fastest", lambda *_: ("gpu", "chunked"))
    np.testing.assert_array_equal(linear_attention(x, x, x, g), wanted)


def mesh_with_sequence():
    names = ("data", "fsdp", "tensor", "seq")
    return jax.make_mesh((2, 1, 2, 2), names, axis_types=(AxisType.Auto,) * 4)


def test_sharded_equals_whole():
    arrays, segment_ids = inputs("decay of a channel, packed")
    wanted = value_and_grads(arrays, segment_ids, implementation="reference")
    with jax.set_mesh(mesh_with_sequence()):
        got = value_and_grads(arrays, segment_ids, implementation="chunked", chunk=32)
    assert_close(got, wanted)


def test_on_a_mesh_the_sequence_is_exchanged_by_states_alone():
    arrays, _ = inputs("decay of a head")
    mesh = mesh_with_sequence()
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", "seq", "tensor")
        tokens = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays[:3]]
        run = jax.jit(functools.partial(linear_attention, implementation="chunked"))
        program = run.lower(*tokens, arrays[3]).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert sizes and max(sizes) <= arrays[4].size  # two parts of a quarter of the states each
