"""Reads the head that the brain set trains on: the ICBM152 template, and structures in it."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from scipy import ndimage

from unimed_jax.data.datasets.brain.volume import GRID, ORIGIN, SHAPE, STRUCTURES, Head, read_nifti
from unimed_jax.errors import UserError

# The T1 holds fluid near 90, grey matter near 170 and white matter up to 236: black and white just
# outside.
_T1_WINDOW = (60, 250)


@functools.cache
def load() -> Head:
    """Reads the three ICBM152 maps that are installed with nilearn, and labels their structures.

    The maps are symmetric 2009a; nothing is downloaded.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise UserError(
            "the brain set reads the ICBM152 volumes inside nilearn; run pip install -e '.[demo]'."
        )
    raw = {}
    for name, short in (("t1", "t1"), ("grey", "gm"), ("white", "wm")):
        path = (
            Path(spec.origin).parent
            / "datasets"
            / "data"
            / f"mni_icbm152_{short}_tal_nlin_sym_09a_converted.nii.gz"
        )
        if not path.is_file():
            raise UserError(
                f"{path} is missing from nilearn; install a nilearn that carries it (0.11 or newer)."
            )
        raw[name] = _read_map(path)
    # Only this part of the head holds structures; the rest would cost four times the work.
    low, high = np.array((-64, -102, -72)), np.array((64, 46, 40))  # world mm
    part = tuple(slice(a - o, b - o + 1) for a, b, o in zip(low, high, ORIGIN, strict=True))
    labels = np.zeros(raw["t1"].shape, np.uint8)
    labels[part] = _label(
        raw["t1"][part], raw["grey"][part].astype(np.int16), raw["white"][part].astype(np.int16), low
    )
    maps = {name: data.astype(np.float32) / 255 for name, data in raw.items()}
    dark, bright = _T1_WINDOW
    maps["t1"] = np.clip((raw["t1"].astype(np.float32) - dark) / (bright - dark), 0, 1)
    return Head(maps, labels)


def _read_map(path: Path) -> np.ndarray:
    """Reads a map, uint8 [X, Y, Z], which must lie in the common grid as it is."""
    return read_nifti(path, SHAPE, "install another nilearn", GRID)[0]


def _label(t1: np.ndarray, grey: np.ndarray, white: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Labels the structures where seed shapes meet the tissue that is most probable there.

    The shapes are in MNI mm and were checked against an atlas. Maps [X, Y, Z] whose first voxel
    lies at `origin` -> labels, uint8 [X, Y, Z].
    """
    x, y, z = np.ogrid[tuple(slice(o, o + n) for o, n in zip(origin, t1.shape, strict=True))]
    fluid = 255 - grey - white
    brain = t1 > 0
    is_grey = brain & (grey >= white) & (grey >= fluid)
    is_white = brain & (white > grey) & (white >= fluid)
    tissue = is_grey | is_white

    def ellipsoid(centre, radii, dy_dz: float = 0.0, dz_dy: float = 0.0) -> np.ndarray:
        along_y, along_z = y - centre[1], z - centre[2]
        parts = (x - centre[0], along_y - dy_dz * along_z, along_z - dz_dy * along_y)
        return sum((p / r) ** 2 for p, r in zip(parts, radii, strict=True)) <= 1

    labels = np.zeros(t1.shape, np.uint8)

    def put(name: str, mask: np.ndarray, opening: int = 0) -> None:
        """Labels the largest piece of `mask` that no structure has taken yet.

        Earlier ones keep what they have.
        """
        mask = mask & (labels == 0)
        core = ndimage.binary_opening(mask, iterations=opening) if opening else mask
        pieces, count = ndimage.label(core)
        piece = pieces == np.bincount(pieces.ravel(), minlength=count + 1)[1:].argmax() + 1
        if opening:  # thin bridges to other grey are cut, the rim comes back
            piece = ndimage.binary_dilation(piece, iterations=opening) & mask
        labels[piece] = STRUCTURES.index(name) + 1

    # The fluid pocket through the seed; both ventricles touch at the midline.
    window = (brain & ~tissue) & (abs(x) < 42) & (y > -60) & (y < 40) & (z > -2) & (z < 32)
    pockets, _ = ndimage.label(window)
    ventricles = pockets == np.bincount(pockets[window & ellipsoid((9, 5, 16), (8, 25, 10))]).argmax()
    for side, sign in (("left", -1), ("right", 1)):
        half = x * sign > 0
        put(f"{side} lateral ventricle", ventricles & half)
        put(f"{side} thalamus", ellipsoid((sign * 11, -19, 8), (12, 15, 11)) & tissue & half)
        put(
            f"{side} caudate nucleus",
            ellipsoid((sign * 13, 9, 10), (8, 18, 16)) & is_grey & half,
            opening=1,
        )
        put(f"{side} putamen", ellipsoid((sign * 26, 3, 1), (9, 19, 13)) & is_grey & half, opening=1)
        put(f"{side} amygdala", ellipsoid((sign * 23, -5, -19), (10, 8, 9)) & is_grey & half, opening=1)
        # Its head lies lower than its tail.
        put(
            f"{side} hippocampus",
            ellipsoid((sign * 27, -24, -14), (11, 22, 8), dz_dy=-0.5) & is_grey & half,
        )
    put("brainstem", ellipsoid((0, -30, -34), (17, 15, 37), dy_dz=0.2) & tissue)
    # The tentorium, the dark sheet above the cerebellum in the T1, as a fitted surface.
    behind, before = np.maximum(-50 - y, 0), np.maximum(y + 50, 0)
    tentorium = -1 - 0.6 * abs(x) - 0.35 * before - (0.47 - 0.0143 * abs(x)) * behind
    put("cerebellum", ellipsoid((0, -62, -34), (58, 36, 38)) & tissue & (z < tentorium), opening=1)
    arch = [((y + 4) / a) ** 2 + ((z - 2) / b) ** 2 for a, b in ((41, 29), (27, 17))]
    put("corpus callosum", is_white & (abs(x) < 9) & (arch[0] <= 1) & (arch[1] >= 1) & (z > -4))
    return labels
