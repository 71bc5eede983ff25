"""Fits images to the size that the encoder takes: stretched, cropped or padded."""

import numpy as np
from PIL import Image

from unimed_jax.config import VisionConfig
from unimed_jax.data.pixels import MOST_PIXELS


def fit(image: np.ndarray, how: str, vision: VisionConfig) -> np.ndarray:
    """Fits an image to the encoder's uint8 [size, size, 3] in the way that `config.data.fit` names.

    stretch: the aspect ratio is given up. crop: the shorter side is scaled to size and the middle
    kept (CLIP). pad: a square first, with the mean colour beside or above and below (LLaVA). Memory
    is bounded for strips too: pad shrinks a side of more than 8192 pixels to that first, and crop
    looks at the middle of a strip alone.
    """
    if how == "stretch":
        return resize(image, vision.image_size)
    if how == "pad":
        red, green, blue = (int(255 * mean) for mean in vision.mean)
        image = pad_square(_shrunk(image), (red, green, blue))
    return crop_square(image, vision.image_size)


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Scales uint8 [H, W, 3] down until its longer side makes a square of at most `MOST_PIXELS`."""
    height, width = image.shape[:2]
    most = int(MOST_PIXELS**0.5)
    if max(height, width) <= most:
        return image
    scale = most / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def pad_square(image: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """Puts uint8 [H, W, 3] in the middle of a square of one colour, uint8 [longer, longer, 3]."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    out = np.full((side, side, 3), fill, np.uint8)
    out[top : top + height, left : left + width] = image
    return out


def crop_square(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the shorter side of an image to `size` and keeps the middle.

    The image is uint8 [H, W, 3], the result uint8 [size, size, 3]; scaling is bicubic.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    longest = short * max(1, MOST_PIXELS // size**2)  # what is further out would be cut off anyway
    if max(height, width) > longest:
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        image = image[top : top + longest, left : left + longest]
        height, width = image.shape[:2]
    scaled = (int(size * width / short), int(size * height / short))
    if scaled != (width, height):
        image = np.array(Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC))
    top, left = (scaled[1] - size) // 2, (scaled[0] - size) // 2
    return image[top : top + size, left : left + size]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Scales uint8 [H, W, 3] to uint8 [size, size, 3], bicubic with antialiasing.

    The aspect ratio is given up.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
