"""Exact nearest neighbours by brute force: float32 finds the candidates, float64 decides among them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from simclr_jax import mesh as meshes

METRICS = ("euclidean", "cosine")

_TILE = 1024  # rows of the bank in one matrix product
# For few neighbours the scores are searched by the least of every 8, which is an eighth of the sorting and
# one pass over them; for many, computing all 8 distances again would cost more than that saves.
_GROUP = 8
_GROUPED_UP_TO = 16
_SPARE = 2  # groups taken beyond k, so that few queries are in doubt
_BUFFER = 2**24  # scores in memory at once, 64 MB, which decide how many queries a product takes
_GATHERED = 2**20  # numbers of gathered rows in memory at once
_SAMPLED = 16  # one row in as many gives the origin
_QUERIES = 2**14  # searched for at once, or as many as have
_QUERY_NUMBERS = 2**27  # numbers, 0.5 GB: of raw pixels at 224 they would be 10
_TOO_LARGE = 1e150  # for float64 to hold its square
_NOWHERE = np.iinfo(np.int32).max


class _Found(NamedTuple):
    """The neighbours of Q queries in a part of the bank."""

    squared: Any  # float64 [Q, k], ascending: squared distances
    index: Any  # int32 [Q, k]
    bound: Any  # float64 [Q]: rows that are not among the k are at least this far, squared
    finite: Any  # bool []: whether all numbers of part and queries can be squared


def nearest(
    queries: jax.typing.ArrayLike,
    bank: jax.typing.ArrayLike,
    k: int = 1,
    metric: str = "euclidean",
    *,
    part_mb: float = 128,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` rows of `bank` nearest to each row of `queries`, all pairs compared.

    The result is that of float64 arithmetic on the given numbers. One matrix product in float32, about the
    mean of the bank, gives scores with an error bound (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 3.1); the distances of the best candidates are computed again in float64; and
    queries for which a row beyond the candidates could still be nearer, by that bound, are searched for once
    more in float64 throughout. A TPU has no float64: its compiler makes one of two float32, with about 46
    bits and float32's range.

    The bank may be larger than the device's memory, such as a memory-mapped file: it is sent in parts of
    `part_mb`, each split over the devices of this process. Beside the arguments and the result a device
    needs a few times `part_mb`, on a CPU at the default 0.6 GB, however large the bank. It waits for the
    device; call it outside jit.

    Args:
      queries: [Q, F], any real dtype.
      bank: [N, F], likewise.
      k: number of neighbours, 1 to N.
      metric: "euclidean"; or "cosine", 1 - cos, which is 1 from and to a zero row.
      part_mb: size in MiB of the part of the bank that is on the devices at a time.

    Returns:
      Distances, float64 [Q, k], ascending, and indices into the bank, int32 [Q, k]. Between equal
      distances the lower index comes first.

    Raises:
      ValueError: for shapes that do not fit, a `k`, `metric` or `part_mb` out of range, or a number that is
        NaN, infinite or too large to be squared.
    """
    queries, bank = (rows if isinstance(rows, jax.Array) else np.asarray(rows) for rows in (queries, bank))
    if bank.ndim != 2 or bank.shape[0] == 0:
        raise ValueError(f"bank has shape {bank.shape}; expected [N, F] with N >= 1")
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1] or queries.shape[0] == 0:
        raise ValueError(f"queries has shape {queries.shape}; expected [Q, {bank.shape[1]}], Q >= 1")
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"k is {k}; expected 1 to {bank.shape[0]}, the rows of the bank")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(METRICS)}")
    if not part_mb > 0:
        raise ValueError(f"part_mb is {part_mb}; expected a number above 0")

    row_mb = bank.shape[1] * bank.dtype.itemsize / 2**20
    parts = -(-len(bank) // max(1, int(part_mb / row_mb)))
    mesh = meshes.mesh_of(jax.local_devices())
    search = partial(_search, bank=bank, parts=parts, k=k, metric=metric, mesh=mesh)
    found: list[_Found] = []
    with jax.enable_x64(True):
        at_once = min(_QUERIES, max(1, _QUERY_NUMBERS // queries.shape[1]))
        for start in range(0, len(queries), at_once):
            rows = queries[start : start + at_once]
            block = search(rows, dtype=jnp.float32)
            doubtful = np.flatnonzero(block.squared[:, -1] >= block.bound)
            if len(doubtful):
                # Filled up with repetitions to a power of 4, so that few programs are compiled.
                doubtful = np.resize(doubtful, max(64, 4 ** -(-(len(doubtful) - 1).bit_length() // 2)))
                again = search(rows[doubtful], dtype=jnp.float64)
                block.squared[doubtful], block.index[doubtful] = again.squared, again.index
            found.append(block)
    squared = np.concatenate([block.squared for block in found])
    index = np.concatenate([block.index for block in found])
    if metric == "euclidean":
        return np.sqrt(squared), index
    distance = squared / 2  # |q - b|² of rows of length 1 is 2 - 2 cos
    zero = ~np.any(np.asarray(queries), axis=1)
    distance[zero], index[zero] = 1.0, np.arange(k)
    return distance, index


def _search(queries, *, bank, parts: int, k: int, metric: str, dtype, mesh: Mesh) -> _Found:
    """Goes through the parts of the bank; the result is in NumPy."""
    queries = jax.device_put(queries, meshes.replicated(mesh))
    found: list[_Found] = []
    for start, rows, count in _parts(bank, parts, mesh.size):
        rows = jax.device_put(rows, meshes.split(mesh))
        part = jax.device_get(
            _search_part(queries, rows, np.int32(count), k=k, metric=metric, dtype=dtype, mesh=mesh)
        )
        if not part.finite:
            raise ValueError(
                "queries or bank holds a NaN, an infinity or a number too large; expected finite numbers"
            )
        found.append(part._replace(index=part.index + np.int32(start) * (part.index != _NOWHERE)))
    squared = np.concatenate([part.squared for part in found], axis=1)
    index = np.concatenate([part.index for part in found], axis=1)
    if squared.shape[1] > k:
        order = np.lexsort((index, squared), axis=1)[:, :k]
        squared, index = (np.take_along_axis(array, order, axis=1) for array in (squared, index))
    bound = np.min([part.bound for part in found], axis=0)
    return _Found(np.array(squared), np.array(index), bound, True)


def _parts(bank, parts: int, devices: int) -> Iterator[tuple[int, Any, int]]:
    """(first row, rows, how many of them count) of parts of one size that the devices can share."""
    size = -(-len(bank) // parts)
    size += -size % devices
    for start in range(0, len(bank), size):
        rows = bank[start : start + size] if parts > 1 else bank
        count = len(rows)
        if count < size:
            pad = jnp.pad if isinstance(rows, jax.Array) else np.pad
            rows = pad(rows, ((0, size - count), (0, 0)))
        yield start, rows, count


@partial(jax.jit, static_argnames=("k", "metric", "dtype", "mesh"))
def _search_part(
    queries: Array, part: Array, count: Array, *, k: int, metric: str, dtype: Any, mesh: Mesh
) -> _Found:
    """The nearest of the first `count` rows of a part that is split over the devices.

    Returns `k` or fewer neighbours from each device, side by side.
    """

    def on_device(queries: Array, rows: Array, count: Array) -> _Found:
        first = lax.axis_index("data").astype(jnp.int32) * len(rows)
        found = _search_rows(
            queries, rows, jnp.minimum(count - first, len(rows)), k=k, metric=metric, dtype=dtype
        )
        index = jnp.where(jnp.isinf(found.squared), _NOWHERE, found.index + first)
        return found._replace(index=index, bound=found.bound[:, None], finite=found.finite[None])

    across = _Found(P(None, "data"), P(None, "data"), P(None, "data"), P("data"))
    found = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=across, check_vma=False
    )(queries, part, count)
    return found._replace(bound=jnp.min(found.bound, axis=1), finite=jnp.all(found.finite))


def _search_rows(queries: Array, rows: Array, count: Array, *, k: int, metric: str, dtype: Any) -> _Found:
    """The nearest of the first `count` rows; infinitely far where there are fewer than k."""
    # Whole multiples of what the kernels of a product take at once: so equal rows have equal scores, and the
    # first of them comes first.
    tile = min(_TILE, len(rows) + -len(rows) % 128)
    rows = jnp.pad(rows, ((0, max(0, tile - len(rows))), (0, 0)))
    tiles = -(-len(rows) // tile)
    # The last tile begins early enough to be whole, and skips what the one before it had.
    fresh = jnp.arange(tiles, dtype=jnp.int32) * tile
    starts = jnp.minimum(fresh, len(rows) - tile)

    # Any origin and scale are right; these keep the numbers of float32 small and near 1.
    sampled = jnp.arange(0, len(rows), _SAMPLED)
    origin = jnp.mean(_points(rows[::_SAMPLED], metric), axis=0, where=(sampled < count)[:, None])
    origin = jnp.nan_to_num(origin)  # of no rows at all
    largest = jnp.maximum(*(jnp.max(jnp.abs(x)).astype(jnp.float64) for x in (rows, queries)))
    scale = jnp.where((metric == "euclidean") & (largest > 0), largest, 1.0)

    # |computed score - score| <= error (|q|² + |b|²): the rounding of a product of F terms and of what
    # went into it, and 2 |q| |b| <= |q|² + |b|². Taken off here, what is left is a lower bound.
    error = (2 * rows.shape[1] + 32) * float(jnp.finfo(dtype).eps) / 2

    def move(rows: Array) -> tuple[Array, Array]:
        """Points about the origin, and their squared lengths less the error."""
        moved = ((_points(rows, metric) - origin[None]) / scale).astype(dtype)
        return moved, (1 - error) * jnp.sum(jnp.square(moved.astype(jnp.float64)), axis=1)

    def move_tile(number: Array) -> tuple[Array, Array]:
        here = lax.dynamic_slice_in_dim(rows, starts[number], tile)
        moved, length = move(here)
        index = starts[number] + jnp.arange(tile, dtype=jnp.int32)
        counts = (index >= fresh[number]) & (index < count)
        return moved, jnp.where(counts, length + _extra(here, metric), jnp.inf).astype(dtype)

    # Tile by tile, as of everything at once the compiler would keep several copies in float64.
    moved, offset = lax.map(move_tile, jnp.arange(tiles, dtype=jnp.int32))
    moved_queries, length_queries = move(queries)

    group = _GROUP if k <= _GROUPED_UP_TO else 1
    groups = tiles * tile // group
    taken = min(k + k // 8 + _SPARE, groups)
    block = min(len(queries), _power_of_two(_BUFFER // groups))

    def search(operands: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        """Of `block` queries: squared distances and indices [block, k], bounds [block]."""
        queries, moved_queries, length_queries = operands
        twice = -2 * moved_queries

        def add_tile(number: Array, least: Array) -> Array:
            product = lax.dot_general(
                twice, moved[number], (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
            )
            score = (product + offset[number][None, :]).reshape(block, -1, group)
            start = number * (tile // group)
            return lax.dynamic_update_slice_in_dim(least, jnp.min(score, axis=2), start, axis=1)

        least = lax.fori_loop(0, tiles, add_tile, jnp.zeros((block, groups), dtype))
        negated, best = lax.top_k(-least, taken)
        # Not the last column of `negated`: with a slice after it XLA makes the top-k a sort, 20 times slower.
        bound = length_queries - jnp.min(negated, axis=1).astype(jnp.float64)
        number, within = best // (tile // group), best % (tile // group)
        index = (starts[number] + within * group)[:, :, None] + jnp.arange(group, dtype=jnp.int32)[None, None]
        counts = (index >= fresh[number][:, :, None]) & (index < count)
        index, counts = (x.reshape(block, -1) for x in (index, counts))

        def measure(operands: tuple[Array, Array]) -> Array:
            query, index = operands
            near = rows.at[index].get(mode="promise_in_bounds")
            difference = _points(near, metric) - _points(query, metric)[None]
            return jnp.sum(jnp.square(difference), axis=1) + _extra(near, metric)

        at_once = _power_of_two(_GATHERED // (index.shape[1] * rows.shape[1]))
        squared = lax.map(measure, (queries, index), batch_size=at_once)
        squared, index = lax.sort((jnp.where(counts, squared, jnp.inf), index), num_keys=2)
        return squared[:, :k], index[:, :k], bound

    def in_blocks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, -len(x) % block), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(-1, block, *x.shape[1:])

    searched = lax.map(search, tuple(map(in_blocks, (queries, moved_queries, length_queries))))
    squared, index, bound = (x.reshape(-1, *x.shape[2:])[: len(queries)] for x in searched)
    # Numbers so small beside the largest that their squares vanish have no part in the bound.
    bound = (bound - rows.shape[1] * 16 * float(jnp.finfo(dtype).tiny)) * scale**2
    bound = jnp.where(taken < groups, bound, jnp.inf)
    return _Found(squared, index, bound, largest < _TOO_LARGE)


def _points(rows: Array, metric: str) -> Array:
    """Float64 points [..., F] whose Euclidean distances order the neighbours of `metric`."""
    points = rows.astype(jnp.float64)
    if metric == "euclidean":
        return points
    length = jnp.sqrt(jnp.sum(jnp.square(points), axis=-1, keepdims=True))
    return points / jnp.where(length > 0, length, 1.0)


def _extra(rows: Array, metric: str) -> Array:
    """Added to squared distances [...]: a zero row, which has no cosine, is put where it would be 0."""
    zero = jnp.all(rows == 0, axis=-1) if metric == "cosine" else jnp.zeros(rows.shape[:-1], bool)
    return zero.astype(jnp.float64)


def _power_of_two(limit: int) -> int:
    """The largest that is no more than `limit`, and at least 1."""
    return 1 << max(0, limit.bit_length() - 1)
