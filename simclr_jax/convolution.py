"""Convolutions of maps, and on CPUs forms of them and of their gradients that are fast there.

By XLA's convolutions a ResNet's step on a CPU takes nearly twice as long as PyTorch's. There, in float32,
those with a 3x3 kernel of stride 1, most of a ResNet's, are Winograd's F(2x2, 3x3) (Lavin and Gray 2015,
arXiv:1509.09308): 4 multiplications where the definition has 9, as products of matrices. Those of stride 2
are products of patches, which copy a map 2.25 times only. Both take a few images at a time, so that what
stands between stays in the cache. Results are those of the definition to 1e-5 of their standard deviation.
What was measured, and what else was tried: docs/performance.md.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Lavin and Gray, equation 7: four inputs and three weights to two outputs.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

_LEAST_CHANNELS = 64  # with fewer XLA's convolution is as fast
# Computed at a time; with a quarter or twice as much it takes up to 1.5 times as long.
_WINOGRAD_BYTES = 1 << 21  # of a map
_PATCHES_BYTES = 1 << 22


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves maps with a square kernel of odd side, half of which is padded on every side with zeros.

    Args:
      x: float [N, H, W, channels in].
      kernel: float [side, side, channels in, channels out], of the same type.
      stride: in both directions.

    Returns:
      float [N, ceil(H / stride), ceil(W / stride), channels out].
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_cpu, stride=stride),
        default=functools.partial(_plain, stride=stride),
    )


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel, stride), (x, kernel)


def _backward(
    stride: int, given: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def plain(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(functools.partial(_plain, stride=stride), x, kernel)[1](cotangent)

    def cpu(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        if x.dtype != jnp.float32:
            return plain(x, kernel, cotangent)
        of_input, of_kernel = plain(x, kernel, cotangent)  # what is not used is not computed
        if len(kernel) == 1:
            of_kernel = _product_of_rows(x[:, ::stride, ::stride], cotangent)[None, None]
        elif _suits_winograd(x, kernel, stride):
            of_input = _winograd(cotangent, kernel[::-1, ::-1], backwards=True)
            of_kernel = _winograd_kernel_gradient(x, cotangent)
        elif _suits_patches(kernel, stride):
            of_input = _strided_input_gradient(x, kernel, cotangent)
            of_kernel = _strided_kernel_gradient(x, cotangent)
        elif _is_large_stem(x, kernel, stride):
            of_kernel = _stem_kernel_gradient(x, cotangent)
        return of_input, of_kernel

    return jax.lax.platform_dependent(*given, cotangent, cpu=cpu, default=plain)


convolve.defvjp(_forward, _backward)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    half = len(kernel) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    if x.dtype == jnp.float32 and _suits_winograd(x, kernel, stride):
        return _winograd(x, kernel)
    if x.dtype == jnp.float32 and _suits_patches(kernel, stride):
        return _strided(x, kernel)
    return _plain(x, kernel, stride)


# ------------------------------------------------------------------------------------ Winograd


def _suits_winograd(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    height, width = x.shape[1:3]
    padded = (
        4 * -(-height // 2) * -(-width // 2)
    )  # to even sides, which for 3x3 pixels is nearly twice as many
    return len(kernel) == 3 and stride == 1 and _is_wide(kernel) and padded < 1.4 * height * width


def _is_wide(kernel: jax.Array) -> bool:
    return min(kernel.shape[2:]) >= _LEAST_CHANNELS


def _winograd(x: jax.Array, kernel: jax.Array, *, backwards: bool = False) -> jax.Array:
    """Convolves with a 3x3 kernel, with `backwards` from its channels out to its channels in."""
    height, width = x.shape[1:3]
    tall, wide = -(-height // 2), -(-width // 2)
    out = kernel.shape[2 if backwards else 3]
    contract = (((1,), (1 if backwards else 0,)), ((), ()))
    weights = _combine_twice(_KERNEL, [list(row) for row in kernel])

    def put(found: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
        products = [
            jax.lax.dot_general(tile, weight, contract)
            for tile, weight in zip(_tiles(x), weights, strict=True)
        ]
        quarters = _combine_twice(_OUTPUT, [products[i : i + 4] for i in range(0, 16, 4)])
        pixels = [quarter.reshape(-1, tall, wide, out) for quarter in quarters]
        part = jnp.stack([jnp.stack(pixels[:2], 3), jnp.stack(pixels[2:], 3)], 2)
        part = part.reshape(-1, 2 * tall, 2 * wide, out)[:, :height, :width]
        return jax.lax.dynamic_update_index_in_dim(found, part, k, 1)

    count = _parts(len(x), x.size, _WINOGRAD_BYTES)
    found = jnp.zeros((len(x) // count, count, height, width, out), x.dtype)
    return _over_parts(put, found, (x,), count).reshape(-1, height, width, out)


def _winograd_kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The transpose of `_winograd` in its kernel: [3, 3, channels in, channels out]."""
    channels, out = x.shape[3], cotangent.shape[3]

    def add(total: jax.Array, k: jax.Array, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        even = _to_even(cotangent)
        spread = _combine_twice(
            _transposed(_OUTPUT), [[even[:, i::2, j::2] for j in range(2)] for i in range(2)]
        )
        products = [_product_of_rows(tile, rows) for tile, rows in zip(_tiles(x), spread, strict=True)]
        return total + jnp.stack(products)

    count = _parts(len(x), x.size, _WINOGRAD_BYTES)
    total = _over_parts(add, jnp.zeros((16, channels, out), x.dtype), (x, cotangent), count)
    found = _combine_twice(_transposed(_KERNEL), [list(total[i : i + 4]) for i in range(0, 16, 4)])
    return jnp.stack(found).reshape(3, 3, channels, out)


def _tiles(x: jax.Array) -> list[jax.Array]:
    """The 4x4 pixels around each 2x2, transformed: 16 arrays [N ceil(H / 2) ceil(W / 2), C]."""
    x = jnp.pad(_to_even(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width, channels = x.shape[1:]
    shifted = [[x[:, i : height - 2 + i : 2, j : width - 2 + j : 2] for j in range(4)] for i in range(4)]
    return [tile.reshape(-1, channels) for tile in _combine_twice(_INPUT, shifted)]


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


# ------------------------------------------------------------------------------------- patches


def _suits_patches(kernel: jax.Array, stride: int) -> bool:
    return len(kernel) == 3 and stride == 2 and _is_wide(kernel)


def _strided(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a 3x3 kernel and stride 2."""
    height, width = (-(-side // 2) for side in x.shape[1:3])
    out = kernel.shape[3]
    weights = kernel.reshape(-1, out)

    def put(found: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
        part = _patches(x, 3, 2, (1, 1)) @ weights
        return jax.lax.dynamic_update_index_in_dim(found, part.reshape(-1, height, width, out), k, 1)

    count = _parts(len(x), 9 * len(x) * height * width * x.shape[3], _PATCHES_BYTES)
    found = jnp.zeros((len(x) // count, count, height, width, out), x.dtype)
    return _over_parts(put, found, (x,), count).reshape(-1, height, width, out)


def _strided_input_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    n, height, width, channels = x.shape
    tall, wide, out = cotangent.shape[1:]
    weights = kernel.reshape(-1, out)

    def put(found: jax.Array, k: jax.Array, cotangent: jax.Array) -> jax.Array:
        # What each pixel gives to the 3x3 around it: even rows get it from one row, odd ones from two.
        given = jax.lax.dot_general(cotangent.reshape(-1, out), weights, (((1,), (1,)), ((), ())))
        given = given.reshape(-1, tall, wide, 3, 3, channels)
        rows = (given[..., 1, :, :], given[..., 2, :, :] + _next(given[..., 0, :, :], 1))
        pixels = [jnp.stack([row[..., 1, :], row[..., 2, :] + _next(row[..., 0, :], 2)], 3) for row in rows]
        part = jnp.stack(pixels, 2).reshape(-1, 2 * tall, 2 * wide, channels)[:, :height, :width]
        return jax.lax.dynamic_update_index_in_dim(found, part, k, 1)

    count = _parts(n, 9 * n * tall * wide * channels, _PATCHES_BYTES)
    found = jnp.zeros((n // count, count, height, width, channels), x.dtype)
    return _over_parts(put, found, (cotangent,), count).reshape(x.shape)


def _next(x: jax.Array, axis: int) -> jax.Array:
    """`x` with entry i + 1 of `axis` for i, and zeros at the end."""
    padding = [(0, int(i == axis)) for i in range(x.ndim)]
    return jax.lax.slice_in_dim(jnp.pad(x, padding), 1, None, axis=axis)


def _strided_kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    found = _patches_kernel_gradient(x, cotangent, side=3, stride=2, padding=(1, 1))
    return found.reshape(3, 3, x.shape[3], -1)


def _is_large_stem(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    return len(kernel) == 7 and stride == 2 and even and kernel.shape[3] >= _LEAST_CHANNELS


def _stem_kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Of 7x7 with stride 2: with one row and column more in front, 4x4 on blocks of two by two pixels.

    Patches of blocks are put together from 16 slices, of pixels from 49.
    """
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(n, height // 2, width // 2, 4 * channels)
    found = _patches_kernel_gradient(blocks, cotangent, side=4, stride=1, padding=(2, 1))
    by_pixel = found.reshape(4, 4, 2, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    return by_pixel.reshape(8, 8, channels, -1)[1:, 1:]


def _patches_kernel_gradient(
    x: jax.Array, cotangent: jax.Array, *, side: int, stride: int, padding: tuple[int, int]
) -> jax.Array:
    """Of a convolution with a kernel of this `side`: [side² channels in, channels out]."""

    def add(total: jax.Array, k: jax.Array, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        # The other way around the product takes up to 1.3 times as long.
        return total + _product_of_rows(cotangent, _patches(x, side, stride, padding))

    wide, out = side * side * x.shape[3], cotangent.shape[3]
    count = _parts(len(x), wide * cotangent.size // out, _PATCHES_BYTES)
    return _over_parts(add, jnp.zeros((out, wide), x.dtype), (x, cotangent), count).T


def _patches(x: jax.Array, side: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """The squares that a kernel meets: [N rows columns, side² C], with zeros in front and behind."""
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width = (size - side + 1 for size in x.shape[1:3])
    slices = [x[:, i : i + height : stride, j : j + width : stride] for i in range(side) for j in range(side)]
    return jnp.concatenate([part.reshape(-1, x.shape[3]) for part in slices], -1)


# --------------------------------------------------------------------------------------- parts


def _product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maps [..., C] and [..., D] to their [C, D]."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _parts(images: int, size: int, part_bytes: int) -> int:
    """The number of parts to compute `size` float32 in: of as many images each, and of about `part_bytes`."""
    wanted = min(4 * size / part_bytes, images)
    return next(count for count in range(1, images + 1) if images % count == 0 and count >= wanted)


def _over_parts(
    compute: Callable[..., jax.Array], start: jax.Array, arrays: tuple[jax.Array, ...], count: int
) -> jax.Array:
    """Folds `compute`, (carry, k, *part k of each array) to carry, over `count` parts of the images.

    Part k is every `count`-th image from the k-th on: of a batch split over devices each has its share.
    """
    split = [array.reshape(-1, count, *array.shape[1:]) for array in arrays]

    def step(k: jax.Array | int, carry: jax.Array) -> jax.Array:
        return compute(carry, k, *(jax.lax.dynamic_index_in_dim(array, k, 1, False) for array in split))

    return step(0, start) if count == 1 else jax.lax.fori_loop(0, count, step, start)
