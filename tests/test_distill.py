"""Distillation from end to end, in this process but for the command line, on runs of seconds."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config, distill, evaluation, labels, recipe, runs, supervised, training, workdirs
from simclr_jax import mesh as meshes
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.classifier import Classifier
from simclr_jax.config import default_config
from simclr_jax.data.batches import step_indices
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest

ROOT = pathlib.Path(__file__).parent.parent
STEPS, BATCH = 30, 40


pytestmark = pytest.mark.usefixtures("kept_compilations")


def tiny(stage):
    settings = default_config()
    settings.stage = stage
    settings.data.update(dataset="shapes", split="train[:200]", canvas_size=32)
    settings.views.update(count=1, size=16, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    settings.views.update(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))  # as in evaluation
    settings.views.mean = (0.5, 0.5, 0.5)
    settings.model.update(depth=10, width=0.125, head_hidden=16, head_out=8)
    settings.optimizer.update(learning_rate=0.05, scaling="none", final_fraction=1.0)
    settings.train.update(steps=STEPS, batch_size=BATCH)
    settings.evaluation.update(dataset="shapes", query_split="test[:60]", batch_size=64)
    settings.run.update(log_every_steps=1, checkpoint_minutes=60.0)
    return settings


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A fine-tuned run with four labels of each class, whose encoder is wider than a student's."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    settings = tiny("finetune")
    settings.model.width = 0.25
    settings.labels.per_class = 4
    _, record = supervised.open_labelled(settings)
    rng = np.random.default_rng(0)
    model = recipe.build_classifier(settings, recipe.build_model(settings), 10)
    kernel = model.classifier.kernel
    kernel[...] = jnp.asarray(5 * rng.standard_normal(kernel.shape, np.float32))
    params, batch_stats = training.weights(model)
    # Means and variances come as 0 and 1.
    moved = jax.tree.map(
        lambda leaf: leaf * np.exp(0.2 * rng.standard_normal(leaf.shape, np.float32)) + np.float32(0.01),
        batch_stats,
    )
    state = jax.device_put(training.TrainState(jnp.int32(9), params, moved, ()))
    workdirs.create(workdir, settings, record)
    saved = Checkpoints(workdir / "checkpoints", keep=1, best_metric="accuracy")
    saved.save(9, state, seconds=1.0, metrics={"accuracy": 0.5})
    saved.close()
    workdirs.write_result(workdir, {"steps": 9})
    return workdir


def student_of(teacher, **changes):
    settings = tiny("distill")
    settings.distill.update(teacher=str(teacher), temperature=1.0, alpha=0.9)
    settings.update_from_flattened_dict(changes)
    return settings


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def distilled(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    before = contents(teacher)
    result = distill.distill(student_of(teacher), workdir, StopRequest())
    assert contents(teacher) == before
    return workdir, result


def test_a_smaller_student_comes_to_agree_with_its_teacher(distilled):
    steps = logged(distilled[0])[1 : STEPS + 1]
    first, last = (
        {name: np.mean([record[name] for record in records]) for name in ("loss", "divergence", "agreement")}
        for records in (steps[:5], steps[-5:])
    )
    assert last["loss"] < first["loss"] - 0.2
    assert last["divergence"] < 0.5 * first["divergence"]
    assert last["agreement"] > first["agreement"] + 0.2
    for record in steps:
        parts = 0.9 * record["distillation_loss"] + 0.1 * record["labelled_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)


def test_all_of_the_student_learns(distilled, teacher):
    begun = training.weights(distill._open(student_of(teacher), True).model)
    ended = runs.open_run(distilled[0]).weights(STEPS, begun)
    for before, after in zip(jax.tree.leaves(begun), jax.tree.leaves(ended), strict=True):
        assert (before != after).any()


@pytest.fixture(scope="module")
def ask_teacher(teacher):
    """Of images to the logits that the teacher's run gives them in evaluation."""
    opened = runs.open_classifier(runs.open_run(teacher))
    infer = recipe.build_inference(opened.model, Classifier.__call__)(*opened.weights(9))
    views = recipe.clean_views(opened.run.settings, 16)
    return lambda images: evaluation.embed(infer, images, views, batch_size=64)


def test_the_teacher_sees_the_students_views_with_its_running_statistics(distilled, teacher, ask_teacher):
    images = recipe.open_data(student_of(teacher))
    rows = step_indices(0, seed=0, images=200, batch_size=BATCH)
    logits = np.float64(ask_teacher(images)[rows])
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    first = logged(distilled[0])[1]  # of a student whose classifier is zero
    assert first["distillation_loss"] == pytest.approx(np.log(10), rel=1e-5)
    assert first["divergence"] == pytest.approx((odds * np.log(10 * odds)).sum(axis=1).mean(), rel=1e-4)
    assert first["agreement"] == pytest.approx(np.mean(logits.argmax(axis=1) == 0))


def test_the_result_names_labels_and_the_teachers_accuracy(distilled, teacher, ask_teacher):
    workdir, result = distilled
    queries = recipe.open_evaluation_split(tiny("finetune"), "test[:60]")
    hits = ask_teacher(queries).argmax(axis=1) == queries.label
    assert result["top1_accuracy_teacher"] == pytest.approx(hits.mean())
    assert result["stage"] == "distill" and result["steps"] == STEPS
    assert (result["labels"], result["images"]) == (40, 200)
    assert workdirs.read_labels(workdir) == workdirs.read_labels(teacher)
    params, _ = runs.open_classifier(runs.open_run(teacher)).weights(9)
    assert result["parameters"] < sum(leaf.size for leaf in jax.tree.leaves(params)) / 3


