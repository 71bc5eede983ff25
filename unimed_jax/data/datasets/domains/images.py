"""Cuts the pictures that are installed with pydicom and scikit-image into many views.

They are of other kinds than the brain set's images. There are few of them, so each belongs to one
split with all its views: what is measured holds for these images.
"""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.data.images import read_image
from unimed_jax.errors import UserError

SIZE = 64  # pixels of a view, square


class Source(NamedTuple):
    """Names one picture of a package; `shown` is empty where no training picture shows the like."""

    file: str
    split: str
    modality: str
    kind: str
    shown: str

    @property
    def name(self) -> str:
        return Path(self.file).stem


SCAN, OPTICAL = "other scan", "optical image"
KINDS = {  # kind -> with its article
    "CT": "a CT",
    "MR image": "an MR image",
    "ultrasound image": "an ultrasound image",
    "bone scan": "a bone scan",
    "microscope image": "a microscope image",
    "retina image": "a retina image",
    "photograph": "a photograph",
}
# Left out: copies of a picture in other encodings (examples_rgb_color.dcm is examples_jpeg2k.dcm),
# drawings, and the pictures of 16 pixels in pydicom's dicomdirtests.
SOURCES = (
    Source("693_J2KI.dcm", "train", SCAN, "CT", "a head"),
    Source("CT_small.dcm", "train", SCAN, "CT", "a spine"),
    Source("examples_overlay.dcm", "train", SCAN, "MR image", "an abdomen"),
    Source("examples_jpeg2k.dcm", "train", SCAN, "ultrasound image", "a lymph node"),
    Source("JPEG2000.dcm", "train", SCAN, "bone scan", "a whole body"),
    Source("examples_palette.dcm", "val", SCAN, "ultrasound image", ""),
    Source("J2K_pixelrep_mismatch.dcm", "test", SCAN, "CT", "a head"),
    Source("MR_small.dcm", "test", SCAN, "MR image", ""),
    Source("examples_ybr_color.dcm", "test", SCAN, "ultrasound image", ""),
    Source("ihc.png", "train", OPTICAL, "microscope image", "cells"),
    Source("retina.jpg", "train", OPTICAL, "retina image", "a retina"),
    Source("astronaut.png", "train", OPTICAL, "photograph", "a person"),
    Source("brick.png", "train", OPTICAL, "photograph", "a surface"),
    Source("gravel.png", "train", OPTICAL, "photograph", "a surface"),
    Source("chelsea.png", "train", OPTICAL, "photograph", "an animal"),
    Source("coins.png", "train", OPTICAL, "photograph", "coins"),
    Source("page.png", "train", OPTICAL, "photograph", "writing"),
    Source("rocket.jpg", "train", OPTICAL, "photograph", "a machine"),
    Source("moon.png", "train", OPTICAL, "photograph", "the sky"),
    Source("coffee.png", "val", OPTICAL, "photograph", ""),
    Source("cell.png", "test", OPTICAL, "microscope image", "cells"),
    Source("microaneurysms.png", "test", OPTICAL, "retina image", "a retina"),
    Source("camera.png", "test", OPTICAL, "photograph", "a person"),
    Source("grass.png", "test", OPTICAL, "photograph", "a surface"),
    Source("motorcycle_left.png", "test", OPTICAL, "photograph", "a machine"),
    Source("text.png", "test", OPTICAL, "photograph", "writing"),
    Source("hubble_deep_field.jpg", "test", OPTICAL, "photograph", "the sky"),
)


@functools.cache
def pixels(file: str) -> np.ndarray:
    """Reads a picture from its installed package as uint8 [H, W, 3]; nothing is downloaded."""
    package, folder = ("pydicom", "data/test_files") if file.endswith(".dcm") else ("skimage", "data")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the domains set reads images inside {package}; run pip install -e '.[demo]'.")
    path = Path(spec.origin).parent / folder / file
    if not path.is_file():
        raise UserError(f"{path} is missing from {package}; install a {package} that carries it.")
    return read_image(path)


def view(source: Source, rng: np.random.Generator) -> np.ndarray:
    """Cuts a square from anywhere in a picture and scales it to uint8 [64, 64, 3].

    The side of the square is 60 to 100 % of the picture's shorter side. Views are mirrored by
    chance, except those with writing; gamma, gain and grey noise are drawn too.
    """
    whole = pixels(source.file)
    height, width = whole.shape[:2]
    side = rng.uniform(0.6, 1.0) * min(height, width)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    small = Image.fromarray(whole).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    white = np.asarray(small, np.float32) / 255  # [64, 64, 3]
    if source.shown != "writing" and rng.random() < 0.5:
        white = white[:, ::-1]
    white = rng.uniform(0.9, 1.1) * white ** rng.uniform(0.85, 1.2) + rng.normal(
        0, 0.02, (SIZE, SIZE, 1)
    )
    return np.round(np.clip(white, 0, 1) * 255).astype(np.uint8)
