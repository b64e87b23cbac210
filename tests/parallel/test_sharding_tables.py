"""How the presets for accelerators are split: a table for each, and nothing large left whole.

python -m tests.parallel.test_sharding_tables     writes the tables of GOLDEN anew
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.models.stand_in import stand_in
from jaxvid.parallel.mesh import AXES
from jaxvid.parallel.sharding import PARAM_RULES, find_rule, partition, path_name
from jaxvid.runs import make_task

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
LARGE = 2**20  # bytes
# Name of the table: config, and latents in the place of a tokenizer.
PRESETS = {
    "ar_diffusion_xl": ("ar_diffusion.py:size=xl", "256x4"),
    "ar_diffusion_xl_gla_text": ("ar_diffusion.py:size=xl,mixer=gla,cond=text", "256x4"),
    "tokenizer_b": ("tokenizer.py:size=b", ""),
    "tokenizer_b_omnitokenizer": ("tokenizer.py:size=b,arch=omnitokenizer", ""),
    "tokenizer_b_ar_vae_kl": ("tokenizer.py:size=b,arch=ar_vae,quantizer=kl", ""),
}


def parameters(preset):
    """{path: shape} of the parameters of a preset."""
    file, latents = PRESETS[preset]
    config = config_lib.read(str(ROOT / "configs" / file))
    task = make_task(config.task, stand_in(latents))
    shapes = data.batch_shapes(config.data, 1)

    def init():
        batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        return task.init(jax.random.key(0), batch)[0]

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init))
    return {path_name(path): x.shape for path, x in leaves}


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(1, 4, 2, 1), AXES)


def table(preset):
    """The parameters of a preset with their axes, on a mesh of fsdp=4 and tensor=2."""
    rows = []
    for path, shape in parameters(preset).items():
        axes = " ".join(map(_axes, partition(path, shape, mesh())))
        rows.append(f"{path} {'x'.join(map(str, shape))}: {axes}".rstrip() + "\n")
    return "".join(rows)


def _axes(entry):
    return "-" if entry is None else entry if isinstance(entry, str) else "+".join(entry)


@pytest.mark.parametrize("preset", PRESETS)
def test_table(preset):
    assert table(preset) == (GOLDEN / f"{preset}.txt").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_large_is_whole_on_every_device(preset):
    whole = [
        path
        for path, shape in parameters(preset).items()
        if 4 * np.prod(shape) >= LARGE and not any(partition(path, shape, mesh()))
    ]
    assert whole == []


def test_every_rule_names_a_parameter():
    named = {find_rule(path) for preset in PRESETS for path in parameters(preset)}
    assert named >= set(PARAM_RULES)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.mkdir(exist_ok=True)
    for name in PRESETS:
        (GOLDEN / f"{name}.txt").write_text(table(name))
