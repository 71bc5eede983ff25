"""Holds what every head of the brain set has in common: its grid, slices, jitter and boxes.

World coordinates are MNI millimetres: x to the patient's right, y to the front, z up. Heads lie in
one grid of 1 mm voxels, whatever grid their files have. A slice is shown as radiologists do: front
or top up, the patient's right on the image's left.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file, refuse_stand_in

PLANES = ("axial", "coronal", "sagittal")
MAPS = {"t1": "T1 image", "grey": "grey matter map", "white": "white matter map"}
SIZE = 64  # pixels of an image, square
FIELD = 196.0  # mm that an image shows, so that the brain fills it
PIXEL = FIELD / SIZE  # mm
SMALLEST_SIDE = 4  # pixels: a structure with a shorter box is not asked for
SMALLEST_AREA = 20.0  # mm^2

PAIRED = ("thalamus", "caudate nucleus", "putamen", "hippocampus", "amygdala", "lateral ventricle")
SINGLE = ("cerebellum", "brainstem", "corpus callosum")
SIDES = ("left", "right")
STRUCTURES = (*(f"{side} {name}" for name in PAIRED for side in SIDES), *SINGLE)  # label = index + 1

ORIGIN = (-98, -134, -72)  # world coordinates of voxel 0, 0, 0 of the grid
SHAPE = (197, 233, 189)  # voxels of the grid
# Voxels of the grid to world mm.
GRID = np.vstack([np.column_stack([np.eye(3), ORIGIN]), [0.0, 0.0, 0.0, 1.0]])
_CENTRE = (0.0, -17.0, 5.0)  # middle of the brain's extent, world
_AXIS = {"sagittal": 0, "coronal": 1, "axial": 2}


# --------------------------------------------------------------------------------------------------
# Slabs: which slices belong to train, val and test
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slab:
    """Holds neighbouring slices of one plane that all belong to one split.

    `first` to `last` are mm, both inclusive; in the sagittal plane they are mm of |x|.
    """

    plane: str
    split: str
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.plane}:{'xyz'[_AXIS[self.plane]]}{self.first}..{self.last}"

    @property
    def positions(self) -> range:
        return range(self.first, self.last + 1)


GAP = 4  # slices left out between two slabs: no two splits come closer than 4 mm
# plane: first slice, then slabs of so many slices (T train, v val, t test). The borders are set so
# that every structure has slices of each plane that shows it well in train, and that test meets
# each structure.
_LAYOUT = {
    "axial": (-66, "T5 t5 T12 t5 T12 t5 T12 v5 T12 t5 T19"),
    "coronal": (-98, "T16 t5 T12 v5 T12 t5 T12 t5 T12 t5 T12 t5 T12"),
    "sagittal": (0, "T11 t5 T11 t5 T11 v5"),
}


def _lay() -> tuple[Slab, ...]:
    slabs = []
    for plane, (first, widths) in _LAYOUT.items():
        for word in widths.split():
            last = first + int(word[1:]) - 1
            slabs.append(Slab(plane, {"T": "train", "v": "val", "t": "test"}[word[0]], first, last))
            first = last + 1 + GAP
    return tuple(slabs)


SLABS = _lay()


# --------------------------------------------------------------------------------------------------
# A head
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)  # a head is itself alone: slices are kept by head
class Head:
    """Holds the maps of a head in the common grid and says which structure each voxel belongs to.

    maps: name of MAPS -> float32 [X, Y, Z] in 0..1; labels: uint8 [X, Y, Z], 0 or index into
    STRUCTURES + 1; structures: those that are labelled in this head, in the order of STRUCTURES.
    """

    maps: Mapping[str, np.ndarray]
    labels: np.ndarray
    structures: tuple[str, ...] = STRUCTURES


def read_nifti(
    path: Path, shape: tuple[int, int, int], again: str, expected: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a NIfTI volume of bytes, and where its voxels lie by its sform.

    Returns uint8 [X, Y, Z] and float [4, 4], voxels to world mm. Raises UserError for a file that
    cannot be read, has another shape or type, no sform, or not the `expected` one; `again` says what
    to do.
    """
    import nibabel

    if reason := no_file(path):
        raise UserError(f"{path} {reason}; {again}.")
    refuse_stand_in(path)
    array = np.zeros(0)
    try:
        image = nibabel.Nifti1Image.from_filename(path)
        place, code = image.header.get_sform(coded=True)
        fault = _fault_of_header(image, shape, place if code else None, expected)
        if not fault:
            array = np.asarray(image.dataobj)
    except Exception as error:  # nibabel raises what it comes across in a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}); {again}.") from error
    if fault or array.dtype != np.uint8:  # bytes may be scaled
        raise UserError(f"{path} {fault or 'does not hold plain bytes'}; {again}.")
    return array, place