def run_of(settings, mesh):
    """What `session.run` makes of a stage: state, batches, steps, key and the teacher's weights."""
    opened = distill._open(settings, True)
    plan = config.derive(settings, len(opened.images))
    begun = recipe.build_start(settings, plan, opened.model, mesh)
    batches = recipe.build_batches(settings, opened.images, plan, mesh, first_step=0)
    step = recipe.build_step(settings, begun, mesh, teacher=opened.teacher[0])
    run_steps = training.make_run_steps(step, batches.fetch, meshes.replicated(mesh))
    key = jax.random.key(settings.seed), jax.device_put(opened.teacher[1], meshes.replicated(mesh))
    return begun.state, batches, functools.partial(run_steps, key), key[1]


def test_four_devices_equal_one_and_leave_the_teacher_as_it_is(teacher, distilled):
    settings = student_of(teacher)
    loaded = runs.open_classifier(runs.open_run(teacher)).weights(9)
    found = []
    for mesh in (meshes.mesh_of(jax.devices()[:1]), meshes.data_mesh(BATCH)):
        state, batches, run_steps, weights = run_of(settings, mesh)
        history = []
        for step in range(2):
            arrays, indices = batches.call(step, 1)
            state, metrics = run_steps(state, arrays, indices, 1)
            history.append({name: float(value[0]) for name, value in metrics.items()})
        jax.tree.map(np.testing.assert_array_equal, weights, loaded)
        found.append((history, jax.device_get(state)))
    (one, one_state), (four, four_state) = found
    assert one[0]["gradient_norm"] > 0.01
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, four, one)
    jax.tree.map(close, four_state, one_state)
    # The run itself had the same first steps.
    assert [record["loss"] for record in logged(distilled[0])[1:3]] == [record["loss"] for record in four]


def test_below_all_weight_the_student_has_the_labels_of_its_teacher_and_no_others(teacher):
    settings = student_of(teacher, **{"distill.alpha": 0.5})
    images = recipe.open_data(settings)
    rows = labels.draw(images.label, images.class_names, fraction=1.0, per_class=4, seed=0)
    expected = np.full(200, -1)
    expected[rows] = images.label[rows]
    np.testing.assert_array_equal(distill._open(settings, False).images.label, expected)


def test_with_all_weight_on_the_teacher_no_image_has_a_label_and_any_will_do(teacher):
    settings = student_of(teacher, **{"distill.alpha": 1.0, "data.split": "train[200:300]"})
    images = distill._open(settings, False).images
    assert len(images) == 100
    np.testing.assert_array_equal(images.label, -1)


def test_a_distilled_teacher_has_the_labels_of_its_own(teacher, tmp_path):
    """The rows of labels.json are of the images that the first teacher learned from, not the second."""
    second = shutil.copytree(teacher, tmp_path / "second")
    settings = workdirs.read_config(teacher)
    settings.stage = "distill"
    settings.distill.teacher = str(teacher)
    settings.data.split = "train[100:300]"
    workdirs.create(second, settings)
    settings = student_of(second, **{"distill.alpha": 0.5})
    opened = distill._open(settings, False)
    rows = json.loads((teacher / "labels.json").read_text())["rows"]
    assert np.flatnonzero(opened.images.label >= 0).tolist() == rows
    settings.data.split = "train[100:300]"
    with pytest.raises(UserError, match="alpha is below 1"):
        distill._open(settings, False)


# ---------------------------------------------------------------- bad input


def refused(settings, workdir, message):
    with pytest.raises(UserError, match=message) as raised:
        distill.distill(settings, workdir, StopRequest())
    assert "\n" not in str(raised.value)
    assert not workdir.exists()


BAD_INPUT = {
    "missing teacher": ({"distill.teacher": "nowhere"}, "nowhere holds no run"),
    "other images": (
        {"data.split": "train[:100]"},
        r"of shapes\[train\[:200\]\]: .* or alpha to 1",
    ),
    "other mean": ({"views.mean": (0.0, 0.0, 0.0)}, r"learned with config\.views\.mean=\(0\.5, 0\.5, 0\.5\)"),
    "other deviation": (
        {"views.std": (0.5, 0.5, 0.5)},
        r"learned with config\.views\.std=\(1\.0, 1\.0, 1\.0\)",
    ),
    "large batch": ({"train.batch_size": 240}, "at most 200"),
    "missing start": ({"start.run": "nowhere"}, "nowhere holds no run"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_before_anything_is_written(teacher, tmp_path, case):
    changes, message = BAD_INPUT[case]
    refused(student_of(teacher, **changes), tmp_path / "run", message)


def test_a_teacher_that_is_none_is_refused(teacher, tmp_path):
    changed = shutil.copytree(teacher, tmp_path / "changed")
    record = workdirs.read_labels(teacher)
    assert record is not None
    names = record["classes"]
    for classes, told in (
        ([f"pet {number}" for number in range(10)], r"knows 10 classes and .*, such as "),
        (names[::-1], "in another order"),
    ):
        (changed / "labels.json").write_text(json.dumps(record | {"classes": classes}))
        refused(student_of(changed), tmp_path / "run", told)

    (changed / "result.json").unlink()
    refused(student_of(changed), tmp_path / "run", "changed is not finished")

    (changed / "labels.json").unlink()
    settings = tiny("pretrain")
    settings.views.count = 2
    workdirs.create(changed, settings)
    refused(student_of(changed), tmp_path / "run", "is a pretrained run, without a classifier")


def test_the_command_line_tells_bad_input_in_one_line(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "simclr_jax.distill"),
            *("--config", str(ROOT / "configs" / "shapes_distill.py"), "--workdir", str(tmp_path / "run")),
            "--config.distill.teacher=/nowhere",
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: /nowhere holds no run")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()
