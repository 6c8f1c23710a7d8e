"""The results of `evaluate` as tables, pictures and a page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
from PIL import Image

from simclr_jax import neighbors
from simclr_jax.gallery import gallery
from simclr_jax.logs import write_projector
from simclr_jax.page import Part, Picture, Section, Text, page
from simclr_jax.table import Table

_GALLERY_QUERIES, _GALLERY_NEIGHBORS = 12, 5
_THUMBNAIL = 32  # pixels

# Linear probes with 10, 20, 50, 100, 200 and 500 labels a class that others published, for comparison.
_PUBLISHED = {
    "stl10": (
        "published: UvA tutorial 17, ResNet-18, 500 epochs",
        {10: 0.6221, 20: 0.6854, 50: 0.7365, 100: 0.7684, 200: 0.7897, 500: 0.8105},
    )
}

Results = Mapping[str, Any]


class ClassifierRow(TypedDict):
    """What one classifier reaches: an entry of the list `classifiers` of the results."""

    name: str
    run: str
    kind: Literal["pretrain", "finetune", "distill"]  # a pretrained encoder is judged by its linear probe
    start: str  # whose weights it began with, such as "runs/shapes"; "": random ones
    labels: int  # how many labelled images it learned from
    parameters: int
    images_per_second: float | None  # of training
    top1: float  # in [0, 1], as top5
    top5: float | None
    standard_error: float  # of top1
    confusion: list[list[int]] | None  # [C, C], as of `classification.confusion`


class Shown(NamedTuple):
    """What the pictures of a run, or of raw pixels, are made of."""

    name: str
    bank: np.ndarray  # float32 [N, F], or [0, F] where no neighbours are shown
    queries: np.ndarray  # float32 [n, F], of the first n of `Images.queries`


class Images(NamedTuple):
    """Images behind the embeddings: those of queries are some, drawn at random."""

    queries: Sequence[np.ndarray]  # n of uint8 [H, W, 3]
    query_labels: np.ndarray  # int [n]
    bank: Any  # index to uint8 [H, W, 3]
    bank_labels: np.ndarray  # int [N]
    class_names: tuple[str, ...]


def tables(results: Results) -> list[Table]:
    """The tables of `results`, as `evaluate` writes them to `evaluation.json`.

    First that of `classifiers`, a list of `ClassifierRow`, then those of `rows`, the representations; either
    may be empty or missing.
    """
    found = []
    if results.get("classifiers"):
        found.append(_classifiers(results))
    if rows := results.get("rows", []):
        found.append(_representations(results))
        settings = results["settings"]
        found += [_grid(row, settings) for row in rows if row["representation"] == "h" and row["last"]]
    if any(row["few_labels"] for row in rows):
        found.append(_few_labels(results))
    return found


def _queries(results: Results) -> str:
    return f"{results['queries']['name']}, {results['queries']['count']:,} images"


def _classifiers(results: Results) -> Table:
    classifiers: Sequence[ClassifierRow] = results["classifiers"]
    note = (
        f"± of top-1: standard error of an accuracy on {results['queries']['count']:,} images. Labels: how "
        "many labelled images it learned from. Images/s: of training."
    )
    for start in dict.fromkeys(row["start"] for row in classifiers if row["start"]):
        names = ", ".join(row["name"] for row in classifiers if row["start"] == start)
        note += f" Began with the weights of {start}: {names}."
    return Table(
        f"Accuracy (%) of classifiers on {_queries(results)}",
        ["", "how", "labels", "top-1", "top-5", "parameters", "images/s"],
        [
            [
                row["name"],
                _how(row),
                f"{row['labels']:,}",
                _percent(row["top1"], row["standard_error"]),
                "–" if row["top5"] is None else _percent(row["top5"], None),
                f"{row['parameters']:,}",
                "–" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}",
            ]
            for row in classifiers
        ],
        note,
    )


def _how(row: ClassifierRow) -> str:
    if row["kind"] == "finetune":
        return "fine-tuned" if row["start"] else "from scratch"
    return {"pretrain": "linear probe", "distill": "distilled"}[row["kind"]]


def _representations(results: Results) -> Table:
    settings = results["settings"]
    bank = f"{results['bank']['count']:,} of {results['bank']['name']}"
    k, temperature = _headline(settings)
    views = settings["augmented"]
    fitted = f", fitted on {views} crops and flips of each image," if views else ""
    weighted = {"k": k, "metric": "cosine", "temperature": temperature}
    columns = [
        "",
        "epoch",
        "width",
        "1-NN, cosine",
        "1-NN, Euclidean",
        *_weighted_heading(k, temperature),
        "linear",
    ]
    return Table(
        f"Accuracy (%) on {_queries(results)}, from {bank}",
        columns,
        [
            [
                row["name"],
                "–" if row["epoch"] is None else f"{row['epoch']:g}",
                f"{row['width']:,}",
                _knn(row, {"k": 1, "metric": "cosine"}),
                _knn(row, {"k": 1, "metric": "euclidean"}),
                *([_knn(row, weighted)] if k > 1 else []),
                _mean(row["linear"]),
            ]
            for row in results["rows"]
        ],
        f"± of k-NN: standard error of an accuracy on {results['queries']['count']:,} images. ± of linear"
        f"{fitted}: standard deviation over seeds, {len(settings['seeds'])} of them, which draw the training "
        "images that choose its penalty. Nothing was chosen on the images above.",
    )


def _headline(settings: Mapping[str, Any]) -> tuple[int, float | None]:
    """The k and temperature of the grid that the main table shows."""
    ks = [k for k in settings["ks"] if k > 1] or [1]
    temperatures = settings["temperatures"] or [None]
    return 20 if 20 in ks else ks[0], 0.1 if 0.1 in temperatures else temperatures[0]


def _weighted_heading(k: int, temperature: float | None) -> list[str]:
    if k == 1:
        return []
    return [f"{k}-NN, cosine" + ("" if temperature is None else f", t={temperature:g}")]


def _percent(value: float, deviation: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _mean(summary: Mapping[str, Any]) -> str:
    return _percent(summary["accuracy"], summary["std"])


def _knn(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    entry = next(entry for entry in row["knn"] if wanted.items() <= entry.items())
    return _percent(entry["accuracy"], entry["standard_error"])


def _grid(row: Mapping[str, Any], settings: Mapping[str, Any]) -> Table:
    kinds = [("cosine", temperature) for temperature in settings["temperatures"]]
    kinds += [("cosine", None), ("euclidean", None)]
    headings = {"cosine": "cosine, majority", "euclidean": "Euclidean, majority"}

    def cell(k: int, metric: str, temperature: float | None) -> str:
        wanted = {"k": k, "metric": metric, "temperature": None if k == 1 else temperature}
        return _knn(row, wanted)

    return Table(
        f"k-NN accuracy (%) of {row['name']}",
        ["k", *(headings[m] if t is None else f"cosine, t={t:g}" for m, t in kinds)],
        [[str(k), *(cell(k, *kind) for kind in kinds)] for k in settings["ks"]],
        "t: a neighbour's vote weighs exp(cosine / t). Majority: all weigh the same, and the lower class "
        "wins between equal votes.",
    )


def _few_labels(results: Results) -> Table:
    settings = results["settings"]
    sizes, seeds = settings["labels_per_class"], len(settings["seeds"])
    rows = [row for row in results["rows"] if row["few_labels"]]
    cells = [[row["name"], *map(_mean, row["few_labels"]), _mean(row["linear"])] for row in rows]
    for name, accuracies in _published(results):
        cells.append([name, *(_percent(accuracies[n], None) if n in accuracies else "–" for n in sizes), "–"])
    return Table(
        "Linear probe accuracy (%) by labels a class",
        ["", *map(str, sizes), "all"],
        cells,
        f"± standard deviation over {settings['draws']} draws of the labelled images, and over "
        f"{seeds} seed{'s' if seeds > 1 else ''} for all.",
    )


def _published(results: Results) -> list[tuple[str, dict[int, float]]]:
    name = (results["queries"]["dataset"] or "").split("/")[0].split(":")[0]
    return [_PUBLISHED[name]] if name in _PUBLISHED else []


def write_pictures(
    folder: pathlib.Path,
    results: Results,
    shown: Sequence[Shown],
    images: Images,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    seed: int,
) -> list[Section]:
    """Writes the pictures as PNG files, and the projector's files, to `folder`.

    Args:
      folder: exists.
      results: as `tables`.
      shown: runs and raw pixels; may be empty.
      images: behind them.
      histories: the records of `metrics.jsonl` by run.
      seed: of t-SNE.

    Returns:
      Sections of the page that show them.
    """
    from simclr_jax import figures  # here, as matplotlib is an extra

    def picture(name: str, caption: str, alt: str) -> Picture:
        return Picture(caption, folder / f"{name}.png", alt)

    rows = results.get("rows", [])
    curves: list[Part] = []
    few = {row["name"]: _few_points(row) for row in rows if row["few_labels"]}
    if few:
        few |= {name: [(n, value, 0.0) for n, value in found.items()] for name, found in _published(results)}
        figures.label_curve(folder / "few_labels.png", few, title="Linear probe by labels a class")
        curves.append(picture("few_labels", "Few labels", "accuracy over the number of labels a class"))
    epochs = _epoch_points(rows)
    if any(len(points) > 1 for points in epochs.values()):
        figures.epoch_curve(folder / "epochs.png", epochs, title="Accuracy over training")
        curves.append(picture("epochs", "Checkpoints", "accuracy of each kept checkpoint over epochs"))
    if any("loss" in record for records in histories.values() for record in records):
        figures.loss_curve(folder / "loss.png", histories, title="Training")
        curves.append(picture("loss", "Training", "loss over epochs"))

    confusions: list[Part] = []
    classes = images.class_names
    for number, row in enumerate(results.get("classifiers", [])):
        if row["confusion"] is None or len(classes) > figures.MAX_CLASSES:
            continue
        name, title = f"confusion_{number}", f"Confusion of {row['name']}, {_how(row)}"
        figures.confusion_matrix(folder / f"{name}.png", row["confusion"], classes, title=title)
        confusions.append(picture(name, title, "share of each class that is taken for each class"))

    maps: list[Part] = []
    for number, part in enumerate(shown) if len(classes) <= figures.MAX_CLASSES else ():
        for method, points in (
            ("t-SNE", figures.tsne(part.queries, seed=seed)),
            ("PCA", figures.pca(part.queries)),
        ):
            name = f"{method.lower().replace('-', '')}_{number}"
            title = f"{method} of {part.name}"
            figures.scatter(folder / f"{name}.png", points, images.query_labels, classes, title=title)
            maps.append(picture(name, title, f"{len(points)} images of {results['queries']['name']}"))

    galleries: list[Part] = []
    for number, part in enumerate(shown):
        if not len(part.bank):
            continue
        name = f"neighbors_{number}"
        Image.fromarray(_gallery(part, images)).save(folder / f"{name}.png")
        galleries.append(picture(name, f"Nearest neighbours by {part.name}", "queries and their neighbours"))

    if shown:
        write_projector(
            folder / "projector",
            {part.name: part.queries for part in shown},
            labels=[classes[label] for label in images.query_labels],
            thumbnails=np.stack([_thumbnail(image) for image in images.queries]),
        )
    sections = [
        ("Curves", curves),
        ("Confusion", confusions),
        ("Embeddings in the plane", maps),
        ("Nearest neighbours", galleries),
    ]
    return [Section(heading, parts) for heading, parts in sections if parts]


def _few_points(row: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    return [
        (entry["labels_per_class"], entry["accuracy"], entry["std"] or 0.0) for entry in row["few_labels"]
    ]


def _epoch_points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Accuracies of h over the epochs, by run and measure."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["representation"] == "h" and row["epoch"] is not None:
            one = next(e["accuracy"] for e in row["knn"] if e["k"] == 1 and e["metric"] == "cosine")
            curves.setdefault(f"{row['run']}: 1-NN, cosine", []).append((row["epoch"], one))
            curves.setdefault(f"{row['run']}: linear", []).append((row["epoch"], row["linear"]["accuracy"]))
    return curves


def _gallery(part: Shown, images: Images) -> np.ndarray:
    count = min(_GALLERY_QUERIES, len(images.queries))
    k = min(_GALLERY_NEIGHBORS, len(part.bank))
    distances, indices = neighbors.nearest(part.queries[:count], part.bank, k, "cosine")
    labels = images.bank_labels[indices]
    names = images.class_names
    return gallery(
        images.queries[:count],
        [[images.bank(index) for index in row] for row in indices],
        [names[label] for label in images.query_labels[:count]],
        [
            [f"{names[label]} {distance:.2f}" for label, distance in zip(*row, strict=True)]
            for row in zip(labels, distances, strict=True)
        ],
        labels == images.query_labels[:count, None],
        title=f"Nearest neighbours by {part.name}\nthe query, then its {k} nearest by cosine distance",
    )


def _thumbnail(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    square = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL))
    square.paste(picture, ((_THUMBNAIL - picture.width) // 2, (_THUMBNAIL - picture.height) // 2))
    return np.asarray(square)


def write_page(file: pathlib.Path, results: Results, pictures: Sequence[Section]) -> None:
    """Writes one self-contained HTML file with the tables and pictures."""
    settings = results["settings"]
    share = settings["crop"]
    square = "the central square" if share == 1 else f"a central square of {share:g} of the shorter side"
    sizes = ", ".join(f"{size} pixels ({run})" for run, size in settings["view_size"].items())
    raw = f"; raw pixels are compared at {settings['raw_size']}" if results.get("rows") else ""
    seen = [
        f"The encoder sees {square} of each image at {sizes}{raw}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}; "
        f"{results['device']}.",
    ]
    runs = ", ".join(settings["view_size"])
    title = f"{runs} on {results['queries']['name']}"
    file.write_text(page(title, [Text("", seen), *tables(results), *pictures]), encoding="utf-8")
