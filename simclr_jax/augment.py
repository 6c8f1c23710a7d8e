"""Views of an image: crop, flip, colour jitter, grayscale, blur and solarize, on the accelerator.

Three kinds of functions. `adjust_*` and the other deterministic ones map (image, parameter) to an
image. `sample_*` draw parameters. `random_*` take a key first, draw, and apply. `random_view` is
the SimCLR chain of them and `two_views` a batch of positive pairs. All are pure, take one image
[H, W, 3], and are meant for `jax.vmap` inside `jax.jit`: no shape depends on a drawn value, and
parameters of its own for each image cost nothing extra.

Values are RGB in [0, 1], float32, and stay there: what could leave the range is clipped after each
operation, as torchvision does. Parameters mean what they mean in torchvision's transforms of float
tensors (`RandomResizedCrop(antialias=True)`, `ColorJitter`, `GaussianBlur`, `RandomSolarize`), and
the tests hold every operation to 1e-5 of it. dm-pix has operations of the same names that differ:

    brightness   here: image * factor            dm-pix: image + delta
    contrast     here: blend with the mean gray  dm-pix: blend with the mean of each channel
    saturation   here: blend with the gray       dm-pix: scale S of HSV

A canvas is an array [S, S, 3], uint8 or float in [0, 1], that holds an image at its top-left; the
image's extent is int32 [2], (height, width). What lies outside the extent is never read.

Colours may lie on another axis, `channel_axis=-3`. The views are computed that way: the colour jitter
of 128 images of 96x96 took 24 ms channel first and 37 channel last on two CPU cores.

Sources: Chen et al., https://arxiv.org/abs/2002.05709, appendix A (crop, jitter, gray, blur);
Grill et al., https://arxiv.org/abs/2006.07733, appendix B (solarize).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Range = tuple[float, float]

CROP_TRIES = 10  # torchvision's
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with torchvision's digits

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# By default accelerators multiply float32 matrices in bfloat16 or TF32, which moves pixel values by
# up to 1/256, as much as storing them in eight bits.
FLOAT32 = jax.lax.Precision.HIGHEST


# ---------------------------------------------------------------------------------------- crop


def sample_crop(key: Array, extent: Array, *, area: Range, aspect: Range) -> Array:
    """Draws the box of a random resized crop, as torchvision's `RandomResizedCrop.get_params`.

    Of ten tries, each with a uniform area and a log-uniform aspect ratio, the first that fits into
    the image wins and is placed uniformly. If none fits, the box is the largest central one whose
    aspect ratio lies in the range.

    Args:
      key: a typed random key.
      extent: int32 [2], height and width of the image, at least 1.
      area: range of the box's share of the image's area, 0 < low <= high <= 1.
      aspect: range of width / height, 0 < low <= high.

    Returns:
      float32 [4]: top, left, height, width, whole pixels inside the image.
    """
    _check_range("area", area, high=1.0)
    _check_range("aspect", aspect)
    key_area, key_aspect, key_corner = jax.random.split(key, 3)
    height, width = extent.astype(jnp.float32)

    tries = (CROP_TRIES,)
    areas = height * width * jax.random.uniform(key_area, tries, minval=area[0], maxval=area[1])
    low, high = jnp.log(jnp.asarray(aspect, jnp.float32))
    aspects = jnp.exp(jax.random.uniform(key_aspect, tries, minval=low, maxval=high))
    sizes = jnp.stack([jnp.sqrt(areas / aspects), jnp.sqrt(areas * aspects)], axis=1)
    sizes = jnp.round(sizes).astype(extent.dtype)
    fits = jnp.all((sizes >= 1) & (sizes <= extent[None]), axis=1)
    drawn = sizes[jnp.argmax(fits)]
    fallback = jnp.stack([jnp.round(width / aspect[0]), jnp.round(height * aspect[1])])
    fallback = jnp.minimum(extent, fallback.astype(extent.dtype))

    found = jnp.any(fits)
    size = jnp.where(found, drawn, fallback)
    room = extent - size
    corner = jnp.where(found, jax.random.randint(key_corner, (2,), 0, room + 1), room // 2)
    return jnp.concatenate([corner, size]).astype(jnp.float32)


def crop_and_resize(canvas: Array, box: Array, size: int, *, flip: ArrayLike = False) -> Array:
    """Cuts a box out of a canvas and resizes it with an antialiased bilinear filter.

    Equals torchvision's `resized_crop` of a float tensor with `antialias=True`: pixels outside the
    box have no weight. It is two matrix products; a flip only turns the weights of the columns
    around and so is free.

    Args:
      canvas: [S, S, 3], uint8 or float in [0, 1].
      box: float32 [4]: top, left, height, width, in whole pixels inside the canvas.
      size: side of the result.
      flip: bool, may be traced: whether to flip the result left to right.

    Returns:
      float32 [size, size, 3] in [0, 1].

    Raises:
      ValueError: if the canvas is not of that shape and type, or size is less than 1.
    """
    _check_canvas(canvas)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    top, left, height, width = box
    rows = _resize_weights(top, height, canvas.shape[0], size)
    columns = _resize_weights(left, width, canvas.shape[1], size, flip=flip)
    if canvas.dtype == jnp.uint8:
        rows = rows / 255
    resized = jnp.einsum("ih,hwc->ciw", rows, canvas.astype(jnp.float32), precision=FLOAT32)
    return jnp.einsum("ciw,jw->ijc", resized, columns, precision=FLOAT32)


def _resize_weights(start: Array, length: Array, side: int, size: int, *, flip: ArrayLike = False) -> Array:
    """Weights [size, side] that resize pixels start ... start + length to size pixels."""
    target = jax.lax.broadcasted_iota(jnp.float32, (size, side), 0)
    source = jax.lax.broadcasted_iota(jnp.float32, (size, side), 1) - start
    target = jnp.where(flip, size - 1 - target, target)
    # The distance of the pixels' centres in units of the larger of the two pixels. Written over a
    # common denominator, so that the difference is one of integers, exact in float32.
    distance = size * (2 * source + 1) - length * (2 * target + 1)
    distance = distance / (2 * jnp.maximum(length, size))
    inside = (source >= 0) & (source < length)
    weights = jnp.where(inside, jnp.maximum(1 - jnp.abs(distance), 0), 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def random_resized_crop(
    key: Array,
    canvas: Array,
    extent: Array,
    *,
    size: int,
    area: Range,
    aspect: Range,
    flip: ArrayLike = 0.0,
) -> Array:
    """Cuts out a random box (see `sample_crop`), resizes it, and flips it with probability `flip`.

    Returns:
      float32 [size, size, 3] in [0, 1].
    """
    _check_probability("flip", flip)
    key_box, key_flip = jax.random.split(key)
    box = sample_crop(key_box, extent, area=area, aspect=aspect)
    flipped = False if _is_zero(flip) else jax.random.bernoulli(key_flip, flip)
    return crop_and_resize(canvas, box, size, flip=flipped)


# -------------------------------------------------------------------------------------- colour


def rgb_to_grayscale(image: Array, *, channel_axis: int = -1) -> Array:
    """The luma of an image, with the channel axis kept at length 1.

    dm-pix has the same weights in a product with a vector, which does not fuse with what surrounds
    it and which a TPU rounds to bfloat16.
    """
    red, green, blue = jnp.split(image, 3, axis=channel_axis)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def adjust_brightness(image: Array, factor: ArrayLike) -> Array:
    """Multiplies by a factor >= 0 and clips: 0 is black, 1 the image."""
    return _blend(image, jnp.zeros_like(image), factor)


def adjust_contrast(image: Array, factor: ArrayLike, *, channel_axis: int = -1) -> Array:
    """Blends with the mean of the grayscale image: factor 0 is uniform gray, 1 the image."""
    gray = rgb_to_grayscale(image, channel_axis=channel_axis)
    return _blend(image, _image_mean(gray), factor)


def adjust_saturation(image: Array, factor: ArrayLike, *, channel_axis: int = -1) -> Array:
    """Blends with the grayscale image: factor 0 is gray, 1 the image."""
    return _blend(image, rgb_to_grayscale(image, channel_axis=channel_axis), factor)


def adjust_hue(image: Array, turn: ArrayLike, *, channel_axis: int = -1) -> Array:
    """Shifts the hue in HSV by `turn`, in turns of the colour circle: 1 is the image again.

    The largest and smallest of a pixel's three values stay, so the result is in range if the image
    is. Equals `dm_pix.adjust_hue` to 1e-6 with fewer operations: after three blends, dm-pix's form
    took 177 ms for 128 images [3, 96, 96] on two CPU cores, this one 21.
    """
    red, green, blue = jnp.split(image, 3, axis=channel_axis)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.where(chroma > 0, chroma, 1)
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    offsets = _channels((5.0, 3.0, 1.0), image, channel_axis)
    sector = (hue + 6 * jnp.asarray(turn, image.dtype)) + offsets
    sector = sector - 6 * jnp.floor(sector / 6)
    return value - chroma * jnp.clip(jnp.minimum(sector, 4 - sector), 0, 1)


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


def sample_jitter(key: Array, *, brightness: float, contrast: float, saturation: float, hue: float) -> Jitter:
    """Draws a colour jitter, as torchvision's `ColorJitter.get_params`.

    The order is a uniform permutation; a strength s of brightness, contrast or saturation draws a
    factor from U(max(0, 1 - s), 1 + s), one of hue a turn from U(-s, s). Strength 0 gives None.

    Raises:
      ValueError: if a strength is negative, or that of hue more than 0.5.
    """
    keys = jax.random.split(key, 5)

    def factor(name: str, strength: float, key: Array) -> Array | None:
        if not strength >= 0:
            raise ValueError(f"{name} must be a strength of at least 0, got {strength}")
        if strength == 0:
            return None
        return jax.random.uniform(key, minval=max(0.0, 1 - strength), maxval=1 + strength)

    if not 0 <= hue <= 0.5:
        raise ValueError(f"hue must be a strength between 0 and 0.5 turns, got {hue}")
    return Jitter(
        order=jax.random.permutation(keys[0], 4),
        brightness=factor("brightness", brightness, keys[1]),
        contrast=factor("contrast", contrast, keys[2]),
        saturation=factor("saturation", saturation, keys[3]),
        hue=None if hue == 0 else jax.random.uniform(keys[4], minval=-hue, maxval=hue),
    )


def color_jitter(image: Array, jitter: Jitter, *, channel_axis: int = -1) -> Array:
    """Applies the operations of `jitter` in its order, which may differ from image to image.

    A `lax.switch` over orders would compute all its branches under vmap. Instead, brightness,
    contrast and saturation are one blend with a reference that is selected, and each image goes
    through the blends in its order, the hue shift, and the blends again. A blend acts on one side
    of the hue; on the other its factor is 1, which is the identity. A view takes 1.2 times as long
    on a CPU as with the hue always last.

    Args:
      image: float32 [..., H, W, 3] in [0, 1].
      jitter: its parameters.
      channel_axis: the axis of the colours, -1 or -3.

    Returns:
      An image of the same shape, in [0, 1].
    """
    factors = (jitter.brightness, jitter.contrast, jitter.saturation)
    active = [operation for operation, factor in enumerate(factors) if factor is not None]
    position = jnp.argsort(jitter.order)
    blends: list[tuple[Array, Array]] = []
    if active:
        turns = jnp.argsort(position[jnp.asarray(active)])
        operations = jnp.asarray(active)[turns]
        values = jnp.stack([factor for factor in factors if factor is not None])[turns]
        blends = list(zip(operations, values, strict=True))

    def blend(image: Array, operation: Array, factor: ArrayLike) -> Array:
        gray = rgb_to_grayscale(image, channel_axis=channel_axis)
        reference = jnp.where(operation == CONTRAST, _image_mean(gray), gray)
        return _blend(image, jnp.where(operation == BRIGHTNESS, 0, reference), factor)

    if jitter.hue is None:
        for operation, factor in blends:
            image = blend(image, operation, factor)
        return image

    for operation, factor in blends:
        before = position[operation] < position[HUE]
        image = blend(image, operation, jnp.where(before, factor, 1))
    image = adjust_hue(image, jitter.hue, channel_axis=channel_axis)
    for operation, factor in blends:
        after = position[operation] > position[HUE]
        image = blend(image, operation, jnp.where(after, factor, 1))
    return image


def random_color_jitter(
    key: Array,
    image: Array,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: ArrayLike = 1.0,
    channel_axis: int = -1,
) -> Array:
    """Jitters the colours with the given strengths (see `sample_jitter`) and probability."""
    _check_probability("probability", probability)
    if _is_zero(probability):
        return image
    key_apply, key_jitter = jax.random.split(key)
    jitter = sample_jitter(
        key_jitter, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
    )
    jittered = color_jitter(image, jitter, channel_axis=channel_axis)
    return jnp.where(jax.random.bernoulli(key_apply, probability), jittered, image)


def random_grayscale(key: Array, image: Array, *, probability: ArrayLike, channel_axis: int = -1) -> Array:
    """Replaces the colours by their luma with the given probability."""
    _check_probability("probability", probability)
    if _is_zero(probability):
        return image
    gray = rgb_to_grayscale(image, channel_axis=channel_axis)
    return jnp.where(jax.random.bernoulli(key, probability), gray, image)


def random_solarize(key: Array, image: Array, *, threshold: Array | float, probability: ArrayLike) -> Array:
    """Inverts the values >= threshold with the given probability."""
    _check_probability("probability", probability)
    if _is_zero(probability):
        return image
    return jnp.where(jax.random.bernoulli(key, probability), pix.solarize(image, threshold), image)


# ---------------------------------------------------------------------------------------- blur


def blur_kernel_size(size: int) -> int:
    """The blur's kernel for views of a size: a tenth of the side, made odd, at least 3."""
    return max(3, 2 * (size // 20) + 1)


def gaussian_blur(image: Array, sigma: ArrayLike, kernel_size: int, *, channel_axis: int = -1) -> Array:
    """Blurs with a Gaussian cut off at the kernel's ends, over borders that reflect.

    Args:
      image: float32 [..., H, W, 3].
      sigma: standard deviation in pixels, more than 0; may be traced.
      kernel_size: odd, at most twice the shorter side less 1; not traced.
      channel_axis: the axis of the colours, -1 or -3.

    Returns:
      An image of the same shape.

    Raises:
      ValueError: if kernel_size is even, less than 1, or too large for the image.
    """
    planes = jnp.moveaxis(image, channel_axis, -3)
    height, width = planes.shape[-2:]
    _check_kernel("kernel_size", kernel_size, min(height, width))
    # Two products with banded matrices. dm_pix.gaussian_blur is a convolution that under vmap, with
    # a sigma for each image, becomes one of B * C groups: 335 ms instead of 18 for 128 images of
    # 96x96 on two CPU cores. It also pads with zeros, which darkens the borders.
    rows, columns = (_blur_weights(sigma, kernel_size, side) for side in (height, width))
    planes = jnp.einsum("...hw,jw->...hj", planes, columns, precision=FLOAT32)
    planes = jnp.einsum("ih,...hj->...ij", rows, planes, precision=FLOAT32)
    return jnp.moveaxis(planes, -3, channel_axis)


def _blur_weights(sigma: ArrayLike, kernel_size: int, side: int) -> Array:
    """Weights [side, side] of the blur of one axis."""
    target = jax.lax.broadcasted_iota(jnp.float32, (side, side), 0)
    source = jax.lax.broadcasted_iota(jnp.float32, (side, side), 1)

    def gauss(distance: Array) -> Array:
        inside = jnp.abs(distance) <= kernel_size // 2
        return jnp.where(inside, jnp.exp(-0.5 * (distance / sigma) ** 2), 0)

    # A pixel is seen at its place and mirrored at either border; those on a border have no image.
    last = side - 1
    weights = gauss(source - target)
    weights += jnp.where(source > 0, gauss(-source - target), 0)
    weights += jnp.where(source < last, gauss(2 * last - source - target), 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def random_gaussian_blur(
    key: Array,
    image: Array,
    *,
    sigma: Range,
    kernel_size: int,
    probability: ArrayLike = 1.0,
    channel_axis: int = -1,
) -> Array:
    """Blurs with the given probability and a standard deviation uniform in a range, in pixels."""
    _check_probability("probability", probability)
    _check_range("sigma", sigma)
    if _is_zero(probability):
        return image
    key_apply, key_sigma = jax.random.split(key)
    drawn = jax.random.uniform(key_sigma, minval=sigma[0], maxval=sigma[1])
    blurred = gaussian_blur(image, drawn, kernel_size, channel_axis=channel_axis)
    return jnp.where(jax.random.bernoulli(key_apply, probability), blurred, image)


# --------------------------------------------------------------------------------------- views


def normalize(image: Array, mean: Sequence[float], std: Sequence[float], *, channel_axis: int = -1) -> Array:
    """(image - mean) / std, with three numbers each, in the order of the channels."""
    if len(mean) != 3:
        raise ValueError(f"mean must be three numbers, got {mean}")
    if len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(f"std must be three numbers more than 0, got {std}")
    centred = image - _channels(mean, image, channel_axis)
    return centred / _channels(std, image, channel_axis)


def random_view(
    key: Array,
    canvas: Array,
    extent: Array,
    *,
    size: int,
    crop_area: Range,
    crop_aspect: Range,
    flip: ArrayLike,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    jitter: ArrayLike,
    grayscale: ArrayLike,
    blur: ArrayLike,
    blur_sigma: Range,
    blur_kernel: int | None = None,
    solarize: ArrayLike,
    solarize_threshold: Array | float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Array:
    """One random view of an image: the SimCLR chain, in the order of the arguments.

    `flip`, `jitter`, `grayscale`, `blur` and `solarize` are probabilities. One that is the Python
    number 0, like a strength of 0, leaves its operation out of the compiled program; the draws of
    the others stay the same.

    Args:
      key: a typed random key; the view is a function of it and the image alone.
      canvas: [S, S, 3], uint8 or float in [0, 1].
      extent: int32 [2], height and width of the image on the canvas.
      size: side of the view.
      crop_area: range of the crop's share of the image's area.
      crop_aspect: range of the crop's width / height, drawn log-uniformly.
      flip: probability of a flip left to right.
      brightness: strength of the jitter, see `sample_jitter`.
      contrast: likewise.
      saturation: likewise.
      hue: likewise, in turns, at most 0.5.
      jitter: probability of the colour jitter.
      grayscale: probability of losing the colours.
      blur: probability of a Gaussian blur.
      blur_sigma: range of its standard deviation in pixels of the view.
      blur_kernel: its odd length in pixels; `blur_kernel_size(size)` if None.
      solarize: probability of inverting the bright values.
      solarize_threshold: the value from which on they are inverted.
      mean: subtracted from the channels at the end.
      std: divides them then.

    Returns:
      float32 [size, size, 3].

    Raises:
      ValueError: if a range is reversed, a probability not in [0, 1], a strength negative, or an
        array not of the stated shape or type; where that is known without running.
    """
    _check_range("crop_area", crop_area, high=1.0)
    _check_range("crop_aspect", crop_aspect)
    _check_range("blur_sigma", blur_sigma)
    _check_probability("jitter", jitter)
    _check_probability("grayscale", grayscale)
    _check_probability("blur", blur)
    _check_probability("solarize", solarize)
    if blur_kernel is None:
        blur_kernel = blur_kernel_size(size)
    elif not _is_zero(blur):
        _check_kernel("blur_kernel", blur_kernel, size)

    planar = -3
    key_crop, key_jitter, key_gray, key_blur, key_solarize = jax.random.split(key, 5)
    image = random_resized_crop(
        key_crop, canvas, extent, size=size, area=crop_area, aspect=crop_aspect, flip=flip
    )
    image = jnp.moveaxis(image, -1, planar)
    image = random_color_jitter(
        key_jitter,
        image,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        probability=jitter,
        channel_axis=planar,
    )
    image = random_grayscale(key_gray, image, probability=grayscale, channel_axis=planar)
    image = random_gaussian_blur(
        key_blur,
        image,
        sigma=blur_sigma,
        kernel_size=blur_kernel,
        probability=blur,
        channel_axis=planar,
    )
    image = random_solarize(key_solarize, image, threshold=solarize_threshold, probability=solarize)
    image = normalize(image, mean, std, channel_axis=planar)
    return jnp.moveaxis(image, planar, -1)


def two_views(keys: Array, canvas: Array, extent: Array, **options: Any) -> Array:
    """Two random views of each image: the positive pairs of a batch.

    View v of image i depends on `fold_in(keys[i], v)` and the image, and on nothing else: not on
    its place in the batch, the batch's size or the devices it is spread over.

    Args:
      keys: typed random keys [B].
      canvas: [B, S, S, 3], uint8 or float in [0, 1].
      extent: int32 [B, 2].
      **options: the keyword arguments of `random_view`.

    Returns:
      float32 [2B, size, size, 3]: the first views of all images, then the second views of all.
      View i's positive is view (i + B) mod 2B.
    """

    def views(key: Array, canvas: Array, extent: Array) -> Array:
        def view(number: Array) -> Array:
            return random_view(jax.random.fold_in(key, number), canvas, extent, **options)

        return jax.vmap(view)(jnp.arange(2))

    pairs = jax.vmap(views, out_axes=1)(keys, canvas, extent)
    return pairs.reshape(-1, *pairs.shape[2:])


def center_view(
    canvas: Array, extent: Array, *, size: int, mean: Sequence[float], std: Sequence[float]
) -> Array:
    """The view for evaluation: the largest central square, resized and normalised.

    Up to rounding, torchvision's `Resize(size)` followed by `CenterCrop(size)`.

    Args:
      canvas: [S, S, 3], uint8 or float in [0, 1].
      extent: int32 [2], height and width of the image on the canvas.
      size: side of the view.
      mean: subtracted from the channels at the end.
      std: divides them then.

    Returns:
      float32 [size, size, 3].
    """
    side = jnp.min(extent)
    corner = (extent - side) // 2
    box = jnp.concatenate([corner, jnp.stack([side, side])]).astype(jnp.float32)
    return normalize(crop_and_resize(canvas, box, size), mean, std)


# ------------------------------------------------------------------------------------- helpers


def _blend(image: Array, reference: Array, factor: ArrayLike) -> Array:
    """From reference (factor 0) over image (1) and beyond, clipped."""
    factor = jnp.asarray(factor, image.dtype)
    return jnp.clip(factor * image + (1 - factor) * reference, 0, 1)


def _channels(values: Sequence[float], image: Array, channel_axis: int) -> Array:
    """One value for each channel, in a shape that broadcasts against the image."""
    shape = [1] * image.ndim
    shape[channel_axis] = 3
    return jnp.asarray(values, image.dtype).reshape(shape)


def _image_mean(image: Array) -> Array:
    return jnp.mean(image, axis=(-3, -2, -1), keepdims=True)


def _is_zero(probability: ArrayLike) -> bool:
    return isinstance(probability, int | float) and probability == 0


def _check_probability(name: str, value: ArrayLike) -> None:
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability in [0, 1], got {value}")


def _check_range(name: str, value: Range, *, high: float = float("inf")) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
        limit = f" <= {high}" if high < float("inf") else ""
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high{limit}, got {value}")


def _check_kernel(name: str, value: int, side: int) -> None:
    if value < 1 or value % 2 == 0 or value > 2 * side - 1:
        raise ValueError(
            f"{name} must be odd and between 1 and {2 * side - 1} for an image of shorter side "
            f"{side}, got {value}"
        )


def _check_canvas(canvas: Array) -> None:
    if canvas.ndim != 3 or canvas.shape[-1] != 3:
        raise ValueError(f"canvas must have shape [S, S, 3], got {canvas.shape}")
    if canvas.dtype != jnp.uint8 and not jnp.issubdtype(canvas.dtype, jnp.floating):
        raise ValueError(f"canvas must be uint8, or float in [0, 1], got {canvas.dtype}")
