"""Training on labels from end to end, in this process but for the command line, on runs of seconds."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from simclr_jax import (
    distill,
    evaluation,
    finetune,
    labels,
    probe,
    recipe,
    runs,
    supervised,
    train,
    training,
    workdirs,
)
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.config import default_config
from simclr_jax.data.batches import step_indices
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest

ROOT = pathlib.Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("kept_compilations")


def tiny(stage="finetune"):
    settings = default_config()
    settings.stage = stage
    settings.data.update(dataset="shapes", split="train[:200]", canvas_size=32)
    settings.views.update(size=16, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    settings.views.update(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))  # as in evaluation
    settings.model.update(depth=10, width=0.125, head_hidden=16, head_out=8)
    settings.labels.update(per_class=4, seed=3)
    settings.optimizer.update(learning_rate=0.05, scaling="none", final_fraction=1.0)
    settings.train.update(steps=6, batch_size=20)
    settings.evaluation.update(
        dataset="shapes", bank_split="train[:200]", query_split="test[:60]", batch_size=64
    )
    settings.run.update(log_every_steps=1, checkpoint_minutes=60.0)
    return settings


def from_run(run, *, batch_norm="batch", **classifier):
    settings = tiny()
    settings.model.batch_norm = batch_norm
    settings.views.count = 1
    settings.start.run = str(run)
    settings.classifier.update(classifier)
    return settings


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pretrained run, with statistics of BatchNorm unlike those of a new encoder."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    settings = tiny("pretrain")
    rng = np.random.default_rng(0)
    params, batch_stats = training.weights(recipe.build_model(settings))
    # Means and variances come as 0 and 1.
    moved = jax.tree.map(
        lambda leaf: leaf * np.exp(0.2 * rng.standard_normal(leaf.shape, np.float32)) + np.float32(0.01),
        batch_stats,
    )
    state = jax.device_put(training.TrainState(jnp.int32(3), params, moved, ()))
    workdirs.create(workdir, settings)
    saved = Checkpoints(workdir / "checkpoints", keep=1, best_metric="accuracy")
    saved.save(3, state, seconds=1.0, metrics={"accuracy": 0.5})
    saved.close()
    return workdir


def encoder_of(pretrained):
    """The pretrained encoder's parameters and statistics."""
    run = runs.open_run(pretrained)
    params, batch_stats = training.weights(recipe.build_model(run.settings))
    return [tree["encoder"] for tree in run.weights(3, (params, batch_stats))]


def tuned(workdir):
    """A finished run with its parameters and statistics."""
    opened = runs.open_classifier(runs.open_run(workdir))
    return opened, opened.weights(opened.run.steps[-1])


def seen(opened, weights, images):
    """Features and logits of images, as evaluation sees them."""
    infer = recipe.build_inference(opened.model, lambda model, x: (model.features(x), model(x)))
    views = recipe.clean_views(opened.run.settings, 16)
    return evaluation.embed(infer(*weights), images, views, batch_size=64)


def accuracy(logits, images):
    return np.mean(logits.argmax(axis=1) == images.label)


