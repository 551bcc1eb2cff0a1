"""Images as they come in rows: to the bytes of a file, and to RGB."""

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

# `decode_image` refuses them itself: warnings.catch_warnings is not for the threads that it runs in.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def image_bytes(image: Any) -> bytes:
    """The encoded file of an image given as bytes, `{"bytes", "path"}`, path or PIL image.

    A PIL image that no longer has its file is encoded as PNG, so that the same pixels always give the same bytes.

    Raises:
        ValueError: none of these. OSError: the file cannot be read.
    """
    match image:
        case bytes():
            return image
        case {"bytes": bytes(data)}:
            return data
        case {"path": str(path)} | (str() as path):
            return Path(path).read_bytes()
        case Path():
            return image.read_bytes()
        case Image.Image():
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            return buffer.getvalue()
        case {}:
            raise ValueError("has neither bytes nor a path")
    raise ValueError(f"is a {type(image).__name__}, expected bytes, a path, or a PIL image")


def decode_image(data: bytes) -> Image.Image:
    """Fully decoded, upright, RGB; transparency becomes white, as in a browser (black would hide black lines).

    Raises:
        ValueError: not an image, cut short, or unreasonably large.
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
