"""Writes twins of data sets: synthetic data in the exact layout of a real set.

With them, configs can be tried without access to the real data.

`TWINS` names, for each reader, its layouts. A twin has the keys, file names and quirks of the real
files (numbers as text, trailing blanks, placeholders, empty boxes), random words and random pixels;
nothing in it comes from a patient.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from unimed_jax.data.twins import (
    boxes,
    choices,
    heads,
    hub,
    medical,
    prepared,
    questions,
    reports,
    samed,
    series,
)
from unimed_jax.errors import UserError, nearest
from unimed_jax.files import new_folder

# (folder, number of records of the largest split, random numbers)
Writer = Callable[[Path, int, np.random.Generator], None]

# reader -> layout -> writer; the first layout is the one that is written by default
TWINS: Mapping[str, Mapping[str, Writer]] = {
    "vqa_rad": {
        "original": questions.vqa_rad,
        "mmq": questions.vqa_rad_mmq,
        "parquet": hub.vqa_rad,
    },
    "medpix2": {"original": questions.medpix2},
    "pubmedqa": {
        "original": questions.pubmedqa,
        "parquet": hub.pubmedqa,
        "options": hub.pubmedqa_options,
    },
    "medqa": {
        "five": questions.medqa,
        "four": questions.medqa_four,
        "mainland": questions.medqa_mainland,
        "taiwan": questions.medqa_taiwan,
        "parquet": hub.medqa,
    },
    "slake": {"original": medical.slake, "flat": medical.slake_flat, "parquet": hub.slake},
    "path_vqa": {
        "original": medical.path_vqa,
        "tsv": medical.path_vqa_tsv,
        "parquet": hub.path_vqa,
    },
    "samed": {"regions": samed.regions, "release": samed.release},
    "medmnist": {"original": medical.medmnist},
    "mimic_cxr": {"r2gen": reports.mimic_cxr, "official": reports.mimic_cxr_official},
    "iu_xray": {"r2gen": reports.iu_xray},
    "medpix": {"radfm": medical.medpix},
    "llava": {"json": questions.llava, "jsonl": questions.llava_lines, "pairs": questions.llava_pairs},
    "choices": {
        "pmc_vqa": choices.pmc_vqa,
        "medxpertqa": choices.medxpertqa,
        "omnimedvqa": choices.omnimedvqa,
        "mmmu": choices.mmmu,
        "medmcqa": choices.medmcqa,
        "tsv": choices.tsv,
    },
    "voc": {"original": boxes.voc},
    "coco": {"instances": boxes.coco, "roboflow": boxes.coco_roboflow},
    "classes": {"folders": questions.classes, "csv": questions.classes_csv},
    "tfds": {"array_record": prepared.tfds},
    "colin": {"mricron": heads.colin},
    "series": {"nested": series.nested, "flat": series.flat},
    "jsonl": {"folder": boxes.jsonl},
}


def write_twin(name: str, out: str | Path, records: int = 24, layout: str = "", seed: int = 0) -> None:
    """Writes a twin of the data set that reader `name` reads into the new folder `out`.

    records: of the training split, about; the others have a third. Raises UserError for an unknown
    name or layout, and if `out` exists.
    """
    if name not in TWINS:
        raise UserError(
            f"there is no twin of {name!r}{nearest(name, TWINS)} Choose from {', '.join(TWINS)}."
        )
    layouts = TWINS[name]
    layout = layout or next(iter(layouts))
    if layout not in layouts:
        raise UserError(
            f"{name} has no layout {layout!r}{nearest(layout, layouts)} Choose from "
            f"{', '.join(layouts)}."
        )
    with new_folder(out) as folder:
        layouts[layout](folder, records, np.random.default_rng(seed))
