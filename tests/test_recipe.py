"""What a config becomes for evaluation: views, representations, accuracies, labelled images."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from simclr_jax import augment, evaluation, recipe, training
from simclr_jax.config import default_config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.simclr import SimCLR

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.5)
COLOURS = {"jitter": 1.0, "grayscale": 1.0, "blur": 1.0, "solarize": 1.0}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_config(**views):
    config = default_config()
    config.data.update(dataset="shapes", canvas_size=16)
    config.views.update({"size": 8, "mean": MEAN, "std": STD} | views)
    config.model.update(
        {"depth": 10, "width": 0.125, "stem": "cifar", "head_hidden": 16, "head_out": 6}
        | {"head_norm": "all"}
    )
    config.evaluation.update(canvas_size=16, batch_size=8)
    return config


def make_canvas(count, *, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 16, 16, 3), np.uint8), np.full((count, 2), 16, np.int32)


def make_set(*, bank=30, queries=20, classes=3):
    """Classes differ a little in their brightness."""
    packs = []
    for seed, count in enumerate((bank, queries)):
        canvas, extent = make_canvas(count, seed=seed)
        label = np.arange(count, dtype=np.int32) % classes
        canvas = (canvas * (0.7 + 0.1 * label[:, None, None, None])).astype(np.uint8)
        packs.append(Pack(canvas, extent, label, tuple("abc"[:classes]), f"set {seed}", 0))
    return EvaluationSet(*packs)


def normalized(pixels):
    """float64 of uint8 pixels, as the configs here say."""
    return (pixels / 255 - np.array(MEAN)) / np.array(STD)


def assert_close(actual, desired, atol=1e-5):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("crop, part", [(1.0, slice(0, 16)), (0.5, slice(4, 12))])
def test_clean_views_are_the_normalised_central_square(crop, part):
    config = make_config()
    config.evaluation.crop = crop
    canvas, extent = make_canvas(3)
    square = canvas[:, part, part]
    rows = np.arange(3)
    view = jax.jit(recipe.clean_views(config, square.shape[1]))(rows, canvas, extent)
    assert_close(view, normalized(square))


def crops(config, *, seed=0, number=0, size=8):
    return jax.jit(recipe.crop_and_flip_views(config, size, seed=seed, number=number))


def test_a_crop_depends_on_image_seed_and_number_and_not_on_the_batch():
    config = make_config(dtype="bfloat16")
    canvas, extent = make_canvas(6)
    rows = np.array([40, 41, 42, 43, 44, 45])
    make = crops(config)
    all_views = make(rows, canvas, extent)
    assert (all_views.shape, all_views.dtype) == ((6, 8, 8, 3), jnp.float32)
    some = np.array([4, 1])
    np.testing.assert_array_equal(make(rows[some], canvas[some], extent[some]), all_views[some])
    for other in (crops(config, seed=1), crops(config, number=1)):
        difference = np.abs(other(rows, canvas, extent) - all_views).max((1, 2, 3))
        assert (difference > 0.1).all()
    alike = np.repeat(canvas[:1], 6, axis=0)
    views = np.asarray(make(rows, alike, extent))
    assert (np.abs(views[1:] - views[:-1]).max((1, 2, 3)) > 0.1).all()


def test_crops_are_those_of_training_without_its_colours():
    canvas, extent = make_canvas(4)
    rows = np.arange(4)
    options = {"crop_area": (0.3, 0.6), "flip": 1.0}
    views = crops(make_config(**options, **COLOURS), number=2)(rows, canvas, extent)
    none = dict.fromkeys(COLOURS, 0)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(rows)
    expected = jax.jit(partial(augment.random_views, count=3, size=8, mean=MEAN, std=STD, **options, **none))(
        keys, canvas, extent
    )
    assert_close(views, expected[8:])


def test_a_colour_stays_what_it_is():
    colours = np.random.default_rng(0).integers(0, 256, (5, 1, 1, 3), np.uint8)
    canvas = np.broadcast_to(colours, (5, 16, 16, 3))
    extent = np.full((5, 2), 16, np.int32)
    views = crops(make_config(**COLOURS))(np.arange(5), canvas, extent)
    assert_close(views, np.broadcast_to(normalized(colours), views.shape))


def test_a_crop_of_everything_that_is_flipped_is_the_mirror_image():
    config = make_config(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=1.0)
    canvas, extent = make_canvas(3)
    views = crops(config, size=16)(np.arange(3), canvas, extent)
    assert_close(views, normalized(canvas)[:, :, ::-1])


def test_the_view_size_is_that_of_training_unless_set():
    config = make_config()
    assert recipe.view_size(config) == 8
    config.evaluation.view_size = 12
    assert recipe.view_size(config) == 12


# ------------------------------------------------------------------------------- accuracies


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_accuracies_during_training_are_scikit_learns(temperature):
    images = make_set()
    config = make_config()
    config.evaluation.update(view_size=16, k=5, temperature=temperature)
    found = recipe.knn_accuracies(config, evaluation.raw_pixels, images)

    bank, queries = (normalized(pack.canvas).reshape(len(pack), -1) for pack in images)
    for k in (1, 5):
        weights: Any = (lambda distance: np.exp((1 - distance) / temperature)) if temperature else "uniform"
        reference = KNeighborsClassifier(k, metric="cosine", weights=weights)
        reference.fit(bank, images.bank.label)
        expected = reference.score(queries, images.queries.label)
        assert found.pop(f"knn{k}_accuracy") == pytest.approx(expected)
    assert found == {}


def test_one_neighbour_is_asked_for_once_and_raw_pixels_at_the_size_of_the_pack():
    images = make_set()
    config = make_config()
    config.evaluation.update(view_size=16, metric="euclidean")
    found = recipe.knn_accuracies(config, evaluation.raw_pixels, images)
    assert list(found) == ["knn1_accuracy"]
    config.evaluation.update(view_size=8, k=5)
    assert recipe.raw_pixel_accuracy(config, images) == found["knn1_accuracy"]


# -------------------------------------------------------------------------- representations


def trained(model):
    """Weights of `model` as training might leave them: no scale is zero, the statistics are not the first."""
    params, batch_stats = training.weights(model)
    rng = np.random.default_rng(1)

    def move(leaf):
        return leaf + rng.uniform(0.05, 0.3, leaf.shape).astype(np.float32) if leaf.ndim == 1 else leaf

    return jax.tree.map(move, params), jax.tree.map(move, batch_stats)


def test_inference_is_the_model_with_running_statistics():
    names = ("stage 2", "z", "h")
    model = recipe.build_model(make_config())
    params, batch_stats = trained(model)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    represent = recipe.build_inference(model, SimCLR.representations)(params, batch_stats)
    found = represent(images)
    assert set(found) > set(names)

    graphdef = nnx.graphdef(nnx.view(model, use_running_average=True))
    merged = nnx.merge(graphdef, params, batch_stats)
    head = jax.jit(lambda h: merged.head(h))
    assert_close(found["z"], head(found["h"]))
    assert_close(found["h"], recipe.build_inference(model, SimCLR.h)(params, batch_stats)(images))
    stages = jax.jit(lambda images: merged.encoder.stage_means(images))(images)
    for name, stage in {"stage 2": 1, "h": 3}.items():
        assert_close(found[name], stages[stage])

    # Of the batch's statistics another image would change every embedding.
    other = represent(images.at[0].set(5.0))
    for name in names:
        assert_close(other[name][1:], found[name][1:])
        assert np.abs(other[name][0] - found[name][0]).max() > 1e-2, name
    # The weights are those given, not those of the model.
    initial = recipe.build_inference(model, SimCLR.representations)(*training.weights(model))(images)
    assert all(np.abs(initial[name] - found[name]).max() > 1e-2 for name in names)


def test_a_model_without_batch_statistics_is_represented_too():
    config = make_config()
    config.model.update(norm="group", head_norm="none")
    model = recipe.build_model(config)
    weights = training.weights(model)
    assert jax.tree.leaves(weights[1]) == []
    assert recipe.build_inference(model, SimCLR.h)(*weights)(jnp.ones((2, 8, 8, 3))).shape == (2, 64)


# -------------------------------------------------------------------------- labelled images


@pytest.fixture
def folder(tmp_path):
    """Ten images a class; those of a class have its colour."""
    for value, name in ((60, "dark"), (200, "light")):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("RGB", (16, 16), (value, index, 0)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_a_folder_is_an_evaluation_set(folder):
    config = make_config()
    config.evaluation.update(dataset="", folder=str(folder), k=16)
    images = recipe.open_evaluation_set(config)
    assert (len(images.bank), len(images.queries)) == (16, 4)
    assert images.bank.class_names == images.queries.class_names == ("dark", "light")
    for pack in images:
        np.testing.assert_array_equal(pack.canvas[:, 3, 3, 0], np.array([60, 200])[pack.label])
        assert set(pack.label) == {0, 1}
    seen = [tuple(pixel) for pack in images for pixel in pack.canvas[:, 3, 3]]
    assert len(set(seen)) == 20  # none is in both


def test_more_neighbours_than_images_are_refused(folder):
    config = make_config()
    config.evaluation.update(dataset="", folder=str(folder), k=17)
    with pytest.raises(UserError, match=r"evaluation\.k is 17.*to at most 16") as raised:
        recipe.open_evaluation_set(config)
    assert "\n" not in str(raised.value)
