"""Takes pictures out of data URLs, checks their headers and decodes them; nothing else is opened."""

import base64
import binascii
import dataclasses
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.config import Config
from unimed_jax.data import images
from unimed_jax.errors import UserError
from unimed_jax.serve.fields import text
from unimed_jax.serve.limits import Limits, wrong

_HEAD = 200  # characters of a data URL in which its comma must stand
_MEDIA = ("", "application/dicom", "application/octet-stream")  # beside image/...


class Picture(NamedTuple):
    """Holds a decoded picture."""

    pixels: np.ndarray  # uint8 [H, W, 3], upright
    header: images.Header


def content_of(url: Any, name: str, limits: Limits) -> bytes:
    """Returns the bytes of a data URL; name: of the field, in sentences."""
    url = text(url, name, 2 * limits.bytes)
    head, comma, _ = url[:_HEAD].partition(",")
    if not (comma and head[:5].lower() == "data:"):
        raise wrong(
            f"{name} is not a data URL; send the picture itself as data:image/png;base64,... (addresses "
            "and paths are never opened).",
            "invalid_image_url",
        )
    media, *parameters = (part.strip().lower() for part in head[5:].split(";"))
    if not (media.startswith("image/") or media in _MEDIA):
        raise wrong(
            f"{name} is a data URL of {media[:60]!r}; send a picture (image/png, image/jpeg, image/tiff "
            "or application/dicom).",
            "invalid_image_format",
        )
    if "base64" not in parameters:
        raise wrong(f"{name} is not base64; write data:{media};base64,....", "invalid_base64")
    try:
        return base64.b64decode(url[len(head) + 1 :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise wrong(
            f"{name} is damaged: what follows base64, is not base64; encode it again, "
            "without line breaks.",
            "invalid_base64",
        ) from None


def picture_of(content: bytes, name: str, config: Config, limits: Limits, **chosen: Any) -> Picture:
    """Decodes a picture whose header says that it is not too large; raises Refused with a sentence.

    It is read as those of the run's sources are, or with the frame and window that are chosen.
    """
    try:
        view = dataclasses.replace(config.data.common_image or images.PLAIN, **chosen)
        frame = dataclasses.replace(view, window=None)
        header = images.read_header(content, f"of {len(content)} bytes", frame)
        if header.width * header.height > limits.pixels:
            raise wrong(
                f"{name} has {header.width} x {header.height} pixels by its header, more than the "
                f"{limits.pixels} that are read; scale it down.",
                "image_too_large",
            )
        if header.kind != "dicom" and "window" not in chosen:
            view = frame  # the window of the run's sources fits DICOM alone
        return Picture(images.read_image(content, view), header)
    except UserError as error:
        raise wrong(f"{name}: {error}", "invalid_image") from error


def png_url(pixels: np.ndarray) -> str:
    """Writes uint8 [H, W, 3] as a data URL of a PNG with the same pixels, grey ones as grey."""
    grey = (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
