"""Convolutions with a 3x3 kernel and stride 1 by fewer multiplications (Winograd; Lavin and Gray 2015,
arXiv:1509.09308): 4 instead of 9 for the output and the gradient of the maps, 4.5 for that of the kernel."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from simclr_jax.convolution import parts

Matrix = Sequence[Sequence[float]]


class Transforms(NamedTuple):
    """Of n + 2 inputs and three weights to n outputs: output @ ((input @ x) * (kernel @ weights))."""

    input: Matrix
    kernel: Matrix
    output: Matrix


# Lavin and Gray, section 4.1 and 4.3: F(2, 3), and F(4, 3) by the points 0, 1, -1, 2 and -2.
TWO = Transforms(
    input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    kernel=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    output=((1, 1, 1, 0), (0, 1, -1, -1)),
)
FOUR = Transforms(
    input=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    kernel=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    output=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)

_PART_BYTES = 5 << 19  # of a map at most; with a quarter to twice as much it takes up to 1.5 times as long

# Transforms all before products, and these all before what is made of them. With jax 0.12 the output of 64
# maps of 8x8x256 then takes 12 ms instead of 14, the gradient of the kernel at 32x32x64 26 instead of 30;
# with jax 0.10 it makes no difference.
_all_first = jax.lax.optimization_barrier


def convolve(x: jax.Array, kernel: jax.Array, *, backwards: bool = False) -> jax.Array:
    """Convolves by F(2x2, 3x3), with `backwards` from the kernel's channels out to its channels in.

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
    weights = _combine_twice(TWO.kernel, [list(row) for row in kernel])

    def compute(x: jax.Array) -> jax.Array:
        tiles = _all_first(_tiles(x))
        products = _all_first(
            [jax.lax.dot_general(tile, weight, contract) for tile, weight in zip(tiles, weights, strict=True)]
        )
        quarters = _combine_twice(TWO.output, [products[i : i + 4] for i in range(0, 16, 4)])
        pixels = [quarter.reshape(len(x), tall, wide, -1) for quarter in quarters]
        even = jnp.stack([jnp.stack(pixels[:2], 3), jnp.stack(pixels[2:], 3)], 2)
        return even.reshape(len(x), 2 * tall, 2 * wide, -1)[:, :height, :width]

    return parts.put_together(compute, parts.number_of_parts(len(x), x.size, _PART_BYTES), x)


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The transpose of `convolve` in its kernel.

    F(4, 3) from row to row and, side by side in one product, the three taps along a row: a product as wide as
    64 channels has half the rate of one three times as wide.

    Args:
      x: float32 [N, H, W, C].
      cotangent: float32 [N, H, W, D].

    Returns:
      float32 [3, 3, C, D].
    """
    below = -x.shape[1] % 4
    height = x.shape[1] + below

    def compute(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (1, 1 + below), (0, 0), (0, 0)))
        cotangent = jnp.pad(cotangent, ((0, 0), (0, below), (0, 0), (0, 0)))
        bands = _combine(FOUR.input, [x[:, i : i + height : 4] for i in range(6)])
        spread = _combine(_transposed(FOUR.output), [cotangent[:, i::4] for i in range(4)])
        bands, given = _all_first((bands, [_three_taps(each) for each in spread]))
        return jnp.stack([parts.product_of_rows(*pair) for pair in zip(bands, given, strict=True)])

    count = parts.number_of_parts(len(x), x.size, _PART_BYTES)
    total = parts.add_up(compute, count, x, cotangent)
    rows = jnp.stack(_combine(_transposed(FOUR.kernel), list(total)))
    return rows.reshape(3, x.shape[3], 3, -1).transpose(0, 2, 1, 3)


def _three_taps(cotangent: jax.Array) -> jax.Array:
    """[N, H, W, D] to [N, H, W, 3 D]: what each pixel gives to the kernel's left, middle and right."""
    width = cotangent.shape[2]
    cotangent = jnp.pad(cotangent, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([cotangent[:, :, j : j + width] for j in (2, 1, 0)], -1)


def _tiles(x: jax.Array) -> list[jax.Array]:
    """The 4x4 pixels around each 2x2, transformed: 16 arrays [N ceil(H / 2) ceil(W / 2), C]."""
    x = jnp.pad(x, ((0, 0), (1, 1 + x.shape[1] % 2), (1, 1 + x.shape[2] % 2), (0, 0)))
    height, width, channels = x.shape[1:]
    shifted = [[x[:, i : height - 2 + i : 2, j : width - 2 + j : 2] for j in range(4)] for i in range(4)]
    return [tile.reshape(-1, channels) for tile in _combine_twice(TWO.input, shifted)]


def _combine_twice(matrix: Matrix, grid: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """`matrix` @ grid @ `matrix`ᵀ of a grid of arrays, row by row."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [array for row in zip(*columns, strict=True) for array in _combine(matrix, row)]


def _combine(matrix: Matrix, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    found = []
    for weights in matrix:
        terms = [array if w == 1 else w * array for w, array in zip(weights, arrays, strict=True) if w]
        found.append(functools.reduce(jnp.add, terms))
    return found


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))
