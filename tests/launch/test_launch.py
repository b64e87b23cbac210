"""The launch scripts print what they would run, and do it with stand-ins for cloud tools."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import kubernetes_validate
import pytest
import yaml
from jax.sharding import SingleDeviceSharding

ROOT = Path(__file__).parents[2]
LAUNCH, GOLDEN = ROOT / "launch", Path(__file__).with_name("golden")
TRAIN = ["--", "--config=configs/ar_diffusion.py:size=xl", "--workdir=/data/my run"]
JOBSET = ["--name=run1", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--image=IMAGE"]
JOBSET += ["--claim=shared"]
XPK = ["--cluster=C", "--name=run1", "--type=v6e-64", "--image=IMAGE"]
QUEUED = ["--name=run1", "--zone=us-east5-b", "--type=v6e-64", "--nfs=10.0.0.2:/share"]
# Dry runs by the name of their golden file.
DRY_RUNS = {
    "jobset": ("jobset.sh", [*JOBSET, "--slices=2", "--queue=q", "--libtpu=vmem"]),
    "jobset_plain": ("jobset.sh", JOBSET),
    "xpk": ("xpk.sh", [*XPK, "--slices=2", "--storage=s", "--zone=Z", "--libtpu=overlap"]),
    "queued": ("queued_resources.sh", [*QUEUED, "--libtpu=vmem"]),
    "queued_slices": ("queued_resources.sh", [*QUEUED, "--slices=2", "--provisioning=on-demand"]),
    "local": ("local.sh", ["--processes=2", "--devices=4"]),
}


def launch(script, *arguments, path="", **env):
    """The finished process of a launch script. path: a folder with stand-ins for commands."""
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "XLA_FLAGS": "", **env}
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def stand_in(folder, name, body):
    """An executable bash script, as the command `name` of that folder."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


def test_scripts_are_clean():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    tool = Path(sys.executable).with_name("shellcheck")
    command = [tool, "--external-sources", f"--source-path={ROOT}", *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_runs_print_exactly_what_would_run(name):
    script, arguments = DRY_RUNS[name]
    done = launch(script, *arguments, "--dry-run", *TRAIN)
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(str(ROOT), "ROOT")
    assert printed == (GOLDEN / f"{name}.txt").read_text()


def test_the_host_is_set_up_and_slurm_starts_as_printed():
    done = launch("setup_host.sh", "--nfs=h:/share", "--dry-run")
    assert done.stdout == (GOLDEN / "setup_host.txt").read_text()
    done = launch("slurm.sbatch", "--dry-run", *TRAIN, JAXVID="/shared/jaxvid")
    assert done.stdout == (GOLDEN / "slurm.txt").read_text()


@pytest.mark.parametrize("name", ["jobset", "jobset_plain"])
def test_the_manifest_is_valid_and_runs_the_training(name):
    """JobSet itself is no part of the schemas, but the Jobs that it makes are."""
    manifest = yaml.safe_load((GOLDEN / f"{name}.txt").read_text())
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 100
    (part,) = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **part["template"]}
    kubernetes_validate.validate(job, "1.30", strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    shell, option, line = container["command"]
    words = subprocess.run(
        [shell, option, line.replace("exec", "printf '%s\n'", 1)], capture_output=True, text=True
    ).stdout.splitlines()
    assert words == ["python", "-m", "jaxvid.train", "--stopped_status=75", *TRAIN[1:]]


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("jobset.sh", [*JOBSET, "--topology=4x"], "--topology=4x: write it as 4x4 or 2x2x4"),
        ("jobset.sh", [*JOBSET, "--chips=3"], "--chips=3: does not divide the 16 chips"),
        ("jobset.sh", [*JOBSET, "--accelerator=v6e"], "--accelerator=v6e: unknown; use one of tpu"),
        ("jobset.sh", [*JOBSET, "--name=Run_1"], "--name=Run_1: use up to 40 small letters"),
        ("jobset.sh", [*JOBSET, "--libtpu=fast"], "--libtpu=fast: unknown; use one of none, over"),
        ("xpk.sh", XPK[1:], "--cluster: missing; --help says what it is"),
        ("xpk.sh", [*XPK, "--restarts=0"], "--restarts=0: must be a whole number from 1 on"),
        ("xpk.sh", [*XPK, "--tpu_type=x"], "--tpu_type: no such option; --help lists them"),
        ("queued_resources.sh", [*QUEUED, "--type=v9-8"], "--type=v9-8: its runtime version is"),
        ("queued_resources.sh", [*QUEUED, "--provisioning=free"], "--provisioning=free: unknown"),
        ("local.sh", ["--processes=two"], "--processes=two: must be a whole number from 1 on"),
        ("jobset.sh", [*JOBSET, "--name=a\nb"], "--name=a b: use up to 40 small letters"),
        ("jobset.sh", ["--image topology=x"], "--image topology: no such option"),
        ("slurm.sbatch", ["--config=x"], "--config=x: unexpected; the options of jaxvid.train"),
        ("local.sh", ["2"], "2: unexpected; write --name=value, and the options of jaxvid.train"),
    ],
)
def test_bad_options_are_one_line(script, arguments, message):
    done = launch(script, *arguments, *["--dry-run"] * (script != "slurm.sbatch"), *TRAIN)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_nothing_to_train_is_refused():
    assert launch("local.sh").stderr.startswith("error: nothing to train; add -- --config=FILE")


