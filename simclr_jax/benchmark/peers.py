"""What the package's augmentation is measured against: a tutorial's chain, torchvision and Kornia.

Everyone does the same operations with the same ranges, those of SimCLR, which stand here. This module
imports neither JAX nor PyTorch before they are needed: the processes that work on PIL images import it and
stay without JAX.
"""

import importlib
import random
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

OPERATIONS = (
    "chain",
    "crop",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "jitter",
    "grayscale",
    "blur",
    "solarize",
    "normalize",
)

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
FLIP = 0.5
STRENGTHS = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
FACTORS = (0.2, 1.8)  # what a strength of 0.8 means
TURNS = (-0.2, 0.2)
JITTER = 0.8
GRAYSCALE = 0.2
SIGMA = (0.1, 2.0)
BLUR = 0.5
THRESHOLD = 0.5
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

# The chain as `augment.random_views` takes it.
CHAIN = {
    "crop_area": AREA,
    "crop_aspect": ASPECT,
    "flip": FLIP,
    "jitter": JITTER,
    **STRENGTHS,
    "grayscale": GRAYSCALE,
    "blur": BLUR,
    "blur_sigma": SIGMA,
    "solarize": 0.0,
    "solarize_threshold": THRESHOLD,
    "mean": MEAN,
    "std": STD,
}


# ------------------------------------------------------------------------------------ tutorial


def tutorial_view(key: Any, image: Any) -> Any:
    """One view as the UvA tutorial on SimCLR in JAX makes it, with dm-pix and without a crop.

    Written after https://uvadlc-notebooks.readthedocs.io/en/latest/tutorial_notebooks/JAX/tutorial17/SimCLR.html:
    flip; brightness, contrast, saturation and hue in this order, clipped after each, kept for four views of
    five; gray for one of five; a blur of 9 taps always; to [-1, 1].

    Args:
      key: a typed random key.
      image: float [H, W, 3] in [0, 1].

    Returns:
      An image of the same shape and type, in [-1, 1].
    """
    import dm_pix as pix
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(key, 8))
    image = pix.random_flip_left_right(next(keys), image)

    factor = jax.random.uniform(next(keys), dtype=image.dtype, minval=0.5, maxval=1.5)
    jittered = jnp.clip(image * factor, 0, 1)
    jittered = jnp.clip(pix.random_contrast(next(keys), jittered, lower=0.5, upper=1.5), 0, 1)
    jittered = jnp.clip(pix.random_saturation(next(keys), jittered, lower=0.5, upper=1.5), 0, 1)
    jittered = jnp.clip(pix.random_hue(next(keys), jittered, max_delta=0.1), 0, 1)
    image = jnp.where(jax.random.bernoulli(next(keys), 0.8), jittered, image)

    image = jax.lax.cond(
        jax.random.bernoulli(next(keys), 0.2),
        lambda image: jnp.broadcast_to(pix.rgb_to_grayscale(image, keep_dims=True), image.shape),
        lambda image: image,
        image,
    )
    sigma = jax.random.uniform(next(keys), dtype=image.dtype, minval=0.1, maxval=2.0)
    return pix.gaussian_blur(image, sigma, kernel_size=9) * 2 - 1


# --------------------------------------------------------------------------------- torchvision


