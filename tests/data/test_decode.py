import concurrent.futures
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from simclr_jax.data.decode import UnreadableImage, decode_rgb

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def encoded(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def grey_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def over_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "WEBP"])
def test_rgb_pixels_are_kept_exactly(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(Image.fromarray(RGB), image_format, **options)
    decoded = decode_rgb(data, size=7)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RGB)


def test_result_can_be_written_to():
    decode_rgb(encoded(Image.fromarray(RGB)), size=7)[0, 0] = 0


def test_grey():
    np.testing.assert_array_equal(decode_rgb(encoded(Image.fromarray(GREY)), size=7), grey_rgb(GREY))


def test_one_bit():
    bits = GREY > 127
    np.testing.assert_array_equal(
        decode_rgb(encoded(Image.fromarray(bits)), size=7),
        grey_rgb(np.where(bits, 255, 0).astype(np.uint8)),
    )


def test_one_channel_jpeg():
    flat = np.full((16, 16), 77, np.uint8)
    np.testing.assert_array_equal(decode_rgb(encoded(Image.fromarray(flat), "JPEG"), size=16), grey_rgb(flat))


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(
        decode_rgb(encoded(Image.fromarray(deep)), size=6),
        grey_rgb(np.array([[0, 0, 1, 1, 128, 255]], np.uint8)),
    )


def test_rgba_is_laid_over_white():
    alpha = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    alpha[0] = (0, 0, 0, 255, 255, 255, 255)
    data = encoded(Image.fromarray(np.dstack([RGB, alpha])))
    decoded = decode_rgb(data, size=7)
    assert np.abs(decoded - over_white(RGB, alpha)).max() <= 1
    np.testing.assert_array_equal(decoded[0, :3], 255)
    np.testing.assert_array_equal(decoded[0, 3:], RGB[0, 3:])


def test_grey_with_alpha_is_laid_over_white():
    alpha = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    decoded = decode_rgb(encoded(Image.fromarray(np.dstack([GREY, alpha]))), size=7)
    assert np.abs(decoded - over_white(grey_rgb(GREY), alpha)).max() <= 1


@pytest.mark.parametrize(
    ("transparency", "second"),
    [(None, (40, 50, 60)), (1, (255, 255, 255)), (b"\xff\x00\xff", (255, 255, 255))],
)
def test_palette_with_and_without_transparency(transparency, second):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(
        decode_rgb(encoded(image, **options), size=3), [[(10, 20, 30), second, (70, 80, 90)]]
    )


def test_transparent_colour_of_an_rgb_png():
    data = encoded(Image.fromarray(RGB), transparency=tuple(int(c) for c in RGB[2, 3]))
    expected = RGB.copy()
    expected[2, 3] = 255
    np.testing.assert_array_equal(decode_rgb(data, size=7), expected)


def test_adobe_cmyk_jpeg_is_not_inverted():
    # Pillow writes CMYK JPEGs as Adobe does: inverted, with an Adobe marker.
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = encoded(image, "JPEG", quality=95)
    assert b"Adobe" in data
    red, green, blue = decode_rgb(data, size=16)[8, 8]
    assert red <= 2 and green >= 253 and blue >= 253


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.swapaxes(0, 1)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: np.rot90(stored, 2).swapaxes(0, 1)),
        (8, lambda stored: np.rot90(stored, 1)),
        (9, lambda stored: stored),
    ],
)
def test_exif_orientation(orientation, upright, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(Image.fromarray(RGB), image_format, exif=exif, **options)
    np.testing.assert_array_equal(decode_rgb(data, size=7), upright(RGB))


def test_exif_orientation_of_a_reduced_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: the left of the stored image is the top
    stored = np.zeros((40, 80, 3), np.uint8)
    stored[:, :40] = 255
    decoded = decode_rgb(encoded(Image.fromarray(stored), "JPEG", exif=exif), size=20)
    assert decoded.shape == (20, 10, 3)
    assert decoded[:8].min() > 240 and decoded[12:].max() < 15


def test_damaged_exif_leaves_the_pixels():
    data = encoded(Image.fromarray(RGB), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_rgb(data, size=7), RGB)


@pytest.mark.parametrize(
    ("width", "height", "size", "shape"),
    [
        (100, 50, 32, (16, 32, 3)),
        (50, 100, 32, (32, 16, 3)),
        (500, 2, 10, (1, 10, 3)),
        (20, 10, 32, (10, 20, 3)),
        (33, 32, 32, (31, 32, 3)),
    ],
)
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_aspect_is_kept_and_nothing_is_enlarged(width, height, size, shape, image_format):
    data = encoded(Image.new("RGB", (width, height)), image_format)
    assert decode_rgb(data, size=size).shape == shape


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_reduction_is_antialiased(image_format):
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 254
    decoded = decode_rgb(encoded(Image.fromarray(stripes), image_format, quality=95), size=32)
    assert np.abs(decoded[2:-2, 2:-2].astype(int) - 127).max() <= 3


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def bmp_header(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


@pytest.mark.parametrize("header", [png_header, bmp_header])
def test_decompression_bomb_is_refused_from_its_header(header):
    limit = Image.MAX_IMAGE_PIXELS
    start = time.perf_counter()
    with pytest.raises(UnreadableImage, match="60000x60000 pixels, more than the 64000000 allowed"):
        decode_rgb(header(60_000, 60_000), size=32)
    assert time.perf_counter() - start < 1
    assert limit == Image.MAX_IMAGE_PIXELS


def test_webp_bomb_is_refused():
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + (16_383).to_bytes(3, "little") * 2
    body = b"WEBP" + canvas + encoded(Image.fromarray(RGB), "WEBP", lossless=True)[12:]
    with pytest.raises(UnreadableImage):
        decode_rgb(b"RIFF" + struct.pack("<I", len(body)) + body, size=32)


def test_pixel_limit_is_inclusive():
    data = encoded(Image.fromarray(RGB))
    assert decode_rgb(data, size=7, max_pixels=35).shape == (5, 7, 3)
    with pytest.raises(UnreadableImage, match="7x5 pixels, more than the 34 allowed"):
        decode_rgb(data, size=7, max_pixels=34)


def test_more_pixels_than_pillow_would_warn_about(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_rgb(encoded(Image.fromarray(RGB)), size=7).shape == (5, 7, 3)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
def test_truncated(image_format, share):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)
    with pytest.raises(UnreadableImage) as caught:
        decode_rgb(data[: int(len(data) * share)], size=64)
    assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not a JPEG, PNG, WebP or BMP image"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "not a JPEG, PNG, WebP or BMP image"),
    ],
)
def test_other_files(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_rgb(data, size=32)


def test_threads_get_what_one_thread_gets():
    images = [
        encoded(Image.fromarray(RNG.integers(0, 256, (h, 70, 3), dtype=np.uint8)), "JPEG")
        for h in range(20, 84)
    ]
    alone = [decode_rgb(data, size=32) for data in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_rgb(data, size=32), images * 3))
    for index, image in enumerate(together):
        np.testing.assert_array_equal(image, alone[index % len(alone)])
