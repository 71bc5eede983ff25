"""Damages small pictures of every supported kind and reads them.

Each must become an array, or be refused in one sentence.

`cases(seed)` yields names and calls endlessly; the same seed gives the same cases. A call raises
UserError if the picture was refused, and AssertionError if the result is not a picture.
"""

import io
import itertools
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.dicom_files import dicom_file, float_file, item

from unimed_jax.data.images import read_image

_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def cases(seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields (name, call) endlessly; each call reads one damaged picture."""
    files = whole_files()
    names = sorted(files)
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        kind = names[number % len(names)]
        data = damaged(files[kind], rng)
        yield f"{kind}, seed {seed}, case {number}", lambda data=data: read(data)


def read(data: bytes) -> None:
    """Reads bytes as a picture; raises UserError as `read_image` does."""
    image = read_image(data)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size, (
        image.shape
    )


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flips, overwrites, inserts, repeats or cuts some bytes.

    Most changes are near the start, where headers are.
    """
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        length = max(1, len(out))
        at = int(length * rng.random() ** (2 if rng.random() < 0.7 else 1))
        what = int(rng.integers(6))
        if what == 0:
            out[at : at + 1] = bytes([(out[at] if at < len(out) else 0) ^ (1 << int(rng.integers(8)))])
        elif what == 1:
            width = int(rng.choice([1, 2, 4]))
            value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] % (1 << (8 * width))
            out[at : at + width] = value.to_bytes(width, "little" if rng.random() < 0.5 else "big")
        elif what == 2:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif what == 3:
            out[at:at] = out[at : at + int(rng.integers(1, 200))]
        elif what == 4:
            out[at : at + 4] = rng.bytes(4)
        elif rng.random() < 0.3:
            del out[at:]
        else:
            del out[at : at + int(rng.integers(1, 20))]
    return _with_sums(bytes(out))


