"""Views of a batch of images: the SimCLR chain, sampled and applied."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from simclr_jax.augment import checks, color
from simclr_jax.augment.blur import blur_kernel_size
from simclr_jax.augment.chain import ON_PLANES, Settings, View, at_once, in_sequence
from simclr_jax.augment.checks import Range
from simclr_jax.augment.crop import crop_and_resize, sample_crop
from simclr_jax.augment.plain import PLAIN
from simclr_jax.augment.planes import Scalar

FORMS = ("fast", "plain")


def sample_view(
    key: Array,
    extent: Array,
    *,
    crop_area: Range,
    crop_aspect: Range,
    flip: ArrayLike,
    jitter: ArrayLike,
    brightness: Scalar,
    contrast: Scalar,
    saturation: Scalar,
    hue: Scalar,
    grayscale: ArrayLike,
    blur: ArrayLike,
    blur_sigma: Range,
    solarize: ArrayLike,
) -> View:
    """Draws the parameters of a view of an image with `extent` int32 [2], as `random_views` does."""
    key_crop, key_jitter, key_gray, key_blur, key_solarize = jax.random.split(key, 5)
    key_box, key_flip = jax.random.split(key_crop)
    key_jittered, key_jitter = jax.random.split(key_jitter)
    key_blurred, key_sigma = jax.random.split(key_blur)

    def happens(key: Array, probability: ArrayLike) -> Array | None:
        return None if checks.is_zero(probability) else jax.random.bernoulli(key, probability)

    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    low, high = blur_sigma
    return View(
        box=sample_crop(key_box, extent, area=crop_area, aspect=crop_aspect),
        flip=happens(key_flip, flip),
        jitter=None if checks.is_zero(jitter) else color.sample_jitter(key_jitter, **strengths),
        jittered=happens(key_jittered, jitter),
        grayscale=happens(key_gray, grayscale),
        sigma=None if checks.is_zero(blur) else jax.random.uniform(key_sigma, minval=low, maxval=high),
        blurred=happens(key_blurred, blur),
        solarize=happens(key_solarize, solarize),
    )


def random_views(
    keys: Array,
    canvas: ArrayLike,
    extent: ArrayLike | None = None,
    *,
    count: int = 2,
    first: int = 0,
    size: int,
    crop_area: Range = (0.08, 1.0),
    crop_aspect: Range = (3 / 4, 4 / 3),
    flip: ArrayLike = 0.5,
    jitter: ArrayLike = 0.8,
    brightness: Scalar = 0.8,
    contrast: Scalar = 0.8,
    saturation: Scalar = 0.8,
    hue: Scalar = 0.2,
    grayscale: ArrayLike = 0.2,
    blur: ArrayLike = 0.5,
    blur_sigma: Range = (0.1, 2.0),
    blur_kernel: int | None = None,
    solarize: ArrayLike = 0.0,
    solarize_threshold: Scalar = 0.5,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    form: str = "fast",
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Random views of each image: crop, flip, colour jitter, grayscale, blur, solarize, normalise.

    View v of image i depends on `fold_in(keys[i], v)` and the image, and on nothing else: not on its
    place in the batch, the batch's size or the devices it is spread over. Defaults are the paper's for
    ImageNet (https://arxiv.org/abs/2002.05709, appendix A).

    `flip`, `jitter`, `grayscale`, `blur` and `solarize` are probabilities. One that is the Python
    number 0, like a strength of 0, leaves its operation out of the compiled program; the draws of
    the others stay the same. They may also be traced.

    Args:
      keys: typed random keys [B], or one key, of which B are folded.
      canvas: [B, H, W, 3], uint8 or float in [0, 1].
      extent: int32 [B, 2], height and width of each image at the top left of its canvas; None where
        images fill their canvas.
      count: views of each image, at least 1.
      first: the number of the first view. With `first=2`, smaller views can follow two large ones.
      size: side of a view in pixels, at most 8 times the canvas.
      crop_area: range of the crop's share of the image's area.
      crop_aspect: range of the crop's width / height, drawn log-uniformly.
      flip: probability of a flip left to right.
      jitter: probability of the colour jitter, whose four operations come in random order.
      brightness: strength of the jitter, see `sample_jitter`.
      contrast: likewise.
      saturation: likewise.
      hue: likewise, in turns, at most 0.5.
      grayscale: probability of losing the colours.
      blur: probability of a Gaussian blur.
      blur_sigma: range of its standard deviation in pixels of the view.
      blur_kernel: its odd length in pixels; `blur_kernel_size(size)` if None.
      solarize: probability of inverting the bright values.
      solarize_threshold: the value from which on they are inverted.
      mean: subtracted from the channels at the end.
      std: divides them then.
      form: `"fast"`, or `"plain"`: dm-pix and jnp operations composed, up to rounding the same views.
      dtype: float32 or bfloat16, of the views and of what is stored on the way to them.

    Returns:
      [count * B, size, size, 3] of `dtype`: the first views of all images, then the second views of all,
      and so on. With two views, that of which view i is the partner is (i + B) mod 2B.

    Raises:
      ValueError: if a range is reversed, a probability not in [0, 1], a strength negative, an array not
        of the stated shape or type, or, where values are known, out of its range.
    """
    canvas = checks.canvas("canvas", canvas, rank=4)
    batch, shape = canvas.shape[0], canvas.shape[1:3]
    if extent is None:
        extent = jnp.broadcast_to(jnp.asarray(shape, jnp.int32), (batch, 2))
    extent = checks.extent("extent", extent, shape, batch=(batch,))
    keys = _keys(keys, batch)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    checks.size("size", size, shape)
    checks.number_range("crop_area", crop_area, high=1.0)
    checks.number_range("crop_aspect", crop_aspect)
    checks.number_range("blur_sigma", blur_sigma)
    probabilities = {"flip": flip, "jitter": jitter, "grayscale": grayscale, "blur": blur}
    for name, value in (probabilities | {"solarize": solarize}).items():
        checks.probability(name, value)
    if blur_kernel is None:
        blur_kernel = blur_kernel_size(size)
    if not checks.is_zero(blur):
        checks.kernel_size("blur_kernel", blur_kernel, size)
    mean, std = color.check_normalization(mean, std)
    settings = Settings(size, blur_kernel, solarize_threshold, mean, std, dtype)

    def sample(number: Array, key: Array, extent: Array) -> View:
        return sample_view(
            jax.random.fold_in(key, number),
            extent,
            crop_area=crop_area,
            crop_aspect=crop_aspect,
            flip=flip,
            jitter=jitter,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            grayscale=grayscale,
            blur=blur,
            blur_sigma=blur_sigma,
            solarize=solarize,
        )

    numbers = jnp.repeat(jnp.arange(first, first + count), batch)
    views = jax.vmap(sample)(numbers, jnp.tile(keys, count), jnp.tile(extent, (count, 1)))

    def each(apply: Callable[[View, Array], Array]) -> Callable[[View, Array], Array]:
        return lambda views, canvas: jax.vmap(apply)(views, jnp.tile(canvas, (count, 1, 1, 1)))

    def one_by_one(views: View, canvas: Array) -> Array:
        def apply(number: Array) -> Array:
            view = jax.tree.map(lambda leaf: leaf[number], views)
            return in_sequence(view, canvas[number % batch], settings, ON_PLANES)

        return jax.lax.map(apply, jnp.arange(count * batch))

    if form == "plain":
        # dm-pix leaves the precision of its products to JAX's default: ten bits on GPUs, eight on TPUs.
        with jax.default_matmul_precision("highest"):
            return each(lambda view, canvas: in_sequence(view, canvas, settings, PLAIN))(views, canvas)
    return jax.lax.platform_dependent(
        views,
        canvas,
        cpu=one_by_one,
        default=each(lambda view, canvas: at_once(view, canvas, settings)),
    )


