"""`shapes`: a small labelled data set that is drawn, not downloaded.

Ten shapes in random colours and textures on calm backgrounds. Everything but the outline is
independent of the class, so that pixels say little about it, and an encoder that ignores colour,
place and size says a lot. It needs no network, so the first run of a clone works anywhere.
"""

import contextlib
import io
import logging
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZE = 32
TRAIN_IMAGES = 4_000
TEST_IMAGES = 1_000
_SEED = 2002_05709  # SimCLR's arXiv number

_OVERSAMPLE = 4
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CENTRES = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
_FINE_CENTRES = (np.arange(SIZE * _OVERSAMPLE, dtype=np.float32) + 0.5) / (SIZE * _OVERSAMPLE)


def _regular(corners: int) -> np.ndarray:
    """Vertices [corners, 2] of the regular polygon in the unit circle, the first one on top."""
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.sin(angle), -np.cos(angle)], axis=-1)


def _in_polygon(vertices: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        crossings = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
            if y0 != y1:
                edge = np.float32(x0) + (y - np.float32(y0)) * np.float32((x1 - x0) / (y1 - y0))
                crossings ^= ((y0 <= y) != (y1 <= y)) & (x < edge)
        return crossings

    return inside


def _disc(x: np.ndarray, y: np.ndarray, radius: float = 1.0, left: float = 0.0) -> np.ndarray:
    return (x - left) ** 2 + y**2 <= radius**2


# Each maps points (y downwards, the shape within the unit circle) to whether the shape covers them.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "arrow": _in_polygon(
        np.array(
            [(0, -1), (0.8, 0), (0.3, 0), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0), (-0.8, 0)],
        )
    ),
    "bars": lambda x, y: (np.abs(x) <= 0.7) & (np.abs(np.abs(y) - 0.45) <= 0.25),
    "circle": lambda x, y: _disc(x, y, 0.9),
    "columns": lambda x, y: (np.abs(y) <= 0.7) & (np.abs(np.abs(x) - 0.45) <= 0.25),
    "crescent": lambda x, y: _disc(x, y) & ~_disc(x, y, 0.85, left=0.5),
    "cross": _in_polygon(
        np.array(
            [
                (-0.3, -0.95),
                (0.3, -0.95),
                (0.3, -0.3),
                (0.95, -0.3),
                (0.95, 0.3),
                (0.3, 0.3),
                (0.3, 0.95),
                (-0.3, 0.95),
                (-0.3, 0.3),
                (-0.95, 0.3),
                (-0.95, -0.3),
                (-0.3, -0.3),
            ]
        )
    ),
    "hourglass": _in_polygon(np.array([(-0.6, -0.8), (0.6, -0.8), (-0.6, 0.8), (0.6, 0.8)])),
    "ring": lambda x, y: _disc(x, y, 0.95) & ~_disc(x, y, 0.5),
    "slash": lambda x, y: (np.abs(x - y) <= 1.3) & (np.abs(x + y) <= 0.4),
    "triangle": _in_polygon(_regular(3)),
}

CLASS_NAMES = tuple(_OUTLINES)


