# SPDX-License-Identifier: Apache-2.0
"""Encoded bytes to upright RGB pixels, whatever Pillow can open."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


# What Pillow raises for bytes that are no image, a broken one or one of absurd size.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION_TAG = 0x0112
_TURNED_SIDEWAYS = 5  # orientations 5 to 8 exchange width and height


@contextmanager
def _reading() -> Iterator[None]:
    """Some of Pillow's decoders, AVIF's and DDS's among them, answer broken bytes with errors that say nothing of the
    kind; whatever it was, it becomes one of DECODING_ERRORS."""
    try:
        yield
    except (*DECODING_ERRORS, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"it cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB.

    Sixteen-bit greys keep their upper byte, floats in [0, 1] are spread over 255 levels, transparency is dropped as
    stock image processors drop it.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # in the type they come in: wider copies of a large picture would take gigabytes
        values = np.asarray(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 255):
            values = values // 256
        elif image.mode == "F":
            values = np.nan_to_num(values)
            values = values * 255 if values.max() <= 1 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def oriented_size(image: Image.Image) -> tuple[int, int, int]:
    """Width and height as the EXIF orientation wants them, and that orientation (1 when there is none)."""
    with _reading():
        orientation = image.getexif().get(_ORIENTATION_TAG, 1) if "exif" in image.info else 1
    width, height = image.size
    return (height, width, orientation) if orientation in range(_TURNED_SIDEWAYS, 9) else (width, height, orientation)


def load_pixels(image: Image.Image, orientation: int) -> Tensor:
    """uint8 (H, W, 3) of an opened image, turned as `orientation` says. Raises one of DECODING_ERRORS."""
    with _reading():
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(to_rgb(image)))


def open_image(encoded: bytes) -> Image.Image:
    """The image behind encoded bytes, its header read and no pixel yet. Raises one of DECODING_ERRORS.

    Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`, is an error here from its first pixel on: between once and twice
    the limit Pillow only warns, and what a few kilobytes claim to hold would fill gigabytes of every loader process.
    """
    with _reading():
        image = Image.open(io.BytesIO(encoded))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}"
        )
    return image


def decode_image(encoded: bytes) -> Tensor:
    """Pixels uint8 (H, W, 3) of an encoded image, upright. Raises one of DECODING_ERRORS when it cannot be read."""
    image = open_image(encoded)
    return load_pixels(image, oriented_size(image)[2])


def image_size(encoded: bytes) -> tuple[int, int]:
    """Upright (width, height) from the header alone."""
    return oriented_size(open_image(encoded))[:2]
