"""Pictures of many images at once: a labelled contact sheet, and a bare grid for TensorBoard."""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps

_PAPER, _INK, _FAINT = 208, 0, 80  # gray levels; no image is lost on this gray, be it black or white
_MARGIN, _GAP, _BLOCK_GAP = 16, 8, 24  # pixels
_HEADING, _LABEL, _SMALL = 18, 15, 13  # sizes of the type in pixels
_LABEL_WIDTH = 176  # at most
_FRAME = 4
_GRID_GAP = 2


class Row(NamedTuple):
    """A row of a contact sheet."""

    label: str  # left of the images; lines after the first are set smaller
    images: Sequence[ArrayLike]  # each [H, W, 3], uint8 or float in [0, 1]
    captions: Sequence[str] = ()  # one line below each image, or none at all
    frames: Sequence[tuple[int, int, int] | None] = ()  # RGB of the line round each image, or none at all


class Block(NamedTuple):
    """Rows below a heading."""

    heading: str  # may be empty; lines after the first are set smaller
    rows: Sequence[Row]


def contact_sheet(blocks: Sequence[Block], *, cell: int = 144) -> np.ndarray:
    """Lays out images in rows of equal cells, with a column of labels at the left.

    An image keeps its aspect. One that is smaller than a cell is enlarged by the largest whole factor
    that fits, each pixel a square; a larger one is reduced, antialiased. A heading or label that is too
    long goes on in the next line, a caption is cut short.

    Args:
      blocks: what to show, from top to bottom; at least one image.
      cell: side of a cell in pixels, at least 1; less where no image comes out that large. A frame lies
        outside.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: if there is no image, one has another shape or type, or a row that has captions or
        frames does not have one for each image.
    """
    rows = [row for block in blocks for row in block.rows]
    columns = max((len(row.images) for row in rows), default=0)
    if columns == 0:
        raise ValueError("a contact sheet needs at least one image")
    for row in rows:
        if row.captions and len(row.captions) != len(row.images):
            raise ValueError(f"{row.label!r} has {len(row.images)} images and {len(row.captions)} captions")
        if row.frames and len(row.frames) != len(row.images):
            raise ValueError(f"{row.label!r} has {len(row.images)} images and {len(row.frames)} frames")

    fitted = [
        [
            _framed(_fitted(image, cell), frame)
            for image, frame in zip(row.images, row.frames or repeat(None), strict=False)
        ]
        for row in rows
    ]
    cell = max(max(image.size) for images in fitted for image in images)
    labels = [_paragraph(row.label, _LABEL, _LABEL_WIDTH) for row in rows]
    label_width = max((_width(line) for lines in labels for line in lines), default=0)
    left = _MARGIN + (label_width + 2 * _GAP if label_width else 0)
    width = left + columns * (cell + _GAP) - _GAP + _MARGIN

    # What is drawn is collected first, as the height is known only at the end.
    texts: list[tuple[int, int, _Line, str]] = []
    images: list[tuple[int, int, Image.Image]] = []
    remaining = zip(fitted, labels, strict=True)
    y = _MARGIN
    for number, block in enumerate(blocks):
        y += _BLOCK_GAP if number else 0
        for line in _paragraph(block.heading, _HEADING, width - 2 * _MARGIN):
            texts.append((_MARGIN, y, line, "la"))
            y += line.height
        y += _GAP if block.heading else 0
        for row in block.rows:
            fits, lines = next(remaining)
            height = max(cell, sum(line.height for line in lines))
            above = (height - sum(line.height for line in lines)) // 2
            for line in lines:
                texts.append((_MARGIN, y + above, line, "la"))
                above += line.height
            for column, image in enumerate(fits):
                x = left + column * (cell + _GAP)
                images.append((x + (cell - image.width) // 2, y + (height - image.height) // 2, image))
                if row.captions:
                    caption = _shortened(_Line(row.captions[column], _SMALL, _INK), cell)
                    texts.append((x + cell // 2, y + height + 2, caption, "ma"))
            y += height + _GAP
            y += _Line("", _SMALL, _INK).height if row.captions else 0
        y -= _GAP if block.rows else 0

    sheet = Image.new("RGB", (width, y + _MARGIN), (_PAPER,) * 3)
    for x, y, image in images:
        sheet.paste(image, (x, y))
    draw = ImageDraw.Draw(sheet)
    for x, y, line, anchor in texts:
        draw.text((x, y), line.text, fill=(line.level,) * 3, font=_font(line.size), anchor=anchor)
    return np.asarray(sheet)


def view_grid(views: ArrayLike) -> np.ndarray:
    """Puts views side by side with nothing around them: one row an image, one column a view.

    Args:
      views: [count, n, H, W, 3], uint8 or float in [0, 1], not normalised: `count` views of n images, as
        `random_views` orders them once its result is reshaped. Both at least 1.

    Returns:
      uint8 [n * (H + 2) - 2, count * (W + 2) - 2, 3], with 2 gray pixels between neighbours.

    Raises:
      ValueError: if the array has another shape or type.
    """
    views = np.asarray(views)
    if views.ndim != 5 or views.shape[-1] != 3 or 0 in views.shape:
        raise ValueError(f"views must have shape [count, n, H, W, 3], none of them 0, got {views.shape}")
    count, n, height, width, _ = views.shape
    grid = np.full((n, height + _GRID_GAP, count, width + _GRID_GAP, 3), _PAPER, np.uint8)
    grid[:, :height, :, :width] = _to_uint8(views).transpose(1, 2, 0, 3, 4)
    grid = grid.reshape(n * (height + _GRID_GAP), count * (width + _GRID_GAP), 3)
    return grid[:-_GRID_GAP, :-_GRID_GAP]


class _Line(NamedTuple):
    """A line of text, its size and gray level."""

    text: str
    size: int
    level: int

    @property
    def height(self) -> int:
        return round(1.35 * self.size)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _width(line: _Line) -> int:
    return -int(-_font(line.size).getlength(line.text) // 1)


def _paragraph(text: str, size: int, width: int) -> list[_Line]:
    """The lines of a text, its first line in `size`, the others smaller, none wider than `width`."""
    first, *others = text.split("\n")
    lines = _wrap(first, size, _INK, width)
    for other in others:
        lines += _wrap(other, _SMALL, _FAINT, width)
    return lines


def _wrap(text: str, size: int, level: int, width: int) -> list[_Line]:
    """Breaks a text between words into lines of at most `width` pixels; a longer word is cut short."""
    lines: list[_Line] = []
    for word in text.split():
        longer = _Line(f"{lines[-1].text} {word}" if lines else word, size, level)
        if lines and _width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_shortened(_Line(word, size, level), width))
    return lines


def _shortened(line: _Line, width: int) -> _Line:
    if _width(line) <= width:
        return line
    for end in range(len(line.text) - 1, 0, -1):
        shorter = line._replace(text=line.text[:end] + "...")
        if _width(shorter) <= width:
            return shorter
    return line._replace(text="")


def _fitted(value: ArrayLike, cell: int) -> Image.Image:
    """An image at the size it has in its cell."""
    pixels = np.asarray(value)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"an image must have shape [H, W, 3], got {pixels.shape}")
    image = Image.fromarray(_to_uint8(pixels))
    longer = max(image.size)
    if longer <= cell:
        factor = cell // longer
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * cell / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _framed(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    return ImageOps.expand(image, _FRAME, colour) if colour else image


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if not jnp.issubdtype(values.dtype, jnp.floating):  # NumPy's does not know bfloat16
        raise ValueError(f"images must be uint8, or float in [0, 1], got {values.dtype}")
    return np.round(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)
