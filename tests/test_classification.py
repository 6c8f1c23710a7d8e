"""Accuracies and the confusion matrix against scikit-learn, and where logits are equal or NaN."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from simclr_jax.classification import confusion, scores

NAN, INF = np.nan, np.inf


def draw(rows, classes, *, seed=0):
    """Logits of which the label's are somewhat higher, all of them different."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.permutation(rows * classes).reshape(rows, classes) / (rows * classes)
    logits[np.arange(rows), labels] += 0.3
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("classes", [6, 10, 130])
def test_accuracies_are_those_of_scikit_learn(classes):
    logits, labels = draw(500, classes)
    found = scores(logits, labels, classes)
    every = range(classes)
    assert found.top1 == top_k_accuracy_score(labels, logits, k=1, labels=every)
    assert found.top5 == top_k_accuracy_score(labels, logits, k=5, labels=every)
    assert found.top1 == accuracy_score(labels, found.predicted)
    assert found.top5 is not None and 0.1 < found.top1 < found.top5 < 1
    assert found.predicted.dtype == np.int32
    np.testing.assert_array_equal(found.predicted, logits.argmax(1))


def test_of_five_classes_or_fewer_there_is_no_top5():
    for classes in (2, 3, 5):
        logits, labels = draw(40, classes)
        found = scores(logits, labels, classes)
        assert found.top5 is None
        assert found.top1 == np.mean(logits.argmax(1) == labels)


def test_equal_logits_are_ordered_as_by_a_stable_sort():
    rng = np.random.default_rng(1)
    logits, labels = rng.integers(0, 3, (400, 12)).astype(np.float32), rng.integers(0, 12, 400)
    logits[logits == 0] = -INF
    order = np.argsort(-logits, axis=1, kind="stable")
    found = scores(logits, labels, 12)
    np.testing.assert_array_equal(found.predicted, order[:, 0])
    assert found.top1 == np.mean(order[:, 0] == labels)
    assert found.top5 == np.mean((order[:, :5] == labels[:, None]).any(1))
    # A collapsed classifier, all of whose logits are equal, gets the share of class 0, and of 0 to 4.
    flat = scores(np.zeros((24, 12)), np.arange(24) % 12, 12)
    assert (flat.top1, flat.top5) == (1 / 12, 5 / 12)


@pytest.mark.parametrize(
    ("row", "label", "predicted"),
    [
        ([NAN, NAN, NAN], 0, 1),
        ([NAN, NAN, NAN], 2, 0),
        ([NAN, 1, 2], 0, 2),
        ([NAN, -INF, -INF], 0, 1),
        ([-INF, -INF, NAN], 2, 0),
        ([1, NAN, 0], 0, 1),
        ([INF, NAN, 0], 0, 1),
        ([INF, NAN, 0], 1, 0),
        ([0, 9, NAN], 1, 2),
    ],
)
def test_a_nan_counts_against_the_label(row, label, predicted):
    found = scores(np.array([row]), np.array([label]), 3)
    assert found.top1 == 0
    assert found.predicted == [predicted]


@pytest.mark.parametrize(
    ("row", "label", "place"),
    [
        ([5, 4, 3, 2, 1, 0, -1], 4, 4),
        ([NAN, 4, 3, 2, 1, 0, -1], 4, 4),
        ([NAN, 4, 3, 2, 1, NAN, -1], 4, 5),
        ([5, 4, 3, 2, NAN, 0, -1], 4, 6),
    ],
)
def test_a_nan_takes_one_of_the_first_five_places(row, label, place):
    found = scores(np.array([row]), np.array([label]), 7)
    assert (found.top1, found.top5) == (0, place < 5)


def test_narrow_logits_and_those_of_jax():
    logits, labels = draw(60, 8)
    expected = scores(np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64), labels, 8)
    found = scores(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels), 8)
    assert found[:2] == expected[:2]
    np.testing.assert_array_equal(found.predicted, expected.predicted)
    whole = scores(np.arange(12).reshape(2, 6), np.array([5, 0], np.uint8), 6)
    assert (whole.top1, whole.top5) == (0.5, 0.5)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_the_confusion_matrix_is_that_of_scikit_learn(dtype):
    rng = np.random.default_rng(0)
    labels, predicted = (rng.integers(0, 16, 300).astype(dtype) for _ in range(2))
    counts = confusion(labels, predicted, 17)  # 17 * 16 is more than a uint8 holds
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predicted, labels=range(17)))
    assert not counts[16].any() and not counts[:, 16].any()


def test_the_diagonal_of_the_confusion_matrix_is_top1():
    logits, labels = draw(200, 7)
    logits[:20] = NAN
    found = scores(logits, labels, 7)
    assert np.trace(confusion(labels, found.predicted, 7)) / 200 == found.top1 > 0


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "message"),
    [
        (np.zeros((2, 3)), [0, 1], 4, r"logits has shape \(2, 3\); expected \(2, 4\)"),
        (np.zeros((3, 4)), [0, 1], 4, r"logits has shape \(3, 4\); expected \(2, 4\)"),
        (np.zeros(2), [0, 1], 4, r"logits has shape \(2,\)"),
        (np.zeros((2, 1)), [0, 0], 1, "classes is 1; expected at least 2"),
        (np.zeros((2, 4)), [0, 4], 4, "labels holds 4; expected 0 to 3"),
        (np.zeros((2, 4)), [-1, 0], 4, "labels holds -1; expected 0 to 3"),
        (np.zeros((2, 4)), [0.0, 1.0], 4, r"labels is float64 \(2,\); expected integers \[N\]"),
        (np.zeros((1, 4)), [[0]], 4, r"labels is int64 \(1, 1\)"),
        (
            np.zeros((0, 4)),
            np.zeros(0, int),
            4,
            r"labels is int64 \(0,\); expected integers \[N\] with N >= 1",
        ),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits, labels, classes, message):
    labels = np.array(labels)
    with pytest.raises(ValueError, match=message):
        scores(logits, labels, classes)
    if "logits" not in message:
        with pytest.raises(ValueError, match=message):
            confusion(labels, labels, classes)


def test_predictions_that_do_not_fit_are_refused():
    labels = np.arange(2)
    with pytest.raises(ValueError, match=r"predicted has shape \(3,\); expected \(2,\)"):
        confusion(labels, np.zeros(3, int), 2)
    with pytest.raises(ValueError, match="predicted holds 2; expected 0 to 1"):
        confusion(labels, 2 * labels, 2)
