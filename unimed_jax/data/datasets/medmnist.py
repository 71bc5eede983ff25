"""Reads MedMNIST+: pictures in classes (task cls), any of its two-dimensional sets in any size.

    <name>.npz or <name>_<size>.npz     {train,val,test}_{images,labels}; option name="dermamnist"

Pictures are read one at a time, so that a file of several GB costs no memory. ChestMNIST has
several labels a picture: its answer names them in the order of the classes, or says "no finding".
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options, one_of
from unimed_jax.errors import UserError
from unimed_jax.parsing import no_file, refuse_stand_in, zip_fault

_ORGANS = (
    "bladder", "left femur", "right femur", "heart", "left kidney", "right kidney", "liver",
    "left lung", "right lung",
    "pancreas", "spleen",
)  # fmt: skip
# As the package medmnist names them; "kidney-left" is written as it is spoken (Uni-Med).
CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
        "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    ),
    "chestmnist": (
        "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia",
        "pneumothorax",
        "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia",
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
        "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("0", "1", "2", "3", "4"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte",
        "neutrophil",
        "platelet",
    ),
    "tissuemnist": (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
        "Thick Ascending Limb",
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # fmt: skip
SIZES = (28, 64, 128, 224)
LARGEST = 1024  # pixels of a side, far beyond every published one
ROWS = 10_000_000  # pictures of a split at most, as far beyond

INFO = Info(
    name="medmnist",
    tasks=("cls",),
    licence="CC BY 4.0; DermaMNIST CC BY-NC 4.0",
    citation="Yang et al., MedMNIST v2, Scientific Data 2023",
    cluster_word="image",
    files=("*mnist*.npz",),
    other_counts={
        name: dict(zip(("train", "val", "test"), numbers, strict=True))
        for name, numbers in {
            "pathmnist": (89996, 10004, 7180),
            "chestmnist": (78468, 11219, 22433),
            "dermamnist": (7007, 1003, 2005),
            "octmnist": (97477, 10832, 1000),
            "pneumoniamnist": (4708, 524, 624),
            "retinamnist": (1080, 120, 400),
            "breastmnist": (546, 78, 156),
            "bloodmnist": (11959, 1712, 3421),
            "tissuemnist": (165466, 23640, 47280),
            "organamnist": (34561, 6491, 17778),
            "organcmnist": (12975, 2392, 8216),
            "organsmnist": (13932, 2452, 8827),
        }.items()
    },
)
OPTIONS = {
    "name": "",  # of the set: CLASSES
    "size": 224,  # pixels of a side: SIZES
    "question": "",  # what is asked; empty: the instruction says it all
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[np.ndarray, ...]]]:
    """Yields the pictures of a split in the order of the file."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "medmnist")
    name = one_of(chosen, "name", tuple(CLASSES), "medmnist")
    size = one_of(chosen, "size", SIZES, "medmnist")
    names = [f"{name}_{size}.npz", *([f"{name}.npz"] if size == SIZES[0] else [])]
    file = next((folder / found for found in names if (folder / found).exists()), folder / names[-1])
    if not file.exists():
        raise UserError(f"{file} does not exist; download it, or choose another size.")
    if reason := no_file(file):
        raise UserError(f"{file} {reason}; get it again.")
    try:
        with zipfile.ZipFile(file) as archive:
            labels = np.stack(list(_rows(archive, f"{split}_labels", file)))
            number = -1
            for number, pixels in enumerate(_rows(archive, f"{split}_images", file)):
                if number >= len(labels):
                    raise UserError(
                        f"{file}: {split} has {len(labels)} labels but more images; get it again."
                    )
                key = f"{name}/{split}/{number}"
                answer = _answer(labels[number], CLASSES[name], f"{file}, {split} {number}")
                facts = {"template": name, "class": answer}
                yield (
                    Example(key, "cls", str(chosen["question"]), answer, (key,), None, key, facts),
                    (pixels,),
                )
            if number + 1 < len(labels):
                raise UserError(
                    f"{file}: {split} has {len(labels)} labels but {number + 1} images; get it again."
                )
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails at any of its steps
        refuse_stand_in(file)
        raise UserError(f"{file} cannot be read ({zip_fault(file) or error}); get it again.") from error


def _rows(archive: zipfile.ZipFile, name: str, file: Path) -> Iterator[np.ndarray]:
    """Yields the rows of an array of whole numbers in the archive, one at a time."""
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(stream)
        whole = dtype.kind in "ui" and dtype.itemsize <= 8 and not fortran
        bounded = 1 <= len(shape) <= 4 and min(shape) >= 1 and shape[0] <= ROWS
        if not whole or not bounded or max(shape[1:], default=1) > LARGEST:
            raise UserError(
                f"{file}: {name} is an array {shape} of {dtype}, not of pictures or labels; get it "
                "again."
            )
        if name.endswith("images") and (
            dtype != np.uint8 or shape[3:] not in ((), (3,)) or len(shape) < 3
        ):
            raise UserError(
                f"{file}: {name} is an array {shape} of {dtype}, not of pictures in uint8; get it again."
            )
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        for number in range(shape[0]):
            data = stream.read(size)
            if len(data) < size:
                raise UserError(f"{file}: {name} ends after {number} of {shape[0]} rows; get it again.")
            yield np.frombuffer(data, dtype).reshape(shape[1:])


def _answer(label: np.ndarray, classes: tuple[str, ...], where: str) -> str:
    """Names the class of a picture, or all of its classes."""
    if label.size == 1:
        number = int(label.reshape(-1)[0])
        if not 0 <= number < len(classes):
            raise UserError(
                f"{where}: label {number} is none of the {len(classes)} classes; get the file again."
            )
        return classes[number]
    if label.size != len(classes):
        raise UserError(f"{where}: it has {label.size} labels, not {len(classes)}; get the file again.")
    named = [name for name, there in zip(classes, label.reshape(-1).tolist(), strict=True) if there]
    return ", ".join(named) or "no finding"
