"""Reads the images of a row as the bytes of their files, and decodes those to RGB."""

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

# `decode_image` refuses such images itself; warnings.catch_warnings is not safe in the threads that it runs in.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def image_bytes(image: Any) -> bytes:
    """Return the encoded file of an image that is given as bytes, `{"bytes", "path"}` or a path.

    Raises:
        ValueError: it is none of these. OSError: the file cannot be read.
    """
    match image:
        case bytes():
            return image
        case {"bytes": bytes(data)}:
            return data
        case {"path": str(path)} | (str() as path):
            return Path(path).read_bytes()
        case {}:
            raise ValueError("has neither bytes nor a path")
    raise ValueError(f"is a {type(image).__name__}, expected bytes or a path")


def decode_image(data: bytes) -> Image.Image:
    """Return the image upright and in RGB. Transparent becomes white, as in a browser: black would hide black lines.

    Raises:
        ValueError: it is no image, incomplete, or unreasonably large.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if not image.has_transparency_data:
            return image.convert("RGB")
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("cannot identify image file" if data else "is empty") from None
    except Exception as error:  # Pillow's decoders raise whatever they meet: OSError, SyntaxError, struct.error, ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
