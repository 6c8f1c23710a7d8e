"""Shows what a config's augmentation does, in one picture, before any training.

    python -m simclr_jax.preview --config configs/imagenette.py [--out views.png] [--images 8] [--views 6]
        [--config.KEY=VALUE ...]

The picture is a labelled grid: the first images that a training run of the config sees, each beside views
of it, the first of them those of training's first step; then a row for each operation alone, at rising
strength over the range that the config gives it.
"""

import functools
import io
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image

from simclr_jax import augment, command, config, paths, recipe, sheet
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.logs import say

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe of the run.", lock_config=True, flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
    "out", "views.png", "File of the picture; its suffix names the format.", flag_values=_FLAGS
)
_IMAGES = flags.DEFINE_integer(
    "images", 8, "Images, a row each.", lower_bound=1, upper_bound=64, flag_values=_FLAGS
)
_VIEWS = flags.DEFINE_integer("views", 6, "Views of each.", lower_bound=1, upper_bound=32, flag_values=_FLAGS)

_STEPS = 7  # values of a parameter: of an odd number, the one in the middle changes nothing


def picture(settings: Config, images: Pack, ids: np.ndarray, *, name: str, views: int) -> np.ndarray:
    """The whole picture: images and their views, small views if there are any, operations.

    Args:
      settings: a checked config.
      images: its data set.
      ids: int32 [n], which images.
      name: what the title calls the config.
      views: how many views of each.

    Returns:
      uint8 [H, W, 3].
    """
    options = settings.views
    blocks = [
        sheet.Block(
            f"{name}: {images.name}, views of {options.size} pixels, seed {settings.seed}\n"
            f"The image, then views of it; the first {options.count} are those of training's first step",
            image_rows(images, ids, recipe.first_views(settings, images, ids, count=views)),
        )
    ]
    if options.small_count:
        small = recipe.first_views(
            settings,
            images,
            ids,
            first=options.count,
            count=options.small_count,
            size=options.small_size,
            crop_area=options.small_crop_area,
        )
        blocks.append(
            sheet.Block(
                f"Small views of {options.small_size} pixels\nThe image, then those of that step",
                image_rows(images, ids, small),
            )
        )
    blocks.append(
        sheet.Block(
            "Each operation alone\nOn the first image, over the range that the config gives it",
            operation_rows(settings, images.canvas[ids[0]], images.extent[ids[0]]),
        )
    )
    return sheet.contact_sheet(blocks)


def image_rows(images: Pack, ids: np.ndarray, views: np.ndarray) -> list[sheet.Row]:
    """A row for each image: its class and number, itself, its views [count, n, H, W, 3]."""
    rows = []
    for position, index in enumerate(ids):
        height, width = images.extent[index]
        label = f"image {index:,}"
        if images.label[index] >= 0:
            name = images.class_names[images.label[index]]
            label = f"class {name}\n{label}" if name.isdigit() else f"{name}\n{label}"
        rows.append(sheet.Row(label, [images.canvas[index, :height, :width], *views[:, position]]))
    return rows


