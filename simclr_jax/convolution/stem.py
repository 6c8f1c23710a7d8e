"""The stem's convolution, 7x7 with stride 2, of maps with even sides.

With one row and column of zeros more in front it is a 4x4 convolution of blocks of two by two pixels, which
have four times the channels: 12 for images.
"""

import jax
import jax.numpy as jnp

from simclr_jax.convolution import patches

_PADDING = (2, 1)  # blocks


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with a 7x7 kernel and stride 2.

    Args:
      x: float [N, H, W, C], H and W even.
      kernel: float [7, 7, C, D].

    Returns:
      float [N, H / 2, W / 2, D].
    """
    channels, out = kernel.shape[2:]
    by_pixel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, channels, out)
    by_block = by_pixel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * channels, out)
    return jax.lax.conv_general_dilated(
        _blocks(x), by_block, (1, 1), [_PADDING] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient [7, 7, C, D] of `convolve` at the kernel, by patches put together from 16 slices, not 49.

    Args:
      x: float32 [N, H, W, C], H and W even.
      cotangent: float32 [N, H / 2, W / 2, D].
    """
    channels = x.shape[3]
    by_block = patches.kernel_gradient(_blocks(x), cotangent, side=4, stride=1, padding=_PADDING)
    by_pixel = by_block.reshape(4, 4, 2, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    return by_pixel.reshape(8, 8, channels, -1)[1:, 1:]


def _blocks(x: jax.Array) -> jax.Array:
    """[N, H / 2, W / 2, 4 C]."""
    n, height, width, channels = x.shape
    pixels = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(n, height // 2, width // 2, 4 * channels)
