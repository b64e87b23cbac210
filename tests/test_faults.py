"""Damage and hostile input, injected at random from a fixed seed into what jaxvid reads.

    pytest -m faults -s tests/test_faults.py

prints how many injections of each kind were refused in one line, changed nothing, or were passed
over for an earlier checkpoint. None may end in a traceback or change a result without a word. An
oracle that was taken before the damage decides: weights, clips, or another decoder.
"""

import collections
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid import data
from jaxvid.data import clips, shards, video
from jaxvid.data.source import digest_of
from jaxvid.errors import UserError
from jaxvid.parallel.mesh import make_mesh
from jaxvid.prepare import Recipe
from jaxvid.runs import make_task, open_run
from jaxvid.train import train
from jaxvid.training.checkpoint import Checkpoints
from jaxvid.training.optim import make_optimizer
from jaxvid.training.restore import is_free
from tests.training import toy
from tests.videos import data_config, prepare_here, write_clip

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[1]
OUTCOMES = ("refused", "unchanged", "passed over", "SILENT", "TRACEBACK")
SIZE, FRAMES = 16, 4
ARRAYS = [f"{tree}.{name}" for tree in ("params", "ema") for name in ("up.kernel", "out.kernel")]


@pytest.fixture(scope="module")
def tally():
    """{kind: Counter of outcomes}, printed at the end."""
    table = {}
    yield table
    print(f"\n{'injections':<34}" + "".join(f"{name:>12}" for name in OUTCOMES))
    for kind, counts in table.items():
        print(f"{kind:<34}" + "".join(f"{counts[name]:>12}" for name in OUTCOMES))
    total = sum(counts.total() for counts in table.values())
    print(f"{'total':<34}{total:>12}")


def inject(tally, kind, count, seed, trial):
    """Run `trial(rng)` `count` times: it returns an outcome or raises. Fail on the bad outcomes."""
    counts, bad = collections.Counter(), []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        try:
            found = trial(rng)
        except UserError as error:
            line = str(error)
            found = "refused" if line.isprintable() and len(line) < 1000 else "TRACEBACK"
            if found != "refused":
                bad.append((number, line))
        except Exception as error:
            found = "TRACEBACK"
            bad.append((number, f"{type(error).__name__}: {error}"))
        else:
            bad += [(number, found)] if found not in OUTCOMES[:3] else []
        counts[found] += 1
    tally[kind] = counts
    assert not bad, bad[:5]
    return counts


def spoil(path, rng, cut=0.0):
    """Flip one to four bits of a file, or, with the probability `cut`, cut its end off."""
    content = bytearray(path.read_bytes())
    if not content or rng.random() < cut:
        path.write_bytes(content[: int(rng.integers(len(content) + 1))])
        return
    for position in rng.integers(len(content), size=rng.integers(1, 5)):
        content[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def same(a, b):
    """Whether two trees are equal, bit for bit."""
    leaves = [jax.tree.leaves(tree) for tree in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f")
        for x, y in zip(*leaves)
    )


@contextlib.contextmanager
def restored(path):
    """A file or folder as it was before, afterwards."""
    kept = path.with_name(f"{path.name}.kept")
    (shutil.copytree if path.is_dir() else shutil.copy2)(path, kept)
    try:
        yield
    finally:
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
        kept.rename(path)


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work folder, {step: the weights}, {step: the train state}) of a run with two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ("tasks", "data"):
            patch.setitem(sys.modules, f"jaxvid.{room}.toy", toy)
        workdir = tmp_path_factory.mktemp("faults") / "run"
        saved = {}

        def save(self, step, state, *rest):
            saved[step] = jax.device_get(state)
            return original(self, step, state, *rest)

        original = Checkpoints.save
        with patch.context() as saving:
            saving.setattr(Checkpoints, "save", save)
            train(toy.config(steps=4), str(workdir))
        yield workdir, {step: state.weights for step, state in saved.items()}, saved
    jax.config.update("jax_compilation_cache_dir", None)


def newest(workdir):
    """The files of the newest checkpoint."""
    return sorted(path for path in (workdir / "ckpt" / "4").rglob("*") if path.is_file())


