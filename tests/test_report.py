"""Tables, pictures and the page of results made by hand."""

import html
import re

import numpy as np
import pytest
from PIL import Image

from simclr_jax import report
from simclr_jax.page import Picture
from simclr_jax.report import Images, Shown, tables, write_page, write_pictures
from simclr_jax.table import number_columns

SIZES = [10, 20, 50, 100, 200, 500]
ONE, WEIGHTED = "1-NN, cosine", "20-NN, cosine, t=0.1"


def knn_entries(ks, temperatures, base):
    """Entries as `measure` gives them, of accuracies that are all different."""
    kinds = [(k, "cosine", t) for k in ks for t in [*temperatures, None] if k > 1 or t is None]
    kinds += [(k, "euclidean", None) for k in ks]
    return [
        {"k": k, "metric": m, "temperature": t, "accuracy": base + 0.01 * i, "standard_error": 0.004}
        for i, (k, m, t) in enumerate(kinds)
    ]


def summary(accuracy, std):
    return {"accuracy": accuracy, "std": std, "standard_error": 0.004, "accuracies": [accuracy], "l2": [0.1]}


def make_row(name, representation, base, settings, *, epoch=None, last=True, few=True):
    return {
        "name": name,
        "run": None if representation == "raw pixels" else "runs/a",
        "step": None if epoch is None else int(100 * epoch),
        "epoch": epoch,
        "last": last,
        "representation": representation,
        "width": 2048,
        "knn": knn_entries(settings["ks"], settings["temperatures"], base),
        "linear": summary(base + 0.2, 0.0123 if last else None),
        "few_labels": [
            {"labels_per_class": size, **summary(base + 0.001 * size / 10, 0.02)}
            for size in settings["labels_per_class"]
            if few
        ],
    }


def make_results(dataset="stl10", **changes):
    """A run with an earlier checkpoint, its untrained encoder, and raw pixels."""
    settings = {
        "ks": [1, 5, 20],
        "temperatures": [0.07, 0.1],
        "seeds": [0, 1, 2],
        "labels_per_class": SIZES,
        "draws": 4,
        "augmented": 0,
        "crop": 0.875,
        "raw_size": 24,
        "view_size": {"runs/a": 64},
    } | changes
    rows = [
        make_row("trained h", "h", 0.40, settings, epoch=12.5, last=False, few=False),
        make_row("trained h", "h", 0.60, settings, epoch=100.0),
        make_row("trained z", "z", 0.50, settings, epoch=100.0),
        make_row("untrained h", "untrained h", 0.20, settings),
        make_row("raw pixels", "raw pixels", 0.10, settings),
    ]
    return {
        "bank": {"name": "stl10[train]", "count": 5000},
        "queries": {"name": "stl10[test]", "count": 8000, "dataset": dataset},
        "settings": settings,
        "rows": rows,
        "device": "1 CPU",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    }


def make_classifier(kind, start="", **changes):
    """An entry of the list of classifiers."""
    return {
        "name": f"runs/{kind}",
        "run": f"runs/{kind}",
        "kind": kind,
        "start": start,
        "labels": 5000,
        "parameters": 11_173_962,
        "images_per_second": 1234.5,
        "top1": 0.9123,
        "top5": 0.99,
        "standard_error": 0.0032,
        "confusion": [[3, 1, 0], [0, 4, 0], [0, 0, 4]],
    } | changes


def only_classifiers(*classifiers):
    results = make_results() | {"classifiers": list(classifiers)}
    return results | {"rows": []}


def without_few_labels(results):
    for row in results["rows"]:
        row["few_labels"] = []
    return results


# ------------------------------------------------------------------------------------ tables


def test_classifiers_have_a_table_of_their_own():
    results = only_classifiers(
        make_classifier("pretrain"),
        make_classifier("finetune", name="runs/scratch", images_per_second=None),
        make_classifier("finetune", "runs/pretrain", labels=500, top5=None),
        make_classifier("finetune", "runs/pretrain", name="again", standard_error=0.01),
        make_classifier("distill", "resnet18.safetensors", parameters=272_474, images_per_second=41_000.0),
    )
    (table,) = tables(results)
    assert table.caption == "Accuracy (%) of classifiers on stl10[test], 8,000 images"
    assert table.columns == ["", "how", "labels", "top-1", "top-5", "parameters", "images/s"]
    size = "11,173,962"
    assert table.rows == [
        ["runs/pretrain", "linear probe", "5,000", "91.2 ± 0.3", "99.0", size, "1,234"],
        ["runs/scratch", "from scratch", "5,000", "91.2 ± 0.3", "99.0", size, "–"],
        ["runs/finetune", "fine-tuned", "500", "91.2 ± 0.3", "–", size, "1,234"],
        ["again", "fine-tuned", "5,000", "91.2 ± 1.0", "99.0", size, "1,234"],
        ["runs/distill", "distilled", "5,000", "91.2 ± 0.3", "99.0", "272,474", "41,000"],
    ]
    assert "standard error of an accuracy on 8,000 images" in table.note
    assert "Images/s: of training." in table.note
    assert "weights of runs/pretrain: runs/finetune, again." in table.note
    assert "weights of resnet18.safetensors: runs/distill." in table.note
    assert number_columns(table) == [False, False, True, True, True, True, True]


