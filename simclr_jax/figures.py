"""Charts of an evaluation as PNG files, and the two projections that they show.

They need the extra `figures` (matplotlib and scikit-learn), so import this module where you draw. The
same input gives the same bytes. Colours are told apart by the colour-blind too, and each has a marker.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

# Found by a search over sRGB for ten that stay apart. The least distance of two in OKLab is 0.15, and 0.11
# as a deuteranope or protanope sees them (Machado et al. 2009), where matplotlib's tab10 has 0.01 and its
# petroff10 0.06.
COLOURS = (
    *("#443377", "#aa4411", "#448899", "#999933", "#dd9999"),
    *("#770022", "#00ccff", "#bbcc11", "#9988ff", "#7755bb"),
)
MARKERS = "o^sDvP<X>*"
MAX_CLASSES = len(COLOURS) * len(MARKERS)  # beyond it, two classes would look the same

_INK, _FAINT, _RULE, _BLANK = "#222222", "#666666", "#dddddd", "#f4f4f4"
_STYLE = {
    "figure.dpi": 144,
    "savefig.dpi": 144,
    "font.size": 11,
    "text.color": _INK,
    "text.parse_math": False,  # a class may be called "$"
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "legend.frameon": False,
    "legend.handletextpad": 0.6,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "lines.linewidth": 2,
}
_LETTER = 0.095  # inches, the mean width
_TSNE_WIDTH = 50
_CELL = 0.74  # inches, the side of a cell of a table
_KEY = 1.0  # inches, for a scale of colours
_NUMBERED, _NAMED = 20, 30  # classes of a confusion matrix


def tsne(features: np.ndarray, *, seed: int, perplexity: float = 30.0) -> np.ndarray:
    """Embed rows in the plane so that neighbours stay neighbours (van der Maaten and Hinton 2008).

    Rows wider than 50 are first projected onto their 50 main axes. It starts from the first two of them,
    so that the large-scale order means something too. Distances between clusters, and their sizes, mean
    nothing.

    Args:
      features: [N, F], N >= 4 and F >= 2.
      seed: of what is drawn.
      perplexity: about the number of neighbours of a row that count, at least 1; with fewer than
        3 * perplexity + 1 rows it is lowered to (N - 1) / 3.

    Returns:
      float32 [N, 2]; zeros where all rows are equal, as those of a collapsed encoder are.

    Raises:
      ValueError: for another shape, a NaN or infinity, or a perplexity below 1.
    """
    from sklearn.manifold import TSNE  # here, as it takes a second

    features = _finite_rows(features, 4)
    if not perplexity >= 1:
        raise ValueError(f"perplexity is {perplexity}; expected at least 1")
    if (features == features[0]).all():
        return np.zeros((len(features), 2), np.float32)
    if features.shape[1] > _TSNE_WIDTH:
        features = _main_axes(features, _TSNE_WIDTH)
    perplexity = min(perplexity, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def pca(features: np.ndarray) -> np.ndarray:
    """Project rows onto their two main axes.

    Args:
      features: [N, F], N and F at least 2.

    Returns:
      float32 [N, 2], centred. The sign of an axis is such that its largest entry is positive.

    Raises:
      ValueError: for another shape, or a NaN or infinity.
    """
    return _main_axes(_finite_rows(features, 2), 2)


def scatter(
    path: str | os.PathLike[str],
    points: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str,
) -> None:
    """Draw points of the plane in the colours of their classes, without axes.

    Up to 10 classes differ in colour alone, more also in the shape of the point.

    Args:
      path: of the PNG file.
      points: [N, 2]. Which of two points lies on top is drawn by lot, whatever their classes.
      labels: int [N], in 0 to C - 1.
      class_names: the C names for the legend, at most `MAX_CLASSES`.
      title: above the picture.

    Raises:
      ValueError: for shapes or labels that do not fit, or too many classes.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    classes = len(class_names)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"points has shape {points.shape}; expected [N, 2] with N >= 1")
    if labels.shape != points.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}; expected {points.shape[:1]}")
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"there are {classes} class names; expected 1 to {MAX_CLASSES}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}; expected 0 to {classes - 1}")

    order = np.random.default_rng(0).permutation(len(points))
    points, labels = points[order], labels[order]
    colours = np.array(COLOURS)[labels % len(COLOURS)]
    legend_columns = -(-classes // 25)
    legend_width = legend_columns * (0.5 + _LETTER * max(map(len, class_names)))
    extent = np.ptp(points, axis=0)
    height = float(np.clip(7 * extent[1] / max(extent[0], 1e-9), 3.2, 8))
    with _png(path, 7.4 + legend_width, 0.6 + height) as figure:
        axes = figure.subplots()
        for shape, marker in enumerate(MARKERS):
            chosen = labels // len(COLOURS) == shape
            axes.scatter(
                *points[chosen].T,
                s=np.clip(30_000 / len(points), 6, 40),
                c=colours[chosen],
                marker=marker,
                alpha=0.8,
                linewidths=0,
            )
        axes.set_title(title, wrap=True)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()
        handles = [
            Line2D([], [], linestyle="", color=COLOURS[i % len(COLOURS)], marker=MARKERS[i // len(COLOURS)])
            for i in range(classes)
        ]
        figure.legend(handles, class_names, loc="outside right center", ncols=legend_columns)


def loss_curve(
    path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str
) -> None:
    """Draw how runs learned: the loss over the epochs and, below, what else was measured.

    Args:
      path: of the PNG file.
      runs: of each run by its name the records of its `metrics.jsonl`. A record has `epoch` and any of
        `loss`, `contrast_top1` and `knn1_accuracy`, the last two in [0, 1]; the first may also have
        `knn1_accuracy_untrained`, where the curve of the 1-NN then starts, and
        `knn1_accuracy_raw_pixels`, a dashed line.
      title: above the picture.

    Raises:
      ValueError: if no record has a loss.
    """
    panels = {"loss": "loss", "contrast_top1": "contrast top-1", "knn1_accuracy": "1-NN accuracy"}
    curves = {key: {name: _series(records, key) for name, records in runs.items()} for key in panels}
    for name, records in runs.items():
        curves["knn1_accuracy"][name][:0] = _series(records, "knn1_accuracy_untrained")
    shown = [key for key in panels if any(curves[key].values())]
    if "loss" not in shown:
        raise ValueError("no record has a loss")

    with _png(path, 6.8, 1 + 2.2 * len(shown), lines=list(runs) if len(runs) > 1 else ()) as figure:
        stack = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        stack[0].set_title(title, wrap=True)
        for axes, key in zip(stack, shown, strict=True):
            axes.set_ylabel(panels[key])
            if key != "loss":
                axes.yaxis.set_major_formatter(_percent)
            for number, curve in enumerate(curves[key].values()):
                look = _look(number) | ({"marker": ""} if len(curve) > 30 else {})
                axes.plot(*_columns(curve, 2), **look, lw=1.5)
        if shown[-1] == "knn1_accuracy":
            for number, records in enumerate(runs.values()):
                for _, accuracy in _series(records, "knn1_accuracy_raw_pixels"):
                    _level(stack[-1], accuracy, "raw pixels", _look(number)["color"])
        _epochs_below(stack[-1])


def label_curve(
    path: str | os.PathLike[str], curves: Mapping[str, Sequence[tuple[int, float, float]]], *, title: str
) -> None:
    """Draw accuracy over the number of labels a class, a line a curve within a band of one deviation.

    Args:
      path: of the PNG file.
      curves: by name, points (labels a class >= 1, mean accuracy in [0, 1], its standard deviation). The
        axis of the labels is logarithmic and has a tick for each number that occurs.
      title: above the picture.

    Raises:
      ValueError: if there is no point, or a number is out of its range.
    """
    _check_accuracies(value for curve in curves.values() for _, value, _ in curve)
    ticks = sorted({labels for curve in curves.values() for labels, _, _ in curve})
    if ticks[0] < 1:
        raise ValueError(f"labels a class are {ticks[0]}; expected at least 1")
    with _png(path, 6.8, 4.6, lines=list(curves)) as figure:
        axes = _accuracy_axes(figure, title)
        axes.set_xscale("log")
        for number, curve in enumerate(curves.values()):
            labels, mean, deviation = _columns(sorted(curve), 3)
            (line,) = axes.plot(labels, mean, **_look(number))
            low, high = np.clip([mean - deviation, mean + deviation], 0, 1)
            axes.fill_between(labels, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("labels a class")


def epoch_curve(
    path: str | os.PathLike[str], curves: Mapping[str, Sequence[tuple[float, float]]], *, title: str
) -> None:
    """Draw accuracy over the epochs of training, a line a curve.

    Args:
      path: of the PNG file.
      curves: by name, points (epoch, accuracy in [0, 1]).
      title: above the picture.

    Raises:
      ValueError: if there is no point, or an accuracy is out of its range.
    """
    _check_accuracies(value for curve in curves.values() for _, value in curve)
    with _png(path, 6.8, 4.6, lines=list(curves)) as figure:
        axes = _accuracy_axes(figure, title)
        for number, curve in enumerate(curves.values()):
            axes.plot(*_columns(sorted(curve), 2), **_look(number))
        _epochs_below(axes)


def heat_map(
    path: str | os.PathLike[str],
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_axis: str = "",
    column_axis: str = "",
    average_column: bool = False,
) -> None:
    """Draw a table of accuracies as coloured cells with their numbers in percent.

    Args:
      path: of the PNG file.
      values: [R, C] in [0, 1]; the cell of a NaN is light gray, without number.
      rows: the R names at the left, from top to bottom.
      columns: the C names below.
      title: above the picture.
      row_axis: what the rows are.
      column_axis: what the columns are.
      average_column: sets the last column apart.

    Raises:
      ValueError: for names that do not fit the values, or a value out of its range.
    """
    values = np.asarray(values, float)
    if values.shape != (len(rows), len(columns)) or values.size == 0:
        raise ValueError(f"values has shape {values.shape}; expected {(len(rows), len(columns))}, none 0")
    known = values[~np.isnan(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if low < 0 or high > 1:
        raise ValueError(f"values are {low:g} to {high:g}; expected accuracies in [0, 1]")

    left = np.arange(len(columns), dtype=float)
    if average_column:
        left[-1] += 0.3
    texts = np.where(np.isnan(values), "", np.char.mod("%.1f", 100 * values))
    scale = Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5)
    with _cells(path, values, texts, scale, rows, columns, left, _CELL) as axes:
        axes.set_title(f"{title} (%)", wrap=True)
        axes.set_xlabel(column_axis)
        axes.set_ylabel(row_axis)


def confusion_matrix(
    path: str | os.PathLike[str],
    counts: np.ndarray | Sequence[Sequence[int]],
    class_names: Sequence[str],
    *,
    title: str,
) -> None:
    """Draw how often each class is taken for each class, in percent of the images of the true class.

    Colours follow the square root of the share, so that rare mistakes are seen. Up to 20 classes each
    cell has its number, of more there is a scale instead; up to 30 classes have their names.

    Args:
      path: of the PNG file.
      counts: [C, C], not negative, a row for each true class and a column for each prediction, as of
        `classification.confusion`. The row of a class without images is light gray, without numbers.
      class_names: the C names, at most `MAX_CLASSES`.
      title: above the picture.

    Raises:
      ValueError: for counts that do not fit the names or are negative, or too many classes.
    """
    counts = np.asarray(counts, float)
    classes = len(class_names)
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"there are {classes} class names; expected 1 to {MAX_CLASSES}")
    if counts.shape != (classes, classes):
        raise ValueError(f"counts has shape {counts.shape}; expected {(classes, classes)}")
    if not counts.min() >= 0:
        raise ValueError(f"counts hold {counts.min():g}; expected numbers of images")

    images = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    texts = np.where(counts > 0, np.char.mod("%.1f", 100 * shares), np.where(images > 0, "0", ""))
    texts = texts if classes <= _NUMBERED else None
    names = class_names if classes <= _NAMED else ()
    side = min(_CELL, 10 / classes)
    with _cells(path, shares, texts, PowerNorm(0.5, 0, 1), names, names, np.arange(classes), side) as axes:
        axes.set_title(f"{title} (% of each class)", wrap=True)
        axes.set_xlabel("prediction" if names else f"prediction, {classes} classes")
        axes.set_ylabel("truth" if names else f"truth, {classes} classes")


@contextlib.contextmanager
def _cells(
    path: str | os.PathLike[str],
    values: np.ndarray,
    texts: np.ndarray | None,
    scale: Normalize,
    rows: Sequence[str],
    columns: Sequence[str],
    left: np.ndarray,
    side: float,
) -> Iterator[Axes]:
    """Axes with a table of coloured cells, saved as `_png` does.

    Args:
      path: of the PNG file.
      values: [R, C]; the cell of a NaN is light gray.
      texts: str [R, C], in the cells; None: a scale of the colours beside them.
      scale: from values to [0, 1].
      rows: the R names at the left, from top to bottom, or none.
      columns: the C names below, or none.
      left: [C], where each column begins, in widths of a cell.
      side: of a cell in inches.

    Yields:
      The axes, whose title and labels are yet to be set.
    """
    longest = max(map(len, columns), default=0)
    slanted = longest > 9 * side / _CELL  # a cell of 0.74 inches has room for 9 letters
    width = 1.5 + _LETTER * max(map(len, rows), default=0) + side * len(left)
    width = max(5, width) + (_KEY if texts is None else 0)
    height = 1.4 + side * len(values) + (0.7 * _LETTER * longest if slanted else 0)
    with _png(path, width, height) as figure:
        axes = figure.subplots()
        colour_map = matplotlib.colormaps["viridis"].with_extremes(bad=_BLANK)
        colours = colour_map(scale(np.ma.masked_invalid(values)))
        gap = 0.02 if rows else 0  # lines between small cells would come out in different widths
        # One collection: 10,000 patches would take 6 s.
        corner = np.stack(np.meshgrid(left, np.arange(len(values))), axis=-1)[:, :, None] + gap
        squares = corner + (1 - 2 * gap) * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        axes.add_collection(
            PolyCollection(list(squares.reshape(-1, 4, 2)), facecolors=colours.reshape(-1, 4), linewidths=0)
        )
        axes.set_xlim(0, left[-1] + 1)
        axes.set_ylim(len(values), 0)
        axes.set_aspect("equal")
        axes.set_xticks(left[: len(columns)] + 0.5, columns)
        if slanted:
            for label in axes.get_xticklabels():
                label.set(rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0, labelcolor=_INK)
        axes.spines[:].set_visible(False)
        axes.grid(False)
        if texts is None:
            key = figure.colorbar(
                ScalarMappable(scale, colour_map), ax=axes, fraction=_KEY / width, shrink=0.6, format=_percent
            )
            key.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1])
            key.outline.set_visible(False)
        else:
            for (row, column), text in np.ndenumerate(texts):
                # The contrast, as WCAG 2 measures it, is 3.8 or more with each colour of the map.
                ink = _INK if colours[row, column, :3] @ [0.3, 0.59, 0.11] > 0.42 else "white"
                axes.text(float(left[column]) + 0.5, row + 0.5, text, color=ink, ha="center", va="center")
        yield axes


@contextlib.contextmanager
def _png(
    path: str | os.PathLike[str], width: float, height: float, *, lines: Sequence[str] = ()
) -> Iterator[Figure]:
    """A figure of `width` by `height` inches above a legend of `lines`; saved unless the drawing fails."""
    longest = max(map(len, lines), default=0)
    columns = min(len(lines), max(1, int(width / (0.8 + _LETTER * longest))))
    legend_rows = -(-len(lines) // columns) if lines else 0
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height + 0.25 * legend_rows), layout="constrained")
        yield figure
        if lines:
            handles = [Line2D([], [], **_look(number)) for number in range(len(lines))]
            figure.legend(handles, lines, loc="outside lower center", ncols=columns)
        figure.savefig(path, format="png", metadata={"Software": None})


def _accuracy_axes(figure: Figure, title: str) -> Axes:
    axes = figure.subplots()
    axes.set_title(title, wrap=True)
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(_percent)
    return axes


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.4g}%"


