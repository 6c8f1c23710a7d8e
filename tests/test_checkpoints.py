import errno
import gc
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from simclr_jax.checkpoints import Checkpoints, finished_steps, load_weights
from simclr_jax.errors import UserError
from simclr_jax.training import TrainState


def state_of(step):
    return {"step": jnp.int32(step), "params": {"kernel": jnp.arange(1000.0) * step}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def open_checkpoints(folder, **options):
    return Checkpoints(folder, **({"keep": 2, "best_metric": "knn1_accuracy"} | options))


def save(checkpoints, step, **metrics):
    unlogged = {"loss": np.array([0.1, 1 / 3], np.float32).tolist()}
    checkpoints.save(step, state_of(step), seconds=10.0 * step, metrics=metrics, unlogged=unlogged)


def restore(checkpoints, state=None):
    restored = checkpoints.restore(state or state_of(0))
    assert restored is not None
    return restored


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_newest_comes_back_bit_for_bit_with_its_clock(folder):
    checkpoints = open_checkpoints(folder)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.close()
    state, seconds, unlogged = restore(open_checkpoints(folder))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(2))
    assert seconds == 20.0
    np.testing.assert_array_equal(np.array(unlogged["loss"], np.float32), np.array([0.1, 1 / 3], np.float32))


def test_an_empty_folder_restores_nothing(folder):
    assert open_checkpoints(folder).restore(state_of(0)) is None


@pytest.mark.parametrize(("metric", "best"), [("knn1_accuracy", 2), ("loss", 1)])
def test_the_newest_two_and_the_best_stay(folder, metric, best):
    checkpoints = open_checkpoints(folder, best_metric=metric)
    for step, value in enumerate([0.1, 0.9, 0.5, 0.4, 0.3], start=1):
        save(checkpoints, step, **{metric: value})
    checkpoints.close()
    assert steps_in(folder) == [best, 4, 5]


def test_a_checkpoint_without_the_metric_is_not_the_best(folder):
    checkpoints = open_checkpoints(folder)
    save(checkpoints, 1, knn1_accuracy=0.2)
    for step in (2, 3, 4):
        save(checkpoints, step)
    checkpoints.close()
    assert steps_in(folder) == [1, 3, 4]


def large_state(sharding=None):
    """50 MB, which take a while to write."""
    return {"params": jax.device_put(np.random.default_rng(0).random((100, 131_072), np.float32), sharding)}


def on_all_devices():
    return NamedSharding(jax.make_mesh((4,), ("data",), (AxisType.Auto,)), PartitionSpec())


@pytest.mark.parametrize("sharding", [lambda: None, on_all_devices], ids=["one device", "all devices"])
def test_what_is_written_are_the_bits_before_the_step_that_consumed_them(folder, sharding):
    checkpoints = open_checkpoints(folder)
    state = large_state(sharding())
    expected = jax.tree.map(np.array, state)
    checkpoints.save(1, state, seconds=0.0, metrics={})
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    assert checkpoints.writing
    restored = restore(checkpoints, state)
    jax.tree.map(np.testing.assert_array_equal, restored[0], expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y + 3, rtol=1e-6), state, expected)
    checkpoints.close()


def test_a_checkpoint_counts_once_it_is_in_place_and_the_next_waits_for_it(folder):
    checkpoints, state = open_checkpoints(folder), large_state()
    for step in (1, 2, 3):
        checkpoints.save(step, state, seconds=0.0, metrics={})
        assert checkpoints.writing and checkpoints.latest_step == (step - 1 or None)
        assert steps_in(folder) == [s for s in (step - 2, step - 1) if s > 0]
    checkpoints.close()
    assert not checkpoints.writing and checkpoints.latest_step == 3
    assert steps_in(folder) == [2, 3]


def test_a_write_that_fails_later_is_told_soon_and_what_is_saved_stays(folder):
    resource = pytest.importorskip("resource")
    checkpoints = open_checkpoints(folder, keep=1)
    save(checkpoints, 1)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # bytes of a file
    try:
        checkpoints.save(2, large_state(), seconds=0.0, metrics={})
        with pytest.raises(UserError, match=r"step 2 .* ulimit -f.* is of step 1\. Put") as raised:
            for _ in range(1000):  # calls of the loop
                checkpoints.raise_if_failed()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    checkpoints.close()  # it has told
    assert steps_in(folder) == [1]
    checkpoints = open_checkpoints(folder, keep=1)
    assert int(restore(checkpoints)[0]["step"]) == 1
    assert [path.name for path in folder.iterdir()] == ["1"]


def damage(checkpoint):
    """Truncates every file of the arrays, as a machine that dies with its disk cache does."""
    for file in checkpoint.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


