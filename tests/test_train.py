"""The command line from end to end, in processes of its own, as a user starts it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from simclr_jax.checkpoints import finished_steps

pytestmark = pytest.mark.usefixtures("kept_compilations")

ROOT = pathlib.Path(__file__).parent.parent
# A run of seconds: ResNet-10 of the least width on views of 16 pixels.
TINY = {
    "data.split": "train[:200]",
    "views.size": 16,
    "model.depth": 10,
    "model.width": 0.125,
    "model.stem": "imagenet",
    "optimizer.warmup_epochs": 0,
    "train.steps": 12,
    "train.batch_size": 32,
    "evaluation.bank_split": "train[:100]",
    "evaluation.query_split": "test[:50]",
    "run.log_every_steps": 1,
    "run.checkpoint_minutes": 0,
    "run.keep_checkpoints": 20,
}


def command(workdir, base=TINY, **overrides):
    options = base | {key.replace("__", "."): value for key, value in overrides.items()}
    return [
        *(sys.executable, "-m", "simclr_jax.train"),
        *("--config", str(ROOT / "configs" / "shapes.py"), "--workdir", str(workdir)),
        *(f"--config.{key}={value}" for key, value in options.items()),
    ]


def run(arguments, cwd=None, **environment):
    return subprocess.run(
        arguments,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def newest(workdir):
    """Step of the newest finished checkpoint; 0 where there is none."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def final_state(workdir):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes and devices are taken from the file here
        return ocp.load_checkpointables(workdir / "checkpoints" / str(newest(workdir)))["state"]


