"""Convolutions of maps, and on CPUs forms of them and of their gradients that are fast there.

On a CPU XLA's convolution runs at half the rate of its matrix product, and the gradient of the kernel at a
quarter. There, in float32, a convolution is written as products, a few images at a time: what stands between
stays in the cache. A 3x3 convolution of stride 1 is Winograd's F(2x2, 3x3) (Lavin and Gray 2015,
arXiv:1509.09308), which multiplies 4 times where the definition does 9 times.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Of Winograd's F(2, 3) (Lavin and Gray, equation 7): four inputs and three weights to two outputs.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

# Of a map at a time; a kernel's gradient at least as much as the kernel, to which each part adds.
_WINOGRAD_BYTES = 1 << 21
_GRADIENT_BYTES = 1 << 18
_LEAST_CHANNELS = 64  # with fewer XLA's convolution is as fast


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves maps with a square kernel of odd side; its half is padded on every side with zeros.

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
        cpu=functools.partial(_cpu_forward, stride=stride),
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
        return _input_gradient(x, kernel, cotangent, stride), _kernel_gradient(x, kernel, cotangent, stride)

    return jax.lax.platform_dependent(*given, cotangent, cpu=cpu, default=plain)


convolve.defvjp(_forward, _backward)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    half = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _cpu_forward(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    if x.dtype != jnp.float32:
        return _plain(x, kernel, stride)
    if len(kernel) == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if stride == 1 and _suits_winograd(kernel):
        return _winograd(x, kernel)
    return _plain(x, kernel, stride)


def _suits_winograd(kernel: jax.Array) -> bool:
    return kernel.shape[0] == 3 and min(kernel.shape[2:]) >= _LEAST_CHANNELS


def _input_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    if len(kernel) == 1:
        found = cotangent @ kernel[0, 0].T
        ends = [
            size - stride * (count - 1) - 1
            for size, count in zip(x.shape[1:3], found.shape[1:3], strict=True)
        ]
        gaps = [(0, end, stride - 1) for end in ends]
        return jax.lax.pad(found, jnp.zeros((), x.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
    if stride == 1 and _suits_winograd(kernel):
        return _winograd(cotangent, kernel[::-1, ::-1], backwards=True)
    return jax.linear_transpose(lambda x: _plain(x, kernel, stride), x)(cotangent)[0]


def _kernel_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int) -> jax.Array:
    side, _, channels, out = kernel.shape
    if side == 1:
        return _product_of_rows(x[:, ::stride, ::stride], cotangent)[None, None]
    if channels < _LEAST_CHANNELS and side == 3:
        return jax.linear_transpose(lambda kernel: _plain(x, kernel, stride), kernel)(cotangent)[0]
    if stride == 2 and side > 3 and not (x.shape[1] % 2 or x.shape[2] % 2):
        # A pixel's twelve numbers lie together where a kernel's three did: patches are made of longer rows.
        blocks = _blocks_of_two(x)
        widened = jax.ShapeDtypeStruct(((side + 1) // 2, (side + 1) // 2, 4 * channels, out), x.dtype)
        before = (side // 2 + 1) // 2
        found = _of_patches(blocks, widened, cotangent, 1, before).reshape(
            *widened.shape[:2], 2, 2, channels, out
        )
        return found.transpose(0, 2, 1, 3, 4, 5).reshape(side + 1, side + 1, channels, out)[1:, 1:]
    if stride == 1:
        return _two_sided(x, kernel, cotangent)
    return _of_patches(x, kernel, cotangent, stride, side // 2)


def _blocks_of_two(x: jax.Array) -> jax.Array:
    """[N, H, W, C] to [N, H / 2, W / 2, 4 C]."""
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, 4 * channels)


def _two_sided(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The kernel's gradient at stride 1, as one product of shifted maps with shifted cotangents.

    Columns are shifted in the one, rows in the other: that copies both 3 times, and not the maps 9 times.
    """
    side, _, channels, out = kernel.shape
    height, width = x.shape[1:3]
    half = side // 2

    def add(total: jax.Array, k: jax.Array, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (half, half), (0, 0)))
        columns = jnp.concatenate([x[:, :, j : j + width] for j in range(side)], -1)
        cotangent = jnp.pad(cotangent, ((0, 0), (half, half), (0, 0), (0, 0)))
        rows = jnp.concatenate([cotangent[:, i : i + height] for i in reversed(range(side))], -1)
        return total + _product_of_rows(columns, rows)

    total = jnp.zeros((side * channels, side * out), kernel.dtype)
    found = _in_parts(add, total, (x, cotangent), max(_GRADIENT_BYTES, _bytes(kernel)))
    return found.reshape(side, channels, side, out).transpose(2, 0, 1, 3)


