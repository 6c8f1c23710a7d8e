"""Convolutions with a 3x3 kernel and stride 2 by patches, the squares of a map that the kernel meets.

The patches are 2.25 times the map; with stride 1 they would be 9 times.
"""

import jax
import jax.numpy as jnp

from simclr_jax.convolution import parts

_PART_BYTES = 1 << 22  # of patches; with a quarter as much it takes up to 1.5 times as long


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a 3x3 kernel and stride 2.

    Args:
      x: float32 [N, H, W, C].
      kernel: float32 [3, 3, C, D].

    Returns:
      float32 [N, ceil(H / 2), ceil(W / 2), D].
    """
    height, width = (-(-side // 2) for side in x.shape[1:3])
    weights = kernel.reshape(-1, kernel.shape[3])

    def compute(x: jax.Array) -> jax.Array:
        return (_patches(x) @ weights).reshape(-1, height, width, weights.shape[1])

    return parts.put_together(compute, number_of_parts(len(x), height * width, len(weights)), x)


def input_gradient(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient [N, H, W, C] of `convolve` at the maps.

    Args:
      x: float32 [N, H, W, C].
      kernel: float32 [3, 3, C, D].
      cotangent: float32 [N, ceil(H / 2), ceil(W / 2), D].
    """
    height, width, channels = x.shape[1:]
    tall, wide, out = cotangent.shape[1:]
    weights = kernel.reshape(-1, out)

    def compute(cotangent: jax.Array) -> jax.Array:
        # What each pixel gives to the 3x3 around it: even rows get it from one row, odd ones from two.
        given = jax.lax.dot_general(cotangent.reshape(-1, out), weights, (((1,), (1,)), ((), ())))
        given = given.reshape(-1, tall, wide, 3, 3, channels)
        rows = (given[..., 1, :, :], given[..., 2, :, :] + _next(given[..., 0, :, :], 1))
        pixels = [jnp.stack([row[..., 1, :], row[..., 2, :] + _next(row[..., 0, :], 2)], 3) for row in rows]
        even = jnp.stack(pixels, 2).reshape(-1, 2 * tall, 2 * wide, channels)
        return even[:, :height, :width]

    return parts.put_together(compute, number_of_parts(len(x), tall * wide, len(weights)), cotangent)


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient [3, 3, C, D] of `convolve` at the kernel.

    Args:
      x: float32 [N, H, W, C].
      cotangent: float32 [N, ceil(H / 2), ceil(W / 2), D].
    """

    def compute(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        # The other way around the product takes up to 1.3 times as long.
        return parts.product_of_rows(cotangent, _patches(x))

    n, height, width, out = cotangent.shape
    channels = x.shape[3]
    count = number_of_parts(n, height * width, 9 * channels)
    return parts.add_up(compute, count, x, cotangent).T.reshape(3, 3, channels, out)


def _patches(x: jax.Array) -> jax.Array:
    """Row by row [patches, 9 C]."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (size - 2 for size in x.shape[1:3])
    slices = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate([part.reshape(-1, x.shape[3]) for part in slices], -1)


def number_of_parts(images: int, pixels: int, patch: int) -> int:
    """In how many parts to compute images of so many patches each, of so many numbers."""
    return parts.number_of_parts(images, images * pixels * patch, _PART_BYTES)


def _next(x: jax.Array, axis: int) -> jax.Array:
    """`x` with entry i + 1 of `axis` for i, and zeros at the end."""
    padding = [(0, int(i == axis)) for i in range(x.ndim)]
    return jax.lax.slice_in_dim(jnp.pad(x, padding), 1, None, axis=axis)
