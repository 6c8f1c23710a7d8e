"""Everything that is asked of one representation: k-NN, the linear probe, few labels."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from simclr_jax import knn, probe


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
      `labels_per_class`: the mean `accuracy`, the sample standard deviation `std` over seeds or draws
      (None of a single one), the single `accuracies` and the penalty `l2` of each. With them stands
      `standard_error`, of an accuracy on as many queries: sqrt(p (1 - p) / Q).
    """
    labels = features.bank_labels, features.query_labels
    queries = len(features.queries)
    grid = []
    for metric in ("cosine", "euclidean"):
        temperatures = [*questions.temperatures, None] if metric == "cosine" else [None]
        found = knn.accuracies(
            features.queries,
            labels[1],
            features.bank,
            labels[0],
            ks=questions.ks,
            metric=metric,
            temperatures=temperatures,
        )
        for (k, temperature), accuracy in found.items():
            if k == 1 and temperature is not None:
                continue  # a single vote has no weight
            error = standard_error(accuracy, queries)
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
        copies = len(rows) // len(features.bank)
        return probe.linear_probe(
            rows,
            np.tile(labels[0], copies),
            features.queries,
            labels[1],
            classes=features.classes,
            seeds=seeds,
        )

    if augmented is None:
        probes = linear(features.bank, questions.seeds)
    else:
        probes = [found for seed in questions.seeds for found in linear(augmented(seed), [seed])]
    few = []
    for per_class in questions.per_class:
        drawn = probe.few_labels(
            features.bank,
            labels[0],
            features.queries,
            labels[1],
            classes=features.classes,
            per_class=per_class,
            draws=questions.draws,
            seed=questions.seeds[0],
        )
        few.append({"labels_per_class": per_class, **_summary(drawn, queries)})
    return {
        "width": features.bank.shape[1],
        "knn": grid,
        "linear": _summary(probes, queries),
        "few_labels": few,
    }


def standard_error(accuracy: float, queries: int) -> float:
    """The standard deviation of an accuracy that is measured on as many independent queries."""
    return math.sqrt(accuracy * (1 - accuracy) / queries)


def _summary(probes: Sequence[probe.Probe], queries: int) -> dict[str, Any]:
    accuracies = [found.accuracy for found in probes]
    mean = statistics.fmean(accuracies)
    return {
        "accuracy": mean,
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "standard_error": standard_error(mean, queries),
        "accuracies": accuracies,
        "l2": [found.l2 for found in probes],
    }
