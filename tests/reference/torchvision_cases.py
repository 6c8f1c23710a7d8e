"""Random images and parameters: what torchvision was given for the `cases_*` of augment.npz."""

import numpy as np

CASES = 200
BLUR_SHAPES = ((3, 4), (4, 4), (5, 7), (7, 5), (6, 3), (8, 6))


def case(number: int) -> tuple[np.random.Generator, np.ndarray]:
    """A random uint8 image of 3 to 13 pixels a side, and the generator that goes on; also the test's."""
    rng = np.random.default_rng((7, number))
    return rng, rng.integers(0, 256, (*rng.integers(3, 14, 2), 3), np.uint8)


def crop_case(number: int) -> tuple[np.ndarray, list[int], int]:
    """Image, box and size of the result."""
    rng, image = case(number)
    height, width = (int(rng.integers(1, side + 1)) for side in image.shape[:2])
    top, left = int(rng.integers(image.shape[0] - height + 1)), int(rng.integers(image.shape[1] - width + 1))
    return image, [top, left, height, width], int(rng.integers(1, 9))


def blur_case(number: int) -> tuple[np.ndarray, float, int]:
    """Image, of one of six shapes, sigma and one of three kernels."""
    rng = np.random.default_rng((8, number))
    image = rng.integers(0, 256, (*BLUR_SHAPES[number % len(BLUR_SHAPES)], 3), np.uint8)
    return image, float(rng.uniform(0.1, 3)), 2 * (number // len(BLUR_SHAPES) % 3) + 1


def colour_case(number: int) -> tuple[np.ndarray, dict[str, float]]:
    """An image's corner of 2x3 pixels, and a parameter for each operation."""
    rng, image = case(number)
    image[0, 0] = image[0, 0, rng.integers(0, 3, 3)]  # colours that tie
    values = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "solarize": 0.0}
    for name in values:
        low, high = {"hue": (-0.5, 0.5), "solarize": (0, 1)}.get(name, (0, 2.5))
        values[name] = float(rng.uniform(low, high))
    return image[:2, :3], values
