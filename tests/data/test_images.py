"""Decoding: every kind of picture is shown as a viewer shows it, or refused in one line."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mssr.data.images import decode_image, image_bytes

RAMP = np.linspace(0, 1, 1024).reshape(8, 128)
IN_8_BITS = np.rint(RAMP * 255).astype(np.uint8)
IN_16_BITS = np.rint(RAMP * 65535).astype(np.uint16)


def saved(pixels, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, format=format, **options)
    return buffer.getvalue()


def pgm(pixels: np.ndarray) -> bytes:
    return b"P5 %d %d 65535\n" % pixels.shape[::-1] + pixels.astype(">u2").tobytes()


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


DEEP = {
    "16-bit PNG": saved(IN_16_BITS),
    "16-bit TIFF": saved(IN_16_BITS, "TIFF"),
    "16-bit TIFF in which 0 is white": saved(65535 - IN_16_BITS, "TIFF", tiffinfo={262: 0}),
    "16-bit PGM": pgm(IN_16_BITS),
    "float TIFF": saved(RAMP.astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_of_grey_are_scaled(name):
    decoded = np.asarray(decode_image(DEEP[name]))
    assert decoded.dtype == np.uint8 and decoded.shape == (8, 128, 3)
    assert np.abs(decoded.astype(int) - IN_8_BITS[..., None]).max() == 0


def test_values_without_a_known_range_are_refused():
    assert "integers of 32 bits have no known range" in refusal(saved(IN_16_BITS.astype(np.int32), "TIFF"))
    assert "values are 0 to 255; a float image has 0 to 1" in refusal(saved((RAMP * 255).astype(np.float32), "TIFF"))
    assert "values are nan" in refusal(saved(np.full((4, 4), np.nan, np.float32), "TIFF"))
    assert "16 bits end at 4095 of 65535: nearly black" in refusal(saved(IN_16_BITS >> 4))
    assert np.asarray(decode_image(saved(np.zeros((4, 4), np.uint16)))).max() == 0  # black, and meant to be


def png_of_16_bits(values: np.ndarray) -> bytes:
    """Encode values of [height, width, channels], which Pillow cannot write: 2 channels are grey and alpha, 3 are RGB."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.astype(">u2").tobytes() for line in values))
    parts = [(b"IHDR", header), (b"IDAT", lines), (b"IEND", b"")]
    sums = [struct.pack(">I", zlib.crc32(name + part)) for name, part in parts]
    chunks = [struct.pack(">I", len(part)) + name + part + end for (name, part), end in zip(parts, sums)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_that_end_far_below_the_range(channels):
    """As those of a 12-bit camera, of which 8 bits would keep 4."""
    values = np.repeat(IN_16_BITS[..., None], channels, axis=2)
    if channels != 3:
        values[..., -1] = 65535  # opaque
    decoded = np.asarray(decode_image(png_of_16_bits(values))).astype(int)
    assert np.abs(decoded - IN_8_BITS[..., None]).max() <= 1
    values[..., : 3 if channels > 2 else 1] >>= 4
    assert "16 bits end at 15 of 255: nearly black" in refusal(png_of_16_bits(values))


def test_floats_that_rounding_put_beyond_the_range():
    decoded = np.asarray(decode_image(saved((RAMP * 1.0005 - 0.0002).astype(np.float32), "TIFF"))).astype(int)
    assert np.abs(decoded - IN_8_BITS[..., None]).max() <= 1 and (decoded.min(), decoded.max()) == (0, 255)


GREY = Image.fromarray(IN_8_BITS)
MODES = {
    "1": saved(Image.fromarray(IN_8_BITS > 127)),
    "L": saved(GREY),
    "LA": saved(GREY.convert("LA")),
    "P": saved(GREY.convert("P")),
    "PA": saved(GREY.convert("LA").convert("PA"), "TIFF"),
    "RGB": saved(GREY.convert("RGB")),
    "RGBA": saved(GREY.convert("RGBA")),
    "CMYK TIFF": saved(GREY.convert("RGB").convert("CMYK"), "TIFF"),
    # Pillow 12.3 does not read what it writes without compression.
    "YCbCr TIFF": saved(GREY.convert("RGB").convert("YCbCr"), "TIFF", compression="tiff_lzw"),
    "GIF": saved(GREY, "GIF"),
    "WEBP": saved(GREY.convert("RGB"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_of_8_bits(name):
    expected = (IN_8_BITS > 127) * 255 if name == "1" else IN_8_BITS
    decoded = np.asarray(decode_image(MODES[name])).astype(int)
    assert np.abs(decoded - expected[..., None]).max() <= 1  # YCbCr rounds


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_transparent_colour_is_white(mode):
    picture = Image.new(mode, (8, 8))  # black
    picture.putpixel((3, 3), 200 if mode != "RGB" else (200, 0, 0))
    decoded = np.asarray(decode_image(saved(picture, transparency=0 if mode != "RGB" else (0, 0, 0))))
    assert (decoded[0, 0] == 255).all()
    assert (decoded[3, 3] == np.asarray(picture.convert("RGB"))[3, 3]).all() and decoded[3, 3, 1] < 255


@pytest.mark.parametrize("picture, colour", [(IN_16_BITS, 0), (Image.new("RGB", (8, 8)), (300, 0, 0))])
def test_a_transparent_colour_of_16_bits_is_refused(picture, colour):
    assert "transparent colour has 16 bits" in refusal(saved(picture, transparency=colour))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_frames_and_pages_are_not_dropped(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    assert refusal(saved(frames[0], format, save_all=True, append_images=frames[1:])).startswith(
        "it has 3 frames or pages, of which one would be used"
    )


def test_a_photograph_with_a_preview_is_one_picture():
    photo, preview = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (8, 8))
    assert np.asarray(decode_image(saved(photo, "MPO", save_all=True, append_images=[preview]))).min() > 250


def test_base64_and_data_uris(png):
    text = base64.b64encode(png()).decode()
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    uri = f"data:image/png;base64,{text}"
    for form in ({"bytes": text}, {"bytes": lines, "path": None}, {"bytes": uri}, uri, {"path": uri}):
        assert image_bytes(form) == png()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"bytes": "###"}, "is not valid base64"),
        ({"bytes": [137, 80]}, "its `bytes` are a list, expected bytes or base64"),
        ("data:image/svg+xml,%3Csvg%3E", "is a data URI without base64"),
        ("https://example.org/a.png", "is a URL; download the file"),
        ("", "is an empty path"),
        ("iVBO" * 5000, 'is text too long for a path; write base64 as {"bytes": ...}'),
    ],
)
def test_texts_that_are_no_image(image, said):
    with pytest.raises(ValueError, match="^" + said.replace("{", r"\{")):
        image_bytes(image)
