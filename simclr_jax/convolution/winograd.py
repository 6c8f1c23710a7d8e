"""Winograd's F(2x2, 3x3): 4 multiplications where a 3x3 convolution of stride 1 has 9 (Lavin and Gray 2015,
arXiv:1509.09308)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simclr_jax.convolution import parts

# Lavin and Gray, equation 7: four inputs and three weights to two outputs.
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

_PART_BYTES = 1 << 21  # of a map; with a quarter to twice as much it takes up to 1.5 times as long


def convolve(x: jax.Array, kernel: jax.Array, *, backwards: bool = False) -> jax.Array:
    """Convolves with a 3x3 kernel, with `backwards` from its channels out to its channels in.

    Args:
      x: float32 [N, H, W, C].
      kernel: float32 [3, 3, C, D], with `backwards` [3, 3, D, C].

    Returns:
      float32 [N, H, W, D].
    """
    height, width = x.shape[1:3]
    tall, wide = -(-height // 2), -(-width // 2)
    # Turned around beforehand, kernels of 512 channels would cost 100 ms, the transform included.
    contract = (((1,), (1 if backwards else 0,)), ((), ()))
    weights = _combine_twice(KERNEL, [list(row) for row in kernel])

    def compute(x: jax.Array) -> jax.Array:
        products = [
            jax.lax.dot_general(tile, weight, contract)
            for tile, weight in zip(_tiles(x), weights, strict=True)
        ]
        quarters = _combine_twice(OUTPUT, [products[i : i + 4] for i in range(0, 16, 4)])
        pixels = [quarter.reshape(len(x), tall, wide, -1) for quarter in quarters]
        even = jnp.stack([jnp.stack(pixels[:2], 3), jnp.stack(pixels[2:], 3)], 2)
        return even.reshape(len(x), 2 * tall, 2 * wide, -1)[:, :height, :width]

    return parts.put_together(compute, parts.number_of_parts(len(x), x.size, _PART_BYTES), x)


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The transpose of `convolve` in its kernel.

    Args:
      x: float32 [N, H, W, C].
      cotangent: float32 [N, H, W, D].

    Returns:
      float32 [3, 3, C, D].
    """

    def compute(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        even = _to_even(cotangent)
        quarters = [[even[:, i::2, j::2] for j in range(2)] for i in range(2)]
        spread = _combine_twice(_transposed(OUTPUT), quarters)
        return jnp.stack([parts.product_of_rows(*pair) for pair in zip(_tiles(x), spread, strict=True)])

    count = parts.number_of_parts(len(x), x.size, _PART_BYTES)
    total = parts.add_up(compute, count, x, cotangent)
    found = _combine_twice(_transposed(KERNEL), [list(total[i : i + 4]) for i in range(0, 16, 4)])
    return jnp.stack(found).reshape(3, 3, *total.shape[1:])


def _tiles(x: jax.Array) -> list[jax.Array]:
    """The 4x4 pixels around each 2x2, transformed: 16 arrays [N ceil(H / 2) ceil(W / 2), C]."""
    x = jnp.pad(_to_even(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width, channels = x.shape[1:]
    shifted = [[x[:, i : height - 2 + i : 2, j : width - 2 + j : 2] for j in range(4)] for i in range(4)]
    return [tile.reshape(-1, channels) for tile in _combine_twice(INPUT, shifted)]


def _to_even(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))


def _combine_twice(matrix: Sequence[Sequence[float]], grid: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """`matrix` @ grid @ `matrix`ᵀ of a grid of arrays, row by row."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [array for row in zip(*columns, strict=True) for array in _combine(matrix, row)]


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    found = []
    for weights in matrix:
        terms = [array if w == 1 else w * array for w, array in zip(weights, arrays, strict=True) if w]
        found.append(functools.reduce(jnp.add, terms))
    return found


def _transposed(matrix: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return tuple(zip(*matrix, strict=True))