GCLOUD = """
echo "$3 $4" >>"$LOG"
case "$3 $4" in
  "queued-resources list") head -n 1 "$STATES"; sed -i 1d "$STATES" ;;
  "tpu-vm ssh") status=$(head -n 1 "$RUNS"); sed -i 1d "$RUNS"; exit "$status" ;;
esac
"""


def queued(tmp_path, states, runs, *arguments):
    """(the finished process, the gcloud calls): the states and the trainings' statuses in turn."""
    stand_in(tmp_path / "bin", "gcloud", GCLOUD)
    files = {
        "STATES": "\n".join(states) + "\n",
        "RUNS": "\n".join(map(str, runs)) + "\n",
        "LOG": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    env = {name: str(tmp_path / name) for name in files}
    arguments = [*QUEUED, "--poll=1", *arguments, *TRAIN]
    done = launch("queued_resources.sh", *arguments, path=tmp_path / "bin", **env)
    calls = (tmp_path / "LOG").read_text().splitlines()
    return done, [call for call in calls if call != "queued-resources list"]


CREATE, DELETE = "queued-resources create", "queued-resources delete"
ATTEMPT = ["tpu-vm scp", "tpu-vm ssh"]


def test_a_queued_resource_is_made_again_after_a_preemption(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"]
    done, calls = queued(tmp_path, states, [1, 0])
    assert done.returncode == 0, done.stderr
    assert calls == [CREATE, *ATTEMPT, DELETE, CREATE, *ATTEMPT, DELETE]


def test_a_training_that_always_fails_ends_and_frees_its_chips(tmp_path):
    done, calls = queued(tmp_path, ["ACTIVE"] * 9, [1] * 9, "--failures=2")
    assert done.returncode == 2 and "the training failed 2 times" in done.stderr
    assert calls == [*ATTEMPT, *ATTEMPT, DELETE]


def test_a_state_that_cannot_be_read_makes_nothing(tmp_path):
    stand_in(tmp_path / "bin", "gcloud", "echo 'no credentials' >&2; exit 1")
    done = launch("queued_resources.sh", *QUEUED, *TRAIN, path=tmp_path / "bin")
    assert done.returncode == 1 and done.stderr == "no credentials\n"


@pytest.mark.parametrize("status, again", [(0, False), (75, True), (1, False)])
def test_slurm_queues_a_stopped_training_again(tmp_path, status, again):
    stand_in(tmp_path / "bin", "srun", f"exit {status}")
    stand_in(tmp_path / "bin", "scontrol", "echo $@")
    env = {"SLURM_JOB_ID": "7", "JAXVID": str(tmp_path)}
    done = launch("slurm.sbatch", *TRAIN, path=tmp_path / "bin", **env)
    assert done.stdout == ("requeue 7\n" if again else "")
    assert done.returncode == (0 if again else status)


PYTHON = """
[[ $1 != -c ]] || { echo 5; exit; }
for word; do [[ $word != --process_id=* ]] || id=${word#*=}; done
sleep 30 & trap 'echo saved; kill $!; exit 0' TERM
echo begins
(( id == 1 )) && { sleep 0.5; exit 3; }
wait
"""


def test_local_processes_stop_when_one_fails(tmp_path):
    stand_in(tmp_path, "python", PYTHON)
    done = launch("local.sh", "--processes=3", f"--python={tmp_path}/python", *TRAIN)
    assert done.returncode == 3
    lines = sorted(done.stdout.splitlines())
    begun = ["[0] begins", "[1] begins", "[2] begins"]
    assert [line for line in lines if "begins" in line] == begun
    assert {"[0] saved", "[2] saved"} <= set(lines)


def test_local_processes_save_when_the_script_is_stopped(tmp_path):
    stand_in(tmp_path, "python", PYTHON.replace("id == 1", "id == 9"))
    command = ["bash", str(LAUNCH / "local.sh"), f"--python={tmp_path}/python", *TRAIN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"[0] begins\n", "[1] begins\n"}
        process.terminate()
        assert sorted(process.stdout) == ["[0] saved\n", "[1] saved\n"]
    assert process.returncode == 0


@pytest.mark.slow
def test_two_local_processes_train(tmp_path):
    small = ["--config.steps=2", "--config.optim.warmup=0", "--config.evaluate.batches=1"]
    config = f"--config={ROOT}/configs/mqar.py"
    arguments = ["--", config, f"--workdir={tmp_path}/run", *small]
    done = launch("local.sh", f"--python={sys.executable}", *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"^\[0\] .*finished at step 2$", done.stdout, re.MULTILINE)


@pytest.mark.tpu_aot
def test_libtpu_takes_every_flag(tpu_devices):
    """Each set of flags compiles; a flag that does not exist is refused."""
    device = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=device)
    lowered = jax.jit(lambda x: x @ x).lower(x)
    rows = (LAUNCH / "libtpu_flags.txt").read_text().splitlines()
    sets = dict(row.split(maxsplit=1) for row in rows if row and not row.startswith("#"))
    for flags in sets.values():
        flags = (flag.removeprefix("--").split("=") for flag in flags.split())
        lowered.compile(compiler_options=dict(flags))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_flag"):
        lowered.compile(compiler_options={"xla_tpu_no_such_flag": "true"})
