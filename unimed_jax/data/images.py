"""Image files to arrays: PNG, JPEG and DICOM; resizing as published."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from unimed_jax.config import VisionConfig
from unimed_jax.errors import UserError


def read_image(path: str | Path | bytes) -> np.ndarray:
    """Reads a file, or the bytes of one, to uint8 [H, W, 3].

    Grey images are repeated over the three channels. Sixteen-bit grey keeps its zero; white is the smallest
    2^n - 1 that holds the brightest pixel, so that twelve-bit data in a sixteen-bit file is not black.
    DICOM: see `read_dicom`. Raises UserError for a file that is missing or cannot be read.
    """
    if isinstance(path, bytes):
        return _decoded(io.BytesIO(path), f"of {len(path)} bytes")
    if not Path(path).is_file():
        raise UserError(f"image {path} does not exist; check the path.")
    with Path(path).open("rb") as file:
        return _decoded(file, str(path))


def _decoded(file: BinaryIO, path: str) -> np.ndarray:
    """Decodes an open file; `path` names it in messages and may say what it is."""
    dicom = file.read(132)[128:] == b"DICM" or path.lower().endswith((".dcm", ".dicom"))
    file.seek(0)
    if dicom:
        return read_dicom(file, path)
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):
                return _grey(_deep(np.asarray(image)))
            return np.array(image.convert("RGB"))  # [H, W, 3]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read ({error}); give a whole PNG, JPEG or DICOM file.") from error


def read_dicom(file: str | Path | BinaryIO, path: str = "") -> np.ndarray:
    """Reads a DICOM file (called `path` in messages) to uint8 [H, W, 3].

    First frame, modality rescale, then the file's first VOI table or window.
    Without one, data of at most eight bits stays as it is and deeper data spans its range (padding apart).
    MONOCHROME1 is inverted, palettes and YBR become RGB. PS3.3 C.11.1, C.11.2.
    """
    path = path or str(file)
    try:
        import pydicom
        from pydicom import pixels
    except ImportError as error:
        raise UserError(f"image {path} is DICOM; install pydicom to read it.") from error
    try:
        data = pydicom.dcmread(file, force=True)
        # `pixel_array` of colour images is RGB already where the file holds YBR.
        array = data.pixel_array
        colours = int(data.get("SamplesPerPixel", 1))
        if int(data.get("NumberOfFrames", 1) or 1) > 1:
            array = array[0]  # [H, W] or [H, W, 3]
        if data.PhotometricInterpretation == "PALETTE COLOR":
            array, colours = pixels.apply_color_lut(array, data), 3
        if colours == 3:
            return _deep(array)  # [H, W, 3]
        white = _grey_window(pixels.apply_modality_lut(array, data), data, array)
    except UserError:
        raise
    except Exception as error:  # pydicom raises what its many decoders and fields raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"image {path} cannot be read as DICOM ({reason[:200]}); give a whole file with an image in it."
        ) from error
    if data.PhotometricInterpretation == "MONOCHROME1":
        white = 1 - white
    return _grey(np.round(white * 255).astype(np.uint8))


def fit(image: np.ndarray, how: str, vision: VisionConfig) -> np.ndarray:
    """uint8 [H, W, 3] -> the encoder's uint8 [size, size, 3], as `config.data.fit` says.

    stretch: the aspect ratio is given up. crop: the shorter side is scaled to size and the middle kept (CLIP).
    pad: a square first, with the mean colour beside or above and below (LLaVA).
    """
    if how == "stretch":
        return resize(image, vision.image_size)
    if how == "pad":
        red, green, blue = (int(255 * mean) for mean in vision.mean)
        image = pad_square(image, (red, green, blue))
    return crop_square(image, vision.image_size)


def pad_square(image: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [longer, longer, 3], the image in the middle of one colour."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    out = np.full((side, side, 3), fill, np.uint8)
    out[top : top + height, left : left + width] = image
    return out


def crop_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: bicubic to `size` on the shorter side, the middle of the longer."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = (int(size * width / short), int(size * height / short))
    if scaled != (width, height):
        image = np.array(Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC))
    top, left = (scaled[1] - size) // 2, (scaled[0] - size) // 2
    return image[top : top + size, left : left + size]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: bicubic with antialiasing, aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _grey(plane: np.ndarray) -> np.ndarray:
    return np.repeat(plane[..., None], 3, axis=-1)  # [H, W, 3]


def _deep(array: np.ndarray) -> np.ndarray:
    """Integers of any depth -> uint8 of the same shape; white is the smallest 2^n - 1 >= 255 that holds them."""
    if array.dtype == np.uint8:
        return array
    white = max(255, 2 ** int(array.max()).bit_length() - 1)
    return np.round(np.clip(array, 0, None) / white * 255).astype(np.uint8)


def _grey_window(values: np.ndarray, data, stored: np.ndarray) -> np.ndarray:
    """Rescaled values [H, W] -> float [H, W] in 0..1. `stored` are the values before the rescale."""
    from pydicom.pixels import apply_voi

    if data.get("VOILUTSequence"):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return np.clip(apply_voi(values.astype(stored.dtype), data) / (2**bits - 1), 0, 1)

    def first(name: str) -> float | None:
        value = data.get(name)
        if value is None or value == "":
            return None
        return float(value if isinstance(value, (int, float)) else value[0])

    centre, width = first("WindowCenter"), first("WindowWidth")
    if centre is not None and width is not None:
        function = data.get("VOILUTFunction") or "LINEAR"
        if function == "SIGMOID":
            return 1 / (1 + np.exp(-4 * (values - centre) / width))
        if function == "LINEAR" and width > 1:
            return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)
        return np.clip((values - centre) / max(width, 1e-6) + 0.5, 0, 1)
    top = 2 ** int(data.BitsStored) - 1
    if top <= 255 and values.min() >= 0 and values.max() <= top:
        return values / top
    inside = values[stored != data.PixelPaddingValue] if "PixelPaddingValue" in data else values
    if not inside.size:
        return np.zeros(values.shape)
    low, high = float(inside.min()), float(inside.max())
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1)
