"""Maps computed a few images at a time, so that what stands between stays in a CPU's cache.

Part k is every so many-th image from the k-th on: of a batch split over devices each has its share.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def number_of_parts(images: int, size: int, part_bytes: int) -> int:
    """In how many parts to compute `size` float32: of as many images each, and of about `part_bytes`."""
    wanted = min(4 * size / part_bytes, images)
    return next(count for count in range(1, images + 1) if images % count == 0 and count >= wanted)


def put_together(compute: Callable[..., jax.Array], count: int, *maps: jax.Array) -> jax.Array:
    """`compute`, maps [n, ...] of images to others of the same images, of `count` parts of [N, ...] each."""
    if count == 1:
        return compute(*maps)
    shape, take = _of_parts(compute, count, maps)

    def put(k: jax.Array | int, found: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(found, compute(*take(k)), k, 1)

    found = jnp.zeros((shape[0], count, *shape[1:]), maps[0].dtype)
    return jax.lax.fori_loop(0, count, put, found).reshape(-1, *shape[1:])


def add_up(compute: Callable[..., jax.Array], count: int, *maps: jax.Array) -> jax.Array:
    """The sum of what `compute` makes of `count` parts of the maps [N, ...]."""
    if count == 1:
        return compute(*maps)
    shape, take = _of_parts(compute, count, maps)

    def add(k: jax.Array | int, total: jax.Array) -> jax.Array:
        return total + compute(*take(k))

    return jax.lax.fori_loop(0, count, add, jnp.zeros(shape, maps[0].dtype))


def product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maps [..., C] and [..., D] to their [C, D]."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _of_parts(
    compute: Callable[..., jax.Array], count: int, maps: tuple[jax.Array, ...]
) -> tuple[tuple[int, ...], Callable[[jax.Array | int], list[jax.Array]]]:
    """The shape of what `compute` makes of a part, and the function from k to part k."""
    split = [array.reshape(-1, count, *array.shape[1:]) for array in maps]

    def take(k: jax.Array | int) -> list[jax.Array]:
        return [jax.lax.dynamic_index_in_dim(array, k, 1, False) for array in split]

    return jax.eval_shape(lambda: compute(*take(0))).shape, take
