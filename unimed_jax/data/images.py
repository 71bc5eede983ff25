"""Reads pictures (PNG, JPEG, TIFF, DICOM ...) as arrays."""

import contextlib
import ctypes
import functools
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, ImageOps, UnidentifiedImageError, _imaging

from unimed_jax.config import ImageConfig
from unimed_jax.data.pixels import (
    SCANS,
    by_depth,
    check_size,
    chosen_frame,
    grey,
    one_line,
    ramp,
)
from unimed_jax.errors import UserError
from unimed_jax.parsing import stand_in

# Pillow opens no other format: EPS, for one, is a program that it hands to Ghostscript.
READABLE = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
MOST_FILE = 1 << 30  # bytes of a picture's file that are copied into a data set
# Formats with several frames to choose from; those of a JPEG are previews.
FILMS = ("TIFF", "GIF", "WEBP", "PNG")
PLAIN = ImageConfig()  # how pictures are read where nothing is set
MOST_PAGES = 4096  # of a TIFF
_COMPOSED = 1 << 30  # pixels that are decoded at most to reach a frame which builds on those before it
_ADVICE = "give a whole PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, PNM or DICOM file"
_BLOCK = 1 << 20  # pixels that change their mode at once


def read_image(path: str | Path | bytes, view: ImageConfig = PLAIN) -> np.ndarray:
    """Reads a picture's file, or the bytes of one, as uint8 [H, W, 3].

    Grey is repeated over the three channels, and of several frames or pages that of `view` is
    taken, by default the first. The picture is turned upright by its EXIF orientation; behind what
    is transparent lies the background of `view`. Integers of 16 bits are scaled by their depth (see
    `_deep`), while floats and signed integers span their own range. For DICOM see
    `dicom.read_dicom`.

    Raises UserError for what is not a regular file, cannot be read, lacks what `view` asks for, or
    has more than `pixels.MOST_PIXELS` by its header.
    """
    if isinstance(path, bytes):
        return _decoded(io.BytesIO(path), f"of {len(path)} bytes", view)
    with _opened(path) as file:
        return _decoded(file, one_line(path), view)


def read_bytes(path: str | Path) -> bytes:
    """Reads a picture's file as it is.

    Raises UserError if it is not a regular file or has more than `MOST_FILE` bytes.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_FILE:
            raise UserError(
                f"image {one_line(path)} has {size} bytes, more than {MOST_FILE}; give a smaller file."
            )
        return file.read()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading.

    Pipes, devices and folders are refused and never waited for.
    """
    name = one_line(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"image {name} is a folder; give a picture's file.")
        if not stat.S_ISREG(mode):
            raise UserError(f"image {name} is a pipe or a device; give a picture's file.")
        # Not blocking, because a pipe may have taken the file's place by now.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"image {name} does not exist; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"image {name} cannot be read ({reason}); check the path and its permissions."
        ) from error


def _decoded(file: BinaryIO, name: str, view: ImageConfig) -> np.ndarray:
    """Decodes an open file.

    `name` is the picture's in sentences, and its ending may say that it is DICOM.
    """
    head = file.read(132)
    file.seek(0)
    with _explained(name, head):
        if _is_dicom(head, name):
            from unimed_jax.data.dicom import read_dicom

            return read_dicom(file, name, view)
        with _picture(file, name) as image:
            _check_scans(file, image, name)
            if view != PLAIN:
                _show(image, view, name)
            return _pixels(image, view)


def check_header(data: bytes, name: str, view: ImageConfig = PLAIN) -> int:
    """Returns the number of frames of a picture by its header, which costs little.

    `name` is as in `_decoded`. Raises UserError if the bytes are not those of a picture, if the
    picture is too large, or if it lacks what `view` asks for.
    """
    with _explained(name, data[:132]):
        if _is_dicom(data[:132], name):
            from unimed_jax.data.dicom import read_header

            return read_header(io.BytesIO(data), name, view)[0]
        with _picture(io.BytesIO(data), name) as image:
            if view != PLAIN:
                _show(image, view, name)
            try:
                return _frames(image, name)
            except UserError:
                raise
            except Exception:  # the first frame is wanted, and only later ones are damaged
                return 1


class Header(NamedTuple):
    """Says what a picture's header does."""

    kind: str  # "png", "jpeg", "tiff", ..., "dicom"
    width: int  # upright, of one frame
    height: int
    frames: int
    frame: int  # which one, from 0


