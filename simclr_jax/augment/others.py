"""Cutout, Sobel, Gaussian noise, quarter turns: the operations that SimCLR studied and left out.

Source: Chen et al., https://arxiv.org/abs/2002.05709, section 3.1, which gives none of their parameters.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from simclr_jax.augment import checks
from simclr_jax.augment.planes import Scalar


def cutout(image: Array, center: ArrayLike, side: ArrayLike) -> Array:
    """Blackens a square, of which the part outside the image is lost.

    Source: DeVries and Taylor, https://arxiv.org/abs/1708.04552. Their images are normalised first, so
    that their zero is the mean of the data; here it is black.

    Args:
      image: float [H, W, 3] in [0, 1].
      center: integers [2], row and column of the square's centre. Of an even side it is the first pixel
        after the middle.
      side: of the square, whole pixels, at least 0; may be traced.

    Returns:
      An image of the same shape and type.

    Raises:
      ValueError: if side is negative, center not two integers, or the image not one.
    """
    image = checks.image("image", image)
    checks.at_least_zero("side", "number of pixels", side)
    center, side = jnp.asarray(center), jnp.asarray(side)
    if center.shape != (2,) or not jnp.issubdtype(center.dtype, jnp.integer):
        raise ValueError(f"center must be integers of shape [2], got {center.dtype} {list(center.shape)}")
    if not jnp.issubdtype(side.dtype, jnp.integer):
        raise ValueError(f"side must be a whole number of pixels, got {side.dtype}")
    first = center.astype(jnp.int32) - side // 2
    row, column = (jax.lax.broadcasted_iota(jnp.int32, image.shape, axis) - first[axis] for axis in (0, 1))
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    return jnp.where(inside, jnp.zeros((), image.dtype), image)


def sobel(image: Array) -> Array:
    """Replaces each channel by the size of its gradient.

    The gradient is that of the two 3x3 Sobel filters over borders that reflect, as in
    `tf.image.sobel_edges`. Its length is divided by 4, what a straight edge between black and white has,
    and clipped at 1; a corner has up to sqrt(20).

    Args:
      image: float [H, W, 3] in [0, 1].

    Returns:
      An image of the same shape and type, black where nothing changes.

    Raises:
      ValueError: if the image is not one.
    """
    image = checks.image("image", image)
    padded = jnp.pad(image.astype(jnp.float32), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    smooth, difference = (1, 2, 1), (-1, 0, 1)
    down = _three_taps(_three_taps(padded, difference, axis=0), smooth, axis=1)
    across = _three_taps(_three_taps(padded, smooth, axis=0), difference, axis=1)
    return jnp.minimum(jnp.sqrt(down**2 + across**2) / 4, 1).astype(image.dtype)


def _three_taps(array: Array, taps: Sequence[int], *, axis: int) -> Array:
    """The weighted sums of neighbours along `axis`, which loses one entry at either end."""
    # Not a convolution: on a CPU those are slow inside the loop over images.
    length = array.shape[axis] - 2
    lines = [jax.lax.slice_in_dim(array, tap, tap + length, axis=axis) for tap in range(3)]
    return taps[0] * lines[0] + taps[1] * lines[1] + taps[2] * lines[2]


def add_noise(image: Array, noise: ArrayLike) -> Array:
    """Adds `noise`, of the image's shape [H, W, 3], to an image in [0, 1] and clips.

    Raises:
      ValueError: if the shapes differ, or the image is not one.
    """
    image, noise = checks.image("image", image), jnp.asarray(noise)
    if noise.shape != image.shape:
        raise ValueError(f"noise must have the image's shape {list(image.shape)}, got {list(noise.shape)}")
    return jnp.clip(image.astype(jnp.float32) + noise, 0, 1).astype(image.dtype)


def rotate_quarter_turns(image: Array, turns: ArrayLike) -> Array:
    """Rotates counter-clockwise by a number of quarter turns, exactly.

    `numpy.rot90`, and torchvision's `rotate` by a multiple of 90 degrees.

    Args:
      image: float [N, N, 3] in [0, 1], a square one: no shape can depend on the number of turns.
      turns: an integer of any sign; may be traced.

    Returns:
      An image of the same shape and type.

    Raises:
      ValueError: if the image is not one or not square, or turns not an integer.
    """
    image, turns = checks.image("image", image), jnp.asarray(turns)
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"image must be square, got {list(image.shape)}")
    if turns.shape != () or not jnp.issubdtype(turns.dtype, jnp.integer):
        raise ValueError(f"turns must be an integer, got {turns.dtype} {list(turns.shape)}")
    return jax.lax.switch(jnp.mod(turns, 4), [partial(jnp.rot90, k=k) for k in range(4)], image)


def random_cutout(key: Array, image: Array, *, side: ArrayLike, probability: ArrayLike = 1.0) -> Array:
    """`cutout` with the given probability around a pixel drawn uniformly, as DeVries and Taylor draw it."""
    checks.probability("probability", probability)
    key_apply, key_center = jax.random.split(key)
    center = jax.random.randint(key_center, (2,), 0, jnp.asarray(image.shape[:2]))
    return jnp.where(jax.random.bernoulli(key_apply, probability), cutout(image, center, side), image)


def random_sobel(key: Array, image: Array, *, probability: ArrayLike) -> Array:
    """`sobel` with the given probability."""
    checks.probability("probability", probability)
    return jnp.where(jax.random.bernoulli(key, probability), sobel(image), image)


def random_gaussian_noise(
    key: Array, image: Array, *, sigma: Scalar = 0.1, probability: ArrayLike = 1.0
) -> Array:
    """Adds noise from N(0, sigma^2) to each value with the given probability, and clips.

    torchvision's `GaussianNoise`, with its sigma.
    """
    checks.probability("probability", probability)
    checks.at_least_zero("sigma", "standard deviation", sigma)
    key_apply, key_noise = jax.random.split(key)
    noisy = add_noise(image, sigma * jax.random.normal(key_noise, image.shape))
    return jnp.where(jax.random.bernoulli(key_apply, probability), noisy, image)


def random_quarter_turns(key: Array, image: Array) -> Array:
    """Rotates a square image by 0, 90, 180 or 270 degrees, each as likely."""
    return rotate_quarter_turns(image, jax.random.randint(key, (), 0, 4))