def wait_for_step(process, workdir, step):
    while process.poll() is None:
        try:
            if logged(workdir)[-1]["step"] >= step:
                return
        except (OSError, ValueError, IndexError):
            pass
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(command(workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_its_folder_complete_and_its_result_on_the_screen(uninterrupted):
    workdir, done = uninterrupted
    result = json.loads((workdir / "result.json").read_text())
    assert result["steps"] == 12 and result["images"] == 200
    assert 0 < result["seconds"] < 300 and result["images_per_second"] > 0
    for name in ("knn1_accuracy", "knn1_accuracy_raw_pixels", "knn1_accuracy_untrained"):
        assert 0 <= result[name] <= 1
        assert f"{result[name]:.1%}" in done.stdout
    records = logged(workdir)
    assert [record["step"] for record in records] == [0, *range(1, 13), 12]
    first = {"step", "epoch", "loss", "contrast_top1", "contrast_top5", "learning_rate"}
    assert first <= records[1].keys()
    assert "images_per_second" in records[2]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 12
    assert list(workdir.glob("events.out.tfevents.*"))
    assert done.stderr == "" or "packing" in done.stderr


def test_finished_the_same_command_shows_the_result_again(uninterrupted):
    workdir, done = uninterrupted
    before = sorted(workdir.rglob("*"))
    again = run(command(workdir))
    assert again.returncode == 0
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    assert sorted(workdir.rglob("*")) == before


def assert_same_run(workdir, uninterrupted):
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(uninterrupted))
    for ours, theirs in zip(logged(workdir), logged(uninterrupted), strict=True):
        # There is no speed of a process's first call.
        ours["images_per_second"] = theirs["images_per_second"] = None
        assert ours == theirs


# With 0 minutes the signal finds the run writing a checkpoint, or nearly.
@pytest.mark.parametrize(("number", "status", "minutes"), [(signal.SIGTERM, 0, 0), (signal.SIGINT, 130, 60)])
def test_asked_to_stop_it_saves_says_so_and_goes_on(uninterrupted, tmp_path, number, status, minutes):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(workdir, run__checkpoint_minutes=minutes), stdout=subprocess.PIPE, text=True
    )
    wait_for_step(process, workdir, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the same command goes on from there" in output
    stopped_at = logged(workdir)[-1]["step"]
    assert f"stopped at step {stopped_at} of 12" in output
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()
    done = run(command(workdir))
    assert f"going on from step {stopped_at}" in done.stdout
    assert_same_run(workdir, uninterrupted[0])


def cut_short(uninterrupted, workdir):
    """The run as it was after its first checkpoint; returns the step of it."""
    shutil.copytree(uninterrupted, workdir)
    (workdir / "result.json").unlink()
    first, *later = finished_steps(workdir / "checkpoints")
    for step in later:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return first


@pytest.mark.parametrize("after", ["parameters;", "untrained encoder"])
def test_asked_to_stop_before_the_first_step_it_leaves_at_once(uninterrupted, tmp_path, after):
    workdir = tmp_path / "run"
    if after == "parameters;":  # the folder is opened next
        cut_short(uninterrupted[0], workdir)
    before = finished_steps(workdir / "checkpoints")
    process = subprocess.Popen(command(workdir), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if after in line:
            break
    process.send_signal(signal.SIGTERM)
    *_, last = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert last == "stopped, with nothing to save; the same command goes on"
    assert finished_steps(workdir / "checkpoints") == before
    assert not list(workdir.glob("checkpoints/damaged-*"))


def test_a_full_disk_is_told_in_one_line_and_what_is_saved_stays(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    step = cut_short(uninterrupted[0], workdir)
    # No file may exceed 300 blocks, of 512 or 1024 bytes as the shell has it; the arrays of a checkpoint do.
    done = run(["sh", "-c", 'ulimit -f 300 && exec "$@"', "sh", *command(workdir)])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: the checkpoint of step ")
    assert (
        f"larger than the system allows (see ulimit -f); the last good one is of step {step}" in done.stderr
    )
    assert finished_steps(workdir / "checkpoints") == [step]
    done = run(command(workdir))
    assert f"going on from step {step}" in done.stdout
    assert_same_run(workdir, uninterrupted[0])


def test_a_nan_stops_the_run_and_names_the_steps(tmp_path):
    workdir = tmp_path / "run"
    done = run(command(workdir, optimizer__learning_rate=1e30, run__log_every_steps=4))
    assert done.returncode == 1
    assert "NaN or infinite between steps" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or "packing" in done.stderr
    assert not (workdir / "result.json").exists()


BAD_COMMANDS = {
    "no config": (["--workdir", "x"], "configs/shapes.py"),
    "no such config": (["--config", "configs/shape.py"], "configs/shapes.py"),
    "mistyped key": (["--config", "configs/shapes.py", "--config.train.batchsize=3"], "batch_size"),
    "mistyped flag": (["--config", "configs/shapes.py", "--workdri=x"], "workdir"),
    "wrong type": (["--config", "configs/shapes.py", "--config.train.epochs=many"], "epochs"),
    "nothing to trace": (["--config", "configs/shapes.py", "--dry-run", "--profile"], "--profile"),
    "stray argument": (["--config", "configs/shapes.py", "shapes"], "'shapes'"),
    "batch of one": (["--config", "configs/shapes.py", "--config.train.batch_size=1"], "at least 2"),
    "batch too large": (
        ["--config", "configs/shapes.py", "--config.train.batch_size=5000"],
        "4000 images",
    ),
    "unknown encoder": (["--config", "configs/shapes.py", "--config.model.depth=19"], "18"),
    "unprepared data": (
        ["--config", "configs/cifar10.py", "--config.run.data_dir=/nowhere"],
        "python -m simclr_jax.prepare cifar10",
    ),
    "unprepared evaluation set": (
        ["--config", "configs/shapes.py", "--config.evaluation.dataset=stl10"],
        "python -m simclr_jax.prepare stl10",
    ),
    "no images named": (["--config", "configs/folder.py"], "config.data.folder"),
    "no such folder": (["--config", "configs/folder.py", "--config.data.folder=/nowhere"], "/nowhere"),
    "folder of text": (["--config", "configs/folder.py", "--config.data.folder=configs"], "configs"),
    "reversed range": (
        ["--config", "configs/shapes.py", "--config.views.crop_area=(1.0, 0.5)"],
        "low <= high",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_with_status_2_and_leaves_nothing(case, tmp_path):
    arguments, said = BAD_COMMANDS[case]
    workdir = [] if "--workdir" in arguments else ["--workdir", str(tmp_path / "run")]
    done = run(
        [sys.executable, "-m", "simclr_jax.train", *arguments, *workdir],
        cwd=ROOT,
        TFDS_DATA_DIR=str(tmp_path / "nothing"),
    )
    errors = [line for line in done.stderr.splitlines() if "packing" not in line]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert said in errors[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "nothing").exists()


def test_importing_the_package_brings_neither_tensorflow_nor_pytorch():
    code = (
        "import sys, simclr_jax.train, simclr_jax.prepare; print({'tensorflow', 'torch'} & set(sys.modules))"
    )
    assert run([sys.executable, "-c", code]).stdout.strip() == "set()"