def _of_patches(
    x: jax.Array, kernel: jax.Array | jax.ShapeDtypeStruct, cotangent: jax.Array, stride: int, before: int
) -> jax.Array:
    """The kernel's gradient as a product of patches with cotangents; `before` is the padding at the start."""
    side = kernel.shape[0]
    height, width = cotangent.shape[1:3]

    def add(total: jax.Array, k: jax.Array, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (before, side), (before, side), (0, 0)))
        shifted = [
            x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
            for i in range(side)
            for j in range(side)
        ]
        return total + _product_of_rows(jnp.concatenate(shifted, -1), cotangent)

    total = jnp.zeros((math.prod(kernel.shape[:3]), kernel.shape[3]), kernel.dtype)
    found = _in_parts(add, total, (x, cotangent), max(_GRADIENT_BYTES, _bytes(kernel)))
    return found.reshape(kernel.shape)


def _winograd(x: jax.Array, kernel: jax.Array, *, backwards: bool = False) -> jax.Array:
    """Convolves with a 3x3 kernel, with `backwards` from its channels out to its channels in."""
    height, width = x.shape[1:3]
    channels, out = kernel.shape[:1:-1] if backwards else kernel.shape[2:]
    contract = (((1,), (1 if backwards else 0,)), ((), ()))
    weights = [weight for row in _combine(_KERNEL, list(kernel)) for weight in _combine(_KERNEL, list(row))]
    tall, wide = -(-height // 2), -(-width // 2)

    def compute(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
        tiles = [
            tile.reshape(-1, channels)
            for row in _combine(_INPUT, [x[:, i : i + 2 * tall : 2] for i in range(4)])
            for tile in _combine(_INPUT, [row[:, :, j : j + 2 * wide : 2] for j in range(4)])
        ]
        products = [jax.lax.dot_general(*pair, contract) for pair in zip(tiles, weights, strict=True)]
        by_row = [_combine(_OUTPUT, products[4 * i : 4 * i + 4]) for i in range(4)]  # [4][2]
        columns = [_combine(_OUTPUT, [row[j] for row in by_row]) for j in range(2)]  # [2 columns][2 rows]
        parts = [[columns[j][i].reshape(-1, tall, wide, out) for j in range(2)] for i in range(2)]
        found = jnp.stack([jnp.stack(row, 3) for row in parts], 2)
        return found.reshape(-1, 2 * tall, 2 * wide, out)[:, :height, :width]

    def put(found: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(found, compute(x), k, 1)

    count = _parts(x, _WINOGRAD_BYTES)
    found = jnp.zeros((len(x) // count, count, height, width, out), x.dtype)
    return _in_parts(put, found, (x,), _WINOGRAD_BYTES).reshape(-1, height, width, out)


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The product of a small matrix with arrays, written out, zeros left out."""
    found = []
    for weights in matrix:
        terms = [array if w == 1 else w * array for w, array in zip(weights, arrays, strict=True) if w]
        found.append(functools.reduce(jnp.add, terms))
    return found


def _product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maps [..., C] and [..., D] to their [C, D]."""
    contract = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), contract)


def _bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize


def _parts(x: jax.Array, part_bytes: int) -> int:
    """The number of parts to compute maps in: of as many images each, and of about `part_bytes`."""
    wanted = min(_bytes(x) / part_bytes, len(x))
    return next(count for count in range(1, len(x) + 1) if len(x) % count == 0 and count >= wanted)


def _in_parts(
    compute: Callable[..., jax.Array], start: jax.Array, arrays: tuple[jax.Array, ...], part_bytes: int
) -> jax.Array:
    """Folds `compute`, (carry, k, *part k of each array) to carry, over parts of some images each.

    Part k is every n-th image from the k-th on, so that of a batch split over devices each has its share.
    """
    count = _parts(arrays[0], part_bytes)
    split = [array.reshape(-1, count, *array.shape[1:]) for array in arrays]

    def step(k: jax.Array | int, carry: jax.Array) -> jax.Array:
        return compute(carry, k, *(jax.lax.dynamic_index_in_dim(array, k, 1, False) for array in split))

    return step(0, start) if count == 1 else jax.lax.fori_loop(0, count, step, start)