def _epochs_below(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _level(axes: Axes, value: float, name: str, colour: str) -> None:
    """A dashed line across the picture, its name on it at the right."""
    axes.axhline(value, color=colour, linestyle="--", linewidth=1)
    place = axes.get_yaxis_transform()
    axes.text(1, value, name, transform=place, color=colour, fontsize=9.5, ha="right", va="bottom")


def _look(number: int) -> dict[str, Any]:
    """Colour and marker of a line; no two of the first 100 are alike."""
    turn, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[(colour + turn) % len(MARKERS)]}


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["epoch"], record[key]) for record in records if key in record]


def _columns(points: Sequence[tuple[float, ...]], count: int) -> np.ndarray:
    return np.array(points, float).reshape(-1, count).T


def _check_accuracies(values: Iterable[float]) -> None:
    values = list(values)
    if not values:
        raise ValueError("there is no point to draw")
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"an accuracy is {value:g}; expected 0 to 1")


def _finite_rows(features: np.ndarray, least: int) -> np.ndarray:
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) < least or features.shape[1] < 2:
        raise ValueError(f"features has shape {features.shape}; expected [N, F], N >= {least} and F >= 2")
    if not np.isfinite(features).all():
        raise ValueError("features hold a NaN or an infinity; expected finite numbers")
    return features


def _main_axes(features: np.ndarray, count: int) -> np.ndarray:
    """Rows along the `count` axes of their largest variance."""
    centred = features - features.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return centred @ (axes * np.sign(largest)).T