def read_header(data: bytes, name: str, view: ImageConfig = PLAIN) -> Header:
    """Reads the header of a picture's bytes; nothing is decoded.

    The size is that of the frame that `view` names, as the pages of a TIFF have sizes of their own.
    Raises UserError as `check_header`.
    """
    frames = check_header(data, name)
    frame = chosen_frame(view, frames, name)
    with _explained(name, data[:132]):
        if _is_dicom(data[:132], name):
            from unimed_jax.data.dicom import read_header

            return Header("dicom", *read_header(io.BytesIO(data), name, PLAIN)[1], frames, frame)
        with _picture(io.BytesIO(data), name) as image:
            if image.format == "TIFF" and view != PLAIN:
                _show(image, view, name)
            return Header(str(image.format).lower(), *_upright_size(image), frames, frame)


def upright_size(path: str | Path) -> tuple[int, int]:
    """Reads (width, height) from a picture's header, turned upright as by `read_image`.

    Of several frames it is that of the first. Raises UserError if it is not a regular file or not a
    picture.
    """
    name = one_line(path)
    with _opened(path) as file, _explained(name, head := file.read(132)):
        file.seek(0)
        if _is_dicom(head, name):
            from unimed_jax.data.dicom import read_header

            return read_header(file, name, PLAIN)[1]
        with _picture(file, name) as image:
            return _upright_size(image)


def _upright_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    width, height = image.size
    if image.format == "TIFF":  # whose size Pillow may have turned already
        width, height = int(image.tag_v2[256]), int(image.tag_v2[257])  # type: ignore[attr-defined]
    turned = False
    with contextlib.suppress(Exception):  # as in `_pixels`
        turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


@contextlib.contextmanager
def _picture(file: BinaryIO, name: str) -> Iterator[ImageFile.ImageFile]:
    """Opens a picture of one of the known formats, and checks its size before it is decoded."""
    with Image.open(file, formats=READABLE) as image:
        _check_size(image, name)
        yield image


def _check_size(image: Image.Image, name: str) -> None:
    samples = 4 if image.mode in ("I", "F") else len(image.getbands())
    check_size(name, image.height, image.width, samples)


def _frames(image: Image.Image, name: str) -> int:
    """Returns the number of frames or pages that a source may choose from.

    Raises UserError for a TIFF with more than `MOST_PAGES`, in which each takes longer to find than
    the one before.
    """
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1) if image.format in FILMS else 1
    for number in range(1, MOST_PAGES + 1):
        try:
            image.seek(number)
        except EOFError:
            image.seek(0)
            return number
    raise UserError(
        f"image {name} has more than {MOST_PAGES} pages, the most that are counted; cut it into several."
    )


def _show(image: Image.Image, view: ImageConfig, name: str) -> None:
    """Turns an opened picture to the frame that `view` names.

    Raises UserError if there is none, if it takes too long to get there, or for a window, which
    fits DICOM alone.
    """
    if view.window is not None:
        raise UserError(
            f"image {name} is {image.format}, and a window fits DICOM alone; leave out the source's "
            "image.window, or this image."
        )
    number = 0 if view.frame in (None, "first") else chosen_frame(view, _frames(image, name), name)
    if number:
        if image.format != "TIFF" and (number + 1) * image.width * image.height > _COMPOSED:
            raise UserError(
                f"image {name} has {image.width} x {image.height} pixels in each frame, of which frame "
                f"{number} takes too long to reach; cut the film, or choose an earlier one."
            )
        image.seek(number)
        _check_size(image, name)


@contextlib.contextmanager
def _explained(name: str, head: bytes) -> Iterator[None]:
    """Turns whatever is raised inside into a UserError about the image `name`.

    head: the first bytes of the file; there are none if it is empty.
    """
    if found := stand_in(head):
        raise UserError(f"image {name} {found}.")
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError:
        what = "it is of none of the formats that are read" if head else "it is empty"
        if head[:2] in (b"II", b"MM"):
            what = "it is a TIFF that is damaged or of a kind that is not read"
        raise UserError(f"image {name} cannot be read ({what}); {_ADVICE}.") from None
    except Exception as error:  # decoders raise whatever they come across in a damaged file
        reason = one_line(error) or type(error).__name__
        raise UserError(f"image {name} cannot be read ({reason}); {_ADVICE}.") from error


