"""Whole runs of the toy in this process; see test_resume.py for runs that are killed."""

import functools
import json
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy

from jaxvid import cli
from jaxvid import config as config_lib
from jaxvid import train as train_module
from jaxvid.data import video
from jaxvid.errors import UserError
from jaxvid.runs import open_run
from jaxvid.train import train
from jaxvid.training import profile, watchdog
from jaxvid.training.checkpoint import Checkpoints
from jaxvid.training.writer import Writer


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def error_of(config, workdir):
    with pytest.raises(UserError) as error:
        train(config, str(workdir))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work folder of a run of 8 steps that evaluated, sampled and kept its best checkpoint."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = toy.config(
        checkpoint__best="mse",
        checkpoint__every=2,
        checkpoint__keep=1,
        evaluate__every=2,
        sample__every=4,
        log__tensorboard=True,
    )
    train(config, str(workdir))
    return workdir


def test_the_work_folder(finished):
    assert [line["step"] for line in lines(finished)] == list(range(1, 9))
    assert all(np.isfinite(line["loss"]) for line in lines(finished))
    assert {"frames_per_s", "steps_per_s", "data_wait", "mfu", "lr", "grad_norm"} <= set(
        lines(finished)[-1]
    )
    assert (finished / "ckpt" / "8" / "state").is_dir()
    config = config_lib.load(finished / "config.json")
    assert config.steps == 8 and config.task.name == "toy"
    for step in ("4", "8"):
        names = {path.name for path in (finished / "samples" / step).iterdir()}
        assert names == {"0.mp4", "0.gif", "1.mp4", "1.gif", "sheet.png"}


def test_the_rate_of_the_source_is_kept(tmp_path, monkeypatch):
    """For sampling; clips are written at it."""
    monkeypatch.setattr(toy.Source, "fps", 12.0)
    train(toy.config(steps=1, data__fps=0.0, data__stride=2), str(tmp_path / "run"))
    assert config_lib.load(tmp_path / "run" / "config.json").data.fps == 12
    with open(tmp_path / "run" / "samples" / "1" / "0.mp4", "rb") as file:
        assert video.probe(file).fps == 6


def test_the_best_checkpoint_is_kept_beside_the_last(finished):
    scores = {line["step"]: line.get("evaluate/mse") for line in lines(finished)}
    best = max((step for step in scores if scores[step] is not None), key=scores.get)
    assert {path.name for path in (finished / "ckpt").iterdir()} == {str(best), "8"}
    assert best == 2  # the loss falls, and "mse" without a minus asks for the highest


def test_samples_of_earlier_versions_are_known(finished, tmp_path):
    """They have six digits in their name; a resumed run does not make them again."""
    shutil.copytree(finished / "samples" / "4", tmp_path / "samples" / "000004")
    writer = Writer(str(tmp_path), 8, tensorboard=False)
    assert [step for step in range(9) if writer.has_videos(step)] == [4]
    writer.close()