# Orbax leaves a coroutine of the failed load unawaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(folder, caplog):
    checkpoints = open_checkpoints(folder)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.close()
    damage(folder / "2")
    checkpoints = open_checkpoints(folder)
    with caplog.at_level(logging.WARNING, "simclr_jax"):
        state, seconds, _ = restore(checkpoints)
    gc.collect()
    assert int(state["step"]) == 1 and seconds == 10.0
    assert "step 2 is damaged" in caplog.text
    save(checkpoints, 2)  # the run reaches the same step again
    checkpoints.close()
    assert int(restore(open_checkpoints(folder))[0]["step"]) == 2
    assert (folder / "damaged-2").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_all_damaged_is_an_error(folder):
    checkpoints = open_checkpoints(folder)
    save(checkpoints, 1)
    checkpoints.close()
    damage(folder / "1")
    with pytest.raises(UserError, match="another --workdir"):
        open_checkpoints(folder).restore(state_of(0))
    gc.collect()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError('Error writing "x": No space left on device'), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "not writable"),
    ],
)
def test_a_disk_that_cannot_be_written_is_told_in_one_line(folder, monkeypatch, error, said):
    checkpoints = open_checkpoints(folder)
    save(checkpoints, 1)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", fail)
    with pytest.raises(UserError, match=said) as raised:
        save(checkpoints, 2)
    assert "\n" not in str(raised.value) and "step 1" in str(raised.value)
    assert steps_in(folder) == [1]


def weights(seed=0, width=3):
    """Parameters and statistics, of numbers that have no short form."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"conv": {"kernel": draw(2, width)}, "stages": {0: {"bias": draw(width)}}}
    return params, {"norm": {"mean": draw(width), "var": draw(width)}}


def save_training(folder, step, seed):
    params, batch_stats = weights(seed)
    momentum = jax.tree.map(jnp.zeros_like, params)
    checkpoints = open_checkpoints(folder)
    state = TrainState(jnp.int32(step), params, batch_stats, momentum)
    checkpoints.save(step, state, seconds=0.0, metrics={})
    checkpoints.close()


def test_weights_come_back_bit_for_bit_without_the_rest(folder):
    for step in (3, 12):
        save_training(folder, step, seed=step)
    for step in (3, 12):
        found = load_weights(folder, step, *weights(seed=0))
        jax.tree.map(np.testing.assert_array_equal, found, weights(seed=step))
        assert jax.tree.structure(found) == jax.tree.structure(weights())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conv": {"kernel": jnp.zeros((2, 4))}},
            r"^conv.kernel is \(2, 3\) in .*/3, and .* asks for \(2, 4\)$",
        ),
        ({"head": {"kernel": jnp.zeros(2)}}, r"asks for has head.kernel, of \(2,\), and .*/3 has not$"),
        ({"stages": {}}, None),
        (
            {"stages": {1: {"bias": jnp.zeros(3)}}},
            r"asks for has stages.1.bias, of \(3,\), and .*/3 has not$",
        ),
        ({"conv": {}}, r"^.*/3 has conv.kernel, of \(2, 3\), which the model"),
    ],
)
def test_the_first_parameter_that_differs_is_named(folder, changes, message):
    save_training(folder, 3, seed=3)
    params, batch_stats = weights()
    if message is None:  # a module that is not asked for may be there
        params, message = {"conv": params["conv"]}, None
        assert load_weights(folder, 3, params, batch_stats)[0].keys() == {"conv"}
        return
    with pytest.raises(UserError, match=message):
        load_weights(folder, 3, params | changes, batch_stats)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_weights_are_told_in_one_line_and_stay(folder):
    save_training(folder, 3, seed=3)
    damage(folder / "3")
    with pytest.raises(UserError, match=r"step 3 .* cannot be read .*; remove .*/3 to use") as raised:
        load_weights(folder, 3, *weights())
    assert "\n" not in str(raised.value)
    assert finished_steps(folder) == [3]
    gc.collect()


def contents(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_finished_steps_are_told_without_a_change(folder, tmp_path):
    for step in (12, 3):
        save_training(folder, step, seed=step)
    # What a run leaves that is writing just now, and one that met a damaged checkpoint.
    for name in ("20.orbax-checkpoint-tmp", "damaged-1"):
        (folder / name / "state").mkdir(parents=True)
    before = contents(tmp_path)
    assert finished_steps(folder) == [3, 12]
    assert contents(tmp_path) == before


def test_where_there_is_no_folder_no_step_is_finished(tmp_path):
    assert finished_steps(tmp_path / "absent") == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert finished_steps(tmp_path / "empty") == []
