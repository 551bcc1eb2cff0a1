"""Reads the images of a row as the bytes of their files, and decodes those to RGB."""

import base64
import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

# `decode_image` refuses such images itself; warnings.catch_warnings is not safe in the threads that it runs in.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

LONGEST_PATH = 4096  # of Linux; a longer text is an image, not a path
NO_PATH = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]*://")  # how a data URI or URL begins
ONE_PICTURE = ("MPO", "PSD")  # formats whose further frames are previews or layers of the first
DARKEST_MAXIMUM = 1 / 16  # of the range of 16 bits
ROUNDING = 1e-3  # of the range of floats: less than half a step in 8 bits


def image_bytes(image: Any) -> bytes:
    """Return the encoded file of an image: bytes, `{"bytes", "path"}`, a path or a data URI; bytes may also be base64.

    Raises:
        ValueError: it is none of these. OSError: the file cannot be read.
    """
    match image:
        case bytes():
            return image
        case {"bytes": bytes(data)}:
            return data
        case {"bytes": str(text)}:
            return _from_data_uri(text) if text.startswith("data:") else _from_base64(text)
        case {"bytes": value} if value is not None:
            raise ValueError(f"its `bytes` are a {type(value).__name__}, expected bytes or base64")
        case {"path": str(path)} | (str() as path):
            return _from_data_uri(path) if path.startswith("data:") else _from_path(path)
        case {}:
            raise ValueError("has neither bytes nor a path")
    raise ValueError(f"is a {type(image).__name__}, expected bytes or a path")


def is_path(image: Any) -> bool:
    """Whether the text names a file; not so a data URI or a URL."""
    return isinstance(image, str) and bool(image.strip()) and not NO_PATH.match(image)


def _from_path(path: str) -> bytes:
    if not path.strip():
        raise ValueError("is an empty path")
    if len(path) > LONGEST_PATH:
        raise ValueError('is text too long for a path; write base64 as {"bytes": ...}')
    if not is_path(path):
        raise ValueError("is a URL; download the file and give its path")
    return Path(path).read_bytes()


def _from_data_uri(uri: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("is a data URI without base64; write data:image/png;base64,...")
    return _from_base64(data)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"is not valid base64: {error}") from None


def decode_image(data: bytes) -> Image.Image:
    """Return the image upright and in RGB with 8 bits. Transparent becomes white, as in a browser: black would hide
    black lines. 16-bit grey and floats of 0..1 are scaled to 0..255.

    Raises:
        ValueError: it is no image, incomplete, unreasonably large, animated, or its pixels have no known range.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        if getattr(image, "is_animated", False) and image.format not in ONE_PICTURE:
            raise ValueError(
                f"it has {image.n_frames} frames or pages, of which one would be used; save each as an image"
            )
        top, inverted = _grey_range(image)
        colours_of_16_bits = any(";16" in str(tile) for tile in image.tile)
        image = ImageOps.exif_transpose(image)
        if top is not None:
            image = _in_8_bits(image, top, inverted)
        elif colours_of_16_bits:
            _refuse_nearly_black(max(high for _, high in image.convert("RGB").getextrema()), 255)
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        if image.mode == "RGB" and max(image.info["transparency"]) > 255:
            raise ValueError("its transparent colour has 16 bits; save it with 8 bits or an alpha channel")
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file" if data else "is empty") from None
    except Exception as error:  # Pillow's decoders raise whatever they meet: OSError, SyntaxError, struct.error, ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _grey_range(image: Image.Image) -> tuple[float | None, bool]:
    """Return the value of white in a grey image of more than 8 bits, and whether it is black instead; else (None, False).

    Pillow cuts such values off at 255. In colour, it scales 16 bits to 8 itself.
    """
    if image.mode == "F":
        return 1.0, False
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of TIFF
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return 2**bits - 1, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode == "I":
        if image.format != "PPM":  # whose reader scales to 16 bits
            raise ValueError("its integers of 32 bits have no known range; save it with 8 or 16 bits")
        return 2**16 - 1, False
    return None, False


def _in_8_bits(image: Image.Image, top: float, inverted: bool) -> Image.Image:
    if "transparency" in image.info:
        raise ValueError("its transparent colour has 16 bits; save it with 8 bits or an alpha channel")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= -ROUNDING * top and high <= (1 + ROUNDING) * top):  # so that NaN is refused, too
        raise ValueError(
            f"its values are {low:g} to {high:g}; a float image has 0 to 1: scale it, or save it with 8 bits"
        )
    if image.mode != "F":
        _refuse_nearly_black(high, top)
    scaled = np.rint(values * (255 / top)).astype(np.uint8)
    return Image.fromarray(255 - scaled if inverted else scaled)


def _refuse_nearly_black(high: int, top: int) -> None:
    """Refuse 16-bit values of which nothing would be left to see in 8 bits, such as those of a 12-bit camera."""
    if 0 < high < top * DARKEST_MAXIMUM:
        raise ValueError(
            f"its values of 16 bits end at {high} of {top}: nearly black; scale them, or save it with 8 bits"
        )
