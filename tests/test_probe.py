"""The linear probe against scikit-learn and float64 gradients, its held-out rows, few labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import probe
from simclr_jax.probe import few_labels, fit, linear_probe, logits

GRID = (1e-3, 1e-1, 10.0)


def mixture(count, width=20, classes=3, seed=0, *, spread=0.3):
    """Overlapping Gaussians, one a class, with unequal numbers of rows.

    Most tests take 257 to 512 rows of the default width and classes, which share their programs.
    """
    rng = np.random.default_rng(seed)
    centres = spread * np.random.default_rng(99).standard_normal((classes, width))
    share = np.arange(1, classes + 1) / np.sum(np.arange(1, classes + 1))
    labels = rng.choice(classes, count, p=share)
    labels[: 2 * classes] = np.arange(2 * classes) % classes
    return (centres[labels] + rng.standard_normal((count, width))).astype(np.float32), labels


def ill_conditioned(features):
    """The same rows mixed so that their covariance has a condition number of 1e8, far from 0, rescaled."""
    rng = np.random.default_rng(7)
    width = features.shape[1]
    mix = np.linalg.qr(rng.standard_normal((width, width)))[0]
    mixed = (features * np.logspace(0, -4, width)) @ mix
    return (50 + mixed * np.logspace(-1, 1, width)).astype(np.float32)


def standardised(features):
    features = np.asarray(features, np.float64)
    return (features - features.mean(0)) / features.std(0)


def gradient(classifier, features, labels, l2):
    """Gradients of the documented objective in float64."""
    rows = standardised(features)
    weights, bias = (np.asarray(x, np.float64) for x in (classifier.weights, classifier.bias))
    scores = rows @ weights + bias
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = odds / odds.sum(axis=1, keepdims=True) - np.eye(len(bias))[labels]
    return rows.T @ error / len(rows) + l2 * weights, error.mean(axis=0)


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("count", "classes"), [(300, 2), (5000, 4)])
def test_equals_scikit_learn(count, classes, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels = mixture(count, classes=classes)
    test, test_labels = mixture(2000, classes=classes, seed=1)
    # For two classes scikit-learn fits the difference of their weights, which costs half as much here.
    c = (2 if classes == 2 else 1) / (l2 * count)
    reference = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=5000)
    reference.fit(standardised(train), labels)
    expected = reference.predict((test - train.astype(np.float64).mean(0)) / train.astype(np.float64).std(0))

    classifier = fit(train, labels, classes=classes, l2=l2)
    predicted = np.argmax(logits(classifier, test), axis=1)
    assert abs(np.mean(predicted == test_labels) - np.mean(expected == test_labels)) < 0.003
    assert np.mean(predicted == expected) > 0.997
    weights, bias = np.asarray(classifier.weights), np.asarray(classifier.bias)
    if classes == 2:
        weights, bias = weights[:, 1:] - weights[:, :1], bias[1:] - bias[:1]
    np.testing.assert_allclose(weights, reference.coef_.T, atol=2e-3)
    np.testing.assert_allclose(bias, reference.intercept_, atol=2e-3)


@pytest.mark.parametrize("l2", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize(("count", "width"), [(3000, 40), (60, 200)])
def test_gradient_in_float64_is_small(count, width, l2):
    # 60 rows of 200 features are separable, and fewer than the axes of the features.
    train, labels = mixture(count, width)
    train = ill_conditioned(train)
    weights_gradient, bias_gradient = gradient(fit(train, labels, classes=3, l2=l2), train, labels, l2)
    # At weights 0 they are about 0.2.
    assert np.abs(weights_gradient).max() < 3e-4
    assert np.abs(bias_gradient).max() < 3e-4


def test_constant_feature_is_left_out():
    train, labels = mixture(400)
    train[:, 2] = 0.1  # not a float32
    classifier = fit(train, labels, classes=3, l2=1e-3)
    assert np.isinf(classifier.std[2])
    expected = logits(classifier, train)
    train[:, 2] = np.arange(400)
    np.testing.assert_array_equal(logits(classifier, train), expected)
    train[:, 2] = 1e4
    np.testing.assert_allclose(logits(fit(train, labels, classes=3, l2=1e-3), train), expected, atol=2e-3)


def test_bias_is_not_penalised():
    train, labels = mixture(500)
    classifier = fit(train, labels, classes=3, l2=1e5)
    frequencies = np.bincount(labels) / len(labels)
    np.testing.assert_allclose(jax.nn.softmax(classifier.bias), frequencies, atol=1e-4)
    assert np.abs(classifier.weights).max() < 1e-4


def test_offset_and_scale_of_a_feature_do_not_matter():
    train, labels = mixture(500)
    train = np.round(train * 16) / 16  # exact after the shift
    expected = logits(fit(train, labels, classes=3, l2=1e-2), train)
    moved = 4 * train + 2048
    np.testing.assert_allclose(logits(fit(moved, labels, classes=3, l2=1e-2), moved), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_narrow_features_are_fitted_in_float32(dtype):
    rng = np.random.default_rng(0)
    narrow = jnp.asarray(rng.integers(0, 256, (300, 20)), dtype)
    labels = rng.integers(0, 3, 300)
    from_narrow = fit(narrow, labels, classes=3, l2=1e-2)
    from_wide = fit(narrow.astype(jnp.float32), labels, classes=3, l2=1e-2)
    for one, other in zip(from_narrow, from_wide, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        logits(from_wide, narrow), logits(from_wide, narrow.astype(jnp.float32)), rtol=1e-5
    )


def test_row_counts_that_fill_the_same_blocks_share_a_program():
    def fit_rows(count):
        train, labels = mixture(count)
        fit(train, labels, classes=3, l2=1e-2)
        return probe._solve._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    assert fit_rows(257) == fit_rows(512)


def test_held_out_accuracy_is_that_of_separate_fits():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels = mixture(400)
    (found,) = linear_probe(train, labels, train, labels, classes=3, seeds=[5], l2_grid=GRID)
    folds = probe._folds(jax.random.key(5), labels, 5)
    rows = standardised(train)
    for l2, accuracy in zip(GRID, found.held_out, strict=True):
        hits = 0
        for fold in range(5):
            seen = folds != fold
            reference = linear_model.LogisticRegression(C=1 / (l2 * seen.sum()), tol=1e-9, max_iter=5000)
            reference.fit(rows[seen], labels[seen])
            hits += np.sum(reference.predict(rows[~seen]) == labels[~seen])
        assert abs(accuracy - hits / 400) <= 2 / 400
    assert found.l2 == GRID[int(np.argmax(found.held_out))]


def test_large_sets_hold_out_one_tenth(monkeypatch):
    monkeypatch.setattr(probe, "_CROSS_VALIDATED", 499)
    train, labels = mixture(500)
    (found,) = linear_probe(train, labels, train, labels, classes=3, seeds=[5], l2_grid=GRID)
    hits = 50 * np.asarray(found.held_out)
    np.testing.assert_allclose(hits, np.round(hits), atol=1e-9)
    assert found.held_out[GRID.index(found.l2)] == max(found.held_out)


@pytest.mark.parametrize("count", [5, 10])
def test_folds_are_stratified_and_drawn_anew(count):
    labels = np.random.default_rng(0).choice(4, 997, p=[0.1, 0.2, 0.3, 0.4])
    one, other = (probe._folds(jax.random.key(seed), labels, count) for seed in (0, 1))
    for label in (*range(4), None):
        sizes = np.bincount(one[labels == label] if label is not None else one, minlength=count)
        assert sizes.max() - sizes.min() <= 1
    assert 0.5 / count < np.mean(one == other) < 2 / count


@pytest.mark.parametrize("classes", [3, 7])
def test_scores_are_those_of_the_classifier_with_the_chosen_penalty(classes):
    train, labels = mixture(400, classes=classes)
    test, test_labels = mixture(300, classes=classes, seed=1)
    probes = linear_probe(train, labels, test, test_labels, classes=classes, seeds=[0, 1], l2_grid=GRID)
    for found in probes:
        expected = np.asarray(logits(fit(train, labels, classes=classes, l2=found.l2), test), np.float64)
        order = np.argsort(-expected, axis=1)
        np.testing.assert_array_equal(found.predicted, order[:, 0])
        assert found.accuracy == np.mean(order[:, 0] == test_labels)
        assert found.predicted.dtype == np.int32
        if classes == 3:
            assert found.top5 is None
        else:
            assert found.top5 == np.mean((order[:, :5] == test_labels[:, None]).any(axis=1)) < 1


def test_penalty_is_chosen_without_the_test_rows():
    train, labels = mixture(300)
    test, test_labels = mixture(500, seed=1)

    def run(test, test_labels, seed):
        return linear_probe(train, labels, test, test_labels, classes=3, seeds=[seed], l2_grid=GRID)[0]

    found = run(test, test_labels, 0)
    again = run(test, test_labels, 0)
    assert again[:4] == found[:4]
    np.testing.assert_array_equal(again.predicted, found.predicted)
    wrong = run(test, (test_labels + 1) % 3, 0)
    assert (wrong.l2, wrong.held_out) == (found.l2, found.held_out)
    assert wrong.accuracy < found.accuracy
    elsewhere = run(test[::-1] + 3, test_labels, 0)
    assert (elsewhere.l2, elsewhere.held_out) == (found.l2, found.held_out)
    assert run(test, test_labels, 1).held_out != found.held_out


def test_equal_penalties_give_the_larger():
    train, labels = mixture(300, spread=20.0)
    (found,) = linear_probe(train, labels, train, labels, classes=3, seeds=[0], l2_grid=(1e-4, 1e-2, 1e-3))
    assert (found.accuracy, found.l2, found.held_out) == (1.0, 1e-2, (1.0, 1.0, 1.0))


def test_few_labels_draws_as_many_rows_of_each_class(monkeypatch):
    train, labels = mixture(500)
    train[:, 0] = np.arange(500)
    seen = []

    def record(rows, row_labels, *_):
        seen.append((np.asarray(rows[:, 0], int), row_labels))
        return [probe.Probe(0.0, 0.0, (), None, np.zeros(0, np.int32))]

    monkeypatch.setattr(probe, "_probes", record)
    for draws in (3, 2):
        few_labels(train, labels, train, labels, classes=3, per_class=20, draws=draws, seed=4)
    for rows, row_labels in seen:
        assert len(set(rows)) == 60
        np.testing.assert_array_equal(labels[rows], row_labels)
        np.testing.assert_array_equal(np.bincount(row_labels), [20, 20, 20])
    np.testing.assert_array_equal(seen[0][0], seen[3][0])
    np.testing.assert_array_equal(seen[1][0], seen[4][0])
    assert not np.array_equal(seen[0][0], seen[1][0])


def test_few_labels_reach_less_than_many():
    train, labels = mixture(3000)
    test, test_labels = mixture(1000, seed=1)

    def mean_accuracy(per_class):
        options = {"classes": 3, "draws": 3, "seed": 0, "l2_grid": (0.1,)}
        probes = few_labels(train, labels, test, test_labels, per_class=per_class, **options)
        assert len(probes) == 3
        return np.mean([found.accuracy for found in probes])

    assert 1 / 3 < mean_accuracy(5) < mean_accuracy(150) - 0.05


def test_one_penalty_needs_but_one_example():
    x, y = mixture(100)
    (found,) = few_labels(x, y, x, y, classes=3, per_class=1, draws=1, seed=0, l2_grid=(0.1,))
    assert (found.l2, found.held_out) == (0.1, ())
    with pytest.raises(ValueError, match="class 0 has 1 example; to choose among 7 penalties"):
        few_labels(x, y, x, y, classes=3, per_class=1, draws=1, seed=0)


def test_bad_arguments_are_refused():
    x, y = mixture(60)
    y = np.sort(y)
    with pytest.raises(ValueError, match="classes is 1; expected at least 2"):
        fit(x, y, classes=1, l2=1.0)
    with pytest.raises(ValueError, match="class 3 has no example"):
        fit(x, y, classes=4, l2=1.0)
    with pytest.raises(ValueError, match="labels holds 2; expected 0 to 1"):
        fit(x, y, classes=2, l2=1.0)
    with pytest.raises(ValueError, match="labels holds -1; expected 0 to 2"):
        fit(x, y - 1, classes=3, l2=1.0)
    with pytest.raises(ValueError, match=r"labels is float64 \(60,\); expected integers \(60,\)"):
        fit(x, y.astype(float), classes=3, l2=1.0)
    with pytest.raises(ValueError, match=r"labels is int64 \(59,\); expected integers \(60,\)"):
        fit(x, y[1:], classes=3, l2=1.0)
    with pytest.raises(ValueError, match=r"features has shape \(60,\)"):
        fit(x[:, 0], y, classes=3, l2=1.0)
    for l2 in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="the penalties are"):
            fit(x, y, classes=3, l2=l2)
    with pytest.raises(ValueError, match=r"features has shape \(60, 19\); expected \[N, 20\]"):
        logits(fit(x, y, classes=3, l2=1.0), x[:, 1:])
    with pytest.raises(ValueError, match=r"the penalties are \(\)"):
        linear_probe(x, y, x, y, classes=3, seeds=[0], l2_grid=())
    with pytest.raises(ValueError, match="test has 19 features and train 20"):
        linear_probe(x, y, x[:, 1:], y, classes=3, seeds=[0])
    with pytest.raises(ValueError, match="test_labels holds 3; expected 0 to 2"):
        linear_probe(x, y, x, y + 1, classes=3, seeds=[0])
    rarest = np.bincount(y)[0]
    with pytest.raises(ValueError, match=f"per_class is 50; expected 1 to {rarest}, the examples of class 0"):
        few_labels(x, y, x, y, classes=3, per_class=50, draws=1, seed=0)
    with pytest.raises(ValueError, match="draws is 0"):
        few_labels(x, y, x, y, classes=3, per_class=2, draws=0, seed=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    x, y = mixture(60)
    broken = x.copy()
    broken[7, 1] = bad
    with pytest.raises(ValueError, match="train holds a NaN or an infinity"):
        linear_probe(broken, y, x, y, classes=3, seeds=[0])
    with pytest.raises(ValueError, match="test holds a NaN or an infinity"):
        linear_probe(x, y, broken, y, classes=3, seeds=[0])
