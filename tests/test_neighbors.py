"""Nearest neighbours against scikit-learn, ties, tile edges."""

import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import neighbors
from simclr_jax.neighbors import nearest, one_nn_accuracy


def rows(count, width, seed):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def slow_nearest(queries, bank, k, metric):
    """All distances in float64, and a stable sort."""
    queries, bank = np.asarray(queries, np.float64), np.asarray(bank, np.float64)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
        distances = 1 - queries @ bank.T
    else:
        distances = np.linalg.norm(queries[:, None] - bank[None], axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 7])
def test_equals_scikit_learn(metric, k):
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")
    queries, bank = rows(150, 20, 0), rows(700, 20, 1) + 3
    search = sklearn_neighbors.NearestNeighbors(algorithm="brute", metric=metric).fit(bank)
    expected_distances, expected_indices = search.kneighbors(queries, k)
    distances, indices = nearest(queries, bank, k, metric, tile=128)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5, atol=1e-6)
    assert (distances.dtype, indices.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("count", "bank_count"), [(1, 3), (127, 128), (129, 257), (256, 513)])
def test_tile_edges(count, bank_count, k, metric):
    queries, bank = rows(count, 5, 0), rows(bank_count, 5, 1)
    expected_distances, expected_indices = slow_nearest(queries, bank, k, metric)
    distances, indices = nearest(queries, bank, k, metric, tile=100)
    assert distances.shape == indices.shape == (count, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 4])
def test_ties_go_to_the_lowest_index(metric, k):
    # Each row stands in the bank at i, 90 + i, 180 + i and 270 + i: within and across tiles.
    distinct = rows(90, 33, 0)
    _, indices = nearest(distinct, np.tile(distinct, (4, 1)), k, metric, tile=128)
    np.testing.assert_array_equal(indices, np.arange(90)[:, None] + 90 * np.arange(k)[None])


def test_k_may_be_the_whole_bank_and_exceed_a_tile():
    queries, bank = rows(5, 4, 0), rows(300, 4, 1)
    _, indices = nearest(queries, bank, 300, tile=128)
    np.testing.assert_array_equal(indices, slow_nearest(queries, bank, 300, "euclidean")[1])


def test_distant_features_do_not_cancel():
    queries, bank = rows(50, 8, 0) + 1000, rows(200, 8, 1) + 1000
    expected_distances, expected_indices = slow_nearest(queries, bank, 1, "euclidean")
    distances, indices = nearest(queries, bank)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_narrow_inputs_are_compared_in_float32(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 48))
    queries, bank = jnp.asarray(pixels[:100], dtype), jnp.asarray(pixels[100:], dtype)
    expected_distances, expected_indices = slow_nearest(queries, bank, 1, "euclidean")
    distances, indices = nearest(queries, bank)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5)


def test_cosine_of_a_zero_row_is_at_distance_one():
    distances, indices = nearest(np.zeros((1, 3)), np.eye(3), metric="cosine")
    assert (distances[0, 0], indices[0, 0]) == (1, 0)


def test_accuracy():
    bank = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    queries = np.array([[1.0, 0.0], [9.0, 1.0], [0.0, 8.0], [0.0, 1.0]])
    accuracy = one_nn_accuracy(queries, np.array([5, 6, 7, 7]), bank, np.array([5, 6, 7]))
    assert accuracy == 0.75
    assert isinstance(accuracy, float)


def test_same_shapes_compile_once():
    compiled = neighbors._nearest._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    for seed in range(2):
        nearest(rows(10, 11, seed), rows(20, 11, seed + 2))
    assert neighbors._nearest._cache_size() == compiled + 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_inputs_that_are_not_finite_are_refused(bad, metric):
    good, broken = rows(10, 4, 0), rows(10, 4, 1)
    broken[3, 2] = bad
    for arguments in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="NaN or an infinity"):
            nearest(*arguments, metric=metric)


def test_bad_arguments_are_refused():
    x = rows(5, 4, 0)
    with pytest.raises(ValueError, match="k is 6; expected 1 to 5"):
        nearest(x, x, 6)
    with pytest.raises(ValueError, match="k is 0"):
        nearest(x, x, 0)
    with pytest.raises(ValueError, match="metric is 'l1'; expected one of euclidean, cosine"):
        nearest(x, x, 1, "l1")
    with pytest.raises(ValueError, match="tile is 0"):
        nearest(x, x, tile=0)
    with pytest.raises(ValueError, match=r"queries has shape \(5, 3\)"):
        nearest(x[:, :3], x)
    with pytest.raises(ValueError, match=r"bank has shape \(0, 4\)"):
        nearest(x, x[:0])
    with pytest.raises(ValueError, match=r"bank_labels has shape \(4,\); expected \(5,\)"):
        one_nn_accuracy(x, np.zeros(5), x, np.zeros(4))
