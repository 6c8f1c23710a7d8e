"""What a contrastive loss needs of the similarities of all pairs: all of them at once, or tile by tile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

# Rows, and columns, of one matrix product of the tiled form. On 2 CPU cores 512 to 2048 differ by less than a
# third, but for 4,096 rows, which take 1.4 times as long with 2048; for a TPU v5e the compiler keeps a tile
# of 1024 on the chip, and one of 2048 not.
_TILE = 1024
_GRANULE = 128  # tiles are multiples of it: the lanes of a TPU, and whole blocks of other kernels


class Similarities(NamedTuple):
    """Of R = views * B rows, to each other: cosines divided by the temperature.

    Row k - 1 of `positives` and `ranks` is about row (i - k * B) mod R for each row i.
    """

    logsumexp: Array  # [R], over all other rows, or when decoupled over the rows of other images
    positives: Array  # [views - 1, R], to the other views of the same image
    ranks: Array  # int32 [views - 1, R]: 1 + how many views of other images are not less similar than that


def plain(z: Array, *, temperature: float | Array, views: int, decoupled: bool) -> Similarities:
    """From the matrix [R, R] of all similarities: the simplest form, and the memory grows with R².

    Args:
      z: float32 or float64 [R, D], rows of length 1, ordered as those of `losses.nt_xent`.
      temperature: divides the cosines; positive.
      views: of each image, at least 2; divides R.
      decoupled: whether `logsumexp` leaves out the views of the row's own image.

    Returns:
      `Similarities`, differentiable but for the ranks. A tie, or a NaN, counts against a rank.
    """
    # By default a TPU, and a GPU with TF32, multiply in about bfloat16; 1 / temperature would then
    # multiply that error.
    logits = jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST) / temperature

    # Masks instead of gathers: under a sharded batch they stay where the rows are.
    row = jnp.arange(z.shape[0])
    logits = jnp.where(row[:, None] == row[None, :], -jnp.inf, logits)
    images = z.shape[0] // views
    partners = [jnp.roll(row, shift * images) for shift in range(1, views)]
    positives = jnp.stack(
        [jnp.sum(jnp.where(partner[:, None] == row[None, :], logits, 0.0), axis=1) for partner in partners]
    )
    others = (row[:, None] - row[None, :]) % images != 0
    ranks = [1 + _not_less(logits, positive, others) for positive in positives]
    if decoupled:
        logits = jnp.where(others, logits, -jnp.inf)
    return Similarities(jax.nn.logsumexp(logits, axis=1), positives, jnp.stack(ranks))


def tiled(
    z: Array,
    *,
    temperature: float | Array,
    views: int,
    decoupled: bool,
    mesh: Mesh | None = None,
    tile: int = _TILE,
) -> Similarities:
    """The same as `plain`, to rounding, in memory that grows with R.

    The matrix is computed in tiles, of which a running maximum and sum are kept (Milakov and Gimelshein 2018,
    arXiv:1805.02867), and once more for the gradient. As it is symmetric, the gradient of a row needs no sum
    over devices: with g the cotangent of `logsumexp`, that of z_i is

        1 / temperature * sum_j (g_i exp(s_ij - logsumexp_i) + g_j exp(s_ij - logsumexp_j)) z_j

    Args:
      z: as for `plain`.
      temperature: likewise; may have a gradient.
      views: likewise.
      decoupled: likewise.
      mesh: the devices that share the rows, along its axis `data`, any number of them; each compares its own
        rows with all. None: the rows are on one device.
      tile: the most rows, and columns, of a tile.

    Returns:
      As `plain`. Reverse mode only, and no second derivatives.
    """
    images = z.shape[0] // views
    # With the temperature in the rows, autodiff through this line has its gradient and that of the rows.
    scaled = z / jnp.sqrt(jnp.asarray(temperature, z.dtype))
    logsumexp, ranks = _logsumexp_and_ranks(scaled, views, decoupled, mesh, tile)
    positives = [
        jnp.sum(scaled * jnp.roll(scaled, shift * images, axis=0), axis=1) for shift in range(1, views)
    ]
    return Similarities(logsumexp, jnp.stack(positives), ranks.T)


def _not_less(scores: Array, positive: Array, others: Array) -> Array:
    """How many scores [H, W] of `others` are not below their row's positive [H]: ties and NaN are not."""
    return jnp.sum(~(scores < positive[:, None]) & others, axis=1, dtype=jnp.int32)


