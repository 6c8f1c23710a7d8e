"""Brightness, contrast, saturation, hue, grayscale, solarize, normalise: on one image, and at random."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from simclr_jax.augment import checks
from simclr_jax.augment import planes as plane
from simclr_jax.augment.planes import Planes, Scalar

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _on_planes(image: Array, operation: Callable[[Planes], Planes]) -> Array:
    image = checks.image("image", image)
    planes = plane.cast(plane.split(image), jnp.float32)
    return plane.merge(operation(planes)).astype(image.dtype)


def adjust_brightness(image: Array, factor: Scalar) -> Array:
    """Multiplies by a factor >= 0 and clips: 0 is black, 1 the image. [H, W, 3] in [0, 1]."""
    checks.at_least_zero("factor", "factor", factor)
    return _on_planes(image, lambda planes: plane.brightness(planes, factor))


def adjust_contrast(image: Array, factor: Scalar) -> Array:
    """Blends with the mean of the grayscale image: factor 0 is uniform gray, 1 the image.

    [H, W, 3] in [0, 1]; the factor is at least 0.
    """
    checks.at_least_zero("factor", "factor", factor)
    return _on_planes(image, lambda planes: plane.contrast(planes, factor))


def adjust_saturation(image: Array, factor: Scalar) -> Array:
    """Blends with the grayscale image: factor 0 is gray, 1 the image.

    [H, W, 3] in [0, 1]; the factor is at least 0.
    """
    checks.at_least_zero("factor", "factor", factor)
    return _on_planes(image, lambda planes: plane.saturation(planes, factor))


def adjust_hue(image: Array, turn: Scalar) -> Array:
    """Shifts the hue in HSV by `turn`, in turns of the colour circle: 1 is the image again.

    The largest and smallest of a pixel's three values stay. [H, W, 3] in [0, 1].
    """
    return _on_planes(image, lambda planes: plane.hue(planes, turn))


def rgb_to_grayscale(image: Array) -> Array:
    """The luma 0.2989 red + 0.587 green + 0.114 blue of [H, W, 3] in [0, 1], as [H, W, 1]."""
    image = checks.image("image", image)
    return plane.luma(plane.cast(plane.split(image), jnp.float32))[..., None].astype(image.dtype)


def solarize(image: Array, threshold: Scalar) -> Array:
    """Inverts the values >= threshold of [H, W, 3] in [0, 1]."""
    return jnp.asarray(pix.solarize(checks.image("image", image), threshold))


def flip_left_right(image: Array) -> Array:
    """Turns [H, W, 3] left to right."""
    return jnp.asarray(pix.flip_left_right(checks.image("image", image)))


def normalize(image: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(image - mean) / std of [H, W, 3] in [0, 1], with three numbers each, one a channel."""
    mean, std = check_normalization(mean, std)
    return _on_planes(image, lambda planes: plane.normalize(planes, mean, std))