def assert_same_bits(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---------------------------------------------------------------- a frozen encoder


@pytest.fixture(scope="module")
def frozen(pretrained, tmp_path_factory):
    """A run that learns nothing but the classifier, by SGD with momentum."""
    settings = from_run(pretrained, encoder_rate=0.0, batch_norm="running")
    settings.optimizer.update(weight_decay=0.0, learning_rate=0.5)
    workdir = tmp_path_factory.mktemp("frozen") / "run"
    return settings, workdir, finetune.finetune(settings, workdir, StopRequest())


def test_a_linear_head_on_a_frozen_encoder_is_gradient_descent(frozen):
    settings, workdir, result = frozen
    opened, weights = tuned(workdir)
    images, _ = supervised.open_labelled(settings)
    features, _ = seen(opened, weights, images)
    features = features.astype(np.float64)
    kernel, bias = np.zeros((features.shape[1], 10)), np.zeros(10)
    kernel_velocity, bias_velocity = np.zeros_like(kernel), np.zeros_like(bias)
    for step in range(6):
        rows = step_indices(step, seed=settings.seed, images=40, batch_size=20)
        odds = np.exp(features[rows] @ kernel + bias)
        error = (odds / odds.sum(axis=1, keepdims=True) - np.eye(10)[images.label[rows]]) / 20
        kernel_velocity = 0.9 * kernel_velocity + features[rows].T @ error
        bias_velocity = 0.9 * bias_velocity + error.sum(axis=0)
        kernel -= 0.5 * kernel_velocity
        bias -= 0.5 * bias_velocity
    assert np.abs(kernel).max() > 0.02
    np.testing.assert_allclose(weights[0]["classifier"]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(weights[0]["classifier"]["bias"], bias, atol=1e-6)
    queries = recipe.open_evaluation_split(settings, "test[:60]")
    features, _ = seen(opened, weights, queries)
    assert result["top1_accuracy"] == pytest.approx(accuracy(features @ kernel + bias, queries))


def test_a_frozen_encoder_and_its_statistics_keep_their_bits(frozen, pretrained):
    _, weights = tuned(frozen[1])
    assert_same_bits([tree["encoder"] for tree in weights], encoder_of(pretrained))


def test_the_labels_that_were_used_are_listed(frozen):
    settings, workdir, result = frozen
    listed = json.loads((workdir / "labels.json").read_text())
    images = recipe.open_data(settings)
    rows = labels.draw(images.label, images.class_names, fraction=1.0, per_class=4, seed=3)
    assert listed["rows"] == rows.tolist()
    assert listed["classes"] == list(images.class_names)
    assert (listed["count"], listed["per_class"], listed["seed"]) == (40, 4, 3)
    assert result["labels"] == 40 and result["images"] == 40
    used = finetune._open(settings, False).images
    np.testing.assert_array_equal(used.canvas, images.canvas[rows])
    np.testing.assert_array_equal(used.label, images.label[rows])


def test_the_result_has_accuracies_and_a_second_call_returns_it(frozen):
    settings, workdir, result = frozen
    assert result["stage"] == "finetune" and result["steps"] == 6 and result["epochs"] == 3
    assert 0 <= result["top1_accuracy"] <= result["top5_accuracy"] <= 1
    queries = recipe.open_evaluation_split(settings, "test[:60]")
    assert result["top1_accuracy_before"] == np.mean(queries.label == 0)  # of equal logits the first class
    assert json.loads((workdir / "result.json").read_text()) == result
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert all(record["loss"] > 0 and 0 <= record["accuracy"] <= 1 for record in records[1:7])
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert finetune.finetune(settings, workdir, StopRequest()) == result
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_without_learning_the_linear_probe_stays(pretrained, tmp_path):
    settings = from_run(pretrained, start="probe", batch_norm="running")
    settings.optimizer.learning_rate = 0.0
    settings.train.steps = 2
    result = finetune.finetune(settings, tmp_path / "run", StopRequest())
    assert result is not None
    opened, weights = tuned(tmp_path / "run")
    assert_same_bits([tree["encoder"] for tree in weights], encoder_of(pretrained))
    images, _ = supervised.open_labelled(settings)
    queries = recipe.open_evaluation_split(settings, "test[:60]")
    features, _ = seen(opened, weights, images)
    query_features, logits = seen(opened, weights, queries)
    rows = features, images.label
    (found,) = probe.linear_probe(*rows, query_features, queries.label, classes=10, seeds=[3])
    expected = probe.logits(probe.fit(*rows, classes=10, l2=found.l2), query_features)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert result["top1_accuracy"] == result["top1_accuracy_before"] == found.accuracy


# ---------------------------------------------------------------- interrupted


class StopLater(StopRequest):
    """Is asked to stop once it was looked at `looks` times; the loop looks first and after each step."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def __bool__(self):
        self.looks -= 1
        if self.looks < 0:
            self.signal = signal.SIGTERM
        return super().__bool__()


def final_state(workdir):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes and devices are taken from the file here
        return ocp.load_checkpointables(workdir / "checkpoints" / "6")["state"]


def logged(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name != "images_per_second"} for record in records
    ]


def test_interrupted_it_ends_with_the_bits_of_a_run_never_stopped(frozen, pretrained, tmp_path):
    settings, whole, result = frozen
    settings = settings.copy_and_resolve_references()
    settings.start.run = str(shutil.copytree(pretrained, tmp_path / "pretrained"))
    workdir = tmp_path / "parts"
    assert finetune.finetune(settings, workdir, StopLater(3)) is None
    assert logged(workdir)[-1]["step"] == 3
    assert not (workdir / "result.json").exists()
    shutil.rmtree(settings.start.run)  # what it began with is in its checkpoint
    found = finetune.finetune(settings, workdir, StopRequest())
    assert found is not None
    assert_same_bits(final_state(workdir), final_state(whole))
    assert logged(workdir) == logged(whole)
    for name in ("top1_accuracy", "top5_accuracy", "top1_accuracy_before", "labels"):
        assert found[name] == result[name]


# ---------------------------------------------------------------- bad input


def image_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 0, 0)).save(file, "PNG")
    path.write_bytes(file.getvalue())


def refused(settings, workdir, message, entry=finetune.finetune):
    with pytest.raises(UserError, match=message) as raised:
        entry(settings, workdir, StopRequest())
    assert "\n" not in str(raised.value)
    assert not workdir.exists()


BAD_INPUT = {
    "missing run": ({"start.run": "nowhere"}, "nowhere holds no run"),
    "missing file": ({"start.run": "", "start.weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    "another encoder": ({"model.width": 0.25}, r"encoder\.conv\.kernel is \(7, 7, 3, 8\)"),
    "another head": ({"model.head_hidden": 8, "classifier.head_layer": 1}, r"head\.linears\.0\.kernel"),
    "no middle layer": ({"classifier.head_layer": 2}, "has the middle layers 1 to 1"),
    "an empty class": ({"labels.per_class": 0, "labels.fraction": 0.02}, r"is none in shapes\[train"),
    "too few images": ({"labels.per_class": 30}, r"20 labelled images, 30 are asked for in shapes"),
    "large batch": ({"train.batch_size": 44}, "at most 40"),
    "probe of one": ({"classifier.start": "probe", "labels.per_class": 1}, r"per_class=2"),
    "no such split": ({"data.split": "tset"}, "train"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_before_anything_is_written(pretrained, tmp_path, case):
    changes, message = BAD_INPUT[case]
    settings = from_run(pretrained)
    settings.update_from_flattened_dict(changes)
    refused(settings, tmp_path / "run", message)


@pytest.mark.parametrize(
    ("stage", "entry", "named"),
    [
        ("pretrain", finetune.finetune, "train"),
        ("distill", finetune.finetune, "distill"),
        ("finetune", train.train, "finetune"),
        ("finetune", distill.distill, "finetune"),
    ],
)
def test_a_recipe_of_another_stage_names_its_command(tmp_path, stage, entry, named):
    settings = tiny(stage)
    settings.distill.teacher = "somewhere"
    refused(settings, tmp_path / "run", rf"python -m simclr_jax\.{named}: .*stage is '{stage}'", entry)


def test_images_without_labels_are_refused(pretrained, tmp_path, monkeypatch):
    for name in "ab":
        image_file(tmp_path / "photos" / f"{name}.png")
    settings = from_run(pretrained)
    settings.data.update(dataset="", folder=str(tmp_path / "photos"), split="train")
    refused(settings, tmp_path / "run", "photos has no subfolders")

    settings = from_run(pretrained)
    images = recipe.open_data(settings)
    unlabelled = dataclasses.replace(images, label=np.full_like(images.label, -1))
    monkeypatch.setattr(recipe, "open_data", lambda settings: unlabelled)
    refused(settings, tmp_path / "run", r"shapes\[train\[:200\]\] has no labels to learn")


def test_an_evaluation_set_of_other_classes_is_refused(pretrained, tmp_path):
    for name in ("cat", "dog"):
        for number in range(5):
            image_file(tmp_path / "pets" / name / f"{number}.png")
    settings = from_run(pretrained)
    settings.evaluation.update(dataset="", folder=str(tmp_path / "pets"), query_split="test")
    refused(settings, tmp_path / "run", r"10 classes and .*pets\[test\] has others, such as ")


def test_the_command_line_tells_bad_input_in_one_line(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "simclr_jax.finetune"),
            *("--config", str(ROOT / "configs" / "shapes_finetune.py"), "--workdir", str(tmp_path / "run")),
            *("--config.data.split=train[:200]", "--config.labels.fraction=0.001"),
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    errors = [line for line in done.stderr.splitlines() if "packing" not in line]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert "set config.labels.fraction or config.labels.per_class" in errors[0]
    assert not (tmp_path / "run").exists()