def _sweep(z: Array, views: int, decoupled: bool, mesh: Mesh | None, tile: int) -> tuple[Array, Array]:
    """`logsumexp` [R] and `ranks` [R, views - 1] of rows whose products are the similarities."""
    rows, images = len(z), len(z) // views

    def of_own(own: tuple[Array, Array], z: Array) -> tuple[Array, Array]:
        columns, column_index = _cut(z, tile), _cut(jnp.arange(rows), tile, fill=rows)

        def of_tile(own: tuple[Array, Array]) -> tuple[Array, Array]:
            index, here = own
            width, height = columns.shape[1], len(index)
            partners = (index[None, :] - images * jnp.arange(1, views)[:, None]) % rows
            # A tile of a device's own rows is never larger than one of all rows.
            partners = jnp.pad(z[partners], ((0, 0), (0, width - height), (0, 0)))

            # The first steps are only for the positives, the diagonals of products with the partners. So they
            # come from the same instruction as the scores they are ranked among. From a sum of elementwise
            # products, rounded differently, some rows of a collapsed encoder, all ties, did not rank last.
            def visit(step: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
                largest, total, positives, ahead = found
                number = step - (views - 1)
                there = jnp.where(number < 0, partners[step], columns[number])
                there_index = jnp.where(number < 0, rows, column_index[number])
                scores = _products(here, there)
                first = (jnp.arange(views - 1) == step)[:, None]
                positives = jnp.where(first, jnp.diagonal(scores)[None, :], positives)

                counted = _counted(index, there_index, rows, images, decoupled)
                masked = jnp.where(counted, scores, -jnp.inf)
                larger = jnp.maximum(largest, jnp.max(masked, axis=1))
                total = total * jnp.exp(largest - larger)
                total += jnp.sum(jnp.exp(masked - larger[:, None]), axis=1)
                others = _counted(index, there_index, rows, images, True)
                ahead += jnp.stack([_not_less(scores, p, others) for p in positives])
                return larger, total, positives, ahead

            nothing = (
                jnp.full(height, jnp.finfo(z.dtype).min),  # not -inf, of which differences would be NaN
                jnp.zeros(height, z.dtype),
                jnp.zeros((views - 1, height), z.dtype),
                jnp.zeros((views - 1, height), jnp.int32),
            )
            steps = views - 1 + len(columns)
            largest, total, _, ahead = lax.fori_loop(0, steps, visit, nothing)
            return largest + jnp.log(total), 1 + ahead.T

        return _by_tile(of_tile, own, tile)

    return _by_device(of_own, (jnp.arange(rows), z), z, mesh)


def _forward(
    z: Array, views: int, decoupled: bool, mesh: Mesh | None, tile: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    logsumexp, ranks = _sweep(z, views, decoupled, mesh, tile)
    return (logsumexp, ranks), (z, logsumexp)


def _backward(
    views: int,
    decoupled: bool,
    mesh: Mesh | None,
    tile: int,
    kept: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array]:
    z, logsumexp = kept
    rows, images = len(z), len(z) // views
    everything = (z, logsumexp, cotangents[0])

    def of_own(own: tuple[Array, ...], everything: tuple[Array, ...]) -> Array:
        columns = (_cut(jnp.arange(rows), tile, fill=rows), *(_cut(x, tile) for x in everything))

        def of_tile(own: tuple[Array, ...]) -> Array:
            index, here, logsumexp, cotangent = own

            def visit(number: Array, total: Array) -> Array:
                there_index, there, there_logsumexp, there_cotangent = (x[number] for x in columns)
                # Rows first, as in the forward pass: columns first, the second product took a transposed
                # copy of the weights, and the loop 1.6 times as long on a CPU.
                counted = _counted(index, there_index, rows, images, decoupled)
                scores = jnp.where(counted, _products(here, there), -jnp.inf)
                weights = cotangent[:, None] * jnp.exp(scores - logsumexp[:, None])
                weights += there_cotangent[None, :] * jnp.exp(scores - there_logsumexp[None, :])
                return total + jnp.matmul(weights, there, precision=lax.Precision.HIGHEST)

            return lax.fori_loop(0, len(columns[0]), visit, jnp.zeros_like(here))

        return _by_tile(of_tile, own, tile)

    return (_by_device(of_own, (jnp.arange(rows), *everything), everything, mesh),)


_logsumexp_and_ranks = jax.custom_vjp(_sweep, nondiff_argnums=(1, 2, 3, 4))
_logsumexp_and_ranks.defvjp(_forward, _backward)


def _products(here: Array, there: Array) -> Array:
    """Similarities of rows [H, D] and [W, D]: [H, W]."""
    return lax.dot_general(here, there, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _counted(here: Array, there: Array, rows: int, images: int, decoupled: bool) -> Array:
    """Which of the rows with the indices `there` [W] count for those `here` [H]: bool [H, W].

    Indices from `rows` on are of no row. Decoupled, the rows of the same image do not count.
    """
    if decoupled:
        differ = (here % images)[:, None] != (there % images)[None, :]
    else:
        differ = here[:, None] != there[None, :]
    return differ & (there < rows)[None, :]


def _cut(rows: Array, tile: int, fill: int = 0) -> Array:
    """Rows [n, ...] as tiles [count, size, ...] of equal sizes, the last filled up."""
    count = -(-len(rows) // tile)
    granule = min(tile, _GRANULE)
    size = -(-len(rows) // (count * granule)) * granule
    padding = ((0, count * size - len(rows)), *[(0, 0)] * (rows.ndim - 1))
    return jnp.pad(rows, padding, constant_values=fill).reshape(count, size, *rows.shape[1:])


def _by_tile(function: Callable[..., Any], own: tuple[Array, ...], tile: int) -> Any:
    """`function` of tiles of a device's own rows, one after the other, its results [n, ...] put together."""
    found = lax.map(function, tuple(_cut(rows, tile) for rows in own))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(own[0])], found)


def _by_device(
    function: Callable[..., Any], own: tuple[Array, ...], everything: Any, mesh: Mesh | None
) -> Any:
    """`function` of a device's own rows and of everything, its results [n, ...] put together."""
    if mesh is None:
        return function(own, everything)
    rows = len(own[0])
    padded = [jnp.pad(x, ((0, -rows % mesh.size), *[(0, 0)] * (x.ndim - 1))) for x in own]
    # Left to itself the compiler would split neither loop over the devices.
    shared = jax.shard_map(
        function, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False
    )
    return jax.tree.map(lambda x: x[:rows], shared(tuple(padded), everything))
