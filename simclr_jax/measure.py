"""Everything that is asked of one representation: k-NN, the linear probe, few labels."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from simclr_jax import classification, knn, probe

MAX_CONFUSION = 100  # classes; the counts of 1,000 would be a million lines of JSON for each representation


class Questions(NamedTuple):
    """What is asked, the same of every representation."""

    ks: Sequence[int]  # neighbours, of which 1 is one
    temperatures: Sequence[float]  # of votes weighted by exp(cosine / temperature)
    seeds: Sequence[int]  # of the linear probe: which rows choose its penalty
    per_class: Sequence[int]  # labels a class of the few-label curve, ascending
    draws: int  # random subsets of each size


class Features(NamedTuple):
    """A representation of the bank and the queries, with their labels."""

    bank: np.ndarray  # float32 [N, F]
    bank_labels: np.ndarray  # int [N]
    queries: np.ndarray  # float32 [Q, F]
    query_labels: np.ndarray  # int [Q]
    classes: int


def measure(
    features: Features,
    questions: Questions,
    *,
    augmented: Callable[[int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Answers `questions` for one representation.

    Args:
      features: rows to learn from, and rows to classify.
      questions: what is asked.
      augmented: of a seed, the representation [V * N, F] of V random views of each row of the bank, on
        which the linear probe with all labels is then fitted instead.

    Returns:
      Values for JSON, accuracies in [0, 1]: `width`; `knn`, a list of `k`, `metric`, `temperature` (None
      for the majority), `accuracy`; `linear`, of all labels, and `few_labels`, a list over
      `labels_per_class`: the mean `accuracy` and `top5` (None of five classes or fewer), the sample
      standard deviation `std` of the accuracy over seeds or draws (None of a single one), the single
      `accuracies` and the penalty `l2` of each. With them stands `standard_error`, of an accuracy on as
      many queries: sqrt(p (1 - p) / Q). In `linear` also `confusion`, counts of the queries by class and
      prediction as in `classification.confusion`, of the first seed; None of more than 100 classes.
    """
    bank, bank_labels, queries, query_labels, classes = features
    grid = []
    for metric in ("cosine", "euclidean"):
        temperatures = [*questions.temperatures, None] if metric == "cosine" else [None]
        found = knn.accuracies(
            queries,
            query_labels,
            bank,
            bank_labels,
            ks=questions.ks,
            metric=metric,
            temperatures=temperatures,
        )
        for (k, temperature), accuracy in found.items():
            if k == 1 and temperature is not None:
                continue  # a single vote has no weight
            error = standard_error(accuracy, len(queries))
            grid.append(
                {
                    "k": k,
                    "metric": metric,
                    "temperature": temperature,
                    "accuracy": accuracy,
                    "standard_error": error,
                }
            )

    def linear(rows: np.ndarray, seeds: Sequence[int]) -> list[probe.Probe]:
        labels = np.tile(bank_labels, len(rows) // len(bank))
        return probe.linear_probe(rows, labels, queries, query_labels, classes=classes, seeds=seeds)

    if augmented is None:
        probes = linear(bank, questions.seeds)
    else:
        probes = [found for seed in questions.seeds for found in linear(augmented(seed), [seed])]
    few = []
    for per_class in questions.per_class:
        drawn = probe.few_labels(
            bank,
            bank_labels,
            queries,
            query_labels,
            classes=classes,
            per_class=per_class,
            draws=questions.draws,
            seed=questions.seeds[0],
        )
        few.append({"labels_per_class": per_class, **_summary(drawn, len(queries))})
    counts = confusion(query_labels, probes[0].predicted, classes)
    return {
        "width": bank.shape[1],
        "knn": grid,
        "linear": {**_summary(probes, len(queries)), "confusion": counts},
        "few_labels": few,
    }


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]] | None:
    """`classification.confusion` for JSON; None of more than 100 classes."""
    if classes > MAX_CONFUSION:
        return None
    return classification.confusion(labels, predicted, classes).tolist()


def standard_error(accuracy: float, queries: int) -> float:
    """The standard deviation of an accuracy that is measured on as many independent queries."""
    return math.sqrt(accuracy * (1 - accuracy) / queries)


def _summary(probes: Sequence[probe.Probe], queries: int) -> dict[str, Any]:
    accuracies = [found.accuracy for found in probes]
    mean = statistics.fmean(accuracies)
    top5 = [found.top5 for found in probes if found.top5 is not None]
    return {
        "accuracy": mean,
        "top5": statistics.fmean(top5) if top5 else None,
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "standard_error": standard_error(mean, queries),
        "accuracies": accuracies,
        "l2": [found.l2 for found in probes],
    }
