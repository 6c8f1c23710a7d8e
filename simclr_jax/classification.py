"""How good a classifier is: its top-1 and top-5 accuracy, and which classes it takes for which."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class Scores(NamedTuple):
    """What a classifier reaches on labelled rows."""

    top1: float  # share of rows whose label comes first, in [0, 1]
    top5: float | None  # share of rows whose label is among the first five; None of five classes or fewer
    predicted: np.ndarray  # int32 [N], the class that comes first


def scores(logits: ArrayLike, labels: ArrayLike, classes: int) -> Scores:
    """Compares logits with labels.

    Between equal logits the lower class comes first. A NaN counts against the label: as the logit of
    another class it comes before the label, and as that of the label it comes last. So a row of NaN is
    never right, and what is predicted of it is a class that it does not have.

    Args:
      logits: [N, C], N at least 1, any real dtype; compared as float32.
      labels: int [N], in [0, classes).
      classes: C, at least 2.

    Returns:
      Accuracies and predictions; `top1` is the share of rows where the two agree.

    Raises:
      ValueError: for shapes that do not fit, labels that are not integers or out of range, or fewer than
        two classes.
    """
    labels = _classes("labels", labels, classes)
    logits = np.asarray(logits, np.float32)
    if logits.shape != (len(labels), classes):
        raise ValueError(f"logits has shape {logits.shape}; expected {(len(labels), classes)}")
    rows, column = np.arange(len(labels)), np.arange(classes)
    of_label = logits[rows, labels][:, None]
    behind = np.where(column < labels[:, None], logits < of_label, logits <= of_label)
    behind[rows, labels] = True
    ahead = ~behind  # a comparison with NaN is false, so that NaN is ahead
    place = ahead.sum(axis=1)
    # Where the label is not first, the best of those ahead, of which -inf may be one.
    others = np.where(ahead, np.maximum(logits, np.finfo(np.float32).min), -np.inf)
    predicted = np.where(place == 0, labels, others.argmax(axis=1))  # a NaN is the largest to argmax
    top5 = float(np.mean(place < 5)) if classes > 5 else None
    return Scores(float(np.mean(place == 0)), top5, predicted.astype(np.int32))


def confusion(labels: ArrayLike, predicted: ArrayLike, classes: int) -> np.ndarray:
    """Counts how often rows of each class are taken for each class.

    Args:
      labels: int [N], in [0, classes), N at least 1.
      predicted: int [N], in [0, classes).
      classes: C, at least 2.

    Returns:
      int64 [C, C]: a row for each true class, a column for each prediction.

    Raises:
      ValueError: for shapes that do not fit, classes that are not integers or out of range, or fewer than
        two classes.
    """
    labels = _classes("labels", labels, classes)
    predicted = _classes("predicted", predicted, classes)
    if predicted.shape != labels.shape:
        raise ValueError(f"predicted has shape {predicted.shape}; expected {labels.shape}, as labels")
    cells = labels * classes + predicted
    return np.bincount(cells, minlength=classes**2).astype(np.int64).reshape(classes, classes)


def _classes(name: str, values: ArrayLike, classes: int) -> np.ndarray:
    """The values as int64 [N]."""
    values = np.asarray(values)
    if classes < 2:
        raise ValueError(f"classes is {classes}; expected at least 2")
    if values.ndim != 1 or len(values) == 0 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} is {values.dtype} {values.shape}; expected integers [N] with N >= 1")
    for value in (values.min(), values.max()):
        if not 0 <= value < classes:
            raise ValueError(f"{name} holds {value}; expected 0 to {classes - 1}")
    return values.astype(np.int64)