def _fault_of_header(
    image: Any, shape: tuple[int, ...], place: np.ndarray | None, expected: np.ndarray | None
) -> str:
    """Says what is wrong with a volume's header; empty if nothing is."""
    if image.shape != shape or image.get_data_dtype() != np.uint8:
        return f"does not lie in the expected grid of {' x '.join(map(str, shape))} bytes"
    if place is None or not np.isfinite(place).all() or abs(np.linalg.det(place)) < 1e-6:
        return "has no sform, which says where its voxels lie"
    if expected is not None and not np.array_equal(place, expected):
        return "does not lie in the expected place"
    return ""


def to_grid(array: np.ndarray, place: np.ndarray, order: int) -> np.ndarray:
    """Samples a volume in the common grid; what lies outside it is 0.

    array: [x, y, z]; place: [4, 4], its voxels to world mm; order: of interpolation, 0 for labels.
    Returns [X, Y, Z] of the same type.
    """
    back = np.linalg.inv(place) @ GRID  # voxels of the grid to voxels of the array
    return ndimage.affine_transform(array, back[:3, :3], back[:3, 3], SHAPE, order=order)


# --------------------------------------------------------------------------------------------------
# Slices
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Says how a slice is changed; the defaults change nothing."""

    rotation: float = 0.0  # degrees
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)  # mm down, mm to the right
    gamma: float = 1.0
    gain: float = 1.0
    noise: float = 0.0  # standard deviation, of the range 0..1
    mirrored: bool = False  # sagittal slices only, which carry no side

    @staticmethod
    def draw(rng: np.random.Generator, plane: str) -> "Jitter":
        def normal(sd: float) -> float:
            return float(np.clip(rng.normal(0, sd), -2 * sd, 2 * sd))

        return Jitter(
            rotation=normal(4.0),
            scale=1 + normal(0.06),
            shift=(normal(5.0), normal(5.0)),
            gamma=float(np.exp(normal(0.2))),
            gain=float(rng.uniform(0.75, 1.15)),
            noise=0.02,
            mirrored=bool(rng.integers(2)) and plane == "sagittal",
        )

    def matrix(self) -> np.ndarray:
        """Returns the matrix that turns places in the slice into places in the image.

        It is float [2, 2] and maps (row, column) in mm to mm, both counted from their centres.
        """
        angle = np.deg2rad(self.rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return self.scale * turn @ np.diag([1.0, -1.0 if self.mirrored else 1.0])


@dataclasses.dataclass(frozen=True)
class Slice:
    """Holds one image and what is known of it.

    Names of structures carry a side in axial and coronal slices only.
    """

    key: str
    slab: Slab
    position: int  # mm: x, y or z
    map: str  # of MAPS
    mirrored: bool
    image: np.ndarray  # uint8 [SIZE, SIZE]
    # structures large enough to ask for: x1, y1, x2, y2 pixels
    boxes: Mapping[str, tuple[int, int, int, int]]
    absent: tuple[str, ...]  # structures of which nothing is in the slice

    @property
    def plane(self) -> str:
        return self.slab.plane


def show(array: np.ndarray, plane: str, position: int) -> np.ndarray:
    """Cuts the slice at `position` mm out of an array and turns it as it is shown.

    array: [X, Y, Z]. Returns [rows, columns] of 1 mm each.
    """
    index = position - ORIGIN[_AXIS[plane]]
    if plane == "axial":
        return array[::-1, ::-1, index].T  # [Y, X]
    if plane == "coronal":
        return array[::-1, index, ::-1].T  # [Z, X]
    return array[index, ::-1, ::-1].T  # [Z, Y]: faces left


def _middle(plane: str) -> np.ndarray:
    """Returns the (row, column) of the brain's middle in the slices of `show`.

    The axes of those slices all run downwards in world mm.
    """
    index = [n - 1 - (c - o) for n, c, o in zip(SHAPE, _CENTRE, ORIGIN, strict=True)]
    rows, columns = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}[plane]
    return np.array([index[rows], index[columns]])


@functools.lru_cache(maxsize=8)
def _plane_map(head: Head, plane: str, position: int, name: str) -> np.ndarray:
    # An image pixel is three slice pixels wide: averaging first keeps sampling from aliasing.
    return ndimage.uniform_filter(show(head.maps[name], plane, position), 3)


@functools.lru_cache(maxsize=8)
def _plane_masks(head: Head, plane: str, position: int) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the pixels of each structure, without specks, as int [n, 2] (row, column)."""
    labels = show(head.labels, plane, position)
    masks, absent = {}, []
    for name in head.structures:
        mask = labels == STRUCTURES.index(name) + 1
        if plane == "sagittal" and name not in SINGLE:
            side, name = name.split(" ", 1)
            # The slice shows one side only (x > 0 is the right); at the midline both are cut at the
            # edge.
            if (side == "right") != (position > 0) or abs(position) < 4:
                continue
        if not mask.any():
            absent.append(name)
            continue
        pieces, count = ndimage.label(mask, np.ones((3, 3)))
        large = np.bincount(pieces.ravel(), minlength=count + 1) >= SMALLEST_AREA
        large[0] = False
        if large.any():
            masks[name] = np.argwhere(large[pieces])  # [n, 2]
    return masks, tuple(absent)