def _with_sums(data: bytes) -> bytes:
    """Computes the checksums of a PNG's chunks again after its bytes were changed.

    With a wrong checksum the decoder would look at nothing that comes after it.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + struct.unpack_from(">L", out, at)[0]
        if end + 4 > len(out):
            break
        struct.pack_into(">L", out, end, zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


# --------------------------------------------------------------------------------------------------
# The whole files
# --------------------------------------------------------------------------------------------------


def whole_files() -> dict[str, bytes]:
    """Makes a small valid file of each kind."""
    return _pillow_files() | _dicom_files()


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _pillow_files() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 4), dtype=np.uint8)
    rgb, rgba, grey = (Image.fromarray(part) for part in (noise[..., :3], noise, noise[..., 0]))
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = 6
    files = {
        "png": _saved(rgb, "PNG", exif=exif),
        "png la": _saved(grey.convert("LA"), "PNG"),
        "png palette": _saved(rgb.quantize(8), "PNG", transparency=3),
        "png 16": _saved(deep, "PNG"),
        "png film": _saved(rgba, "PNG", save_all=True, append_images=[rgba]),
        "jpeg": _saved(rgb, "JPEG", exif=exif),
        "jpeg progressive": _saved(rgb, "JPEG", progressive=True),
        "jpeg cmyk": _saved(rgb.convert("CMYK"), "JPEG"),
        "webp": _saved(rgba, "WEBP"),
        "webp lossless": _saved(rgba, "WEBP", lossless=True, exif=exif),
        "gif": _saved(rgb.quantize(8), "GIF", save_all=True, append_images=[grey]),
        "bmp": _saved(rgb, "BMP"),
        "jpeg 2000": _saved(rgb, "JPEG2000"),
        "jpeg 2000 16": _saved(deep, "JPEG2000"),
        "ppm": _saved(rgb, "PPM"),
        "ppm text": b"P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
        "tiff float": _saved(Image.fromarray(noise[..., 0].astype(np.float32)), "TIFF"),
        "tiff 16": _saved(deep, "TIFF"),
        "tiff lab": _saved(Image.new("LAB", (8, 8)), "TIFF"),
        "tiff pages": _saved(rgb, "TIFF", save_all=True, append_images=[grey]),
    }
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        files[f"tiff {compression}"] = _saved(rgb, "TIFF", compression=compression)
    files["tiff fax"] = _saved(grey.convert("1"), "TIFF", compression="group4")
    return files


def _dicom_files() -> dict[str, bytes]:
    from pydicom.encaps import encapsulate

    noise = np.random.default_rng(1).integers(0, 4096, (8, 12), dtype=np.uint16)
    eight = (noise >> 4).astype(np.uint8)
    rgb = np.stack([eight, eight.T.reshape(8, 12), eight[::-1]], -1)
    window = {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 1, "RescaleIntercept": -1024}
    group = item(
        FrameVOILUTSequence=[item(WindowCenter=40, WindowWidth=400)],
        PixelValueTransformationSequence=[item(RescaleIntercept=-1024, RescaleSlope=1)],
    )
    words = np.arange(0, 65536, 8192, dtype="<u2").tobytes()
    table = item(x00283002=("US", [8, 0, 16]), x00283006=("OW", words))
    palette = {f"x{0x00281101 + i:08x}": ("US", [8, 0, 16]) for i in range(3)}
    plain = {f"x{0x00281201 + i:08x}": ("OW", words) for i in range(3)}
    lines = np.array([0, 2, 5, 9, 1, 3, 60000, 2, 1, 0, 0], "<u2").tobytes()
    segments = {f"x{0x00281221 + i:08x}": ("OW", lines) for i in range(3)}
    coloured = {"PhotometricInterpretation": "PALETTE COLOR"} | palette
    picture = Image.fromarray(eight)
    jpeg, wavelets = _saved(picture, "JPEG"), _saved(picture, "JPEG2000", no_jp2=True)
    boxes = _saved(picture, "JPEG2000")
    rle = struct.pack("<16L", 1, 64, *[0] * 14) + b"".join(b"\x0b" + line.tobytes() for line in eight)
    return {
        "dicom": dicom_file(noise, PixelPaddingValue=3, PixelPaddingRangeLimit=9, **window),
        "dicom big": dicom_file(noise, "1.2.840.10008.1.2.2", **window),
        "dicom implicit": dicom_file(noise, "1.2.840.10008.1.2", **window),
        "dicom deflated": dicom_file(noise, "1.2.840.10008.1.2.1.99", **window),
        "dicom groups": dicom_file(noise, SharedFunctionalGroupsSequence=[group], NumberOfFrames=1),
        "dicom tables": dicom_file(noise, ModalityLUTSequence=[table], VOILUTSequence=[table]),
        "dicom float": float_file(noise.astype(np.float32), FloatPixelPaddingValue=1.0),
        "dicom double": float_file(noise.astype(np.float64), **window),
        "dicom rgb": dicom_file(rgb),
        "dicom ybr": dicom_file(rgb, PhotometricInterpretation="YBR_FULL"),
        "dicom palette": dicom_file(eight % 8, **coloured, **plain),
        "dicom segments": dicom_file(eight % 8, **coloured, **segments),
        "dicom mask": dicom_file(eight[:, :8], BitsAllocated=1, BitsStored=1, HighBit=0),
        "dicom jpeg": dicom_file(eight, "1.2.840.10008.1.2.4.50", PixelData=encapsulate([jpeg, jpeg])),
        "dicom jpeg 2000": dicom_file(
            eight, "1.2.840.10008.1.2.4.90", PixelData=encapsulate([wavelets])
        ),
        "dicom jpeg 2000 boxes": dicom_file(
            eight, "1.2.840.10008.1.2.4.91", PixelData=encapsulate([boxes])
        ),
        "dicom rle": dicom_file(
            eight, "1.2.840.10008.1.2.5", PixelData=encapsulate([rle], has_bot=False)
        ),
    }
