import errno
import gc
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.checkpoints import Checkpoints
from simclr_jax.errors import UserError


def state_of(step):
    return {"step": jnp.int32(step), "params": {"kernel": jnp.arange(1000.0) * step}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def open_checkpoints(folder, **options):
    return Checkpoints(folder, **({"keep": 2, "best_metric": "knn1_accuracy"} | options))


def save(checkpoints, step, **metrics):
    checkpoints.save(step, state_of(step), seconds=10.0 * step, metrics=metrics)


def restore(checkpoints):
    restored = checkpoints.restore(state_of(0))
    assert restored is not None
    return restored


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_newest_comes_back_bit_for_bit_with_its_clock(folder):
    checkpoints = open_checkpoints(folder)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.close()
    state, seconds = restore(open_checkpoints(folder))
    jax.tree.map(np.testing.assert_array_equal, state, state_of(2))
    assert seconds == 20.0


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
        state, seconds = restore(checkpoints)
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

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables", fail)
    with pytest.raises(UserError, match=said) as raised:
        save(checkpoints, 2)
    assert "\n" not in str(raised.value) and "step 1" in str(raised.value)
    assert steps_in(folder) == [1]
