"""Reads the head of the brain set: ICBM152 volumes, structures in them, slices and where they lie.

World coordinates are MNI millimetres: x to the patient's right, y to the front, z up. The volumes
have 1 mm voxels. A slice is shown as radiologists do: front or top up, the patient's right on the
image's left.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from unimed_jax.errors import UserError

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

# The T1 holds fluid near 90, grey matter near 170 and white matter up to 236: black and white just
# outside.
_T1_WINDOW = (60, 250)
_ORIGIN = (-98, -134, -72)  # world coordinates of voxel 0, 0, 0
_SHAPE = (197, 233, 189)  # voxels
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
# The volume and its structures
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Volume:
    """Holds the maps of the head and says which structure each voxel belongs to.

    maps: name -> float32 [X, Y, Z] in 0..1; labels: uint8 [X, Y, Z], 0 or index into STRUCTURES +
    1.
    """

    maps: Mapping[str, np.ndarray]
    labels: np.ndarray


@functools.cache
def load_volume() -> Volume:
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
    part = tuple(slice(a - o, b - o + 1) for a, b, o in zip(low, high, _ORIGIN, strict=True))
    labels = np.zeros(raw["t1"].shape, np.uint8)
    labels[part] = _label(
        raw["t1"][part], raw["grey"][part].astype(np.int16), raw["white"][part].astype(np.int16), low
    )
    maps = {name: data.astype(np.float32) / 255 for name, data in raw.items()}
    dark, bright = _T1_WINDOW
    maps["t1"] = np.clip((raw["t1"].astype(np.float32) - dark) / (bright - dark), 0, 1)
    return Volume(maps, labels)


def _read_map(path: Path) -> np.ndarray:
    """Reads a NIfTI map, uint8 [X, Y, Z].

    Raises UserError unless its header says the shape, type and place known.
    """
    import nibabel

    try:
        image = nibabel.Nifti1Image.from_filename(path)
        place = tuple(image.affine[:3, 3]) == _ORIGIN and np.array_equal(image.affine[:3, :3], np.eye(3))
        if image.shape == _SHAPE and image.get_data_dtype() == np.uint8 and place:
            return np.asarray(image.dataobj)
    except Exception as error:  # nibabel raises what it comes across in a damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}); install nilearn again.") from error
    raise UserError(f"{path} does not lie in the expected 1 mm grid of bytes; install another nilearn.")


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
    index = position - _ORIGIN[_AXIS[plane]]
    if plane == "axial":
        return array[::-1, ::-1, index].T  # [Y, X]
    if plane == "coronal":
        return array[::-1, index, ::-1].T  # [Z, X]
    return array[index, ::-1, ::-1].T  # [Z, Y]: faces left


def _middle(plane: str) -> np.ndarray:
    """Returns the (row, column) of the brain's middle in the slices of `show`.

    The axes of those slices all run downwards in world mm.
    """
    index = [n - 1 - (c - o) for n, c, o in zip(_SHAPE, _CENTRE, _ORIGIN, strict=True)]
    rows, columns = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}[plane]
    return np.array([index[rows], index[columns]])


@functools.lru_cache(maxsize=8)
def _plane_map(plane: str, position: int, name: str) -> np.ndarray:
    # An image pixel is three slice pixels wide: averaging first keeps sampling from aliasing.
    return ndimage.uniform_filter(show(load_volume().maps[name], plane, position), 3)


@functools.lru_cache(maxsize=8)
def _plane_masks(plane: str, position: int) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the pixels of each structure, without specks, as int [n, 2] (row, column)."""
    labels = show(load_volume().labels, plane, position)
    masks, absent = {}, []
    for name in STRUCTURES:
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
    slab: Slab,
    position: int,
    name: str,
    jitter: Jitter,
    key: str = "",
    rng: np.random.Generator | None = None,
) -> Slice:
    """Draws the slice at `position` mm of map `name` under `jitter`; `rng` draws its noise."""
    plane, forward, middle = slab.plane, jitter.matrix(), _middle(slab.plane)
    back = np.linalg.inv(forward)
    # Centre of image pixel (r, c), in mm from the image's centre: (r + .5) PIXEL - FIELD / 2.
    corner = PIXEL / 2 - FIELD / 2 - np.array(jitter.shift)
    values = ndimage.affine_transform(
        _plane_map(plane, position, name), back * PIXEL, middle + back @ corner, (SIZE, SIZE), order=1
    )  # [SIZE, SIZE]
    # .85: the brightest white stays below 255
    values = 0.85 * jitter.gain * np.clip(values, 0, 1) ** jitter.gamma
    if jitter.noise:
        assert rng is not None
        values = values + rng.normal(0, jitter.noise, values.shape)
    image = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)

    masks, absent = _plane_masks(plane, position)
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
