"""SIGKILL at random moments. Of a whole run of shapes: `pytest tests/test_kills.py -n 0 -s --kills=50`."""

import re
import signal
import subprocess
import time

import numpy as np
from test_train import TINY, assert_same_run, command, newest, run

QUICK = TINY | {"train.steps": 24, "run.keep_checkpoints": 2, "run.log_every_steps": 7}
SHAPES = {"train.steps": 600, "run.checkpoint_minutes": 0}


def being_written(workdir):
    """Steps of the checkpoints that are not finished."""
    return [int(path.name.split(".")[0]) for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")]


def went_on(output):
    return [int(step) for step in re.findall(r"going on from step (\d+)", output.read_text())]


def kill(arguments, workdir, output, moment, step, delay):
    """Starts the run and kills it.

    Args:
      moment: "start", "step" once a checkpoint of `step` or later is begun or finished, or "save" once
        one is begun.
      delay: seconds after it; of a start at most until it goes on, as what is left may take no longer.
    """
    resuming = newest(workdir) > 0
    with output.open("w") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)

    def due():
        if moment == "start":
            return bool(went_on(output))
        if resuming and not went_on(output):
            return False  # what is being written may be what the last kill left
        return max([*being_written(workdir), 0 if moment == "save" else newest(workdir)], default=0) >= step

    deadline = time.monotonic() + (delay if moment == "start" else 300)
    while process.poll() is None and time.monotonic() < deadline and not due():
        time.sleep(0.005)
    if moment != "start":
        time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, output.read_text()


def test_killed_again_and_again_it_ends_with_the_bits_of_a_run_never_killed(request, tmp_path, monkeypatch):
    kills = request.config.getoption("--kills")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a start is 10 to 30 % quicker
    if kills is None:
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    base = QUICK if kills is None else SHAPES
    kills, seed = kills or 4, np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    print(f"seed {seed}")
    assert run(command(tmp_path / "whole", base)).returncode == 0

    workdir, output = tmp_path / "run", tmp_path / "output.txt"
    arguments = command(workdir, base)
    began, in_saves = time.monotonic(), 0
    for number, step in enumerate(np.sort(rng.integers(1, base["train.steps"] - 10, kills))):
        before = newest(workdir)
        moment = ("save", "step", "save", "start")[number % 4]
        # The first comes as the save begins, so that there is one in a save whatever is drawn.
        delay = rng.uniform(0, 10 if moment == "start" else 0.3) if number else 0
        kill(arguments, workdir, output, moment, step, delay)
        assert went_on(output) == [before] * (before > 0) or (moment == "start" and not went_on(output))
        assert "damaged" not in output.read_text()
        assert newest(workdir) >= before
        in_save = moment != "start" and bool(being_written(workdir))  # at the start it is the last kill's
        in_saves += in_save
        print(
            f"kill {number + 1} ({moment}) after {time.monotonic() - began:.0f} s: from {before} on, "
            f"{newest(workdir)} saved{', in a save' * in_save}",
            flush=True,
        )
    print(f"{kills} kills, {in_saves} in a save, {(time.monotonic() - began) / 60:.1f} minutes")
    assert in_saves

    before = newest(workdir)
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {before} " in done.stdout
    assert_same_run(workdir, tmp_path / "whole")