def _is_dicom(head: bytes, name: str) -> bool:
    """Says whether a file is DICOM.

    It is known by its mark or by its name or, where both lack, by the group of its first element.
    """
    if head[128:] == b"DICM" or name.lower().endswith((".dcm", ".dicom")):
        return True
    return head[:2] in (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08") and len(head) == 132


def _check_scans(file: BinaryIO, image: Image.Image, name: str) -> None:
    """Raises UserError for a progressive JPEG that takes minutes to decode.

    Such a file goes over the picture too often.
    """
    if not image.info.get("progressive"):
        return
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    file.seek(place)
    if scans > SCANS:
        raise UserError(
            f"image {name} has {scans} scans, more than the {SCANS} that are read; save it again."
        )


def _pixels(image: ImageFile.ImageFile, view: ImageConfig) -> np.ndarray:
    """Gives an opened picture of any mode as uint8 [H, W, 3]."""
    paper = view.background if not isinstance(view.background, str) else _colour(view.background)
    kind, tags = image.format, getattr(image, "tag_v2", {})
    if kind == "TIFF":
        _name_planes(image, tags)
    bits = _grey_bits(image)
    image.load()
    clear = image.info.get("transparency")
    if bits < 8 and isinstance(clear, int):  # Pillow has spread the pixels over 8 bits, but not this
        image.info["transparency"] = clear % 2**bits * (255 // (2**bits - 1))
    # an orientation that cannot be read leaves the picture as it is stored
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F" or tags.get(339) == (2,):
        deep, clear = grey(_deep(image, kind, tags)), image.info.get("transparency")
        if isinstance(clear, int):
            deep[np.asarray(image) == clear] = paper
        return deep
    out = np.empty((image.height, image.width, 3), np.uint8)
    step = max(1, _BLOCK // image.width)  # rows at a time: each step of `_rgb` makes a copy
    for top in range(0, image.height, step):
        rows = image.crop((0, top, image.width, min(top + step, image.height)))
        out[top : top + step] = np.asarray(_rgb(rows, paper))
    return out


def _grey_bits(image: ImageFile.ImageFile) -> int:
    """Returns the bits of a pixel of a grey PNG of at most 8 bits that is not decoded; else 8.

    Raises ValueError for colours of 16 bits with a transparent one, which 8 bits cannot name.
    """
    if image.format != "PNG" or not image.tile:
        return 8
    raw = str(image.tile[0][3])
    if raw.startswith("RGB;16") and "transparency" in image.info:
        raise ValueError("one of its colours of 16 bits a channel is transparent; it needs alpha")
    return int(raw[2:]) if raw in ("L;2", "L;4") else 8


def _name_planes(image: ImageFile.ImageFile, tags) -> None:
    """Says of a TIFF whose channels lie one after the other that each has 16 bits.

    Pillow reads such planes as bytes if they are not compressed.
    """
    if tags.get(284) == 2 and set(tags.get(258, ())) == {16}:
        end = ";16L" if tags.prefix == b"II" else ";16B"
        image.tile = [
            tile._replace(args=(tile.args[0] + end, *tile.args[1:]))
            if tile.codec_name == "raw" and isinstance(tile.args, tuple) and len(tile.args[0]) == 1
            else tile
            for tile in image.tile
        ]


def _colour(name: str) -> tuple[int, int, int]:
    red, green, blue = ImageColor.getrgb(name)[:3]
    return red, green, blue


def _rgb(image: Image.Image, paper: tuple[int, int, int]) -> Image.Image:
    """Changes a picture of 8 bits or less to RGB, with paper behind what is transparent."""
    if image.mode == "LAB":
        changed = ImageCms.applyTransform(image, _from_lab())
        assert changed is not None  # as it is not changed in place
        return changed
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # alpha is multiplied into the grey
        image = image.convert("LA")
    clear = image.convert("RGBA")
    out = Image.new("RGB", clear.size, paper)
    out.paste(clear, mask=clear)
    return out


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
    )


def _deep(image: Image.Image, kind: str | None, tags) -> np.ndarray:
    """Gives a grey picture of more than 8 bits as uint8 [H, W].

    Unsigned integers of 16 bits: 65535 is white, but 4095 is in a PNG or TIFF without any pixel
    above that, since scanners of 12 bits write such files and their pictures would be black.
    Signed, 32-bit and float values span their range.
    """
    array = np.asarray(image)
    if image.mode == "L":  # Pillow knows no other mode for signed bytes
        array = array.view(np.int8)
    bits = tags.get(258, (16,))[0] if kind == "TIFF" else 16
    signed = kind == "TIFF" and tags.get(339, (1,))[0] != 1
    if image.mode == "F" or signed or bits > 16:
        if image.mode == "I" and not signed:
            # Pillow has no such mode and gives the bits as signed integers
            array = array.view(np.uint32)
        plane = ramp(array)
    else:
        plane = by_depth(array, 12 if kind in ("PNG", "TIFF") and array.max() < 1 << 12 else 16)
    if kind == "TIFF" and tags.get(262) == 0:
        plane = 255 - plane  # white is zero, which Pillow minds in pictures of 8 bits alone
    return plane


def _silence_decoders() -> None:
    """Keeps messages of Pillow and pydicom about odd files off the screen.

    What matters of them is in our own sentence.
    """
    for name in ("PIL", "pydicom"):
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    # libtiff, inside Pillow, writes to the screen itself
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    warnings.filterwarnings("ignore", module=r"PIL\.|pydicom\.|unimed_jax\.data\.(images|dicom)")


_silence_decoders()