def operation_rows(settings: Config, canvas: np.ndarray, extent: np.ndarray) -> list[sheet.Row]:
    """A row for each operation, which is applied alone to one image, its parameter rising.

    The parameter spans the range that the config draws it from. An operation that the config leaves out
    is marked `(off)`, and has the default config's range where the config's is empty. The crop takes
    boxes around the middle, of the image's proportions; all others start from the central square.

    Args:
      settings: a checked config.
      canvas: uint8 [S, S, 3], with the image at the top left.
      extent: int32 [2], its height and width.

    Returns:
      Nine rows, with the value of the parameter below each image.
    """
    options, usual = settings.views, config.default_config().views
    resize = functools.partial(
        jax.jit(augment.crop_and_resize, static_argnames="size"), canvas, size=options.size
    )
    square = _central_box(np.full(2, extent.min()), extent)
    image = resize(square)
    kernel = augment.blur_kernel_size(options.size)

    def switched(name: str, changed: jax.Array) -> sheet.Row:
        return sheet.Row(_operation_label(name, "", options[name]), [image, changed], ["off", "on"])

    def swept(
        name: str,
        parameter: str,
        apply: Callable[..., jax.Array],
        low: float,
        high: float,
        *,
        probability: float,
    ) -> sheet.Row:
        values = np.linspace(low, high, _STEPS)
        images = jax.jit(jax.vmap(apply, (None, 0)))(image, jnp.asarray(values, jnp.float32))
        label = _operation_label(name, parameter, probability)
        return sheet.Row(label, list(np.asarray(images)), [f"{value:z.2f}" for value in values])

    def jitter(name: str, adjust: Callable[..., jax.Array]) -> sheet.Row:
        strength = options[name] or usual[name]
        probability = options.jitter if options[name] else 0
        if name == "hue":
            return swept(name, "turn", adjust, -strength, strength, probability=probability)
        return swept(name, "factor", adjust, max(0, 1 - strength), 1 + strength, probability=probability)

    crops = options.crop_area[0] < 1
    areas = np.linspace(1, options.crop_area[0] if crops else usual.crop_area[0], _STEPS)
    return [
        sheet.Row(
            _operation_label("crop", "share of the area", float(crops)),
            [resize(_central_box(extent * np.sqrt(area), extent)) for area in areas],
            [f"{area:.2f}" for area in areas],
        ),
        switched("flip", resize(square, flip=True)),
        jitter("brightness", augment.adjust_brightness),
        jitter("contrast", augment.adjust_contrast),
        jitter("saturation", augment.adjust_saturation),
        jitter("hue", augment.adjust_hue),
        switched("grayscale", jnp.broadcast_to(augment.rgb_to_grayscale(image), image.shape)),
        swept(
            "blur",
            "sigma in pixels",
            lambda image, sigma: augment.gaussian_blur(image, sigma, kernel),
            options.blur_sigma[0],
            options.blur_sigma[1],
            probability=options.blur,
        ),
        swept(
            "solarize",
            "threshold",
            augment.solarize,
            1,
            options.solarize_threshold,
            probability=options.solarize,
        ),
    ]


def _operation_label(name: str, parameter: str, probability: float) -> str:
    """What is applied, what the captions are, how often; a probability of 0 is one left out."""
    lines = (
        [name, parameter, f"{probability:.0%} of the views"] if probability else [f"{name} (off)", parameter]
    )
    return "\n".join(filter(None, lines))


def _central_box(size: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """float32 [4]: the box in the middle of an image whose height and width, rounded, are `size` [2]."""
    size = np.maximum(np.round(size), 1)
    return np.concatenate([(extent - size) // 2, size]).astype(np.float32)


def file_format(out: paths.Path) -> str:
    """Pillow's name for the format of `out`. Raises `UserError` where it cannot be written."""
    if out.is_dir():
        raise UserError(f"--out is {out}, a folder; name a file such as {out / 'views.png'}")
    if not (paths.is_remote(out) or out.parent.is_dir()):
        raise UserError(f"--out is {out}; there is no folder {out.parent}")
    name = Image.registered_extensions().get(out.suffix.lower(), "")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), name)
    except (KeyError, OSError, ValueError) as error:  # a format unknown, read only, or without colours
        raise UserError(
            f"--out is {out}; Pillow does not write such a file, but {out.with_suffix('.png')}"
        ) from error
    return name


def main() -> int:
    """Runs the command line; returns the exit status."""
    file = command.config_file(_FLAGS)
    settings, out = _CONFIG.value, paths.parse(_OUT.value)
    format_name = file_format(out)
    config.check(settings)
    images = recipe.open_data(settings)
    ids = recipe.first_images(settings, images, _IMAGES.value)
    pixels = picture(settings, images, ids, name=file.name, views=_VIEWS.value)
    with paths.local(out) as local:
        Image.fromarray(pixels).save(local, format_name)
    say(
        f"wrote {out}: {len(ids)} images of {images.name}, {_VIEWS.value} views of each, "
        f"each operation alone; {pixels.shape[1]} x {pixels.shape[0]} pixels"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, usage=__doc__ or "", flag_values=_FLAGS))