def read_weights(workdir, weights, capsys):
    """How `sample` and `evaluate` take a work folder, compared with what was saved."""
    capsys.readouterr()
    found = open_run(str(workdir))
    told = capsys.readouterr()
    changed = config_lib.differences(toy.config(steps=4), found.config)
    kept = all(is_free(field) for field, *_ in changed)
    if not kept or not same(jax.device_get(found.params), weights[found.step]):
        return "SILENT"
    if found.step == 4:
        return "unchanged"
    return "passed over" if "checkpoint 4 is damaged" in told.err else "SILENT"


def test_checkpoints_read(run, tally, tmp_path, capsys):
    workdir, weights, _ = run
    folder = shutil.copytree(workdir, tmp_path / "run")

    def trial(rng):
        with restored(folder / "ckpt"):
            if rng.random() < 0.3:  # an array that was written whole, with a wrong bit
                toy.damage(folder, 4, rng.choice(ARRAYS))
            else:
                spoil(rng.choice(newest(folder)), rng, cut=0.3)
            before = contents(folder)
            outcome = read_weights(folder, weights, capsys)
            return outcome if contents(folder) == before else "SILENT"  # readers change nothing

    counts = inject(tally, "checkpoint, by sample and evaluate", 40, 1, trial)
    assert counts["passed over"] > 5 and not counts["refused"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_resumed(run, tally, tmp_path, capsys):
    workdir, _, saved = run
    folder = shutil.copytree(workdir, tmp_path / "run")
    config = config_lib.load(folder / "config.json")
    mesh = make_mesh(config.mesh)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
        ),
        saved[4],
    )

    def trial(rng):
        with restored(folder / "ckpt"):
            if rng.random() < 0.3:
                toy.damage(folder, 4, rng.choice(ARRAYS))
            else:
                spoil(rng.choice(newest(folder)), rng, cut=0.3)
            damaged = contents(folder / "ckpt" / "4")
            with Checkpoints(str(folder), config) as checkpoints:
                checkpoints.check_config()
                places = []
                step, state = checkpoints.restore(target, SimpleNamespace(set_state=places.append))
            if not same(jax.device_get(state), saved[step]) or not places:
                return "SILENT"
            if step == 4:
                return "unchanged"
            aside = contents(folder / "ckpt" / "4.damaged")
            kept = list(aside.values()) == list(damaged.values())
            return "passed over" if kept else "SILENT"

    counts = inject(tally, "checkpoint, resumed", 25, 2, trial)
    assert counts["passed over"] > 5 and not counts["refused"]


def test_bit_flips_in_config_json(run, tally, tmp_path, capsys):
    workdir, weights, _ = run
    folder = shutil.copytree(workdir, tmp_path / "run")

    def trial(rng):
        with restored(folder / "config.json"):
            spoil(folder / "config.json", rng, cut=0.2)
            return read_weights(folder, weights, capsys)

    inject(tally, "config.json, bits", 40, 3, trial)


HOSTILE = (
    *(None, True, -1, 0, 10**30, -(10**400), 0.5, 1e308, "", "\0", "\ud800", "x" * 10**5),
    *([], [[]], [1], {}, {"a": 1}, {"a.b": 1}, {"keys": {"items": 1}}),
)


def mutate(document, rng):
    """JSON text of a document with one structural change at a random place."""
    document = json.loads(json.dumps(document))
    places = list(_places(document))
    outer, key = places[rng.integers(len(places))]
    kind = rng.integers(8)
    if kind < 4:
        outer[key] = HOSTILE[rng.integers(len(HOSTILE))]
    elif kind == 4:
        del outer[key]
    elif kind == 5 and isinstance(outer, dict):
        outer[f"{key}_"] = outer.pop(key)
    elif kind == 5:
        outer.append(outer[0])
    elif kind == 6:
        outer[key] = "DEEP" if rng.random() < 0.5 else "NUMBER"
    else:
        outer["optim.lr" if isinstance(outer, dict) else 0] = 1
    text = json.dumps(document)
    deep = rng.choice(["[" * 10**4 + "]" * 10**4, '{"a":' * 300 + "1" + "}" * 300])
    number = rng.choice(["NaN", "-Infinity", "1e999", "9" * 5000])
    text = text.replace('"DEEP"', str(deep)).replace('"NUMBER"', str(number))
    return text.encode() + (b"\xff\xfe" if rng.random() < 0.05 else b"")


