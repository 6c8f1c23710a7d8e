"""Nearest neighbours against scikit-learn and float64: ties, edges, numbers that are hard for float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import neighbors
from simclr_jax.neighbors import nearest

METRICS = pytest.mark.parametrize("metric", neighbors.METRICS)
PART = 700 * 5 * 4 / 2**20  # MiB of 700 rows of 5 float32


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


@METRICS
@pytest.mark.parametrize("k", [1, 7])
def test_equals_scikit_learn(metric, k):
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")
    queries, bank = rows(150, 20, 0), rows(700, 20, 1) + 3
    search = sklearn_neighbors.NearestNeighbors(algorithm="brute", metric=metric).fit(bank)
    expected_distances, expected_indices = search.kneighbors(queries, k)
    distances, indices = nearest(queries, bank, k, metric)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5, atol=1e-6)
    assert (distances.dtype, indices.dtype) == (np.float64, np.int32)


@METRICS
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize(("count", "bank_count"), [(1, 20), (127, 128), (129, 2049), (7, 9001)])
def test_edges_of_tiles_and_blocks(count, bank_count, k, metric):
    queries, bank = rows(count, 5, 0), rows(bank_count, 5, 1)
    expected_distances, expected_indices = slow_nearest(queries, bank, k, metric)
    distances, indices = nearest(queries, bank, k, metric)
    assert distances.shape == indices.shape == (count, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12, atol=1e-12)


@METRICS
@pytest.mark.parametrize("k", [1, 30])
@pytest.mark.parametrize("limit", [{"_QUERIES": 40}, {"_QUERY_NUMBERS": 5 * 40}])
def test_parts_of_the_bank_and_the_queries_give_the_same(monkeypatch, limit, k, metric):
    asked = []

    def search(queries, **options):
        if options["dtype"] == jnp.float32:
            asked.append(len(queries))
        return whole_search(queries, **options)

    whole_search = neighbors._search
    for name, value in limit.items():
        monkeypatch.setattr(neighbors, name, value)
    monkeypatch.setattr(neighbors, "_search", search)
    queries, bank = rows(100, 5, 0), rows(3003, 5, 1)
    whole = nearest(queries, bank, k, metric)
    for other in (bank, jnp.asarray(bank)):
        for expected, found in zip(whole, nearest(queries, other, k, metric, part_mb=PART), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert asked[:3] == [40, 40, 20]


def test_k_beyond_a_part_and_a_device():
    queries, bank = rows(5, 5, 0), rows(1500, 5, 1)
    _, indices = nearest(queries, bank, 1500, part_mb=PART)
    np.testing.assert_array_equal(indices, slow_nearest(queries, bank, 1500, "euclidean")[1])


def test_the_bank_is_split_over_the_devices():
    assert jax.local_device_count() == 4
    queries, bank = rows(10, 5, 0), rows(2, 5, 1)  # two devices have nothing to search
    _, indices = nearest(queries, bank, 2)
    np.testing.assert_array_equal(indices, slow_nearest(queries, bank, 2, "euclidean")[1])


@METRICS
@pytest.mark.parametrize("k", [1, 4])
def test_ties_go_to_the_lowest_index(metric, k):
    # Each row stands in the bank at i, 90 + i, 180 + i, ...: within and across tiles, and devices.
    distinct = rows(90, 33, 0)
    distances, indices = nearest(distinct, np.tile(distinct, (130, 1)), k, metric)
    np.testing.assert_array_equal(indices, np.arange(90)[:, None] + 90 * np.arange(k)[None])
    np.testing.assert_allclose(distances, 0, atol=1e-15)


@METRICS
def test_a_bank_of_equal_rows_gives_the_first_ones(metric):
    bank = np.ones((5000, 7), np.float32)
    _, indices = nearest(rows(5, 7, 0), bank, 3, metric)
    np.testing.assert_array_equal(indices, np.tile(np.arange(3), (5, 1)))


def test_distant_features_do_not_cancel():
    queries, bank = rows(50, 8, 0) + 1000, rows(200, 8, 1) + 1000
    expected_distances, expected_indices = slow_nearest(queries, bank, 1, "euclidean")
    distances, indices = nearest(queries, bank)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


def hard(case):
    """Queries and bank whose order float32 cannot tell, all of it or some."""
    generator = np.random.default_rng(2)
    queries, bank = generator.standard_normal((60, 16)), generator.standard_normal((3000, 16))
    if case == "tiny differences":  # all rows within 1e-9 of one point, relative to its length
        return 1000 + 1e-6 * queries, 1000 + 1e-6 * bank
    if case == "large norms":
        return 1e18 * queries, 1e18 * bank
    if case == "beyond float32":
        return 1e100 * queries, 1e100 * bank
    if case == "one row outweighs all":
        bank[1234] = 1e25
        return queries, bank
    if case == "small beside one":
        bank *= 1e-30
        bank[1234] = 1.0
        return 1e-30 * queries, bank
    assert case == "near duplicates"
    bank[1500:] = bank[:1500] * (1 + 1e-9 * generator.standard_normal((1500, 16)))
    return bank[:60] + 1e-9 * queries, bank


@METRICS
@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize(
    "case",
    [
        *("tiny differences", "large norms", "beyond float32", "one row outweighs all", "small beside one"),
        "near duplicates",
    ],
)
def test_the_order_is_that_of_float64(case, k, metric):
    queries, bank = hard(case)
    if metric == "cosine":  # 1 - cos would lose what |q - b|² / 2 keeps
        queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank))
        expected_distances, expected_indices = slow_nearest(queries, bank, k, "euclidean")
        expected_distances = expected_distances**2 / 2
    else:
        expected_distances, expected_indices = slow_nearest(queries, bank, k, metric)
    distances, indices = nearest(queries, bank, k, metric)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6, atol=1e-30)
    if not (case == "tiny differences" and metric == "cosine"):  # there float64 cannot tell either
        np.testing.assert_array_equal(indices, expected_indices)


@METRICS
def test_equals_scikit_learn_where_float32_does_not(metric):
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")
    queries, bank = hard("near duplicates")
    search = sklearn_neighbors.NearestNeighbors(algorithm="brute", metric=metric).fit(bank)
    expected = search.kneighbors(queries, 2, return_distance=False)
    # Of two rows 1e-8 apart scikit-learn, which expands the square, may take either.
    _, indices = nearest(queries, bank, 2, metric)
    np.testing.assert_array_equal(np.sort(indices % 1500, axis=1), np.sort(expected % 1500, axis=1))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_narrow_inputs_are_compared_in_full(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 48))
    queries, bank = jnp.asarray(pixels[:100], dtype), jnp.asarray(pixels[100:], dtype)
    expected_distances, expected_indices = slow_nearest(queries, bank, 1, "euclidean")
    distances, indices = nearest(queries, bank)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


def test_zero_rows_are_at_cosine_distance_one():
    bank = np.array([[0, 0], [-1, 0], [0, 1], [1, 0], [0, 0]])
    distances, indices = nearest(np.array([[2, 0], [0, 0]]), bank, 5, "cosine")
    np.testing.assert_allclose(distances, [[0, 1, 1, 1, 2], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(indices, [[3, 0, 2, 4, 1], [0, 1, 2, 3, 4]])


def test_same_shapes_compile_once():
    compiled = neighbors._search_part._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    for seed in range(2):
        nearest(rows(10, 11, seed), rows(20, 11, seed + 2))
    found = neighbors._search_part._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    assert found - compiled == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
@METRICS
def test_numbers_that_cannot_be_compared_are_refused(bad, metric):
    good, broken = rows(10, 4, 0).astype(np.float64), rows(10, 4, 1).astype(np.float64)
    broken[3, 2] = bad
    for arguments in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="NaN, an infinity or a number too large"):
            nearest(*arguments, metric=metric)


def test_bad_arguments_are_refused():
    x = rows(5, 4, 0)
    with pytest.raises(ValueError, match="k is 6; expected 1 to 5"):
        nearest(x, x, 6)
    with pytest.raises(ValueError, match="k is 0"):
        nearest(x, x, 0)
    with pytest.raises(ValueError, match="metric is 'l1'; expected one of euclidean, cosine"):
        nearest(x, x, 1, "l1")
    with pytest.raises(ValueError, match="part_mb is 0"):
        nearest(x, x, part_mb=0)
    with pytest.raises(ValueError, match=r"queries has shape \(5, 3\)"):
        nearest(x[:, :3], x)
    with pytest.raises(ValueError, match=r"bank has shape \(0, 4\)"):
        nearest(x, x[:0])
