"""`python -m simclr_jax.evaluate` from end to end, on runs of seconds."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from simclr_jax import comparison, evaluate, finetune, measure, recipe, report, runs, train, workdirs
from simclr_jax.config import default_config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.interrupt import StopRequest

pytestmark = pytest.mark.usefixtures("kept_compilations")

FLAGS = ("--ks=1,5", "--labels=2,4", "--draws=2", "--seeds=2", "--points=40", "--temperatures=0.1")
FEW = measure.Questions(ks=(1,), temperatures=(), seeds=(0,), per_class=(), draws=1)


def tiny(seed):
    settings = default_config()
    settings.seed = seed
    settings.data.update(dataset="shapes", split="train[:200]", canvas_size=32)
    settings.views.update(size=16, blur=0.0)
    settings.model.update(depth=10, width=0.125, head_out=16)
    settings.train.update(steps=8, batch_size=32)
    settings.evaluation.update(
        dataset="shapes", bank_split="train[:200]", query_split="test[:60]", batch_size=64, k=5
    )
    settings.run.update(log_every_steps=1, checkpoint_minutes=0.0, keep_checkpoints=2)
    return settings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two finished runs: one, and the same as if it had begun with another seed."""
    base = tmp_path_factory.mktemp("runs")
    assert train.train(tiny(0), base / "0", StopRequest())
    shutil.copytree(base / "0", base / "1")
    workdirs.create(base / "1", tiny(1))
    return [base / "0", base / "1"]


@pytest.fixture(scope="module")
def classifier(folders, tmp_path_factory):
    """A fine-tuned run."""
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    settings = tiny(0)
    settings.stage = "finetune"
    settings.start.run = str(folders[0])
    settings.labels.per_class = 4
    settings.views.count = 1
    assert finetune.finetune(settings, workdir, StopRequest())
    return workdir


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "simclr_jax.evaluate", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # t-SNE's threads would fight those of other tests
        capture_output=True,
        text=True,
        timeout=300,
    )


def opened(*workdirs):
    found = [runs.open_run(pathlib.Path(workdir)) for workdir in workdirs]
    runs.set_evaluation(found)
    return found, recipe.open_evaluation_set(found[0].settings)


