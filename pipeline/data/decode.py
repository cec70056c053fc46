"""Encoded pictures to upright RGB arrays: the one decoder of training, evaluation, batch scoring and the service.

What a picture becomes, whatever its file is called:

* JPEG (also CMYK, and the first picture of an MPO), PNG, WebP, BMP, GIF and TIFF; the first frame of an animation.
* Turned upright by its EXIF orientation 2-8; an invalid orientation or a damaged EXIF block counts as upright.
* Transparency is laid on white.  (Dropping the alpha channel instead would show whatever colour hides below it.)
* 16-bit grey is divided by 256 (``>> 8``).  Float grey is taken as 0..1 unless a value lies above 1, then as 0..255.
* Colour profiles are ignored, as the networks' training sets ignore them.
"""

from __future__ import annotations

import io
import warnings
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of the formats that count; everything else, however Pillow may read it, is ``undecodable``.

An MPO, a JPEG with further ones behind it, opens as a JPEG; Pillow then names it "MPO"."""

MAX_PIXELS = 100_000_000

# `_open` applies a stricter limit before anything is decoded; Pillow's would print a warning from 89 megapixels on.
Image.MAX_IMAGE_PIXELS = None
# Pillow's remarks about odd files (a damaged EXIF block, say) name no file and would get in the way of a progress bar.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_EXIF_ORIENTATION = 0x0112

ErrorKind = Literal["undecodable", "too_many_pixels", "unreadable"]


class ImageError(Exception):
    """A picture that cannot be used.  ``str()`` is ``"<kind>: <message>"``, on one line."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        self.kind: ErrorKind = kind
        self.message = " ".join(message.split())
        super().__init__(f"{self.kind}: {self.message}")

    def __reduce__(self) -> tuple[type[ImageError], tuple[ErrorKind, str]]:
        return ImageError, (self.kind, self.message)


def read_image(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a file: (H, W, 3) uint8 RGB, upright.  Raises `ImageError`; ``unreadable`` when it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError("unreadable", getattr(error, "strerror", None) or str(error)) from error
    return decode_image(data, max_pixels=max_pixels)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a picture: (H, W, 3) uint8 RGB, upright, writable.  Raises `ImageError`.

    Ordinary JPEGs, grey or RGB, take a path that is about a quarter faster and gives the pixels of
    `decode_image_reference`.  Whatever that path so much as warns about is left to the reference to judge.
    """
    try:
        with _open(data, max_pixels) as picture:
            if picture.format not in ("JPEG", "MPO") or picture.mode not in ("RGB", "L"):
                return _reference_pixels(picture)
            try:
                pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
            except ValueError:
                return _reference_pixels(picture)
            return _upright(pixels, _orientation(picture))
    except ImageError:
        raise
    except Exception as error:  # damaged bytes raise OSError, ValueError, struct.error, SyntaxError, IndexError, ...
        raise ImageError("undecodable", _reason(error)) from error


def decode_draft(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """`decode_image`, but a JPEG comes at 1/2, 1/4 or 1/8 of its size where no side gets shorter than ``size`` pixels.

    libjpeg scales while it decodes, as Pillow's ``Image.draft`` has it: faster, and some grey levels away from the exact
    sums.  Returns the picture, and width and height of the whole one.  Raises `ImageError`.
    """
    try:
        with _open(data, max_pixels) as picture:
            width, height = picture.size
            factor = max(factor for factor in (1, 2, 4, 8) if factor == 1 or min(width, height) >= factor * size)
            if factor > 1 and picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L"):
                least = {"min_width": width // factor, "min_height": height // factor}
                try:
                    pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **least)
                except ValueError:  # what it so much as warns about is left to the reference to judge
                    pixels = None
                if pixels is not None:
                    turned = _orientation(picture)
                    return _upright(pixels, turned), (height, width) if turned >= 5 else (width, height)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("undecodable", _reason(error)) from error
    image = decode_image(data, max_pixels=max_pixels)
    return image, (image.shape[1], image.shape[0])


def decode_image_reference(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`decode_image` by Pillow alone: the meaning of the pixels, which the fast path has to reproduce."""
    try:
        with _open(data, max_pixels) as picture:
            return _reference_pixels(picture)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("undecodable", _reason(error)) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only, and refuse what is too large before a single pixel is decoded."""
    if not data:
        raise ImageError("undecodable", "the file is empty")
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > max_pixels:
        picture.close()
        raise ImageError("too_many_pixels", f"{width} x {height} pixels, the limit is {max_pixels}")
    return picture


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text is the address of our buffer
        return f"the content is none of {', '.join(FORMATS)}, or its header is damaged"
    return str(error) or type(error).__name__


def _reference_pixels(picture: Image.Image) -> np.ndarray:
    picture.load()  # before the orientation is read: loading a TIFF turns it upright
    return _upright(np.array(_to_rgb(picture)), _orientation(picture))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(picture) >> 8)
    if picture.mode == "I":  # 32-bit integers; those that Pillow makes of ordinary files hold 16-bit values
        return _grey_to_rgb(np.clip(np.asarray(picture), 0, 65535) >> 8)
    if picture.mode == "F":
        grey = np.nan_to_num(np.asarray(picture), nan=0.0, posinf=0.0, neginf=0.0)
        return _grey_to_rgb(np.rint(np.clip(grey if grey.max() > 1 else grey * 255, 0, 255)))
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return white
    return picture.convert("RGB")


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none, or none that can be understood."""
    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block does not spoil the picture
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation.  pixels: (H, W, 3) as stored; returns (H, W, 3), or (W, H, 3) for 5-8, contiguous."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