def test_the_table_of_classifiers_comes_first_and_only_if_there_are_any():
    alone = tables(make_results())
    assert tables(make_results() | {"classifiers": []}) == alone
    first, *others = tables(make_results() | {"classifiers": [make_classifier("finetune")]})
    assert "of classifiers" in first.caption and others == alone
    assert "Began" not in first.note


def test_without_rows_there_are_no_tables_of_them():
    results = only_classifiers(make_classifier("finetune"))
    (table,) = tables(results)
    del results["rows"]
    assert tables(results) == [table]
    assert tables(only_classifiers()) == []


def test_the_main_table_has_a_row_for_each_representation():
    main = tables(make_results())[0]
    assert main.caption == "Accuracy (%) on stl10[test], 8,000 images, from 5,000 of stl10[train]"
    assert main.columns == ["", "epoch", "width", ONE, "1-NN, Euclidean", WEIGHTED, "linear"]
    # Of the nine entries the first is 1-NN, the sixth 20-NN with t=0.1, the eighth Euclidean 1-NN.
    assert main.rows == [
        ["trained h", "12.5", "2,048", "40.0 ± 0.4", "47.0 ± 0.4", "45.0 ± 0.4", "60.0"],
        ["trained h", "100", "2,048", "60.0 ± 0.4", "67.0 ± 0.4", "65.0 ± 0.4", "80.0 ± 1.2"],
        ["trained z", "100", "2,048", "50.0 ± 0.4", "57.0 ± 0.4", "55.0 ± 0.4", "70.0 ± 1.2"],
        ["untrained h", "–", "2,048", "20.0 ± 0.4", "27.0 ± 0.4", "25.0 ± 0.4", "40.0 ± 1.2"],
        ["raw pixels", "–", "2,048", "10.0 ± 0.4", "17.0 ± 0.4", "15.0 ± 0.4", "30.0 ± 1.2"],
    ]
    assert "8,000 images" in main.note and "3 of them" in main.note


def test_the_main_table_tells_what_the_probe_was_fitted_on():
    assert "crops and flips" not in tables(make_results())[0].note
    assert "fitted on 3 crops and flips of each image" in tables(make_results(augmented=3))[0].note


def test_the_grid_is_that_of_the_last_h_alone():
    found = tables(make_results())
    grids = [table for table in found if table.caption.startswith("k-NN")]
    assert [grid.caption for grid in grids] == ["k-NN accuracy (%) of trained h"]
    columns = ["k", "cosine, t=0.07", "cosine, t=0.1", "cosine, majority", "Euclidean, majority"]
    assert grids[0].columns == columns
    # A single vote has no weight, so that its row says the same for each temperature.
    values = [
        ["1", 60.0, 60.0, 60.0, 67.0],
        ["5", 61.0, 62.0, 63.0, 68.0],
        ["20", 64.0, 65.0, 66.0, 69.0],
    ]
    assert grids[0].rows == [[k, *(f"{value:.1f} ± 0.4" for value in row)] for k, *row in values]


@pytest.mark.parametrize(
    ("ks", "temperatures", "heading", "cells"),
    [
        ([1], [0.1], None, None),
        ([1, 5], [0.07, 0.5], "5-NN, cosine, t=0.07", ["41.0 ± 0.4", "61.0 ± 0.4"]),
        ([1, 5, 200], [], "5-NN, cosine", ["41.0 ± 0.4", "61.0 ± 0.4"]),
    ],
)
def test_the_main_table_shows_one_k_above_one_if_there_is_one(ks, temperatures, heading, cells):
    main, grid, _ = tables(make_results(ks=ks, temperatures=temperatures))
    shown = [column for column in main.columns if "-NN" in column]
    assert shown == [ONE, "1-NN, Euclidean"] + ([] if heading is None else [heading])
    assert {len(row) for row in main.rows} == {len(main.columns)}
    if heading is not None:
        column = main.columns.index(heading)
        assert [row[column] for row in main.rows[:2]] == cells
    assert len(grid.columns) == 1 + len(temperatures) + 2
    assert [row[0] for row in grid.rows] == list(map(str, ks))


