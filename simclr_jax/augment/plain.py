"""Every operation in the plainest way, from dm-pix where it has one that means the same.

This is the reference that the fast forms are tested against, and what `form="plain"` runs. From dm-pix come
the flip, hue, grayscale, blur and solarize; it has no resized crop, and its brightness, contrast and
saturation mean something else.
"""

import dm_pix as pix
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from simclr_jax.augment.chain import Operations
from simclr_jax.augment.crop import resize_weights
from simclr_jax.augment.planes import Scalar


def _crop(canvas: Array, box: Array, size: int, flip: ArrayLike) -> Array:
    image = canvas / 255 if canvas.dtype == jnp.uint8 else canvas.astype(jnp.float32)
    top, left, height, width = box
    rows = resize_weights(top, height, canvas.shape[0], size)
    columns = resize_weights(left, width, canvas.shape[1], size)
    image = jnp.einsum("ih,jw,hwc->ijc", rows, columns, image, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(flip, jnp.asarray(pix.flip_left_right(image)), image)


def _gray(image: Array) -> Array:
    return jnp.asarray(pix.rgb_to_grayscale(image, keep_dims=True))


def _blend(image: Array, reference: Scalar, factor: Scalar) -> Array:
    return jnp.clip(factor * image + (1 - factor) * reference, 0, 1)


def _hue(image: Array, turn: Scalar) -> Array:
    # dm-pix asks which channel equals the largest. Under jax 0.12 on a CPU the blend before it is computed
    # twice, with different rounding, and then none does.
    return jnp.asarray(pix.adjust_hue(jax.lax.optimization_barrier(image), turn))


def _blur(image: Array, sigma: float, kernel_size: int) -> Array:
    reach = kernel_size // 2
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return jnp.asarray(pix.gaussian_blur(padded, sigma, kernel_size, padding="VALID"))


PLAIN = Operations(
    crop=_crop,
    brightness=lambda image, factor: _blend(image, 0, factor),
    contrast=lambda image, factor: _blend(image, jnp.mean(_gray(image)), factor),
    saturation=lambda image, factor: _blend(image, _gray(image), factor),
    hue=_hue,
    grayscale=lambda image: jnp.broadcast_to(_gray(image), image.shape),
    blur=_blur,
    solarize=pix.solarize,
    normalize=lambda image, mean, std: (image - jnp.asarray(mean)[None, None]) / jnp.asarray(std)[None, None],
)
