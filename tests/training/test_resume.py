"""Runs of the toy as processes that are killed, stopped, starved of disk, and started again."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import portpicker
import pytest
import toy

from jaxvid.errors import UserError
from jaxvid.parallel import peers
from jaxvid.train import train
from jaxvid.training import checkpoint

pytestmark = pytest.mark.slow

TOY = Path(__file__).with_name("toy.py")
TIMEOUT = 120


@contextlib.contextmanager
def started(workdir, *, devices=1, processes=1, delay=0.0, **changes):
    """The processes of a run, killed at the end of the block if they still live.

    `delay` in seconds holds up the reading of each clip.
    """
    port, running = portpicker.pick_unused_port(), []
    for index in range(processes):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TOY_DELAY": str(delay),
            "PYTHONPATH": str(TOY.parents[2]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, str(TOY), str(workdir), json.dumps(changes)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        group = {"start_new_session": True}  # for Ctrl-C, which reaches all of a terminal
        running.append(subprocess.Popen(command, env=env, **pipes, **group))
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def run(workdir, **options):
    """A run to its end: (exit status, stderr)."""
    with started(workdir, **options) as (process,):
        _, stderr = process.communicate(timeout=TIMEOUT)
        return process.returncode, stderr


def finish(workdir, **options):
    code, stderr = run(workdir, **options)
    assert code == 0, stderr


def losses(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = {(line := json.loads(text))["step"]: line["loss"] for text in lines}
    assert len(found) == len(lines), "a step is logged twice"
    return found


def wait_for(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def logged(workdir, step):
    """Whether metrics.jsonl has come to this step."""
    path = Path(workdir) / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) >= step


def saving(workdir):
    return list(Path(workdir).glob("ckpt/*.orbax-checkpoint-tmp"))


def assert_same_end(a, b):
    with np.load(a / "final.npz") as left, np.load(b / "final.npz") as right:
        assert set(left) == set(right) and any(name.startswith("ema/") for name in left)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    assert losses(a) == losses(b)


# A state large enough for a save to take a while.
LARGE = {"steps": 24, "task__width": 4096, "checkpoint__every": 4}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The work folder of the run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    finish(workdir, **LARGE)
    return workdir


def test_a_folder_in_use_is_refused(straight):
    """Not one that a killed run left locked."""
    workdir = straight.with_name("locked")
    with started(workdir, delay=0.3, **LARGE) as (process,):
        wait_for(lambda: logged(workdir, 1), process)
        code, err = run(workdir, **LARGE)
        process.kill()
        assert code == 1
        assert err == (
            f"error: workdir={workdir}: is in use by process {process.pid} on "
            f"{socket.gethostname()}; wait for it, stop it, or choose another --workdir\n"
        )
    assert (workdir / "lock").exists()
    finish(workdir, **LARGE)
    assert not (workdir / "lock").exists()
    assert_same_end(workdir, straight)


def test_kill_at_a_random_step(straight):
    step = random.randrange(1, 22)
    print(f"killed at step {step}")
    workdir = straight.with_name("killed")
    with started(workdir, delay=0.003, **LARGE) as (process,):
        wait_for(lambda: logged(workdir, step), process)
        process.kill()
    finish(workdir, **LARGE)
    assert_same_end(workdir, straight)


def test_kill_in_the_middle_of_a_save(straight):
    workdir = straight.with_name("killed_saving")
    for _ in range(5):  # a save may just be over before the signal comes
        with started(workdir, delay=0.003, **LARGE) as (process,):
            wait_for(lambda: saving(workdir), process)
            process.kill()
        if saving(workdir):
            break
    assert saving(workdir)
    finish(workdir, **LARGE)
    assert not saving(workdir)
    assert_same_end(workdir, straight)


def test_sigterm_saves_and_exits_with_zero(straight):
    workdir = straight.with_name("stopped")
    # jax looks for the signal once a second: the run must last longer
    with started(workdir, delay=0.02, **{**LARGE, "checkpoint__every": 1000}) as (process,):
        wait_for(lambda: logged(workdir, 5), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT) == 0
    (saved,) = (int(path.name) for path in (workdir / "ckpt").iterdir())
    assert 5 <= saved < 24 and max(losses(workdir)) == saved
    finish(workdir, **LARGE)
    assert_same_end(workdir, straight)


def ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)


def test_the_first_ctrl_c_saves(straight):
    """Processes that load data receive it too."""
    workdir = straight.with_name("interrupted")
    options = {**LARGE, "checkpoint__every": 1000, "data__workers": 1}
    with started(workdir, delay=0.02, **options) as (process,):
        wait_for(lambda: logged(workdir, 5), process)
        ctrl_c(process)
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert [line for line in err.splitlines() if "SIGTERM caught" not in line] == []
    (saved,) = (int(path.name) for path in (workdir / "ckpt").iterdir())
    assert 5 <= saved < 24
    *_, first, second = (line for line in out.splitlines() if not line.startswith("step"))
    assert first == "stopping after a save; Ctrl-C again stops at once"
    assert second.endswith(f"step {saved} is saved, the same command goes on from there")
    finish(workdir, **LARGE)
    assert_same_end(workdir, straight)


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    options = {"steps": 10**6, "data__workers": 1}
    with started(tmp_path, delay=0.5, **options) as (process,):  # a step of 4 s
        wait_for(lambda: logged(tmp_path, 1), process)
        ctrl_c(process)
        assert any("stops at once" in line for line in process.stdout)
        begin = time.monotonic()
        ctrl_c(process)
        _, err = process.communicate(timeout=TIMEOUT)  # until processes that load data end too
    assert time.monotonic() - begin < 3
    assert process.returncode == 130
    assert err == "error: interrupted; the last complete checkpoint is kept\n"


def test_two_processes_train_save_and_resume_on_one(tmp_path):
    options = {"steps": 16, "mesh__fsdp": 2, "mesh__data": 2}
    finish(tmp_path / "one", devices=4, **options)
    with started(tmp_path / "two", devices=2, processes=2, delay=0.1, **options) as processes:
        wait_for(lambda: logged(tmp_path / "two", 4), processes[0])
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=TIMEOUT) for process in processes] == [0, 0]
    stopped = max(losses(tmp_path / "two"))
    assert stopped < 16
    alone = {**options, "mesh__fsdp": 1, "mesh__data": 1}
    finish(tmp_path / "two", devices=1, **alone)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(one.values()), list(two.values()), atol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others_in_one_line(tmp_path, number):
    """Also one that hangs. The run then goes on from its last checkpoint."""
    options = {"steps": 10**6, "mesh__data": 2}
    with started(tmp_path, processes=2, delay=0.1, **options) as processes:
        wait_for(lambda: logged(tmp_path, 4), processes[0])
        processes[1].send_signal(number)
        begin = time.monotonic()
        _, err = processes[0].communicate(timeout=TIMEOUT)
        assert time.monotonic() - begin < 60
        assert processes[0].returncode == peers.LOST
        assert err.splitlines()[-1].startswith("error: ")
        assert "start the same command again on all hosts" in err


def test_without_the_coordinator_the_others_end_too(tmp_path):
    """In one line, unless jax itself is faster and aborts."""
    options = {"steps": 10**6, "mesh__data": 2}
    with started(tmp_path, processes=2, delay=0.1, **options) as processes:
        wait_for(lambda: logged(tmp_path, 4), processes[0])
        processes[0].kill()
        begin = time.monotonic()
        processes[1].communicate(timeout=TIMEOUT)
        assert time.monotonic() - begin < 60
        assert processes[1].returncode in (peers.LOST, -signal.SIGABRT)


def test_a_process_that_never_starts_is_one_line(tmp_path):
    port = portpicker.pick_unused_port()
    command = [sys.executable, "-m", "jaxvid.train", f"--config={TOY.parents[2]}/configs/mqar.py"]
    command += [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"]
    command += ["--join_seconds=3", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == peers.LOST
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the 2 processes (this is 0, and localhost")
    assert "did not all start within 3 s; start the same command on all hosts" in line


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(small_disk, straight):
    """A state of 1.8 MB of noise fits twice; where the third should go, the disk is full."""
    options = {"steps": 12, "task__width": 1150, "checkpoint__every": 3, "checkpoint__keep": 5}
    options["compile_cache"] = str(straight.parent / "jax_cache")
    workdir = small_disk / "run"
    code, stderr = run(workdir, **options)
    assert code != 0
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: workdir=") and "No space left on device" in line
    assert "checkpoint 6 is complete" in line
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finish(workdir, **options)
    assert list(losses(workdir)) == list(range(1, 13))


def test_a_disk_that_fills_up_while_orbax_writes(small_disk, monkeypatch):
    """The same without the look at the free space beforehand: orbax fails, the rest holds."""
    monkeypatch.setattr(checkpoint, "_require_room", lambda folder, state: None)
    config = toy.config(steps=12, task__width=1150, checkpoint__keep=5)
    with pytest.raises(
        UserError, match=r"No space left on device.*checkpoint 6 is complete"
    ) as error:
        train(config, str(small_disk))
    assert "\n" not in str(error.value)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert int(train(config, str(small_disk)).step) == 12
