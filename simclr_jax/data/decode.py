"""Encoded image bytes to RGB arrays."""

import io

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 64_000_000

# `Image.open` would measure every header against the process-wide Image.MAX_IMAGE_PIXELS, and warn.
# The classes behind it leave that check to `max_pixels`.
_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"BM", BmpImageFile),
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """The bytes are no image that can be decoded; the message is a short reason."""


def decode_rgb(data: bytes, *, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or BMP image, turned upright, to at most `size` pixels a side.

    A larger image is reduced, antialiased, with its aspect kept; a smaller one stays as it is.
    Transparent images are laid over white, 16-bit grey ones are scaled to 8 bits, and of an
    animation the first frame is taken. Safe to call from many threads at once.

    Args:
        data: the encoded image.
        size: the longest side of the result, in pixels.
        max_pixels: the most pixels the header may announce; checked before anything is decoded.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnreadableImage: if the data is damaged, in another format or larger than `max_pixels`.
    """
    try:
        with _open(data) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImage(
                    f"{image.width}x{image.height} pixels, more than the {max_pixels} allowed"
                )
            return _upright_rgb(image, size)
    except UnreadableImage:
        raise
    except Exception as error:  # damaged data makes Pillow raise nearly any type
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnreadableImage(reason) from error


def _open(data: bytes) -> ImageFile:
    for signature, image_class in _FORMATS:
        if data.startswith(signature):
            return image_class(io.BytesIO(data))
    raise UnreadableImage("not a JPEG, PNG, WebP or BMP image" if data else "empty file")


def _upright_rgb(image: ImageFile, size: int) -> np.ndarray:
    shrink = size / max(image.width, image.height)
    target = None
    if shrink < 1:
        target = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice the target leaves the filter
        # below enough to work with. Other formats ignore the call.
        image.draft(None, (2 * target[0], 2 * target[1]))
    image.load()
    rgb = _to_rgb(image)
    if target is not None:
        rgb = rgb.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    transpose = _UPRIGHT.get(_orientation(image))
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    return np.array(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255. Adding 128 rounds the division by 257 = 65535 / 255.
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata around sound pixels, where Pillow raises nearly any type
        return 1
