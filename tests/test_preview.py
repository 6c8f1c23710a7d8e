"""The picture of a config's views, and the command that writes it."""

import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from simclr_jax import augment, preview, recipe, training
from simclr_jax import mesh as meshes
from simclr_jax.config import default_config
from simclr_jax.data.batches import ResidentBatches
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
BATCH, SIDE = 4, 24
# Compiles fast, and tells one view from another as well as the whole chain.
CROP_ONLY = {"flip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}


def make_config(**views):
    settings = default_config()
    settings.seed = 3
    settings.train.batch_size = BATCH
    settings.views.update({"size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)} | views)
    return settings


@pytest.fixture(scope="module")
def images():
    """Ten images of several shapes, two of them without a label."""
    rng = np.random.default_rng(0)
    extent = rng.integers(12, SIDE + 1, (10, 2)).astype(np.int32)
    canvas = rng.integers(0, 256, (10, SIDE, SIDE, 3), np.uint8)
    label = np.array([0, 1] * 4 + [-1, -1], np.int32)
    return Pack(canvas, extent, label, ("disc", "7"), "toys[train]", 0)


def first_step(settings, images):
    """The views that `train_step` makes in its first step, arrays as `recipe.build_views` has them."""
    mesh = meshes.data_mesh(BATCH)
    batches = ResidentBatches(images, seed=settings.seed, batch_size=BATCH, steps_per_call=1, mesh=mesh)
    arrays, indices = batches.call(0, 1)
    optimizer = optax.sgd(0.1)
    weight = jnp.ones(())

    def forward(weight: Any, stats: Any, views: Any) -> Any:
        return [weight * view for view in views], stats

    def loss(z: Any) -> Any:
        return sum(jnp.mean(view) for view in z), {"z": z}

    step = functools.partial(
        training.train_step,
        make_views=recipe.build_views(settings, mesh),
        forward=forward,
        loss=loss,
        optimizer=optimizer,
        learning_rate=optax.constant_schedule(0.1),
    )
    state = training.TrainState(jnp.zeros((), jnp.int32), weight, {}, optimizer.init(weight))
    key = jax.random.key(settings.seed)
    _, metrics = jax.jit(step)(state, batches.fetch(arrays, indices[0]), key)
    return metrics["z"]


def test_views_are_those_of_trainings_first_step_without_normalisation(images):
    settings = make_config(**CROP_ONLY, small_count=2, small_size=8)
    ids = recipe.first_images(settings, images, 3)
    assert len(ids) == 3 and len(recipe.first_images(settings, images, 8)) == BATCH
    made = [
        recipe.first_views(settings, images, ids, count=4),
        recipe.first_views(settings, images, ids, first=2, count=2, size=8, crop_area=(0.05, 0.14)),
    ]
    for views, trained in zip(made, first_step(settings, images), strict=True):
        trained = np.asarray(trained) * settings.views.std + settings.views.mean
        trained = trained.reshape(2, BATCH, *trained.shape[1:])
        np.testing.assert_allclose(views[:2], trained[:, :3], atol=1e-5)
        assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6
    assert abs(made[0][2:] - made[0][:2]).mean() > 0.05  # further views are others


def test_a_row_is_an_image_as_it_is_and_its_views(images):
    ids = np.array([9, 2, 3], np.int32)
    views = np.random.default_rng(1).random((2, 3, 16, 16, 3), np.float32)
    rows = preview.image_rows(images, ids, views)
    assert [row.label for row in rows] == ["image 9", "disc\nimage 2", "class 7\nimage 3"]
    for position, (row, index) in enumerate(zip(rows, ids, strict=True)):
        height, width = images.extent[index]
        original, *others = row.images
        np.testing.assert_array_equal(original, images.canvas[index, :height, :width])
        np.testing.assert_array_equal(others, views[:, position])


@pytest.fixture(scope="module")
def operations(images):
    """The rows of all operations on image 1."""
    settings = make_config(brightness=1.5, contrast=0.6, hue=0.1, jitter=0.7, blur_sigma=(0.5, 2.0))
    return preview.operation_rows(settings, images.canvas[1], images.extent[1])


def test_operations_span_the_range_of_the_config(operations):
    assert [(row.label.split("\n")[0], row.captions[0], row.captions[-1]) for row in operations] == [
        ("crop", "1.00", "0.08"),
        ("flip", "off", "on"),
        ("brightness", "0.00", "2.50"),
        ("contrast", "0.40", "1.60"),
        ("saturation", "0.20", "1.80"),
        ("hue", "-0.10", "0.10"),
        ("grayscale", "off", "on"),
        ("blur", "0.50", "2.00"),
        ("solarize (off)", "1.00", "0.50"),
    ]
    assert operations[2].label == "brightness\nfactor\n70% of the views"
    assert operations[5].captions[3] == "0.00"


def test_each_operation_is_applied_alone(operations, images):
    canvas, extent = images.canvas[1], images.extent[1]
    plain = augment.center_view(canvas, extent, size=16, mean=(0, 0, 0), std=(1, 1, 1))
    whole = augment.crop_and_resize(canvas, np.array([0, 0, *extent], np.float32), 16)
    crop, flip, brightness, contrast, saturation, hue, grayscale, blur, solarize = (
        [np.asarray(image) for image in row.images] for row in operations
    )
    for unchanged in (flip[0], contrast[3], saturation[3], hue[3], grayscale[0]):
        np.testing.assert_allclose(unchanged, plain, atol=1e-5)
    np.testing.assert_allclose(crop[0], whole, atol=1e-6)
    changes = [abs(image - whole).mean() for image in crop]
    assert len(crop) == 7 and min(changes[1:]) > 0.05
    np.testing.assert_allclose(flip[1], plain[:, ::-1], atol=1e-6)
    assert not brightness[0].any()
    np.testing.assert_allclose(brightness[6], np.minimum(2.5 * plain, 1), atol=1e-5)
    np.testing.assert_allclose(saturation[0], 0.2 * plain + 0.8 * grayscale[1], atol=1e-5)
    assert np.ptp(grayscale[1], axis=-1).max() < 1e-6
    np.testing.assert_allclose(blur[6], augment.gaussian_blur(plain, 2.0, 3), atol=1e-5)
    np.testing.assert_allclose(solarize[6], np.where(plain < 0.5, plain, 1 - plain), atol=1e-6)


def test_an_operation_that_is_left_out_is_shown_at_its_usual_range(images):
    settings = make_config(crop_area=(1.0, 1.0), flip=0.0, jitter=0.0, saturation=0.0, blur=0.0)
    rows = preview.operation_rows(settings, images.canvas[1], images.extent[1])
    on = [row.label for row in rows if "(off)" not in row.label]
    assert on == ["grayscale\n20% of the views"]
    assert (rows[0].label, rows[0].captions[-1]) == ("crop (off)\nshare of the area", "0.08")
    assert (rows[4].label, rows[4].captions[-1]) == ("saturation (off)\nfactor", "1.80")


def start(tmp_path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "simclr_jax.preview", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_writes_a_picture_or_says_in_a_line_why_not(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (20, 20 + number, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    recipe_file = f"--config={ROOT / 'configs' / 'folder.py'}"
    photos = "--config.data.folder=photos"
    views = CROP_ONLY | {"size": 16, "small_count": 1, "small_size": 8}
    options = [f"--config.views.{name}={value}" for name, value in views.items()]
    good = start(tmp_path, recipe_file, photos, *options, "--out=all.webp", "--images=50", "--views=3")
    bad = {
        "name a recipe with --config, such as": start(tmp_path),
        # The data is not there either; it is looked at later.
        "--out is no/views.png; there is no folder no": start(
            tmp_path, recipe_file, "--config.data.folder=nowhere", "--out=no/views.png"
        ),
    }
    for message, process in bad.items():
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (2, "")
        assert errors.startswith(f"error: {message}") and errors.count("\n") == 1, errors
    output, errors = good.communicate(timeout=120)
    assert good.returncode == 0, errors
    with Image.open(tmp_path / "all.webp") as picture:
        assert picture.format == "WEBP"
        width, height = picture.size
    assert output == (
        "wrote all.webp: 6 images of photos, 3 views of each, each operation alone; "
        f"{width} x {height} pixels\n"
    )
    assert sorted(os.listdir(tmp_path)) == ["all.webp", "photos"]


@pytest.mark.parametrize(("name", "highest"), [("images", 64), ("views", 32)])
def test_numbers_out_of_range(name, highest):
    parse = preview._FLAGS[name].parser.parse
    assert parse("1") == 1 and parse(str(highest)) == highest
    for value in ("0", str(highest + 1), "1.5"):
        with pytest.raises(ValueError):  # of which `command.run` makes a line, as of every flag
            parse(value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("views.xyz", "Pillow does not write such a file, but views.png"),
        ("views", "Pillow does not write such a file, but views.png"),
        ("views.xbm", "Pillow does not write such a file, but views.png"),  # black and white only
        ("views.psd", "Pillow does not write such a file, but views.png"),  # read only
        ("no/views.png", "there is no folder no"),
        (".", "a folder; name a file such as views.png"),
    ],
)
def test_files_that_cannot_be_written(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        preview.file_format(pathlib.Path(name))
    assert preview.file_format(pathlib.Path("views.JPG")) == "JPEG"
    assert not list(tmp_path.iterdir())