def import_torchvision() -> types.ModuleType | None:
    """torchvision, or None where it or PyTorch is not installed.

    The usual wheel is built for CUDA. Beside a PyTorch for CPUs it cannot be imported, as it describes to
    PyTorch operators that are in the part it could not load; nothing else is amiss, so that description is
    left out.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        stub = "torchvision._meta_registrations"
        sys.modules[stub] = types.ModuleType(stub)
        return importlib.import_module("torchvision")


def import_kornia() -> types.ModuleType | None:
    """`kornia.augmentation`, or None where it or something that it needs is not installed."""
    try:
        return importlib.import_module("kornia.augmentation")
    except ImportError:
        return None


def torchvision_operation(name: str, size: int, blur_kernel: int, *, pil: bool) -> Callable[[Any], Any]:
    """An operation as torchvision has it, with parameters of its own for each call.

    Args:
      name: one of `OPERATIONS`.
      size: side of the view.
      blur_kernel: side of the blur's kernel.
      pil: for a PIL image, from which `chain` and `normalize` make a tensor, with `torchvision.transforms`;
        else for a float tensor [3, H, W], with `torchvision.transforms.v2`.
    """
    transforms = _transforms(pil=pil)
    functional = importlib.import_module(f"{transforms.__name__}.functional")

    crop = [transforms.RandomResizedCrop(size, AREA, ASPECT), transforms.RandomHorizontalFlip(FLIP)]
    normalize = [*([transforms.ToTensor()] if pil else []), transforms.Normalize(MEAN, STD)]
    operations: dict[str, Callable[[Any], Any]] = {
        "chain": torchvision_chain(CHAIN, size, blur_kernel, pil=pil),
        "crop": transforms.Compose(crop),
        "brightness": lambda image: functional.adjust_brightness(image, random.uniform(*FACTORS)),
        "contrast": lambda image: functional.adjust_contrast(image, random.uniform(*FACTORS)),
        "saturation": lambda image: functional.adjust_saturation(image, random.uniform(*FACTORS)),
        "hue": lambda image: functional.adjust_hue(image, random.uniform(*TURNS)),
        "jitter": transforms.RandomApply([transforms.ColorJitter(**STRENGTHS)], JITTER),
        "grayscale": lambda image: functional.rgb_to_grayscale(image, 3),
        "blur": transforms.GaussianBlur(blur_kernel, SIGMA),
        "solarize": lambda image: functional.solarize(image, 255 * THRESHOLD if pil else THRESHOLD),
        "normalize": transforms.Compose(normalize),
    }
    return operations[name]


def torchvision_chain(
    options: Mapping[str, Any], size: int, blur_kernel: int, *, pil: bool
) -> Callable[[Any], Any]:
    """The chain of a view as torchvision has it; what has a probability of 0 is left out.

    Args:
      options: names and values of `CHAIN`, as `augment.random_views` takes them; others are not looked at.
      size: side of the view.
      blur_kernel: side of the blur's kernel.
      pil: as in `torchvision_operation`.
    """
    transforms = _transforms(pil=pil)
    strengths: dict[str, Any] = {name: options[name] for name in STRENGTHS}
    threshold = options["solarize_threshold"]
    maybe = {
        "flip": transforms.RandomHorizontalFlip(options["flip"]),
        "jitter": transforms.RandomApply([transforms.ColorJitter(**strengths)], options["jitter"]),
        "grayscale": transforms.RandomGrayscale(options["grayscale"]),
        "blur": transforms.RandomApply(
            [transforms.GaussianBlur(blur_kernel, options["blur_sigma"])], options["blur"]
        ),
        "solarize": transforms.RandomSolarize(255 * threshold if pil else threshold, options["solarize"]),
    }
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, options["crop_area"], options["crop_aspect"]),
            *(operation for name, operation in maybe.items() if options[name]),
            *([transforms.ToTensor()] if pil else []),
            transforms.Normalize(options["mean"], options["std"]),
        ]
    )


def _transforms(*, pil: bool) -> Any:
    import_torchvision()
    return importlib.import_module("torchvision.transforms" if pil else "torchvision.transforms.v2")


def v2_pass(name: str, images: np.ndarray, blur_kernel: int, threads: int) -> Callable[[], Any]:
    """A function that takes all images through torchvision v2 as tensors, one after the other.

    One by one, because v2 draws one set of parameters a call and contrastive learning wants one an image.

    Args:
      name: one of `OPERATIONS`.
      images: uint8 [N, S, S, 3]; they are made float and put on the GPU, if PyTorch has one, here.
      blur_kernel: side of the blur's kernel.
      threads: for PyTorch's own use.

    Returns:
      A function of nothing to a float tensor [N, 3, S, S]; it returns when that is computed.
    """
    import torch  # pyright: ignore[reportMissingImports]

    tensors = _tensors(images, threads)
    operation = torchvision_operation(name, images.shape[1], blur_kernel, pil=False)
    return _finished(lambda: torch.stack([operation(image) for image in tensors]))


def kornia_pass(name: str, images: np.ndarray, blur_kernel: int, threads: int) -> Callable[[], Any]:
    """A function that takes all images through Kornia as one batch; as `v2_pass` else."""
    tensors = _tensors(images, threads)
    operation = kornia_operation(name, images.shape[1], blur_kernel)
    return _finished(lambda: operation(tensors))


def kornia_operation(name: str, size: int, blur_kernel: int) -> Callable[[Any], Any]:
    """An operation as Kornia has it, with parameters of its own for each image of a batch [N, 3, S, S]."""
    from kornia import augmentation  # pyright: ignore[reportMissingImports]

    crop = [
        augmentation.RandomResizedCrop((size, size), AREA, ASPECT),
        augmentation.RandomHorizontalFlip(p=FLIP),
    ]
    blur = augmentation.RandomGaussianBlur((blur_kernel, blur_kernel), SIGMA, p=1.0)
    strengths: dict[str, Any] = STRENGTHS
    operations: dict[str, list[Callable[[Any], Any]]] = {
        "chain": [*crop, *kornia_colors(CHAIN, blur_kernel)],
        "crop": crop,
        "jitter": [augmentation.ColorJitter(**strengths, p=JITTER)],
        "grayscale": [augmentation.RandomGrayscale(p=1.0)],
        "blur": [blur],
        "solarize": [augmentation.RandomSolarize((THRESHOLD, THRESHOLD), (0.0, 0.0), p=1.0)],
        "normalize": [augmentation.Normalize(MEAN, STD)],
    }
    # `RandomContrast` and its like mean something else; a jitter of one strength is torchvision's operation.
    for single in STRENGTHS:
        alone: dict[str, Any] = {single: STRENGTHS[single]}
        operations[single] = [augmentation.ColorJitter(**alone, p=1.0)]

    def apply(batch: Any) -> Any:
        for operation in operations[name]:
            batch = operation(batch)
        return batch

    return apply


def kornia_colors(
    options: Mapping[str, Any], blur_kernel: int, jitter_order: tuple[int, ...] | None = None
) -> list[Any]:
    """What comes after the flip in the chain of a view, modules that take batches [N, 3, S, S] in turn.

    Args:
      options: as in `torchvision_chain`; what has a probability of 0 is left out.
      blur_kernel: side of the blur's kernel.
      jitter_order: of brightness, contrast, saturation and hue, by number; by default drawn for each batch.
    """
    from kornia import augmentation  # pyright: ignore[reportMissingImports]

    strengths: dict[str, Any] = {name: options[name] for name in STRENGTHS}
    threshold, kernel = options["solarize_threshold"], (blur_kernel, blur_kernel)
    maybe = {
        "jitter": augmentation.ColorJitter(**strengths, p=options["jitter"], order=jitter_order),
        "grayscale": augmentation.RandomGrayscale(p=options["grayscale"]),
        "blur": augmentation.RandomGaussianBlur(kernel, options["blur_sigma"], p=options["blur"]),
        "solarize": augmentation.RandomSolarize((threshold, threshold), (0.0, 0.0), p=options["solarize"]),
    }
    return [
        *(operation for name, operation in maybe.items() if options[name]),
        augmentation.Normalize(options["mean"], options["std"]),
    ]


def on_gpu() -> bool:
    """Whether PyTorch, which has to be installed, has a GPU, where `v2_pass` and `kornia_pass` then work."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.cuda.is_available()


def _tensors(images: np.ndarray, threads: int) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    return tensors.cuda() if on_gpu() else tensors


def _finished(function: Callable[[], Any]) -> Callable[[], Any]:
    import torch  # pyright: ignore[reportMissingImports]

    if not on_gpu():
        return function

    def wait() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return wait