def check_normalization(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as tuples of three; raises ValueError unless they are three numbers, those of `std` above 0."""
    if len(mean) != 3:
        raise ValueError(f"mean must be three numbers, got {mean}")
    if len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(f"std must be three numbers more than 0, got {std}")
    return tuple(mean), tuple(std)


class Jitter(NamedTuple):
    """One draw of the colour jitter's parameters; None leaves an operation out.

    `order` is int32 [4], the operations from first to last as 0 brightness, 1 contrast,
    2 saturation, 3 hue. The others are scalars, the arguments of the `adjust_*` functions.
    """

    order: Array
    brightness: Array | None
    contrast: Array | None
    saturation: Array | None
    hue: Array | None


def sample_jitter(
    key: Array, *, brightness: Scalar, contrast: Scalar, saturation: Scalar, hue: Scalar
) -> Jitter:
    """Draws a colour jitter, as torchvision's `ColorJitter.get_params`.

    The order is a uniform permutation; a strength s of brightness, contrast or saturation draws a
    factor from U(max(0, 1 - s), 1 + s), one of hue a turn from U(-s, s). The number 0 gives None;
    a strength may also be traced.

    Raises:
      ValueError: if a strength is negative, or that of hue more than 0.5.
    """
    keys = jax.random.split(key, 5)
    return Jitter(
        order=jax.random.permutation(keys[0], 4),
        brightness=None if checks.is_zero(brightness) else sample_factor(keys[1], "brightness", brightness),
        contrast=None if checks.is_zero(contrast) else sample_factor(keys[2], "contrast", contrast),
        saturation=None if checks.is_zero(saturation) else sample_factor(keys[3], "saturation", saturation),
        hue=None if checks.is_zero(hue) else sample_turn(keys[4], hue),
    )


def sample_factor(key: Array, name: str, strength: Scalar) -> Array:
    """Draws from U(max(0, 1 - strength), 1 + strength); `name` is the argument's, for the error."""
    checks.at_least_zero(name, "strength", strength)
    return jax.random.uniform(key, minval=jnp.maximum(0.0, 1 - strength), maxval=1 + strength)


def sample_turn(key: Array, strength: Scalar) -> Array:
    """Draws from U(-strength, strength), in turns of the colour circle."""
    checks.at_least_zero("hue", "strength in turns", strength, high=0.5)
    return jax.random.uniform(key, minval=-strength, maxval=strength)


def color_jitter(image: Array, jitter: Jitter) -> Array:
    """Applies the operations of `jitter` in its order to [H, W, 3] in [0, 1]."""
    return _on_planes(image, lambda planes: jitter_planes(planes, jitter, dtype=jnp.float32))


def jitter_planes(planes: Planes, jitter: Jitter, *, dtype: jax.typing.DTypeLike) -> Planes:
    """Applies `jitter` without a branch, so that under vmap each image may have its order.

    A `lax.switch` over the operation would compute all four under vmap, at each of the four places. Here
    the contrast, whose mean has to wait for the whole image, stands in the middle, and on either side of
    it a hue shift with blends on both of its sides. Of these, those that the order does not ask for get
    the parameter that changes nothing. So there is one mean, and all else is arithmetic on pixels.

    Args:
      planes: float [..., H, W].
      jitter: its parameters, scalars.
      dtype: of the planes wherever the computation is cut. A compiler can only fuse so many operations;
        for a TPU and 512 images of 96x96 the cuts cost 0.9 GB in float32, 0.3 GB in bfloat16.

    Returns:
      float32 planes.
    """
    place = [jnp.sum(jnp.where(jitter.order == operation, jnp.arange(4), 0)) for operation in range(4)]

    def blends(planes: Planes, after: ArrayLike, before: ArrayLike) -> Planes:
        """Brightness and saturation, if their places lie between the two."""

        def factor(value: Array, operation: int, condition: ArrayLike = True) -> Array:
            between = (place[operation] > after) & (place[operation] < before)
            return jnp.where(between & condition, value, 1)

        brightness, saturation = jitter.brightness, jitter.saturation
        if brightness is not None and saturation is not None:
            first = place[BRIGHTNESS] < place[SATURATION]
            planes = plane.brightness(planes, factor(brightness, BRIGHTNESS, first))
            planes = plane.saturation(planes, factor(saturation, SATURATION))
            return plane.brightness(planes, factor(brightness, BRIGHTNESS, ~first))
        if brightness is not None:
            return plane.brightness(planes, factor(brightness, BRIGHTNESS))
        if saturation is not None:
            return plane.saturation(planes, factor(saturation, SATURATION))
        return planes

    def shift(planes: Planes, after: ArrayLike, before: ArrayLike) -> Planes:
        """Blends, hue and blends, as far as their places lie between the two."""
        if jitter.hue is None:
            return blends(planes, after, before)
        here = (place[HUE] > after) & (place[HUE] < before)
        planes = blends(planes, after, jnp.where(here, place[HUE], before))
        planes = plane.hue(planes, jnp.where(here, jitter.hue, 0))
        planes = plane.cast(plane.cast(planes, dtype), jnp.float32)
        return blends(planes, jnp.where(here, place[HUE], before), before)

    planes = plane.cast(planes, jnp.float32)
    if jitter.contrast is None:
        return shift(planes, -1, 4)
    planes = shift(planes, -1, place[CONTRAST])
    planes = plane.cast(plane.cast(planes, dtype), jnp.float32)
    planes = plane.contrast(planes, jitter.contrast)
    return shift(planes, place[CONTRAST], 4)


def random_brightness(key: Array, image: Array, *, strength: Scalar) -> Array:
    """`adjust_brightness` by a factor from U(max(0, 1 - strength), 1 + strength)."""
    return adjust_brightness(image, sample_factor(key, "strength", strength))


def random_contrast(key: Array, image: Array, *, strength: Scalar) -> Array:
    """`adjust_contrast` by a factor from U(max(0, 1 - strength), 1 + strength)."""
    return adjust_contrast(image, sample_factor(key, "strength", strength))


def random_saturation(key: Array, image: Array, *, strength: Scalar) -> Array:
    """`adjust_saturation` by a factor from U(max(0, 1 - strength), 1 + strength)."""
    return adjust_saturation(image, sample_factor(key, "strength", strength))


def random_hue(key: Array, image: Array, *, strength: Scalar) -> Array:
    """`adjust_hue` by U(-strength, strength) turns; the strength is at most 0.5."""
    return adjust_hue(image, sample_turn(key, strength))


def random_color_jitter(
    key: Array,
    image: Array,
    *,
    brightness: Scalar,
    contrast: Scalar,
    saturation: Scalar,
    hue: Scalar,
    probability: ArrayLike = 1.0,
) -> Array:
    """Jitters the colours with the given strengths (see `sample_jitter`) and probability."""
    checks.probability("probability", probability)
    if checks.is_zero(probability):
        return image
    key_apply, key_jitter = jax.random.split(key)
    jitter = sample_jitter(
        key_jitter, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
    )
    applied = jax.random.bernoulli(key_apply, probability)
    return jnp.where(applied, color_jitter(image, jitter), image)


def random_flip_left_right(key: Array, image: Array, *, probability: ArrayLike = 0.5) -> Array:
    """Turns the image left to right with the given probability."""
    checks.probability("probability", probability)
    return jnp.where(jax.random.bernoulli(key, probability), flip_left_right(image), image)


def random_grayscale(key: Array, image: Array, *, probability: ArrayLike) -> Array:
    """Replaces the colours by their luma with the given probability."""
    checks.probability("probability", probability)
    return jnp.where(jax.random.bernoulli(key, probability), rgb_to_grayscale(image), image)


def random_solarize(key: Array, image: Array, *, threshold: Scalar, probability: ArrayLike) -> Array:
    """Inverts the values >= threshold with the given probability."""
    checks.probability("probability", probability)
    return jnp.where(jax.random.bernoulli(key, probability), solarize(image, threshold), image)
