"""Exact nearest neighbours by brute force, and the 1-NN accuracy they give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_METRICS = ("euclidean", "cosine")
# Both sides of a tile are a multiple of this, so that the matrix product treats all rows alike and
# equal rows tie to the last bit.
_TILE_GRANULE = 128


def nearest(
    queries: jax.typing.ArrayLike,
    bank: jax.typing.ArrayLike,
    k: int = 1,
    metric: str = "euclidean",
    *,
    tile: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """Find the `k` rows of `bank` nearest to each row of `queries`, all pairs compared.

    Inputs of any real dtype are converted to float32 a tile at a time; beside them and the result
    the memory needed is a few times tile² floats. Euclidean distances come from
    |q|² + |b|² - 2 q·b, about the mean of the bank, so that their squares are exact to about
    1e-7 (|q|² + |b|²): the distance of equal rows is small, not always 0. The cosine distance is
    1 - cos, and 1 from and to a zero row. It waits for the device; call it outside jit.

    Args:
      queries: [Q, F].
      bank: [N, F].
      k: number of neighbours, 1 to N; one needs no sort.
      metric: "euclidean" or "cosine".
      tile: rows of queries and of bank compared at a time, rounded up to a multiple of 128.

    Returns:
      Distances, float32 [Q, k], ascending, and indices into the bank, int32 [Q, k]. Between equal
      distances the lower index comes first.

    Raises:
      ValueError: for shapes that do not fit, a `k`, `metric` or `tile` out of range, or a NaN or
        infinity among the inputs.
    """
    queries, bank = jnp.asarray(queries), jnp.asarray(bank)
    if bank.ndim != 2 or bank.shape[0] == 0:
        raise ValueError(f"bank has shape {bank.shape}; expected [N, F] with N >= 1")
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1] or queries.shape[0] == 0:
        raise ValueError(f"queries has shape {queries.shape}; expected [Q, {bank.shape[1]}], Q >= 1")
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"k is {k}; expected 1 to {bank.shape[0]}, the rows of the bank")
    if metric not in _METRICS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(_METRICS)}")
    if tile < 1:
        raise ValueError(f"tile is {tile}; expected at least 1")
    distances, indices, finite = _nearest(queries, bank, k=k, metric=metric, tile=tile)
    if not finite:
        raise ValueError("queries or bank holds a NaN or an infinity; expected finite numbers")
    return distances, indices


def one_nn_accuracy(
    queries: jax.typing.ArrayLike,
    query_labels: jax.typing.ArrayLike,
    bank: jax.typing.ArrayLike,
    bank_labels: jax.typing.ArrayLike,
    metric: str = "euclidean",
) -> float:
    """Return the share of queries, in [0, 1], whose nearest row of the bank has their label.

    Args:
      queries: [Q, F].
      query_labels: int [Q].
      bank: [N, F].
      bank_labels: int [N].
      metric: as in `nearest`.

    Raises:
      ValueError: for labels that do not fit, and as `nearest`.
    """
    for name, labels, rows in (
        ("query_labels", query_labels, queries),
        ("bank_labels", bank_labels, bank),
    ):
        expected = jnp.shape(rows)[:1]
        if jnp.shape(labels) != expected:
            raise ValueError(f"{name} has shape {jnp.shape(labels)}; expected {expected}")
    _, indices = nearest(queries, bank, 1, metric)
    predicted = np.asarray(bank_labels)[np.asarray(indices[:, 0])]
    return float(np.mean(predicted == np.asarray(query_labels)))


@partial(jax.jit, static_argnames=("k", "metric", "tile"))
def _nearest(queries, bank, *, k, metric, tile):
    centre = jnp.mean(bank, axis=0, dtype=jnp.float32)

    def prepare(rows):
        """Float32 rows whose inner products order the distances, and their squared norms."""
        rows = rows.astype(jnp.float32)
        if metric == "euclidean":
            rows -= centre[None, :]
        else:
            norm = jnp.sqrt(jnp.sum(rows * rows, axis=1, keepdims=True))
            rows /= jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
        return rows, jnp.sum(rows * rows, axis=1)

    query_tiles = _split(queries, tile)
    bank_tiles = _split(bank, tile)
    bank_tile = bank_tiles.shape[1]
    column = jnp.arange(bank_tile, dtype=jnp.int32)

    def visit_bank_tile(best, bank_rows_and_start):
        rows, start = bank_rows_and_start
        rows, squared_norm = prepare(rows)
        # What is left of the distance without the terms of the query alone, which order nothing.
        offset = squared_norm if metric == "euclidean" else jnp.zeros_like(squared_norm)
        offset = jnp.where(start + column < bank.shape[0], offset, jnp.inf)
        factor = 2 if metric == "euclidean" else 1

        def visit_query_tile(best_and_query_rows):
            (best_score, best_index), query_rows = best_and_query_rows
            product = lax.dot_general(
                factor * prepare(query_rows)[0],
                rows,
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST,
            )
            score = offset[None, :] - product
            if k == 1:
                # Not argmin: on the CPU two plain reductions take 3.0 s where it takes 4.0
                # (10,000 x 50,000 rows of 512).
                least = jnp.min(score, axis=1, keepdims=True)
                at = jnp.where(score == least, column[None, :], bank_tile)
                at = start + jnp.min(at, axis=1, keepdims=True)
                closer = least < best_score
                return jnp.where(closer, least, best_score), jnp.where(closer, at, best_index)
            # top_k puts the earlier of equals first, and the best so far have the lower indices.
            score = jnp.concatenate([best_score, score], axis=1)
            index = jnp.broadcast_to(start + column[None, :], (score.shape[0], bank_tile))
            index = jnp.concatenate([best_index, index], axis=1)
            negated, at = lax.top_k(-score, k)
            return -negated, jnp.take_along_axis(index, at, axis=1)

        return lax.map(visit_query_tile, (best, query_tiles)), jnp.all(jnp.isfinite(squared_norm))

    best = (
        jnp.full((*query_tiles.shape[:2], k), jnp.inf, jnp.float32),
        jnp.zeros((*query_tiles.shape[:2], k), jnp.int32),
    )
    starts = jnp.arange(bank_tiles.shape[0], dtype=jnp.int32) * bank_tile
    (score, index), bank_finite = lax.scan(visit_bank_tile, best, (bank_tiles, starts))
    squared_norm = lax.map(lambda rows: prepare(rows)[1], query_tiles)
    if metric == "euclidean":
        distance = jnp.sqrt(jnp.maximum(score + squared_norm[:, :, None], 0.0))
    else:
        distance = jnp.clip(1.0 + score, 0.0, 2.0)
    finite = jnp.all(bank_finite) & jnp.all(jnp.isfinite(squared_norm))
    count = queries.shape[0]
    return distance.reshape(-1, k)[:count], index.reshape(-1, k)[:count], finite


def _split(rows: jax.Array, tile: int) -> jax.Array:
    """Rows [N, F] as tiles [T, tile or less, F], the last filled up with zeros."""
    tile = min(tile, rows.shape[0])
    tile += -tile % _TILE_GRANULE
    rows = jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))
    return rows.reshape(-1, tile, rows.shape[1])