@pytest.mark.parametrize("dataset", ["stl10", "stl10:1.0.0"])
def test_few_labels_stand_beside_what_was_published_for_the_data_set(dataset):
    few = tables(make_results(dataset))[-1]
    assert few.columns == ["", *map(str, SIZES), "all"]
    *rows, published = few.rows
    assert [row[0] for row in rows] == ["trained h", "trained z", "untrained h", "raw pixels"]
    expected = [60.1, 60.2, 60.5, 61.0, 62.0, 65.0]
    assert rows[0] == ["trained h", *(f"{value:.1f} ± 2.0" for value in expected), "80.0 ± 1.2"]
    assert published[0].startswith("published")
    # The accuracies that the UvA tutorial 17 prints: 62.21, 68.54, 73.65, 76.84, 78.97, 81.05.
    for cell, percent in zip(published[1:-1], [62.21, 68.54, 73.65, 76.84, 78.97, 81.05], strict=True):
        assert float(cell) == pytest.approx(percent, abs=0.0501)
    assert published[-1] == "–"
    assert "4 draws" in few.note and "3 seeds" in few.note


def test_sizes_that_were_not_published_have_a_dash():
    few = tables(make_results(labels_per_class=[4, 50]))[-1]
    assert few.columns == ["", "4", "50", "all"]
    assert few.rows[-1][1] == "–" and float(few.rows[-1][2]) == pytest.approx(73.65, abs=0.0501)


@pytest.mark.parametrize("dataset", ["cifar10", "stl10_mine", "imagenette/320px-v2"])
def test_of_another_data_set_nothing_was_published(dataset):
    few = tables(make_results(dataset))[-1]
    assert [row[0] for row in few.rows] == ["trained h", "trained z", "untrained h", "raw pixels"]


def test_without_few_labels_there_is_no_such_table():
    captions = [table.caption for table in tables(without_few_labels(make_results()))]
    assert len(captions) == 2 and not any("labels a class" in caption for caption in captions)


# ---------------------------------------------------------------------------------- pictures


def make_shown(classes):
    """Images of which each has a colour of its own, and embeddings whose neighbours are known."""
    rng = np.random.default_rng(0)
    bank = rng.integers(0, 256, (9, 6, 10, 3), np.uint8)
    queries = [rng.integers(0, 256, (8, side, 3), np.uint8) for side in range(8, 14)]
    images = Images(
        queries,
        np.arange(6) % 3,
        lambda index: bank[index],
        np.arange(9) % 3,
        tuple(f"class {number}" for number in range(classes)),
    )
    parts = [
        Shown("trained h", *(rng.normal(size=(rows, 5)).astype(np.float32) for rows in (9, 6))),
        Shown("raw pixels", np.empty((0, 7), np.float32), rng.normal(size=(6, 7)).astype(np.float32)),
    ]
    return parts, images


HISTORY = [{"step": 1, "epoch": 0.5, "loss": 3.0}, {"step": 2, "epoch": 1.0, "loss": 2.5}]


@pytest.fixture
def drawing():
    """matplotlib and scikit-learn, with one thread: those of t-SNE wait for each other on a busy machine."""
    pytest.importorskip("matplotlib")
    limits = pytest.importorskip("threadpoolctl")
    pytest.importorskip("sklearn")
    with limits.threadpool_limits(1, user_api="openmp"):
        yield


def outline(sections):
    return {section.heading: [part.png.stem for part in section.parts] for section in sections}


