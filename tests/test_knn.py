"""Votes of neighbours against scikit-learn."""

import numpy as np
import pytest

from simclr_jax import knn

GENERATOR = np.random.default_rng(0)
CENTRES = GENERATOR.standard_normal((4, 6))
BANK_LABELS, QUERY_LABELS = GENERATOR.integers(0, 4, 400), GENERATOR.integers(0, 4, 150)
BANK = CENTRES[BANK_LABELS] + 1.5 * GENERATOR.standard_normal((400, 6))
QUERIES = CENTRES[QUERY_LABELS] + 1.5 * GENERATOR.standard_normal((150, 6))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_majority_equals_scikit_learn(metric):
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")
    found = knn.accuracies(QUERIES, QUERY_LABELS, BANK, BANK_LABELS, ks=(1, 2, 10, 200), metric=metric)
    for k in (1, 2, 10, 200):
        vote = sklearn_neighbors.KNeighborsClassifier(k, algorithm="brute", metric=metric)
        assert found[k, None] == vote.fit(BANK, BANK_LABELS).score(QUERIES, QUERY_LABELS)
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_weighted_votes_equal_scikit_learn(temperature):
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")
    vote = sklearn_neighbors.KNeighborsClassifier(
        20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    expected = vote.fit(BANK, BANK_LABELS).score(QUERIES, QUERY_LABELS)
    found = knn.accuracies(
        QUERIES, QUERY_LABELS, BANK, BANK_LABELS, ks=(1, 20), temperatures=(None, temperature)
    )
    assert found[20, temperature] == expected
    assert found[1, temperature] == found[1, None]


def test_equal_votes_go_to_the_lower_class_and_weights_can_turn_them():
    labels = np.array([[2, 1, 1, 2], [0, 3, 3, 3]])
    np.testing.assert_array_equal(knn.predict(labels, classes=4), [1, 3])
    distances = np.array([[0.0, 0.5, 0.5, 0.9], [0.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(
        knn.predict(labels, classes=4, distances=distances, temperature=0.05), [2, 0]
    )


def test_a_small_temperature_does_not_overflow():
    distances = np.array([[0.1, 1.9, 2.0]])
    labels = np.array([[1, 0, 0]])
    assert knn.predict(labels, classes=2, distances=distances, temperature=1e-4) == [1]


def test_bad_arguments_are_refused():
    x, labels = np.eye(3), np.arange(3)
    with pytest.raises(ValueError, match=r"bank_labels has shape \(4,\); expected \(3,\)"):
        knn.accuracies(x, labels, x, np.zeros(4, int))
    with pytest.raises(ValueError, match="query_labels holds other numbers"):
        knn.accuracies(x, labels - 1, x, labels)
    with pytest.raises(ValueError, match="a temperature weighs cosines"):
        knn.accuracies(x, labels, x, labels, metric="euclidean", temperatures=(0.1,))
    with pytest.raises(ValueError, match="temperature is 0"):
        knn.predict(labels[None], classes=3, distances=np.zeros((1, 3)), temperature=0.0)
    with pytest.raises(ValueError, match="needs the distance"):
        knn.predict(labels[None], classes=3, temperature=1.0)
    with pytest.raises(ValueError, match="k is 4"):
        knn.accuracies(x, labels, x, labels, ks=(4,))
