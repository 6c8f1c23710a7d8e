"""Writes augment.npz: what torchvision makes of random images, for tests/test_augment.py.

Run it beside torch and torchvision; the stored file came from torch 2.13.0 and torchvision 0.29.2
on a CPU:

    python tests/reference/make_torchvision_reference.py

Every array of the file is either an input (images, parameters) or torchvision's output for it on
float32 tensors, so the test needs neither package.
"""

# pyright: reportMissingImports=false
import itertools
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms
from torchvision.transforms import functional
from torchvision_cases import CASES, blur_case, colour_case, crop_case

SIDE = 24
BOXES = 40
SIZES = (1, 7, 16, 29)
SAMPLES = 2000
EXTENTS = ((240, 320), (96, 96), (37, 200), (200, 37), (3, 2))
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
OUT = Path(__file__).parent / "augment.npz"


def tensor(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 to [3, H, W] float32 in [0, 1]."""
    return functional.convert_image_dtype(torch.from_numpy(image).permute(2, 0, 1), torch.float32)


def array(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] to [H, W, 3]."""
    return image.permute(1, 2, 0).contiguous().numpy()


def crops(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random boxes of one canvas, the same number for each size of the result."""
    canvas = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    height, width = rng.integers(1, SIDE + 1, (2, BOXES))
    top, left = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
    boxes = np.stack([top, left, height, width], axis=1)
    boxes[0] = (0, 0, SIDE, SIDE)
    boxes[1] = (5, 7, 1, 1)
    out = {"crop_canvas": canvas}
    for size, some in zip(SIZES, np.split(boxes, len(SIZES)), strict=True):
        out[f"crop_boxes_{size}"] = some
        out[f"crop_{size}"] = np.stack(
            [
                array(functional.resized_crop(tensor(canvas), *box, [size, size], antialias=True))
                for box in some.tolist()
            ]
        )
    return out


def colours(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every colour operation on one image that has black, white, gray and saturated pixels too."""
    image = rng.integers(0, 256, (9, 11, 3), np.uint8)
    image[0, :8] = 255 * np.array(list(itertools.product((0, 1), repeat=3)))
    image[1, :6] = np.linspace(0, 255, 6, dtype=np.uint8)[:, None]
    x = tensor(image)
    factors = np.concatenate([[0.0, 1.0], rng.uniform(0, 2, 6)]).astype(np.float32)
    turns = np.concatenate([[-0.5, 0.0, 0.5], rng.uniform(-0.5, 0.5, 5)]).astype(np.float32)
    thresholds = np.array([0.0, 128 / 255, 0.5, 1.0], np.float32)
    out = {"colour_image": image, "factors": factors, "turns": turns, "thresholds": thresholds}
    for name, parameters, operation in (
        ("brightness", factors, functional.adjust_brightness),
        ("contrast", factors, functional.adjust_contrast),
        ("saturation", factors, functional.adjust_saturation),
        ("hue", turns, functional.adjust_hue),
        ("solarized", thresholds, functional.solarize),
    ):
        out[name] = np.stack([array(operation(x, float(value))) for value in parameters])
    out["gray"] = array(functional.rgb_to_grayscale(x, num_output_channels=1))

    operations = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    jitter = (1.4, 0.6, 1.7, -0.13)
    orders = np.array(list(itertools.permutations(range(4))))
    jittered = []
    for order in orders:
        y = x
        for index in order:
            y = operations[index](y, jitter[index])
        jittered.append(array(y))
    out |= {"jitter": np.array(jitter, np.float32), "jitter_orders": orders, "jittered": np.stack(jittered)}
    return out


def blurs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Kernels from 1 to the largest that an image of shorter side 10 allows."""
    image = rng.integers(0, 256, (10, 13, 3), np.uint8)
    kernels = np.array([1, 3, 3, 5, 9, 11, 19, 19])
    sigmas = np.concatenate([[0.1, 0.1, 2.0], rng.uniform(0.1, 2, 4), [30.0]]).astype(np.float32)
    blurred = [
        array(functional.gaussian_blur(tensor(image), [int(kernel)] * 2, [float(sigma)] * 2))
        for kernel, sigma in zip(kernels, sigmas, strict=True)
    ]
    return {
        "blur_image": image,
        "blur_kernels": kernels,
        "blur_sigmas": sigmas,
        "blurred": np.stack(blurred),
    }


def many_cases() -> dict[str, np.ndarray]:
    """Each operation on hundreds of images of many sizes, with parameters of their own."""
    results: dict[str, list[np.ndarray]] = {}

    def keep(name: str, result: torch.Tensor) -> None:
        results.setdefault(f"cases_{name}", []).append(array(result).ravel())

    for number in range(CASES):
        image, box, size = crop_case(number)
        keep("crop", functional.resized_crop(tensor(image), *box, [size, size], antialias=True))
        image, sigma, kernel = blur_case(number)
        keep("blur", functional.gaussian_blur(tensor(image), [kernel] * 2, [sigma] * 2))
        image, values = colour_case(number)
        for name, value in values.items():
            operation = functional.solarize if name == "solarize" else getattr(functional, f"adjust_{name}")
            keep(name, operation(tensor(image), value))
    return {name: np.concatenate(arrays) for name, arrays in results.items()}


def crop_samples() -> dict[str, np.ndarray]:
    """Boxes that torchvision draws, [extents, SAMPLES, 4]."""
    torch.manual_seed(0)
    boxes = [
        [
            transforms.RandomResizedCrop.get_params(torch.empty(3, *extent), AREA, ASPECT)
            for _ in range(SAMPLES)
        ]
        for extent in EXTENTS
    ]
    return {"sample_extents": np.array(EXTENTS), "sample_boxes": np.array(boxes, np.int16)}


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    arrays = crops(generator) | colours(generator) | blurs(generator) | crop_samples() | many_cases()
    np.savez_compressed(OUT, allow_pickle=False, **arrays)
    print(f"{OUT}: {OUT.stat().st_size} bytes")