def draw(rng: np.random.Generator, label: int) -> np.ndarray:
    """Draws one image of class `CLASS_NAMES[label]`: uint8 [32, 32, 3]."""
    background_luma = rng.uniform(0.1, 0.9)
    step = rng.uniform(0.3, 0.6) * (1 if background_luma < 0.5 else -1)
    if abs(background_luma - 0.5) < 0.1:  # room on both sides
        step *= rng.choice([-1, 1])
    fill_luma = background_luma + step

    shade = rng.uniform(-0.1, 0.1)
    background = _blend(
        _gradient(rng),
        _colour(rng, background_luma - shade),
        _colour(rng, background_luma + shade),
    )
    fill = _blend(_texture(rng), _colour(rng, fill_luma), _colour(rng, fill_luma + 0.15 * step))
    image = _blend(_coverage(rng, label), background, fill)
    image += rng.normal(0, 0.015, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _colour(rng: np.random.Generator, luma: float) -> np.ndarray:
    """A random colour [3] of this luma or the nearest in 0.05..0.95, nearly as vivid as there is room for."""
    luma = min(max(luma, 0.05), 0.95)
    direction = rng.normal(size=3)
    direction -= direction @ _LUMA
    room = np.where(direction > 0, 1 - luma, luma) / np.maximum(np.abs(direction), 1e-6)
    return (luma + rng.uniform(0.8, 1) * room.min() * direction).astype(np.float32)


def _blend(weight: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Colours [H, W, 3] from `start` (weight 0) to `end` (weight 1); weight is [H, W]."""
    return start + weight[..., None] * (end - start)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    """A calm background [SIZE, SIZE] in 0..1: at most one slow wave across the image."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    waves = rng.uniform(0.2, 1.0)
    along = np.cos(angle) * _CENTRES + np.sin(angle) * _CENTRES[:, None]
    return (0.5 + 0.5 * np.sin(2 * np.pi * waves * along + phase)).astype(np.float32)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Plain, shaded, striped, checked or dotted: weights [SIZE, SIZE] in 0..1."""
    kind = rng.integers(5)
    angle, phase, other_phase = rng.uniform(0, 2 * np.pi, 3)
    waves = rng.uniform(3.5, 6.0)
    across = np.cos(angle) * _CENTRES + np.sin(angle) * _CENTRES[:, None]
    along = -np.sin(angle) * _CENTRES + np.cos(angle) * _CENTRES[:, None]
    first = np.sin(2 * np.pi * waves * across + phase)
    second = np.sin(2 * np.pi * waves * along + other_phase)
    textures = (
        np.zeros_like(first),
        across,
        2 * first,
        3 * first * second,
        2 * (first + second) - 1,
    )
    return np.clip(0.5 + 0.5 * textures[kind], 0, 1).astype(np.float32)


def _coverage(rng: np.random.Generator, label: int) -> np.ndarray:
    """How much of each pixel a shape of random size, place and turn covers: [SIZE, SIZE]."""
    radius = rng.uniform(0.5, 0.8) / 2
    margin = max(0.5 - 0.9 * radius, 0)
    left, top = rng.uniform(0.5 - margin, 0.5 + margin, 2)
    turn = rng.uniform(-np.pi / 12, np.pi / 12)
    cos, sin = np.float32(np.cos(turn) / radius), np.float32(np.sin(turn) / radius)
    x = rng.choice([-1, 1]) * (_FINE_CENTRES - np.float32(left))
    y = _FINE_CENTRES[:, None] - np.float32(top)
    covered = _OUTLINES[CLASS_NAMES[label]](cos * x + sin * y, cos * y - sin * x)
    blocks = covered.reshape(SIZE, _OVERSAMPLE, SIZE, _OVERSAMPLE)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the data set: splits `train` (4,000 images) and `test` (1,000)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Ten drawn shapes in random colours, textures, sizes and places.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples(0, TRAIN_IMAGES),
            "test": self._generate_examples(1, TEST_IMAGES),
        }

    def _generate_examples(self, split: int, images: int) -> Iterator[tuple[int, dict]]:
        for index in range(images):
            label = index % len(CLASS_NAMES)
            pixels = draw(np.random.default_rng([_SEED, split, index]), label)
            # As a file: TFDS would encode an array with TensorFlow.
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=1)
            png.seek(0)
            yield index, {"image": png, "label": label}


def prepare_shapes(data_dir: str | pathlib.Path) -> tfds.core.DatasetBuilder:
    """Draws the data set into `data_dir`, as TFDS keeps it, unless it is there already.

    A preparation that was killed is done again, and two at once end with one good copy.

    Raises:
        OSError: if `data_dir` cannot be written.
    """
    builder = Shapes(data_dir=data_dir)
    if not builder.is_prepared():
        try:
            with _quiet():
                builder.download_and_prepare(file_format="array_record")
        except OSError:
            # TFDS renames the finished folder into place, which fails if another process was first.
            if not Shapes(data_dir=data_dir).is_prepared():
                raise
    return Shapes(data_dir=data_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS reports to stdout, to absl's log and by progress bars, in words about downloads."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        tfds.enable_progress_bar()
        log.setLevel(level)