def test_tensorboard_holds_the_curves_and_gifs(finished):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (finished / "tensorboard").iterdir()
    raw, events = path.read_bytes(), []
    while raw:
        size = int.from_bytes(raw[:8], "little")
        events.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[16 + size :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    losses = [value.simple_value for _, value in values if value.tag == "loss"]
    np.testing.assert_allclose(losses, [line["loss"] for line in lines(finished)], rtol=1e-6)
    images = [(step, value.image) for step, value in values if value.tag == "sample/0"]
    assert [step for step, _ in images] == [4, 8]
    assert all(image.encoded_image_string.startswith(b"GIF8") for _, image in images)


def test_another_config_is_refused_by_field(finished):
    before = (finished / "config.json").read_text()
    changed = toy.config(optim__lr=0.5, task__width=32, log__every=5, steps=9)
    message = error_of(changed, finished)
    assert "optim.lr: 0.01 -> 0.5" in message and "task.width: 16 -> 32" in message
    assert "log.every" not in message and "steps" not in message
    assert (finished / "config.json").read_text() == before


def test_damaged_scores_of_a_checkpoint_are_set_aside(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ckpt" / "8" / "metrics" / "metrics").write_text('{"ms')
    assert int(train(config_lib.load(finished / "config.json"), str(tmp_path)).step) == 8
    assert "scores of checkpoint 8 are damaged" in capsys.readouterr().out
    assert (tmp_path / "ckpt" / "8" / "metrics.damaged" / "metrics").read_text() == '{"ms'


def test_clips_may_move_but_not_change(tmp_path):
    for name, clips in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(clips)

    def config(path, steps):
        return toy.config(data__path=str(path), steps=steps)

    train(config(tmp_path / "a", 1), str(tmp_path / "run"))
    (tmp_path / "a").unlink()
    assert int(train(config(tmp_path / "b", 2), str(tmp_path / "run")).step) == 2
    message = error_of(config(tmp_path / "c", 3), tmp_path / "run")
    assert f"another config (data.path='{tmp_path}/c': clips same -> other); undo" in message

    # A checkpoint of an older version knows the path alone, which may be spelled differently.
    shutil.rmtree(tmp_path / "run" / "ckpt" / "2" / "digests")
    (tmp_path / "a").write_text("same")
    message = error_of(config(tmp_path / "a", 3), tmp_path / "run")
    assert f"(data.path: '{tmp_path}/b' -> '{tmp_path}/a'); undo" in message
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert int(train(config(tmp_path / "link", 3), str(tmp_path / "run")).step) == 3


def test_a_run_without_a_field_is_refused_by_field(finished):
    """As one has it that was begun before the field was there."""
    message = error_of(toy.config(task__refuse_to_sample=False), finished)
    assert "run without fields of this config (task.refuse_to_sample: no field -> False)" in message
    assert "the version of jaxvid that began it" in message
    changed = toy.config(task__width=32, task__refuse_to_sample=False)
    del changed.task["noise"]
    message = error_of(changed, finished)
    assert "config (task.noise: 0.1 -> no field; task.width: 16 -> 32; task.refuse_" in message
    assert "task.refuse_to_sample: no field -> False); undo" in message


def test_only_clips_at_the_rates_of_their_files_resume_a_run_without_the_field(
    tmp_path, monkeypatch
):
    """The source `folder` did not resample clips before the field `fps` was there."""
    monkeypatch.setitem(sys.modules, "jaxvid.data.folder", toy)
    train(toy.config(steps=1, data__name="folder"), str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(toy.Source, "fps", 12.0)
        message = error_of(toy.config(steps=2, data__name="folder", data__fps=12.0), tmp_path)
    assert "run without fields of this config (data.fps: no field -> 12.0)" in message
    state = train(toy.config(steps=2, data__name="folder", data__fps=0.0), str(tmp_path))
    assert int(state.step) == 2


def cut_arrays(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_config(folder):
    path = folder / "config" / "metadata"
    path.write_text(path.read_text()[:-9])


def flip_digit(folder):
    path = folder / "data" / "metadata"
    path.write_text(path.read_text().replace("6", "7"))


def damage(name):
    return lambda folder: toy.damage(folder.parents[1], 8, name)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: shutil.rmtree(folder / "config"), "is not one of jaxvid's (Item"),
        (cut_config, "is not one of jaxvid's (a description in it is cut short or no JSON)"),
        (cut_arrays, "does not fit this model or is damaged (arrays in it cannot be read)"),
        (damage("params.up.kernel"), "damaged (params/up/kernel differs from what was saved)"),
        (damage("extra.seen"), "damaged (extra/seen differs from what was saved)"),
        (flip_digit, "damaged (data differs from what was saved)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_if_it_is_the_only_one(finished, tmp_path, spoil, message):
    shutil.copytree(finished / "ckpt" / "8", tmp_path / "ckpt" / "8")
    spoil(tmp_path / "ckpt" / "8")
    found = error_of(toy.config(checkpoint__every=2), tmp_path)
    assert f"workdir={tmp_path}: checkpoint 8 {message.partition('damaged')[0]}" in found
    assert message in found
    assert found.endswith(f"; choose another --workdir, or delete {tmp_path}/ckpt/8 to start again")
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"8"}


@pytest.mark.parametrize("spoil", [cut_config, cut_arrays, damage("ema.out.kernel")])
def test_a_damaged_checkpoint_is_set_aside_for_an_earlier_one(finished, tmp_path, capsys, spoil):
    """Nothing is deleted, and the end is that of a run that nothing happened to."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ckpt" / "8.damaged").mkdir()  # of an earlier time
    spoil(tmp_path / "ckpt" / "8")
    before = {path.name: path.stat().st_size for path in (tmp_path / "ckpt" / "8").rglob("*")}
    train(config_lib.load(finished / "config.json"), str(tmp_path))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "is damaged" in x]
    assert line.startswith(f"{tmp_path}: checkpoint 8 is damaged (")
    assert line.endswith(f"and kept as {tmp_path}/ckpt/8.damaged2; going on from step 2")
    aside = tmp_path / "ckpt" / "8.damaged2"
    assert {path.name: path.stat().st_size for path in aside.rglob("*")} == before
    losses = [line["loss"] for line in lines(finished)]
    assert [line["loss"] for line in lines(tmp_path)] == losses
    names = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert names == {"2", "8", "8.damaged", "8.damaged2"}
    assert open_run(str(tmp_path)).step == 8


def test_more_steps_go_on_where_it_stopped(tmp_path, compiled, monkeypatch):
    """Bit for bit, or within 1e-5 on another mesh; the log has no gaps; nothing is built twice."""
    straight = train(toy.config().lock(), str(tmp_path / "straight"))
    train(toy.config(steps=4), str(tmp_path / "cut"))
    (tmp_path / "cut" / "metrics.jsonl").open("a").write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    compiled.clear()
    traced = []
    with monkeypatch.context() as patch:
        for name in ("evaluate", "sample"):
            patch.setattr(toy.Task, name, noted(traced, getattr(toy.Task, name)))
        resumed = train(toy.config(), str(tmp_path / "cut"))
    assert sorted(traced) == ["evaluate", "sample"]
    assert sorted(compiled) == ["jit(_clips)", "jit(evaluate)", "jit(step)"]
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)
    losses = [line["loss"] for line in lines(tmp_path / "straight")]
    assert [line["loss"] for line in lines(tmp_path / "cut")] == losses

    other_mesh = toy.config(steps=10, mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    train(other_mesh, str(tmp_path / "cut"))
    train(toy.config(steps=10), str(tmp_path / "straight"))
    np.testing.assert_allclose(
        [line["loss"] for line in lines(tmp_path / "cut")],
        [line["loss"] for line in lines(tmp_path / "straight")],
        atol=1e-5,
    )


@pytest.mark.parametrize("stop", [4, 8])
def test_an_evaluation_that_a_stop_prevented_is_caught_up(tmp_path, monkeypatch, stop):
    """SIGTERM at a step with an evaluation, or at the last; resuming leaves the same files."""
    options = dict(
        checkpoint__every=4, evaluate__every=4, sample__every=4, log__every=3, log__tensorboard=True
    )
    straight = train(toy.config(**options), str(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "preempted", lambda self, step: step == stop)
        stopped = train(toy.config(**options), str(tmp_path / "cut"))
    assert int(stopped.step) == lines(tmp_path / "cut")[-1]["step"] == stop
    assert not (tmp_path / "cut" / "samples" / str(stop)).exists()
    resumed = train(toy.config(**options), str(tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)
    train(toy.config(**options), str(tmp_path / "cut"))  # nothing is missing any more

    found, wanted = (
        [
            {
                name: v
                for name, v in line.items()
                if not name.endswith(("_per_s", "_wait", "mfu", "pauses"))
            }
            for line in lines(tmp_path / run)
        ]
        for run in ("cut", "straight")
    )
    assert found == wanted and [line["step"] for line in found] == [3, 4, 6, 8]
    assert "evaluate/mse" in found[1] and "evaluate/mse" in found[3]
    for sample in ("4", "8"):
        for path in (tmp_path / "straight" / "samples" / sample).iterdir():
            resumed = tmp_path / "cut" / "samples" / sample / path.name
            assert resumed.read_bytes() == path.read_bytes()


def test_a_stopped_run_has_the_status_that_was_asked_for(monkeypatch):
    """And a finished one has 0."""
    config = toy.config(steps=8)
    monkeypatch.setattr(cli, "config_from_flags", lambda: (config, "run"))
    flags = dict(coordinator=None, num_processes=None, process_id=None, stopped_status=75)
    flags |= dict(profile_steps="", join_seconds=5, hang_seconds=9)
    monkeypatch.setattr(train_module, "FLAGS", SimpleNamespace(**flags))
    for step, status in ((3, 75), (8, 0)):
        state = SimpleNamespace(step=np.int32(step))
        monkeypatch.setattr(train_module, "train", lambda *_, state=state, **__: state)
        assert train_module.main() == status


@pytest.mark.parametrize("steps", ["2:4", "6:100"])
def test_the_steps_that_were_asked_for_are_traced(tmp_path, steps):
    """Also where the run ends first."""
    straight = train(toy.config(), str(tmp_path / "straight"))
    traced = train(toy.config(), str(tmp_path / "run"), traced=profile.steps_of(steps))
    jax.tree.map(np.testing.assert_array_equal, traced, straight)
    assert len(list((tmp_path / "run" / profile.FOLDER).rglob("*.xplane.pb"))) == 1
    assert not (tmp_path / "straight" / profile.FOLDER).exists()


@pytest.mark.parametrize("text", ["5", "5:5", "9:2", "a:b", "0:2000", "-1:4"])
def test_steps_that_cannot_be_traced_are_refused(text):
    with pytest.raises(UserError, match=rf"^--profile_steps={text}: write first:last, such as"):
        profile.steps_of(text)


def test_a_step_that_hangs_ends_the_process_with_all_stacks():
    """Its status is that of a hang; the time of steps that end does not add up."""
    code = """if True:
        import time
        from jaxvid.training.watchdog import Watchdog
        watchdog = Watchdog(1.0)
        for step in range(4):
            watchdog.step(step)
            time.sleep(0.4)
            watchdog.rest()
        time.sleep(1.5)  # an evaluation
        print("well", flush=True)
        watchdog.step(4)
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n" and done.returncode == watchdog.HUNG
    first, *stacks = done.stderr.splitlines()
    assert first.startswith("error: the step after 4 has not ended for 1 s (--hang_seconds)")
    assert any('File "<string>", line 12' in line for line in stacks)


def test_nan_for_a_while_is_skipped_and_counted(tmp_path):
    state = train(toy.config(task__nan_from=2, task__nan_until=4), str(tmp_path))
    assert int(state.skipped) == 2
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert lines(tmp_path)[2]["loss"] is None and np.isfinite(lines(tmp_path)[4]["loss"])


def test_nan_without_end_stops_naming_the_clips(tmp_path):
    from jaxvid import data

    config = toy.config(task__nan_from=4, steps=50)
    message = error_of(config, tmp_path)
    assert "optim.skip_nonfinite=2" in message and "3 steps in a row, 5 to 7" in message
    iterator = data.make_iterator(config.data, split="train", seed=0, batch_size=8)
    ids = [next(iterator)["id"] for _ in range(7)]
    for index in ids[4]:
        assert f"{index} (clip-{index})" in message
    assert max(int(path.name) for path in (tmp_path / "ckpt").iterdir()) <= 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__batch_size": 6}, "data.batch_size=6"),
        ({"mesh__data": 3}, "does not match the 8 devices"),
        ({"optim__schedule": "cosin"}, "optim.schedule='cosin'"),
        (
            {"task__name": "nothing"},
            "task.name='nothing': unknown; use one of ar_diffusion, masked_transformer, mqar",
        ),
        ({"task__name": "mqar"}, "task.name=mqar: config.task holds the fields of another task"),
        ({"data__name": "toys"}, "data.name='toys'"),
        ({"data__name": "mqar"}, "data.name='mqar'"),
        ({"checkpoint__best": "mse"}, "must be a multiple of evaluate.every=0"),
        (
            {"checkpoint__best": "-msr", "evaluate__every": 3},
            "checkpoint.best=-msr: evaluate has no such metric; choose one of mse",
        ),
        ({"optim__b1": 7.0}, "optim.b1=7.0"),
        ({"optim__warmup": 9}, "optim.warmup=9: is longer than the run of steps=8; use at most 8"),
        (
            {"compile_cache": "/dev/null"},
            "compile_cache=/dev/null: cannot be written (File",
        ),
        ({"compile_cache": "/dev/null/x"}, "compile_cache=/dev/null/x: cannot be written (Not a d"),
        ({"compile_cache": "gs://b/x"}, "compile_cache='gs://b/x': is not a folder of a file"),
        (
            {"task__refuse_to_sample": True},
            "task.refuse_to_sample=True",
        ),  # known before a first step
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, message):
    (tmp_path / "before").mkdir()
    for folder in ("before", "new", "new/with/parents"):
        assert message in error_of(toy.config(**changes), tmp_path / folder)
    assert not (tmp_path / "before" / "metrics.jsonl").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"before"}  # no empty folder is left


def noted(calls, function):
    """`function`, which adds its name to `calls`."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return wrapper


@pytest.fixture
def compiled():
    """Names of the functions that are compiled during the test."""
    names = []

    def listen(event, seconds, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_work_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "workdir=" in error_of(toy.config(), tmp_path / "file" / "run")
    assert "(File name too long); choose" in error_of(toy.config(), tmp_path / ("x" * 300))
    assert "holds the character NUL" in error_of(toy.config(), tmp_path / "a\0b")
    assert "init_from='a\\x00b': holds the" in error_of(toy.config(init_from="a\0b"), tmp_path)
    for changes in ({}, {"init_from": "s3://b/x"}):
        workdir = tmp_path / "run" if changes else "gs://b/x"
        assert "b/x': is not a folder of a file system" in error_of(toy.config(**changes), workdir)


@pytest.fixture
def small_files():
    """No file of this process may have more than 64 KB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_become_too_large_are_one_line(tmp_path, small_files):
    message = error_of(toy.config(task__width=512), tmp_path)
    assert "cannot save" in message and "File too large" in message
