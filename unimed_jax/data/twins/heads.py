"""Writes twins of heads: ellipsoids where a head has its brain and its structures."""

from pathlib import Path

import numpy as np

SHAPE, ORIGIN = (181, 217, 181), (-90, -125, -71)  # voxels of 1 mm; world mm of the first
# What AAL calls the left one -> world mm of the right one's centre and radii.
PAIRED = {
    37: ((27, -21, -12), (9, 18, 9)),
    41: ((25, -1, -17), (7, 7, 8)),
    71: ((13, 11, 10), (7, 17, 14)),
    73: ((26, 4, 2), (8, 17, 12)),
    77: ((12, -18, 8), (9, 13, 10)),
}
CEREBELLUM = ((0, -60, -30), (52, 30, 24))


def colin(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes ch2bet.nii.gz, ch2.nii.gz and aal.nii.gz; how many slices they have is fixed."""
    import nibabel

    x, y, z = np.ogrid[tuple(slice(o, o + n) for o, n in zip(ORIGIN, SHAPE, strict=True))]

    def ellipsoid(centre, radii) -> np.ndarray:
        grown = np.multiply(radii, rng.uniform(0.9, 1.1, 3))
        parts = zip((x, y, z), centre, grown, strict=True)
        return sum(((axis - c) / r) ** 2 for axis, c, r in parts)

    atlas = np.zeros(SHAPE, np.uint8)
    atlas[ellipsoid(*CEREBELLUM) <= 1] = 112
    for number, first in ((91, x < -8), (92, x > 8)):
        atlas[(atlas == 112) & first] = number
    for number, (centre, radii) in PAIRED.items():
        for side, sign in enumerate((-1, 1)):
            atlas[ellipsoid((sign * centre[0], *centre[1:]), radii) <= 1] = number + side
    depth = ellipsoid((0, -17, 8), (68, 86, 70))  # 1 at the surface of the brain
    brain = np.select([depth > 1, depth > 0.8, atlas > 0], [0, 86, 92], 113).astype(np.uint8)
    head = np.where((depth > 1.15) & (depth < 1.45), 200, brain).astype(np.uint8)
    place = np.eye(4)
    place[:3, 3] = ORIGIN
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("ch2bet", brain), ("ch2", head), ("aal", atlas)):
        image = nibabel.Nifti1Image(array, place)
        image.header.set_sform(place, 4)  # MNI 152
        image.header.set_qform(None, 0)
        image.to_filename(folder / f"{name}.nii.gz")
