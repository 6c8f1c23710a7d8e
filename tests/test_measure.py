"""The measurements against scikit-learn and the probe called by itself."""

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from simclr_jax import probe
from simclr_jax.measure import Features, Questions, measure, standard_error

CLASSES = 3
QUESTIONS = Questions(ks=(1, 7), temperatures=(0.1, 0.5), seeds=(4, 2), per_class=(3, 6), draws=3)


def make_features():
    """Overlapping classes, so that no two answers are the same by chance."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % CLASSES
    rows = (0.8 * np.eye(CLASSES, 6)[labels] + rng.normal(size=(60, 6)) + 0.5).astype(np.float32)
    queries = np.arange(41) % CLASSES
    found = (0.8 * np.eye(CLASSES, 6)[queries] + rng.normal(size=(41, 6)) + 0.5).astype(np.float32)
    return Features(rows, labels, found, queries, CLASSES)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def features():
    return make_features()


@pytest.fixture(scope="module")
def found(features):
    return measure(features, QUESTIONS)


def summary(probes, queries):
    accuracies = [one.accuracy for one in probes]
    mean = np.mean(accuracies)
    top5 = [one.top5 for one in probes]
    return {
        "accuracy": pytest.approx(mean),
        "top5": None if top5[0] is None else pytest.approx(np.mean(top5)),
        "std": pytest.approx(np.std(accuracies, ddof=1)),
        "standard_error": pytest.approx(np.sqrt(mean * (1 - mean) / queries)),
        "accuracies": accuracies,
        "l2": [one.l2 for one in probes],
    }


def without_confusion(linear):
    return {name: value for name, value in linear.items() if name != "confusion"}


def test_the_grid_is_scikit_learns(features, found):
    asked = [("cosine", 1, None), ("cosine", 7, 0.1), ("cosine", 7, 0.5), ("cosine", 7, None)]
    asked += [("euclidean", 1, None), ("euclidean", 7, None)]
    assert [(entry["metric"], entry["k"], entry["temperature"]) for entry in found["knn"]] == asked
    for entry in found["knn"]:
        t = entry["temperature"]
        weights: Any = "uniform" if t is None else lambda distances, t=t: np.exp((1 - distances) / t)
        reference = KNeighborsClassifier(entry["k"], metric=entry["metric"], weights=weights)
        reference.fit(features.bank, features.bank_labels)
        hits = reference.predict(features.queries) == features.query_labels
        assert entry["accuracy"] == pytest.approx(hits.mean()), entry
        assert entry["standard_error"] == pytest.approx(np.std(hits) / np.sqrt(len(hits)))
    assert len({entry["accuracy"] for entry in found["knn"]}) > 3  # or a mix-up would not show
    assert found["width"] == 6


def test_the_probes_are_those_of_all_labels_and_of_few(features, found):
    bank, labels, queries, query_labels, classes = features
    linear = probe.linear_probe(bank, labels, queries, query_labels, classes=classes, seeds=(4, 2))
    assert without_confusion(found["linear"]) == summary(linear, len(queries))
    assert [entry["labels_per_class"] for entry in found["few_labels"]] == [3, 6]
    for entry in found["few_labels"]:
        per_class = entry["labels_per_class"]
        drawn = probe.few_labels(
            bank, labels, queries, query_labels, classes=classes, per_class=per_class, draws=3, seed=4
        )
        assert entry == {"labels_per_class": per_class, **summary(drawn, len(queries))}
        assert entry["std"] > 0


def test_the_confusion_is_that_of_the_probe(features, found):
    bank, labels, queries, query_labels, classes = features
    (first,) = probe.linear_probe(bank, labels, queries, query_labels, classes=classes, seeds=(4,))
    counts = confusion_matrix(query_labels, first.predicted)
    np.testing.assert_array_equal(found["linear"]["confusion"], counts)
    assert not any("confusion" in entry for entry in found["few_labels"])


def test_more_classes_have_a_top5_and_very_many_no_confusion(monkeypatch):
    labels = np.arange(16) % 8
    rng = np.random.default_rng(0)
    bank, queries = (np.eye(8, 6)[labels] + rng.normal(size=(16, 6)).astype(np.float32) for _ in range(2))
    asked = Features(bank, labels, queries, labels, 8)
    briefly = Questions(ks=(1,), temperatures=(), seeds=(4,), per_class=(2,), draws=1)
    found = measure(asked, briefly)
    (expected,) = probe.linear_probe(bank, labels, queries, labels, classes=8, seeds=(4,))
    assert found["linear"]["top5"] == expected.top5
    assert found["linear"]["accuracy"] < found["linear"]["top5"] < 1
    assert 0 < found["few_labels"][0]["top5"] < 1
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setattr("simclr_jax.measure.MAX_CONFUSION", 7)
    found["linear"]["confusion"] = None
    assert measure(asked, briefly) == found


def test_the_same_again_and_json_keeps_it(features, found):
    assert measure(features, QUESTIONS) == found
    assert json.loads(json.dumps(found)) == found


def test_augmented_rows_teach_the_probe_of_all_labels_and_nothing_else(features, found):
    asked = []

    def augmented(seed):
        """The rows twice, each copy moved in another way."""
        asked.append(seed)
        moved = [features.bank + np.random.default_rng((seed, copy)).normal(size=6) for copy in range(2)]
        return np.concatenate(moved).astype(np.float32)

    other = measure(features, QUESTIONS, augmented=augmented)
    assert asked == [4, 2]
    labels = np.concatenate([features.bank_labels] * 2)
    probes = [
        probe.linear_probe(
            augmented(seed), labels, features.queries, features.query_labels, classes=CLASSES, seeds=[seed]
        )[0]
        for seed in (4, 2)
    ]
    assert without_confusion(other["linear"]) == summary(probes, len(features.queries))
    first, second = (confusion_matrix(features.query_labels, found.predicted) for found in probes)
    np.testing.assert_array_equal(other["linear"]["confusion"], first)
    assert (first != second).any()
    assert other["linear"]["accuracies"] != found["linear"]["accuracies"]
    assert (other["knn"], other["few_labels"]) == (found["knn"], found["few_labels"])


def test_a_single_seed_has_no_deviation(features, found):
    briefly = measure(features, QUESTIONS._replace(seeds=(4,), per_class=(), temperatures=()))
    assert briefly["linear"]["std"] is None
    assert briefly["linear"]["accuracies"] == found["linear"]["accuracies"][:1]
    assert briefly["few_labels"] == []
    assert briefly["knn"] == [entry for entry in found["knn"] if entry["temperature"] is None]


def test_the_standard_error_is_the_spread_of_measured_accuracies():
    hits = np.random.default_rng(0).binomial(50, 0.8, size=20_000) / 50
    assert standard_error(0.8, 50) == pytest.approx(hits.std(), rel=0.02)
    assert standard_error(0.0, 50) == standard_error(1.0, 50) == 0.0