def test_pictures_and_page(tmp_path, drawing):
    parts, images = make_shown(classes=3)
    results = make_results()
    results["device"] = "<1 CPU & 2>"
    sections = write_pictures(tmp_path, results, parts, images, {"runs/a": HISTORY}, seed=0)
    assert outline(sections) == {
        "Curves": ["few_labels", "epochs", "loss"],
        "Embeddings in the plane": ["tsne_0", "pca_0", "tsne_1", "pca_1"],
        "Nearest neighbours": ["neighbors_0"],  # raw pixels came without a bank
    }
    pictures = [part for section in sections for part in section.parts]
    for part in pictures:
        assert isinstance(part, Picture)
        with Image.open(part.png) as picture:
            assert min(picture.size) > 50
    config = (tmp_path / "projector" / "projector_config.pbtxt").read_text()
    assert config.count("tensor_path") == 2
    for file in tmp_path.glob("projector/**/metadata.tsv"):
        assert file.read_text().splitlines() == [f"class {label}" for label in images.query_labels]

    page = tmp_path / "index.html"
    write_page(page, results, sections)
    text = page.read_text(encoding="utf-8")
    for table in tables(results):
        assert f"<caption>{html.escape(table.caption)}</caption>" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == len(pictures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for said in (
        "0.875",
        "64 pixels (runs/a)",
        "compared at 24",
        "jax 0.10.2, flax 0.12.8",
        "&lt;1 CPU &amp; 2&gt;",
    ):
        assert said in text


def test_runs_with_classifiers_only_have_pictures_and_a_page(tmp_path, drawing):
    _, images = make_shown(classes=3)
    results = only_classifiers(
        make_classifier("finetune", name="a <b>"),
        make_classifier("pretrain", confusion=None),
        make_classifier("distill"),
    )
    sections = write_pictures(tmp_path, results, [], images, {"runs/finetune": HISTORY}, seed=0)
    assert outline(sections) == {"Curves": ["loss"], "Confusion": ["confusion_0", "confusion_2"]}
    captions = [part.caption for part in sections[1].parts if isinstance(part, Picture)]
    assert captions == ["Confusion of a <b>, from scratch", "Confusion of runs/distill, distilled"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion_0.png",
        "confusion_2.png",
        "loss.png",
    ]
    del results["rows"]
    assert write_pictures(tmp_path, results, [], images, {}, seed=0)[0].heading == "Confusion"

    write_page(tmp_path / "page.html", results, sections)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<caption>Accuracy (%) of classifiers" in text and "a &lt;b&gt;" in text
    assert "64 pixels (runs/a)." in text and "raw pixels" not in text
    assert text.count("data:image/png") == 3


def test_a_confusion_matrix_has_the_counts_and_names_of_its_classifier(tmp_path, drawing, monkeypatch):
    from simclr_jax import figures

    drawn = []
    monkeypatch.setattr(figures, "confusion_matrix", lambda *args, **options: drawn.append((args, options)))
    _, images = make_shown(classes=3)
    results = only_classifiers(make_classifier("pretrain"))
    write_pictures(tmp_path, results, [], images, {}, seed=0)
    counts = results["classifiers"][0]["confusion"]
    title = "Confusion of runs/pretrain, linear probe"
    assert drawn == [((tmp_path / "confusion_0.png", counts, images.class_names), {"title": title})]
    _, images = make_shown(classes=101)
    write_pictures(tmp_path, results, [], images, {}, seed=0)
    assert len(drawn) == 1


def test_what_there_is_nothing_to_draw_of_is_left_out(tmp_path, drawing):
    parts, images = make_shown(classes=101)  # more than have a look of their own
    results = without_few_labels(make_results("cifar10"))
    del results["rows"][0]  # the earlier checkpoint
    sections = write_pictures(tmp_path, results, parts, images, {"runs/a": [{"step": 0, "epoch": 0}]}, seed=0)
    assert outline(sections) == {"Nearest neighbours": ["neighbors_0"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neighbors_0.png", "projector"]


def test_curves_have_the_points_of_the_results(tmp_path, drawing, monkeypatch):
    from simclr_jax import figures

    drawn = {}
    for name in ("label_curve", "epoch_curve", "loss_curve"):
        monkeypatch.setattr(figures, name, lambda path, curves, name=name, **_: drawn.update({name: curves}))
    parts, images = make_shown(classes=101)
    write_pictures(tmp_path, make_results(labels_per_class=[10, 50]), parts, images, {"a": HISTORY}, seed=0)
    assert drawn["loss_curve"] == {"a": HISTORY}
    assert drawn["epoch_curve"] == {
        "runs/a: 1-NN, cosine": [(12.5, pytest.approx(0.4)), (100.0, pytest.approx(0.6))],
        "runs/a: linear": [(12.5, pytest.approx(0.6)), (100.0, pytest.approx(0.8))],
    }
    *ours, published = drawn["label_curve"].items()
    assert [name for name, _ in ours] == ["trained h", "trained z", "untrained h", "raw pixels"]
    assert ours[0][1] == [(10, pytest.approx(0.601), 0.02), (50, pytest.approx(0.605), 0.02)]
    assert published[0].startswith("published") and (500, 0.8105, 0.0) in published[1]


def test_the_gallery_shows_the_nearest_by_cosine(tmp_path, drawing, monkeypatch):
    shown = []

    def spy(*args, **options):
        shown.append((args, options))
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(report, "gallery", spy)
    parts, images = make_shown(classes=101)
    write_pictures(tmp_path, make_results(), parts, images, {}, seed=0)
    ((queries, neighbours, names, captions, right), options), *others = shown
    assert others == [] and "trained h" in options["title"]

    bank, found = (np.asarray(rows, np.float64) for rows in parts[0][1:])
    bank, found = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, found))
    distances = 1 - found @ bank.T
    nearest = np.argsort(distances, axis=1)[:, :5]
    assert names == [f"class {label}" for label in images.query_labels]
    for row, indices in enumerate(nearest):
        np.testing.assert_array_equal(queries[row], images.queries[row])
        for place, index in enumerate(indices):
            np.testing.assert_array_equal(neighbours[row][place], images.bank(index))
            label = images.bank_labels[index]
            assert captions[row][place] == f"class {label} {distances[row, index]:.2f}"
            assert right[row, place] == (label == images.query_labels[row])