def _places(value):
    """(mapping or list, key) of everything in a document."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def test_hostile_config_json(run, tally, tmp_path, capsys):
    """Of a run that answers for it (weights are the oracle), and of one that has no checkpoint."""
    workdir, weights, _ = run
    folder = shutil.copytree(workdir, tmp_path / "run")
    document = json.loads((folder / "config.json").read_text())

    def trial(rng):
        (folder / "config.json").write_bytes(mutate(document, rng))
        return read_weights(folder, weights, capsys)

    inject(tally, "config.json, structure", 60, 4, trial)


@pytest.mark.parametrize("name", ["ar_diffusion", "tokenizer:gan=patch", "mqar:mixer=gla"])
def test_hostile_config_json_of_tasks(tally, tmp_path, name):
    """Up to the task, which is built of it: the checks of fields beyond those of the toy."""
    file, _, options = name.partition(":")
    read = config_lib.read(f"{ROOT}/configs/{file}.py:{options}")
    document = json.loads(read.to_json())
    path = tmp_path / "config.json"

    def trial(rng):
        path.write_bytes(mutate(document, rng))
        config = config_lib.load(path)
        config_lib.validate(config)
        make_task(config.task)
        make_optimizer(config.optim, config.steps)
        changed = [field for field, *_ in config_lib.differences(read, config)]
        # What is accepted has a value of the field's own type, or is a window of all of the past.
        before, after = config_lib.flatten(read), config_lib.flatten(config)
        fits = all(
            isinstance(after[field], type(before[field]) | int)
            or (field.endswith(".window") and after[field] is None)
            for field in changed
            if field in before and field in after
        )
        return "unchanged" if fits else "SILENT"

    inject(tally, f"config.json, {name}", 40, 5, trial)


# Values of fields, as the command line gives them

ANY_SIZE = {  # fields whose number may be as large as it likes, up to a bound or not
    *("seed", "steps", "data.stride", "data.num_clips", "checkpoint.every", "checkpoint.keep"),
    "log.parameters",
    *("log.every", "evaluate.every", "evaluate.batches", "sample.every", "optim.skip_nonfinite"),
    *("optim.lr", "optim.muon_lr", "optim.weight_decay", "optim.clip", "task.snr_clip"),
    *("task.sampler.block", "task.sampler.guidance", "task.quantizer.commitment"),
    "task.condition.num_classes",  # once shapes are known, memory decides: test_memory.py
    *("task.network.mixer.sinks", "task.gan.start", "task.gan.r1", "task.gan.lecam"),
    *("task.gan.image", "task.gan.video", "task.gan.feature_matching"),
    *("task.perceptual.lpips_weight", "task.perceptual.i3d_weight"),
    *("optim.discriminator.lr", "optim.discriminator.weight_decay"),
}


class AcceptedError(Exception):
    """No check is left before shapes are known."""


def test_hostile_values_of_fields(tally, tmp_path):
    """Before anything is compiled: what is too large, not finite or negative is one line."""
    arguments = [
        *(f"ar_diffusion:{x}" for x in ("", "cond=class", "cond=text,noise=flow,mixer=gla")),
        *("tokenizer:gan=patch", "tokenizer:quantizer=vq", "mqar:mixer=routing"),
    ]
    read = {
        name: config_lib.read(f"{ROOT}/configs/{name}".replace(":", ".py:")) for name in arguments
    }
    begin = time.perf_counter()

    def accept(*_):
        raise AcceptedError

    def trial(rng):
        config = ConfigDict(read[rng.choice(arguments)].to_dict())
        numbers = {
            field: value
            for field, value in config_lib.flatten(config).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        field = rng.choice(sorted(numbers))
        values = [-1, -(10**12), 10**12, 10**9]
        if isinstance(numbers[field], float):
            values = [np.nan, np.inf, -np.inf, -1e-9, -1e300, 1e300]
        value = values[rng.integers(len(values))]
        config.update_from_flattened_dict({str(field): value})
        if field in ("data.frames", "data.size"):  # as references do
            config.task[field.partition(".")[2]] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "check_config", accept)
            try:
                train(config, str(tmp_path / "run"))
            except AcceptedError:
                is_harmless = field in ANY_SIZE and np.isfinite(value) and value >= 0
                is_rest = field.startswith("mesh.") and value == -1
                return "unchanged" if is_harmless or is_rest else f"SILENT {field}={value}"

    counts = inject(tally, "values of fields", 150, 6, trial)
    assert counts["refused"] > 100
    assert time.perf_counter() - begin < 60


# Prepared sets and cached latents


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos in two classes; their shorter side is SIZE, so reading does not scale them."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        path = folder / "ab"[number % 2] / f"{number}{('.mp4', '.mkv', '.avi')[number % 3]}"
        write_clip(path, 8 + number, height=SIZE, width=24, gop=4)
    return folder


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare_here(videos, folder, size=SIZE, frames=FRAMES)
    return folder


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A set as `jaxvid.tokenize` writes it, of random latents [3, 2, 5]."""
    folder = tmp_path_factory.mktemp("cached")
    rng, parts = np.random.default_rng(0), {}
    for split, count in (("train", 5), ("validation", 2)):
        writer = shards.Shards(folder, split)
        for number in range(count):
            content = rng.standard_normal((1, 3, 2, 5)).astype(np.float32).tobytes()
            if split == "validation":
                frames = video.ChunkWriter(5, SIZE, SIZE, lossless=True)
                frames.write(rng.integers(0, 256, (5, SIZE, SIZE, 3), np.uint8))
                content += frames.finish()
            header = {"name": f"{split}-{number}", "label": number % 2, "caption": "ab"[number % 2]}
            writer.write(shards.pack(header, content))
        parts[split] = writer.finish()
    fields = {"dtype": "float32", "shape": [3, 2, 5], "frames_per_latent": 2, "src": "x"}
    fields |= {"tokenizer": "0" * 16, "size": SIZE, "frames": 5, "fps": 8.0, "mirrored": False}
    fields |= {"num_classes": 2, "captions": True}
    shards.write_manifest(folder, "latents", fields, parts, [], [])
    return folder


