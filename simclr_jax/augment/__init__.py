"""Views of images, on the accelerator: crop, flip, colour jitter, grayscale, blur, solarize, normalise.

    >>> import jax
    >>> import numpy as np
    >>> from simclr_jax import augment
    >>> images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    >>> views = augment.random_views(jax.random.key(0), images, size=32)
    >>> views.shape, str(views.dtype)  # the first views of all eight images, then the second ones
    ((16, 32, 32, 3), 'float32')

`random_views` is the SimCLR chain for a batch; call it inside your own jitted step. Its parts are three
kinds of functions of one image [H, W, 3], pure and meant for `jax.vmap`: `adjust_*` and the other
deterministic ones map (image, parameter) to an image, `sample_*` draw parameters, and `random_*` take a key
first, draw, and apply. No shape depends on a drawn value.

    >>> image = images[0] / np.float32(255)
    >>> brighter = augment.adjust_brightness(image, 1.5)
    >>> jittered = augment.random_color_jitter(
    ...     jax.random.key(1), image, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
    ... )

Values are RGB in [0, 1], and stay there: what could leave the range is clipped after each operation, as
torchvision does. float32 and bfloat16 go in and come out; the arithmetic is float32. Parameters mean what
they mean in torchvision's transforms of float tensors (`RandomResizedCrop(antialias=True)`, `ColorJitter`,
`GaussianBlur`, `RandomSolarize`), and the tests hold every operation to 1e-5 of it. dm-pix and TensorFlow
have operations of the same names that differ:

    brightness   here: image * factor            dm-pix: image + delta
    contrast     here: blend with the mean gray  dm-pix: blend with the mean of each channel
    saturation   here: blend with the gray       dm-pix: scale S of HSV

A canvas is an array [H, W, 3], uint8 or float in [0, 1], that holds an image at its top left; the image's
extent is int32 [2], (height, width). What lies outside the extent is never read.

The chain has three forms of the same result. On a CPU images go through it one by one, with branches, in
the cache; on a GPU or TPU all at once, without a branch, as products and arithmetic that fuse (`chain.py`).
`form="plain"` is the reference, dm-pix and jnp operations composed (`plain.py`).

Cutout, Sobel, Gaussian noise and quarter turns (`others.py`), which SimCLR studied and left out, are not in
the chain; they are functions of one image like the rest.

Sources: Chen et al., https://arxiv.org/abs/2002.05709, appendix A (crop, jitter, gray, blur);
Grill et al., https://arxiv.org/abs/2006.07733, appendix B (solarize); Caron et al.,
https://arxiv.org/abs/2006.09882 (more and smaller views).
"""

from simclr_jax.augment.blur import blur_kernel_size, gaussian_blur, random_gaussian_blur
from simclr_jax.augment.chain import View
from simclr_jax.augment.checks import MAX_ENLARGEMENT
from simclr_jax.augment.color import (
    Jitter,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    flip_left_right,
    normalize,
    random_brightness,
    random_color_jitter,
    random_contrast,
    random_flip_left_right,
    random_grayscale,
    random_hue,
    random_saturation,
    random_solarize,
    rgb_to_grayscale,
    sample_jitter,
    solarize,
)
from simclr_jax.augment.crop import crop_and_resize, random_resized_crop, sample_crop
from simclr_jax.augment.others import (
    add_noise,
    cutout,
    random_cutout,
    random_gaussian_noise,
    random_quarter_turns,
    random_sobel,
    rotate_quarter_turns,
    sobel,
)
from simclr_jax.augment.views import FORMS, center_view, random_views, sample_view

__all__ = [
    "FORMS",
    "MAX_ENLARGEMENT",
    "Jitter",
    "View",
    "add_noise",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "blur_kernel_size",
    "center_view",
    "color_jitter",
    "crop_and_resize",
    "cutout",
    "flip_left_right",
    "gaussian_blur",
    "normalize",
    "random_brightness",
    "random_color_jitter",
    "random_contrast",
    "random_cutout",
    "random_flip_left_right",
    "random_gaussian_blur",
    "random_gaussian_noise",
    "random_grayscale",
    "random_hue",
    "random_quarter_turns",
    "random_resized_crop",
    "random_saturation",
    "random_sobel",
    "random_solarize",
    "random_views",
    "rgb_to_grayscale",
    "rotate_quarter_turns",
    "sample_crop",
    "sample_jitter",
    "sample_view",
    "sobel",
    "solarize",
]