def _keys(keys: Array, batch: int) -> Array:
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(f"keys must be typed random keys, as jax.random.key makes, got {keys.dtype}")
    if keys.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(batch))
    if keys.shape != (batch,):
        raise ValueError(f"keys must be one key or [{batch}], one an image, got {list(keys.shape)}")
    return keys


def center_view(
    canvas: Array,
    extent: Array,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop: float = 1.0,
) -> Array:
    """The view for evaluation: a central square, resized and normalised.

    Up to rounding torchvision's `CenterCrop` followed by `Resize(size)`: pixels outside the square have no
    part in it.

    Args:
      canvas: [H, W, 3], uint8 or float in [0, 1].
      extent: int32 [2], height and width of the image on the canvas.
      size: side of the view.
      mean: subtracted from the channels at the end.
      std: divides them then.
      crop: side of the square as a share of the image's shorter side, above 0 and at most 1.

    Returns:
      float32 [size, size, 3].
    """
    if not 0 < crop <= 1:
        raise ValueError(f"crop must be above 0 and at most 1, got {crop}")
    canvas = checks.canvas("canvas", canvas)
    extent = checks.extent("extent", extent, canvas.shape[:2])
    side = jnp.round(crop * jnp.min(extent)).astype(extent.dtype)
    corner = (extent - side) // 2
    box = jnp.concatenate([corner, jnp.stack([side, side])]).astype(jnp.float32)
    return color.normalize(crop_and_resize(canvas, box, size), mean, std)
