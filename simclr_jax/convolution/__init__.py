"""Convolutions of maps, and on CPUs forms of them and of their gradients that are fast there.

By XLA's convolutions a ResNet's step on a CPU takes up to twice as long as PyTorch's. There, in float32,
those with a 3x3 kernel of stride 1, most of a ResNet's, are computed by `winograd`, those of stride 2 by
`patches`, those of images by `stem`, those of maps too small for `winograd` by `taps`, as are, in any type,
those of maps smaller than their kernel: most as products of matrices. With few channels XLA's are as fast,
but for the gradient of the kernel. Results are those of the definition to 1e-5 of their standard deviation.
What was measured, and what else was tried: docs/performance.md.
"""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.convolution import patches, stem, taps, winograd
from simclr_jax.convolution.parts import product_of_rows

# With fewer channels XLA's convolution is as fast. With 64 it became so in jax 0.11 (from Python 3.12 on):
# 29 ms instead of 68, while its gradient of the kernel still takes 115, ours 44.
_LEAST_CHANNELS = 64 if jax.__version_info__ < (0, 11) else 128
_LEAST_CHANNELS_OF_GRADIENT = 16  # of the kernel, and of maps where the stride is 2
_LEAST_CHANNELS_OF_STEM_GRADIENT = 32
# Before jax 0.11 XLA's narrow stem takes up to six times as long as that of blocks: 85 ms instead of 15.
_MOST_CHANNELS_OF_STEM_BLOCKS = 32 if jax.__version_info__ < (0, 11) else 0
_LEAST_CHANNELS_OF_TAPS = 128


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
    return jax.lax.platform_dependent(
        *given,
        cotangent,
        cpu=functools.partial(_cpu_gradients, stride=stride),
        default=functools.partial(_plain_gradients, stride=stride),
    )


convolve.defvjp(_forward, _backward)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    half = len(kernel) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(half, half)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _plain_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(functools.partial(_plain, stride=stride), x, kernel)[1](cotangent)


# Jitted, so that they are traced once for every shape: in a ResNet-18's step with CIFAR-10's stem they were
# most of 15 s of tracing, on accelerators too.
@functools.partial(jax.jit, static_argnames="stride")
def _cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    if _suits_taps(x, kernel, stride):
        return taps.convolve(x, kernel, stride)
    if _suits_winograd(x, kernel, stride, _LEAST_CHANNELS):
        return winograd.convolve(x, kernel)
    if _suits_patches(kernel, stride, _LEAST_CHANNELS):
        return patches.convolve(x, kernel)
    if _suits_blocks(x, kernel, stride):
        return stem.convolve(x, kernel)
    return _plain(x, kernel, stride)


@functools.partial(jax.jit, static_argnames="stride")
def _cpu_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array, stride: int
) -> tuple[jax.Array, jax.Array]:
    if _suits_taps(x, kernel, stride):
        return jax.vjp(functools.partial(taps.convolve, stride=stride), x, kernel)[1](cotangent)
    of_input, of_kernel = _plain_gradients(x, kernel, cotangent, stride)  # what is not used is not computed
    if _suits_winograd(x, kernel, stride, _LEAST_CHANNELS_OF_GRADIENT):
        if _is_wide(kernel, _LEAST_CHANNELS):
            of_input = winograd.convolve(cotangent, kernel[::-1, ::-1], backwards=True)
        of_kernel = winograd.kernel_gradient(x, cotangent)
    elif _suits_patches(kernel, stride, _LEAST_CHANNELS_OF_GRADIENT):
        of_input = patches.input_gradient(x, kernel, cotangent)
        of_kernel = patches.kernel_gradient(x, cotangent)
    elif _suits_stem(kernel, stride):
        of_kernel = stem.kernel_gradient(x, cotangent, len(kernel), stride)
    elif len(kernel) == 1 and x.dtype == jnp.float32:
        of_kernel = product_of_rows(x[:, ::stride, ::stride], cotangent)[None, None]
    return of_input, of_kernel


def _suits_taps(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    smaller = min(x.shape[1:3]) < len(kernel)
    wide = _is_wide(kernel, _LEAST_CHANNELS_OF_TAPS)
    return smaller or (wide and (len(kernel), stride) == (3, 1) and _is_odd(x))


def _suits_winograd(x: jax.Array, kernel: jax.Array, stride: int, least: int) -> bool:
    return (len(kernel), stride) == (3, 1) and _is_wide(kernel, least) and not _is_odd(x)


def _suits_patches(kernel: jax.Array, stride: int, least: int) -> bool:
    return (len(kernel), stride) == (3, 2) and _is_wide(kernel, least)


def _is_odd(x: jax.Array) -> bool:
    """Whether even sides would make the maps much larger: those of 3x3 pixels nearly twice as large."""
    height, width = x.shape[1:3]
    return 4 * -(-height // 2) * -(-width // 2) >= 1.4 * height * width


def _is_wide(kernel: jax.Array, least: int) -> bool:
    return min(kernel.shape[2:]) >= least and kernel.dtype == jnp.float32


def _suits_blocks(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    narrow = kernel.shape[3] <= _MOST_CHANNELS_OF_STEM_BLOCKS
    return (len(kernel), stride) == (7, 2) and even and narrow and kernel.dtype == jnp.float32


def _suits_stem(kernel: jax.Array, stride: int) -> bool:
    side, _, channels, out = kernel.shape
    wide = out >= _LEAST_CHANNELS_OF_STEM_GRADIENT
    return side > stride and channels == 3 and wide and kernel.dtype == jnp.float32
