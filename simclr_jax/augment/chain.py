"""The chain of operations that makes a view of one image, in the two forms that run fast."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from simclr_jax.augment import blur, color, crop
from simclr_jax.augment import planes as plane
from simclr_jax.augment.color import Jitter
from simclr_jax.augment.planes import Scalar


class View(NamedTuple):
    """One draw of a view's parameters; None leaves an operation out of the program."""

    box: Array  # float32 [4]: top, left, height, width of the crop in pixels
    flip: Array | None  # bool []
    jitter: Jitter | None
    jittered: Array | None  # bool [], whether the jitter is applied
    grayscale: Array | None  # bool []
    sigma: Array | None  # float32 [], pixels
    blurred: Array | None  # bool []
    solarize: Array | None  # bool []


class Settings(NamedTuple):
    """What is the same for every view of a program."""

    size: int  # pixels
    blur_kernel: int  # pixels, odd
    solarize_threshold: Scalar
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: DTypeLike  # of the view


def at_once(view: View, canvas: Array, settings: Settings) -> Array:
    """A view by arithmetic without a branch, meant for vmap on an accelerator.

    Every operation is computed for every image; one that is not applied gets the parameter that changes
    nothing. Between the operations that a compiler cannot fuse, images have the type of the view.

    Returns:
      [size, size, 3] of `settings.dtype`.
    """
    dtype = settings.dtype
    flip = False if view.flip is None else view.flip
    planes = crop.crop_by_products(canvas, view.box, settings.size, flip, dtype)
    planes = plane.cast(planes, jnp.float32)
    if view.jitter is not None and view.jittered is not None:
        planes = color.jitter_planes(planes, _unless(view.jittered, view.jitter), dtype=dtype)
    if view.grayscale is not None:
        planes = plane.select(view.grayscale, plane.grayscale(planes), planes)
    planes = plane.cast(planes, dtype)
    if view.sigma is not None and view.blurred is not None:
        sigma = jnp.where(view.blurred, view.sigma, 0)
        planes = blur.blur_by_products(planes, sigma, settings.blur_kernel)
    planes = plane.cast(planes, jnp.float32)
    if view.solarize is not None:
        planes = plane.select(view.solarize, plane.solarize(planes, settings.solarize_threshold), planes)
    planes = plane.normalize(planes, settings.mean, settings.std)
    return plane.merge(plane.cast(planes, dtype))


def _unless(applied: Array, jitter: Jitter) -> Jitter:
    """`jitter`, or where it is not applied one that changes nothing."""

    def choose(value: Array | None, nothing: float) -> Array | None:
        return None if value is None else jnp.where(applied, value, nothing)

    return Jitter(
        jitter.order,
        choose(jitter.brightness, 1),
        choose(jitter.contrast, 1),
        choose(jitter.saturation, 1),
        choose(jitter.hue, 0),
    )


class Operations(NamedTuple):
    """One implementation of every operation, on whatever it takes for an image in [0, 1]."""

    crop: Callable[..., Any]  # (canvas, box, size, flip) to an image
    brightness: Callable[..., Any]  # (image, factor) to an image, and so on
    contrast: Callable[..., Any]
    saturation: Callable[..., Any]
    hue: Callable[..., Any]
    grayscale: Callable[..., Any]
    blur: Callable[..., Any]
    solarize: Callable[..., Any]
    normalize: Callable[..., Array]  # (image, mean, std) to [size, size, 3]


def in_sequence(view: View, canvas: Array, settings: Settings, operations: Operations) -> Array:
    """A view by one operation after the other, with a branch wherever one may not be applied.

    On one image at a time a branch not taken costs nothing, and the image stays in a CPU's cache. Under
    vmap JAX turns branches into selections and computes all of them.

    Returns:
      [size, size, 3] of `settings.dtype`.
    """
    flip = False if view.flip is None else view.flip
    image = operations.crop(canvas, view.box, settings.size, flip)
    jitter = view.jitter
    if jitter is not None:
        image = _when(view.jittered, lambda image: in_order(image, jitter, operations), image)
    if view.grayscale is not None:
        image = _when(view.grayscale, operations.grayscale, image)
    if view.sigma is not None:
        image = _when(
            view.blurred, lambda image: operations.blur(image, view.sigma, settings.blur_kernel), image
        )
    if view.solarize is not None:
        image = _when(
            view.solarize, lambda image: operations.solarize(image, settings.solarize_threshold), image
        )
    return operations.normalize(image, settings.mean, settings.std).astype(settings.dtype)


def _when(applied: Any, operation: Callable[[Any], Any], image: Any) -> Any:
    return jax.lax.cond(applied, operation, lambda image: image, image)


def in_order(image: Any, jitter: Jitter, operations: Operations) -> Any:
    """The operations of `jitter` in its order."""
    parameters = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    adjusts = (operations.brightness, operations.contrast, operations.saturation, operations.hue)

    def branch(adjust: Callable[[Any, Any], Any], parameter: Array | None) -> Callable[[Any], Any]:
        return lambda image: image if parameter is None else adjust(image, parameter)

    branches = [branch(*pair) for pair in zip(adjusts, parameters, strict=True)]
    for place in range(4):
        image = jax.lax.switch(jitter.order[place], branches, image)
    return image


ON_PLANES = Operations(
    crop=crop.crop_by_taps,
    brightness=plane.brightness,
    contrast=plane.contrast,
    saturation=plane.saturation,
    hue=plane.hue,
    grayscale=plane.grayscale,
    blur=blur.blur_by_shifts,
    solarize=plane.solarize,
    normalize=lambda planes, mean, std: plane.merge(plane.normalize(planes, mean, std)),
)
