"""Convolutions of small maps tap by tap: for each pixel of the kernel a product of matrices, with the pixels
it meets. The zeros around a map of 3x3 pixels, left out so, would be two fifths of the arithmetic."""

import jax
import jax.numpy as jnp


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves all maps at once; its gradients are such products too.

    On the last maps of small views XLA's convolution is 2 to 10 times slower: 64 maps of 3x3x512 with a 3x3
    kernel take 32, 32 and 23 ms (output, gradients of input and kernel) against 12, 12 and 14.

    Args:
      x: float [N, H, W, C].
      kernel: float [side, side, C, D], of the same type; side is odd.
      stride: in both directions.

    Returns:
      float [N, ceil(H / stride), ceil(W / stride), D].
    """
    dtype = x.dtype
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)  # so that sums are rounded once
    half = len(kernel) // 2
    tall, wide = ([_met(size, i - half, stride) for i in range(len(kernel))] for size in x.shape[1:3])
    total = jnp.zeros((), jnp.float32)
    for row, (rows, above_below) in zip(kernel, tall, strict=True):
        for weights, (columns, left_right) in zip(row, wide, strict=True):
            products = x[:, rows, columns] @ weights
            total += jnp.pad(products, ((0, 0), above_below, left_right, (0, 0)))
    return total.astype(dtype)


def _met(size: int, offset: int, stride: int) -> tuple[slice, tuple[int, int]]:
    """Which pixels, each so far from one of the result, are on the map; how many are off it at each end."""
    pixels = range(offset, offset + stride * -(-size // stride), stride)
    on = [pixel for pixel in pixels if 0 <= pixel < size]
    if not on:
        return slice(0), (0, len(pixels))
    off = pixels.index(on[0])
    return slice(on[0], on[-1] + 1, stride), (off, len(pixels) - off - len(on))
