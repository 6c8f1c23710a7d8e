import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from simclr_jax.data import shapes
from simclr_jax.data.decode import decode_rgb
from simclr_jax.data.sources import tfds_source
from simclr_jax.errors import UserError

REFERENCE = pathlib.Path(__file__).parent.parent / "reference" / "shapes.npz"


@pytest.fixture
def few(monkeypatch):
    """Fewer images, so that a test draws them in a moment."""
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 40)
    monkeypatch.setattr(shapes, "TEST_IMAGES", 20)


def drawn(split, index):
    return shapes.draw(np.random.default_rng([shapes._SEED, split, index]), index % 10)


def test_pixels_do_not_change():
    """Accuracies reported on `shapes` hold for these pixels only; another processor's sine may round."""
    images = np.stack([drawn(split, index) for split in (0, 1) for index in range(10)])
    stored = np.load(REFERENCE)["images"]
    assert np.abs(images.astype(int) - stored).max() <= 1
    assert (images != stored).mean() < 1e-3


def test_draw_is_a_function_of_its_generator():
    one, again = (shapes.draw(np.random.default_rng(5), 3) for _ in range(2))
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert (one != shapes.draw(np.random.default_rng(6), 3)).any()


def test_outlines_differ_and_fit_their_circle():
    line = np.linspace(-1.2, 1.2, 121, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    masks = {name: inside(x, y) for name, inside in shapes._OUTLINES.items()}
    for name, mask in masks.items():
        assert mask.any(), name
        assert np.hypot(x, y)[mask].max() < 1.05, name
        for other in masks:
            union = (mask | masks[other]).sum()
            if other != name:
                assert (mask & masks[other]).sum() / union < 0.85, (name, other)


def test_shape_stands_out_from_its_background():
    luma = np.array([0.299, 0.587, 0.114])
    for index in range(200):
        image = drawn(0, index)
        rng = np.random.default_rng([shapes._SEED, 0, index])
        coverage = recorded_coverage(rng, index % 10)
        grey = image @ luma / 255
        inside, outside = grey[coverage > 0.99], grey[coverage < 0.01]
        assert abs(inside.mean() - outside.mean()) > 0.2, index


def recorded_coverage(rng, label):
    seen = []
    coverage = shapes._coverage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_coverage", lambda *args: seen.append(coverage(*args)) or seen[0])
        shapes.draw(rng, label)
    return seen[0]


def test_raw_pixels_say_little_about_the_class():
    train = np.stack([drawn(0, index) for index in range(1_000)]).reshape(1_000, -1) / 255.0
    test = np.stack([drawn(1, index) for index in range(200)]).reshape(200, -1) / 255.0
    distance = (train**2).sum(1) - 2 * test @ train.T
    accuracy = np.mean(distance.argmin(1) % 10 == np.arange(200) % 10)
    assert accuracy < 0.35


@pytest.mark.usefixtures("few")
def test_prepared_set_holds_the_drawn_images(tmp_path, capfd):
    source = tfds_source("shapes", "train", data_dir=str(tmp_path))
    assert source.class_names == shapes.CLASS_NAMES
    labels = []
    images = {drawn(0, index).tobytes() for index in range(40)}
    for index in range(len(source)):
        data, label = source.record(index)
        labels.append(label)
        images.remove(decode_rgb(data, size=32).tobytes())
    assert not images
    assert sorted(labels) == sorted(list(range(10)) * 4)
    assert len(tfds_source("shapes", "test", data_dir=str(tmp_path))) == 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("few")
def test_without_a_folder_it_goes_to_our_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "read-only"))
    tfds_source("shapes", "test")
    assert (tmp_path / "cache/tfds/shapes").is_dir()
    assert not (tmp_path / "read-only").exists()


@pytest.mark.usefixtures("few")
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the shapes data set .*SIMCLR_JAX_CACHE"):
        tfds_source("shapes", "test", data_dir=str(tmp_path / "file"))


def start_preparing(folder):
    code = (
        "import sys; from simclr_jax.data import shapes; "
        "shapes.TRAIN_IMAGES, shapes.TEST_IMAGES = 400, 20; "
        "shapes.prepare_shapes(sys.argv[1])"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(folder)])


@pytest.mark.usefixtures("few")
def test_killed_preparation_is_done_again(tmp_path):
    process = start_preparing(tmp_path)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("shapes/incomplete.*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "shapes/1.0.0").exists()
    assert len(tfds_source("shapes", "train", data_dir=str(tmp_path))) == 40


def test_two_processes_at_once(tmp_path):
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start_preparing(tmp_path)) for _ in range(2)]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(tfds_source("shapes", "train", data_dir=str(tmp_path))) == 400
