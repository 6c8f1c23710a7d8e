"""Classification by nearest neighbours: who votes, and with what weight."""

from collections.abc import Sequence

import jax
import numpy as np

from simclr_jax import neighbors


def predict(
    neighbor_labels: np.ndarray,
    *,
    classes: int,
    distances: np.ndarray | None = None,
    temperature: float | None = None,
) -> np.ndarray:
    """The class with the most votes.

    With a temperature a neighbour's vote weighs exp(cosine / temperature), as in Wu et al. 2018,
    arXiv:1805.01978, section 3.4; otherwise all weigh the same. Between equal votes the lower class wins,
    as in scikit-learn.

    Args:
      neighbor_labels: int [Q, k], in [0, classes).
      classes: how many there are.
      distances: cosine distances [Q, k], for a temperature.
      temperature: above 0, or None for the majority.

    Returns:
      int [Q].

    Raises:
      ValueError: for a temperature that is not positive or comes without distances of that shape.
    """
    queries, k = neighbor_labels.shape
    weights = np.ones((queries, k))
    if temperature is not None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a number > 0")
        if distances is None or distances.shape != neighbor_labels.shape:
            raise ValueError("a temperature needs the distance of each neighbour")
        weights = np.exp((distances[:, :1] - distances) / temperature)  # the nearest weighs 1
    cell = np.arange(queries)[:, None] * classes + neighbor_labels
    votes = np.bincount(cell.ravel(), weights.ravel(), minlength=queries * classes)
    return votes.reshape(queries, classes).argmax(1)


def accuracies(
    queries: jax.typing.ArrayLike,
    query_labels: jax.typing.ArrayLike,
    bank: jax.typing.ArrayLike,
    bank_labels: jax.typing.ArrayLike,
    *,
    ks: Sequence[int] = (1,),
    metric: str = "cosine",
    temperatures: Sequence[float | None] = (None,),
) -> dict[tuple[int, float | None], float]:
    """The share of queries whose neighbours in the bank vote for their label, from one search.

    Args:
      queries: [Q, F].
      query_labels: int [Q], not negative.
      bank: [N, F].
      bank_labels: int [N], not negative.
      ks: numbers of neighbours, each 1 to N.
      metric: as in `neighbors.nearest`.
      temperatures: as in `predict`; of a single neighbour the weight does not matter.

    Returns:
      Accuracies in [0, 1] by (k, temperature).

    Raises:
      ValueError: for labels that do not fit, a temperature with another metric than "cosine", and as
        `neighbors.nearest`.
    """
    query_labels, bank_labels = np.asarray(query_labels), np.asarray(bank_labels)
    for name, labels, rows in (
        ("query_labels", query_labels, queries),
        ("bank_labels", bank_labels, bank),
    ):
        expected = np.shape(rows)[:1]
        if labels.shape != expected:
            raise ValueError(f"{name} has shape {labels.shape}; expected {expected}")
        if not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
            raise ValueError(f"{name} holds other numbers than whole ones from 0 on")
    if metric != "cosine" and any(temperature is not None for temperature in temperatures):
        raise ValueError(f"a temperature weighs cosines; with metric {metric!r} leave it None")
    distances, indices = neighbors.nearest(queries, bank, max(ks), metric)
    labels = bank_labels[indices]
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    found = {}
    for k in ks:
        for temperature in temperatures:
            predicted = predict(
                labels[:, :k], classes=classes, distances=distances[:, :k], temperature=temperature
            )
            found[k, temperature] = float(np.mean(predicted == query_labels))
    return found
