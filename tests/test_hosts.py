"""Several processes as one run: real ones, on this machine, joined over the loopback interface."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from simclr_jax import hosts, launch, loop, session, train, training
from simclr_jax import mesh as meshes
from simclr_jax.data.batches import ResidentBatches, StreamedBatches
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest

ROOT = pathlib.Path(__file__).parent.parent
STEPS, IMAGES, CANVAS = 8, 64, 32
# SGD, as Adam makes much of the rounding of small gradients; feature maps of several pixels, as BatchNorm of
# few numbers does too; and a low rate: at 0.03, from the fourth step on, rounding took another side of a
# ReLU.
TINY = {
    "data.split": f"train[:{IMAGES}]",
    "data.canvas_size": CANVAS,
    "views.size": 16,
    "views.jitter": 0.0,
    "views.grayscale": 0.0,
    "views.blur": 0.0,
    "model.depth": 10,
    "model.width": 0.125,
    "model.stem": "cifar",
    "model.head_hidden": 32,
    "model.head_out": 16,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.003,
    "optimizer.scaling": "none",
    "optimizer.warmup_epochs": 0.0,
    "train.steps": STEPS,
    "train.batch_size": 16,
    "evaluation.bank_split": "train[:100]",
    "evaluation.query_split": "test[:50]",
    "run.log_every_steps": 1,
    "run.keep_checkpoints": STEPS,
}
SPLIT = 0.75e-9 * IMAGES * CANVAS**2 * 3  # GB, in which three quarters of the pack have room


def coordinator():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def start(arguments, *, devices):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    """(output, errors) of each, after all have left."""
    try:
        found = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # XLA's collectives on a CPU print a line of their own.
    return [
        ("".join(line for line in output.splitlines(True) if "Gloo" not in line), errors)
        for output, errors in found
    ]


def command(workdir, **overrides):
    options = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    return [
        *("-m", "simclr_jax.train", "--config", "configs/shapes.py", "--workdir", str(workdir)),
        *(f"--config.{key}={value}" for key, value in options.items()),
    ]


def one_process(workdir, *, devices, **overrides):
    process = start(command(workdir, **overrides), devices=devices)
    ((_, errors),) = finish([process])
    assert process.returncode == 0, errors


def two_processes(workdir, **overrides):
    """Two processes of one device each."""
    joined = [*command(workdir, **overrides), "--distributed", f"--coordinator={coordinator()}"]
    return [start([*joined, "--processes=2", f"--process={number}"], devices=1) for number in range(2)]


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(workdir):
    place = str(
        workdir / "checkpoints" / str(STEPS)
    )  # which Orbax by itself wants back on the devices of then
    metadata = ocp.checkpointables_metadata(place).metadata["state"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda it: jax.ShapeDtypeStruct(it.shape, it.dtype, sharding=here), metadata)
    return jax.tree.map(np.asarray, ocp.load_checkpointables(place, {"state": abstract})["state"])


def assert_same_run(workdir, expected):
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(expected))
    for ours, theirs in zip(logged(workdir), logged(expected), strict=True):
        for name in theirs.keys() - {"images_per_second"}:
            assert ours[name] == theirs[name], (ours, name)


def assert_close_run(workdir, expected):
    def assert_close(ours, theirs):
        assert np.linalg.norm(np.float64(ours) - theirs) <= 1e-5 * np.linalg.norm(np.float64(theirs))

    jax.tree.map(assert_close, final_state(workdir)["params"], final_state(expected)["params"])
    for ours, theirs in zip(logged(workdir), logged(expected), strict=True):
        if "loss" in theirs:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two_devices") / "run"
    one_process(workdir, devices=2, run__checkpoint_minutes=0)
    return workdir


def test_two_processes_end_with_the_bits_of_one_and_one_of_them_writes(two_devices, tmp_path):
    processes = two_processes(tmp_path / "run")
    (said, errors), (other_said, _) = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert other_said == ""
    assert "in 2 processes" in said and "trained encoder" in said
    assert_same_run(tmp_path / "run", two_devices)
    runs = tmp_path / "run", two_devices
    names, expected = (sorted(path.name.split(".")[0] for path in run.iterdir()) for run in runs)
    assert names == expected == ["checkpoints", "config", "events", "metrics", "result"]
    result, theirs = (json.loads((run / "result.json").read_text()) for run in runs)
    for name in theirs.keys() - {"seconds", "images_per_second", "device"}:
        assert result[name] == theirs[name]


def test_begun_by_two_and_stopped_by_a_signal_to_one_it_goes_on_in_one_with_one_device(two_devices, tmp_path):
    """The pack is split over the two."""
    workdir = tmp_path / "run"
    processes = two_processes(workdir, run__memory_gb=SPLIT, run__checkpoint_minutes=0)
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or len(logged(workdir)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    (said, _), _ = finish(processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "the same command goes on from there" in said
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert max(saved) == logged(workdir)[-1]["step"] < STEPS
    one_process(workdir, devices=1)
    assert_close_run(workdir, two_devices)


def test_begun_by_one_it_goes_on_in_two_with_the_same_bits(two_devices, tmp_path):
    """Streamed, half of each batch in each process."""
    workdir = tmp_path / "run"
    shutil.copytree(two_devices, workdir)
    (workdir / "result.json").unlink()
    # A save that is due while another is being written is put off, so not every step has one.
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    last = max(step for step in saved if step <= 3)
    for step in saved:
        if step > last:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    (said, errors), _ = finish(two_processes(workdir, run__memory_gb=0))
    assert f"going on from step {last}" in said, errors
    assert_same_run(workdir, two_devices)


@pytest.fixture(scope="module")
def members():
    """What two processes of two devices each found in `member`."""
    address = coordinator()
    found = finish([start([__file__, address, str(number)], devices=2) for number in range(2)])
    assert all(output for output, _ in found), found
    return [json.loads(output) for output, _ in found]


def member(address, number):
    """A process of `members`."""
    hosts.join(address, 2, number)  # raises if importing the entry above had asked JAX for its devices
    found = {"first": hosts.is_first(), "device": meshes.device_name()}
    found["agree"] = [hosts.agree([number, -number, i]) for i in range(20)]
    found["same"] = [hosts.same("a text"), hosts.same(f"text {number}")]
    for failing in (0, 1):
        try:
            with hosts.together():
                if failing == number:
                    raise ValueError("own")
        except (ValueError, UserError) as error:
            found[f"failed {failing}"] = str(error)
    with hosts.together():
        pass

    session._SHARING_TRIES = 1
    try:
        session._check_shared(ROOT / ("tests" if number else "configs"))
    except UserError as error:
        found["shared"] = str(error)
    session._check_shared(ROOT / "configs")

    mesh = meshes.data_mesh(8)
    whole, halves = meshes.replicated(mesh), meshes.split(mesh)
    array = np.arange(8.0)
    put = hosts.put({"a": array, "b": jnp.asarray(array)}, halves) | {"c": hosts.put(array, whole)}
    shards = [[shard.data for shard in put[name].addressable_shards] for name in "ab"]
    found["put"] = [np.concatenate(own).tolist() for own in shards]
    found["sum"] = float(jax.jit(lambda put: put["a"] @ put["b"] + put["c"][0])(put))
    key = hosts.put(jax.random.key(3), whole)
    found["key"] = np.asarray(jax.jit(jax.random.key_data, out_shardings=whole)(key)).tolist()
    here = hosts.local(put["c"])
    found["local"] = [here.tolist(), here.devices() == {jax.local_devices()[0]}]

    read = []

    class Rows(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (22, 4, 4, 3), np.uint8)
    pack = Pack(canvas, np.full((22, 2), 4, np.int32), np.arange(22, dtype=np.int32), ("a",), "random", 0)
    watched = dataclasses.replace(pack, canvas=canvas.view(Rows))
    options: dict[str, Any] = dict(seed=3, batch_size=8, mesh=mesh)
    resident = ResidentBatches(watched, **options, steps_per_call=1, split=True)
    found["resident rows"] = [[rows.start, rows.stop] for rows in read]
    streamed = StreamedBatches(watched, **options, first_step=0, total_steps=3)
    found["right"] = []
    for batches in (resident, streamed):
        for step in range(3):
            arrays, indices = batches.call(step, 1)
            batch = jax.jit(batches.fetch, out_shardings=whole)(arrays, indices[0])
            right = pack.canvas[batch.ids] == np.asarray(batch.canvas)
            found["right"].append(bool(right.all() and (np.asarray(batch.label) == batch.ids).all()))
    found["streamed rows"] = sorted({len(rows) for rows in read if isinstance(rows, np.ndarray)})
    print(json.dumps(found))


def test_processes_know_which_they_are(members):
    assert [found["first"] for found in members] == [True, False]
    assert all(found["device"].endswith(" in 2 processes") for found in members)


def test_they_agree_on_the_greatest_of_each(members):
    for found in members:
        assert found["agree"] == [[1, 0, i] for i in range(20)]
        assert found["same"] == [True, False]


def test_where_one_fails_all_do(members):
    for failing in (0, 1):
        errors = [found[f"failed {failing}"] for found in members]
        assert errors[failing] == "own"
        assert "another process" in errors[1 - failing]


def test_a_folder_that_they_do_not_share_is_told_in_each(members):
    for found in members:
        assert "not one folder for all" in found["shared"]


def test_arrays_are_put_on_the_devices_of_both(members):
    for number, found in enumerate(members):
        assert found["put"] == [list(range(4 * number, 4 * number + 4))] * 2
        assert found["sum"] == sum(i * i for i in range(8))
        assert found["key"] == np.asarray(jax.random.key_data(jax.random.key(3))).tolist()
        assert found["local"] == [list(range(8)), True]


def test_each_reads_its_own_images_and_all_get_the_batch(members):
    assert [found["resident rows"] for found in members] == [[[0, 6], [6, 12]], [[12, 18], [18, 24]]]
    for found in members:
        assert found["streamed rows"] == [4]
        assert found["right"] == [True] * 6


def test_an_address_that_cannot_be_reached_or_taken_is_told(monkeypatch):
    monkeypatch.setattr(hosts, "_REACH_SECONDS", 0)
    with pytest.raises(UserError, match="was not reached"):
        hosts.join(coordinator(), 2, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match="in use; choose another port"):
            hosts.join(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)


def test_the_loop_does_what_all_processes_agreed_on():
    """Calls as long as the longest that one asked for, and a stop that another was asked to make."""
    counts = []

    def run_steps(state, arrays, indices, count):
        counts.append(count)
        return state.replace(step=state.step + count), dict.fromkeys(("loss", "update_norm"), np.zeros(8))

    def agree(values):
        return [4, sum(counts) > 10, False] if len(values) == 3 else values

    saved = mock.MagicMock()
    state = loop.fit(
        training.TrainState(jnp.int32(0), {}, {}, ()),
        total_steps=100,
        batches=mock.MagicMock(steps_per_call=8, call=lambda step, count: (None, None)),
        run_steps=run_steps,
        evaluate=lambda state: {},
        evaluate_every_steps=0,
        log_every_steps=100,
        checkpoint_seconds=3600,
        meter=loop.Meter(1, step=0, seconds=0),
        log=mock.MagicMock(),
        checkpoints=saved,
        stop=StopRequest(),
        agree=agree,
    )
    assert counts == [1, 4, 4, 4] and state.step == 13
    assert [call.args[0] for call in saved.save.call_args_list] == [13]


BY_HAND = ["--coordinator=127.0.0.1:1234", "--processes=2", "--process=1"]
BAD_FLAGS = {
    "without --distributed": (BY_HAND, "go with --distributed"),
    "one missing": (["--distributed", *BY_HAND[:2]], "set all three or none"),
    "no port": (["--distributed", "--coordinator=10.0.0.1", *BY_HAND[1:]], "HOST:PORT"),
    "port too high": (["--distributed", "--coordinator=a:65536", *BY_HAND[1:]], "HOST:PORT"),
    "one too many": (["--distributed", *BY_HAND[:2], "--process=2"], "number the processes from 0 to 1"),
    "below zero": (["--distributed", *BY_HAND[:2], "--process=-1"], "number the processes from 0 to 1"),
}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections calls it
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_told(case, tmp_path):
    arguments, said = BAD_FLAGS[case]
    values = launch.define_flags()
    values(["train", "--config", str(ROOT / "configs" / "shapes.py"), "--workdir", str(tmp_path), *arguments])
    with pytest.raises(UserError, match=said):
        launch.main(values, train.train, train.report)


def test_where_no_others_are_found_it_is_one_line(tmp_path):
    process = start([*command(tmp_path / "run"), "--distributed"], devices=1)
    ((_, errors),) = finish([process])
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and "--coordinator=HOST:PORT --processes=N --process=I" in line
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    member(sys.argv[1], int(sys.argv[2]))