def read_set(folder, name):
    """Everything that training and evaluation take from a set."""
    frames = {"array_record": FRAMES, "latents": 5}[name]
    found = {}
    for split in ("train", "validation"):
        source = data.make_source(data_config(name, folder, frames=frames, size=SIZE), split)
        facts = (source.num_classes, source.captions, source.fps, source.tokenizer, source.digest)
        rows = [(source.name(i), *sorted(source[i].items())) for i in range(len(source))]
        found[split] = facts, rows
    return found


def equal(a, b):
    """Whether two nests of tuples, lists and dicts with arrays are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b)


@pytest.mark.parametrize("name", ["array_record", "latents"])
def test_damaged_shards(tally, prepared, cached, name):
    folder = prepared if name == "array_record" else cached
    files = sorted(folder.glob("*.array_record"))
    clean = read_set(folder, name)
    used = {path: len(path.read_bytes().rstrip(b"\0")) for path in files}

    def trial(rng):
        path = rng.choice(files)
        with restored(path):
            content = bytearray(path.read_bytes())
            if rng.random() < 0.2:
                spoil(path, rng, cut=1.0)
            else:  # where there are records: the rest is padding
                content[int(rng.integers(used[path]))] ^= 1 << int(rng.integers(8))
                path.write_bytes(content)
            return "unchanged" if equal(read_set(folder, name), clean) else "SILENT"

    counts = inject(tally, f"shards of {name}", 40, 7, trial)
    assert counts["refused"] > 10


@pytest.mark.parametrize("name", ["array_record", "latents"])
def test_hostile_dataset_json(tally, prepared, cached, name):
    """As the disk damages it, and as an enemy writes it: with the right digest."""
    folder = prepared if name == "array_record" else cached
    path, clean = folder / "dataset.json", read_set(folder, name)
    document = json.loads(path.read_text())

    def trial(rng):
        with restored(path):
            text = mutate(document, rng)
            is_signed = rng.random() < 0.5
            if is_signed:
                with contextlib.suppress(
                    ValueError, AttributeError, TypeError, KeyError, RecursionError
                ):
                    found = json.loads(text)
                    found.pop("digest")
                    text = json.dumps({**found, "digest": digest_of(found)}).encode()
            path.write_bytes(text)
            found = read_set(folder, name)
            # An enemy may write another set, which then has another digest.
            other = is_signed and found["train"][0][-1] != clean["train"][0][-1]
            return "unchanged" if other or equal(found, clean) else "SILENT"

    inject(tally, f"dataset.json of {name}", 60, 8, trial)


@pytest.mark.parametrize("name", ["array_record", "latents"])
def test_hostile_records(tally, prepared, cached, tmp_path, name):
    """Records that ArrayRecord finds whole: headers of other forms, lying lengths, other bytes."""
    folder = prepared if name == "array_record" else cached
    config = data_config(
        name, folder, frames={"array_record": FRAMES, "latents": 5}[name], size=SIZE
    )

    def trial(rng):
        source = data.make_source(config, rng.choice(["train", "validation"]))
        clean = source[0]
        header, content = shards.unpack(source._records[0], {"...": None})
        if rng.random() < 0.6:
            text = mutate({**header, "label": int(rng.choice([header["label"], 7, -1]))}, rng)
            record = len(text).to_bytes(4, "little") + text + content
        else:
            spoil_at = tmp_path / "record"
            spoil_at.write_bytes(shards.pack(header, content))
            spoil(spoil_at, rng, cut=0.5)
            record = spoil_at.read_bytes()
        source._records = [record]
        source.name(0)
        found = source[0]
        # Without the checksum of ArrayRecord, content may differ: its form may not.
        forms = [
            [(k, getattr(x[k], "shape", type(x[k]))) for k in sorted(x)] for x in (clean, found)
        ]
        is_label = 0 <= found["label"] < max(source.num_classes, 1)
        return "unchanged" if forms[0] == forms[1] and is_label else "SILENT"

    inject(tally, f"records of {name}", 60, 9, trial)


# Video files


def test_damaged_videos(tally, videos, tmp_path, monkeypatch):
    """By `folder` and `prepare`. Pictures must be those that another reader finds in the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    originals = sorted(path for path in videos.rglob("*") if path.is_file())

    def trial(rng):
        folder = tmp_path / str(rng.integers(2**60))
        original = rng.choice(originals)
        damaged = folder / f"a{original.suffix}"
        folder.mkdir()
        shutil.copy(original, damaged)
        shutil.copy(originals[0], folder / "b.mp4")
        shutil.copy(originals[3], folder / "c.mp4")
        if rng.random() < 0.3:  # the header
            content = bytearray(damaged.read_bytes())
            content[int(rng.integers(64))] = int(rng.integers(256))
            damaged.write_bytes(content)
        else:
            spoil(damaged, rng, cut=0.3)
        cut = clips.cut(str(folder), Recipe(SIZE, FRAMES, 0.0), damaged.name)
        assert isinstance(cut, str) or len(cut[1]) == sum(n // FRAMES for n in cut[0])
        sources = [
            data.make_source(data_config("folder", folder, frames=FRAMES, size=SIZE), split)
            for split in ("train", "validation")
        ]
        for source in sources:
            for index in range(len(source)):
                if source.name(index) != damaged.name:
                    continue
                numbers = source._pieces[index][0]
                found = source._decode(index, numbers)
                if found.shape[1:] != (SIZE, 24, 3):
                    return "unchanged"  # of another size now, and scaled
                seen = pictures(damaged)
                gap = max(
                    np.abs(found[i].astype(int) - seen[n]).max() for i, n in enumerate(numbers)
                )
                return "unchanged" if gap <= 3 else "SILENT"
        return "refused"  # named in the warning about files that are left out

    counts = inject(tally, "video files", 50, 10, trial)
    assert counts["refused"] > 5


def pictures(path):
    """The pictures of a file in order, by PyAV alone."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return [
            frame.reformat(format="rgb24", interpolation=video.EXACT).to_ndarray()
            for frame in container.decode(video=0)
        ]