def test_one_command_leaves_table_json_page_and_pictures(folders, tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first", tmp_path / "second"
    done = command("--workdir", folders[0], "--every", *FLAGS, "--out", first)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((first / "evaluation.json").read_text())
    saved = sorted(int(path.name) for path in (folders[0] / "checkpoints").iterdir())
    assert len(saved) == 2 and saved[-1] == 8
    assert [(row["name"], row["step"]) for row in results["rows"]] == [
        *(("trained h", step) for step in saved),
        ("trained z", 8),
        ("untrained h", None),
        ("raw pixels", None),
    ]
    rows = {(row["name"], row["step"]): row for row in results["rows"]}
    logged = workdirs.read_result(folders[0])
    assert logged is not None

    def accuracy(name, step, k):
        return next(
            entry["accuracy"]
            for entry in rows[name, step]["knn"]
            if (entry["k"], entry["metric"], entry["temperature"]) == (k, "cosine", None)
        )

    # What training logged of the same weights and images.
    assert accuracy("trained h", 8, 1) == logged["knn1_accuracy"]
    assert accuracy("trained h", 8, 5) == logged["knn5_accuracy"]
    assert accuracy("untrained h", None, 1) == logged["knn1_accuracy_untrained"]
    assert accuracy("raw pixels", None, 1) == logged["knn1_accuracy_raw_pixels"]
    assert rows["raw pixels", None]["width"] == 32 * 32 * 3
    assert [e["labels_per_class"] for e in rows["trained z", 8]["few_labels"]] == [2, 4]
    assert len(rows["trained h", 8]["linear"]["accuracies"]) == 2
    assert rows["trained h", saved[0]]["few_labels"] == []
    for name in ("few_labels", "epochs", "loss", "tsne_0", "pca_0", "tsne_1", "pca_1", "neighbors_0"):
        with Image.open(first / f"{name}.png") as picture:
            assert min(picture.size) > 100, name
    page = (first / "page.html").read_text()
    for text in ("untrained h", "k-NN accuracy (%) of trained h", "labels a class", "data:image/png"):
        assert text in page
    assert "Accuracy (%) on shapes[test[:60]], 60 images" in done.stdout
    assert (first / "projector" / "projector_config.pbtxt").exists()

    # The same again, from the run's folder moved elsewhere.
    moved = tmp_path / "runs" / folders[0].name
    shutil.copytree(folders[0], moved)
    done = command("--workdir", moved, "--every", *FLAGS, "--nopictures", "--out", second)
    assert done.returncode == 0
    again = (second / "evaluation.json").read_text().replace(str(moved), str(folders[0]))
    assert again == (first / "evaluation.json").read_text()
    assert not (second / "loss.png").exists()


def test_several_runs_share_a_table(folders):
    both, images = opened(*folders)
    rows, kept = evaluate.evaluate(both, images, FEW)
    names = [row["name"] for row in rows]
    assert names == [
        *(f"{folder}: {kind}" for folder in folders for kind in ("trained h", "trained z", "untrained h")),
        "raw pixels",
    ]
    assert list(kept) == [f"{folders[0]}: trained h", f"{folders[1]}: trained h", "raw pixels"]
    rows, _ = evaluate.evaluate([both[0], both[0]], images, FEW)
    assert sum("untrained" in row["name"] for row in rows) == 1


def test_runs_of_two_kinds_stand_in_one_table(folders, classifier):
    (pretrained, tuned), images = opened(folders[0], classifier)
    rows, _ = evaluate.evaluate([pretrained], images, FEW)
    found = comparison.classify([tuned], images) + comparison.probed([pretrained], images, rows)
    assert [(row["kind"], row["labels"]) for row in found] == [("finetune", 40), ("pretrain", 200)]
    logged = workdirs.read_result(classifier)
    assert logged is not None
    assert (found[0]["top1"], found[0]["top5"]) == (logged["top1_accuracy"], logged["top5_accuracy"])
    assert found[0]["parameters"] == found[1]["parameters"] == logged["parameters"]
    assert found[0]["images_per_second"] == logged["images_per_second"]
    assert found[1]["top1"] == rows[0]["linear"]["accuracy"]
    for row in found:
        assert row["confusion"] is not None
        counts = np.array(row["confusion"])
        np.testing.assert_array_equal(counts.sum(axis=1), np.bincount(images.queries.label, minlength=10))
        assert np.trace(counts) / len(images.queries) == pytest.approx(row["top1"])
    results = {"classifiers": found, "queries": {"name": "shapes", "count": 60}}
    table = report.tables(results)[0]
    assert [row[1] for row in table.rows] == ["fine-tuned", "linear probe"]


def test_a_classifier_alone_is_evaluated_without_probes(classifier, tmp_path):
    done = command("--workdir", classifier, "--nopictures", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fine-tuned" in done.stdout and "k-NN" not in done.stdout
    assert json.loads((tmp_path / "evaluation.json").read_text())["rows"] == []


def test_a_classifier_of_other_classes_is_refused(classifier):
    (tuned,), images = opened(classifier)
    names = tuple(reversed(images.queries.class_names))
    queries = dataclasses.replace(images.queries, class_names=names)
    with pytest.raises(UserError, match=r"knows 10 classes .* another order; they have to be the same"):
        comparison.classify([tuned], EvaluationSet(images.bank, queries))


def test_crops_and_flips_for_the_probe(folders):
    (found,), images = opened(folders[0])
    encoder = runs.Encoder(found, images, ["h"])
    rows = encoder.augmented(8, "h", 2, seed=0)
    plain = encoder.embed(8)[0]["h"]
    assert rows.shape == (400, plain.shape[1])
    assert np.abs(rows[:200] - rows[200:]).max() > 1e-3 < np.abs(rows[:200] - plain).max()
    np.testing.assert_array_equal(encoder.augmented(8, "h", 1, seed=0), rows[:200])
    assert np.abs(encoder.augmented(8, "h", 1, seed=1) - rows[:200]).max() > 1e-3


def test_a_folder_with_one_subfolder_a_class(folders, tmp_path):
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(15):
            pixels = level + generator.integers(-20, 20, (20, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    found = [runs.open_run(folders[0])]
    runs.set_evaluation(found, folder=str(tmp_path), crop=0.8)
    images = recipe.open_evaluation_set(found[0].settings)
    assert (len(images.bank), len(images.queries)) == (24, 6)
    assert images.bank.class_names == ("dark", "light")
    names = np.array(images.queries.class_names)[images.queries.label]
    levels = np.array(
        [
            image[:h, :w].mean()
            for image, (h, w) in zip(images.queries.canvas, images.queries.extent, strict=True)
        ]
    )
    np.testing.assert_array_equal(names, np.where(levels > 120, "light", "dark"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a run with --workdir"),
        (("--workdir", "nowhere"), "nowhere holds no run"),
        (("--workdir", "unsaved"), "unsaved has no finished checkpoint"),
        (("--workdir", "{run}", "--dataset", "nothing"), "there is no data set nothing"),
        (("--workdir", "{run}", "--ks", "0"), "--ks is 0; write numbers above 0"),
        (("--workdir", "{run}", "--ks", "5000"), "--ks asks for 5000 neighbours"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, arguments, message):
    (tmp_path / "unsaved").mkdir()
    shutil.copy(folders[0] / "config.json", tmp_path / "unsaved")
    done = command(*(text.format(run=folders[0]) for text in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_settings_that_do_not_fit_are_refused(folders, tmp_path):
    found = [runs.open_run(folders[0])]
    with pytest.raises(UserError, match="either --dataset or --folder"):
        runs.set_evaluation(found, dataset="shapes", folder=str(tmp_path))
    with pytest.raises(UserError, match=r"evaluation.crop is 2.0; it must be above 0"):
        runs.set_evaluation([runs.open_run(folders[0])], crop=2.0)
    runs.set_evaluation(found, query_split="test[:10]")
    assert found[0].settings.evaluation.bank_split == "train[:200]"
    # Of another data set the usual splits, at the size its images have.
    other = [runs.open_run(folders[0])]
    other[0].settings.evaluation.update(dataset="cifar10", canvas_size=64)
    runs.set_evaluation(other, dataset="shapes")
    chosen = other[0].settings.evaluation
    assert (chosen.bank_split, chosen.query_split, chosen.canvas_size) == ("train", "test", 32)


def labelled(labels, class_names=("a", "b")):
    count = len(labels)
    canvas, extent = np.zeros((count, 8, 8, 3), np.uint8), np.full((count, 2), 8, np.int32)
    return Pack(canvas, extent, np.array(labels, np.int32), class_names, "images", 0)


def ask(images, **changes):
    usual = {"ks": None, "temperatures": (0.1,), "seeds": 2, "labels": None, "draws": 3}
    return evaluate.questions(images, **usual | changes)


def test_by_default_no_more_is_asked_than_the_images_can_answer():
    images = EvaluationSet(labelled([0, 1] * 30), labelled([0, 1]))
    asked = ask(images)
    assert (asked.ks, asked.per_class, list(asked.seeds)) == ([1, 10, 20], [10, 20], [0, 1])
    assert ask(images, ks=[3], labels=[30]).ks == [1, 3]
    assert ask(images, labels=[]).per_class == []


def test_questions_without_an_answer_are_refused():
    images = EvaluationSet(labelled([0, 1] * 30), labelled([0, 1]))
    with pytest.raises(UserError, match="--ks asks for 61 neighbours, images has 60 images"):
        ask(images, ks=[61])
    with pytest.raises(UserError, match="--labels asks for 31 a class, images has 30 of class a"):
        ask(images, labels=[2, 31])
    with pytest.raises(UserError, match="--labels needs 2 a class"):
        ask(images, labels=[1, 2])
    with pytest.raises(UserError, match="class b has no example in images"):
        ask(EvaluationSet(labelled([0, 0]), labelled([0])))
    with pytest.raises(UserError, match="class b has one example in images"):
        ask(EvaluationSet(labelled([0, 0, 1]), labelled([0])))