def render(
    head: Head,
    slab: Slab,
    position: int,
    name: str,
    jitter: Jitter,
    key: str = "",
    rng: np.random.Generator | None = None,
) -> Slice:
    """Draws the slice of a head at `position` mm in map `name` under `jitter`; `rng` draws its noise."""
    plane, forward, middle = slab.plane, jitter.matrix(), _middle(slab.plane)
    back = np.linalg.inv(forward)
    # Centre of image pixel (r, c), in mm from the image's centre: (r + .5) PIXEL - FIELD / 2.
    corner = PIXEL / 2 - FIELD / 2 - np.array(jitter.shift)
    values = ndimage.affine_transform(
        _plane_map(head, plane, position, name),
        back * PIXEL,
        middle + back @ corner,
        (SIZE, SIZE),
        order=1,
    )  # [SIZE, SIZE]
    # .85: the brightest white stays below 255
    values = 0.85 * jitter.gain * np.clip(values, 0, 1) ** jitter.gamma
    if jitter.noise:
        assert rng is not None
        values = values + rng.normal(0, jitter.noise, values.shape)
    image = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)

    masks, absent = _plane_masks(head, plane, position)
    boxes = {}
    for structure, pixels in masks.items():
        box = _box(pixels, forward, middle, jitter)
        if box is not None:
            boxes[structure] = box
    return Slice(key, slab, position, name, jitter.mirrored, image, boxes, absent)


def _box(
    pixels: np.ndarray, forward: np.ndarray, middle: np.ndarray, jitter: Jitter
) -> tuple[int, int, int, int] | None:
    """Finds the box x1, y1, x2, y2 of mask pixels [n, 2] under the jitter.

    Returns None where the box is too small or cut off.
    """
    at = ((pixels - middle) @ forward.T + jitter.shift) / PIXEL + SIZE / 2  # [n, 2]
    half = 0.5 * jitter.scale / PIXEL  # a voxel reaches half a mm around its centre
    inside = ((at >= 0) & (at <= SIZE)).all(1).mean()
    low = np.clip(np.round(at.min(0) - half), 0, SIZE).astype(int)
    high = np.clip(np.round(at.max(0) + half), 0, SIZE).astype(int)
    area = len(pixels) * jitter.scale**2  # mm^2
    if (high - low).min() < SMALLEST_SIDE or area < SMALLEST_AREA or inside < 0.9:
        return None
    return int(low[1]), int(low[0]), int(high[1]), int(high[0])
