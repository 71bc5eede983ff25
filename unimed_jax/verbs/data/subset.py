"""Chooses a seeded part of SA-Med2D-20M, writes it in boxes, and says what each class gets.

The part depends on the names of the files, the options and the seed alone, so that others rebuild it.
All slices of a case are in it under one name, by which a config splits them (docs/real_data.md).
"""

from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError
from unimed_jax.paths import check_output
from unimed_jax.verbs.options import parser

HELP = {
    "seed": "of the choice",
    "fraction": "of the cases, all slices of one or none",
    "per_modality": "images of a modality at most (0: all)",
    "per_class": "images of each class of a modality at most (0: all)",
    "modalities": "these only, with commas between: ct,mr",
    "classes": "these only, with commas between: liver,left kidney",
    "without": "sets that are left out, with commas between: BraTS2018,BraTS2019",
    "least_area": "pixels; smaller connected parts of a mask are left out",
}


def run(arguments: list[str]) -> None:
    """Writes the subset and prints its table."""
    from unimed_jax.data.datasets.samed import CHOICE
    from unimed_jax.data.datasets.samed.subset import TABLE, write_subset

    options = parser(__name__, __doc__)
    options.add_argument("--path", required=True, help="folder of the full release")
    options.add_argument("--out", required=True, help="the new folder")
    options.add_argument("--unions", action="store_true", help="take masks that unite other classes too")
    for key, meaning in HELP.items():
        kind: Any = type(CHOICE[key])
        if kind is list:
            options.add_argument(f"--{key}", default="", help=meaning)
        else:
            options.add_argument(f"--{key}", type=kind, default=CHOICE[key], help=meaning)
    known = options.parse_args(arguments)
    if not Path(known.path).exists():
        raise UserError(f"--path={known.path} does not exist; give the folder of SA-Med2D-20M.")
    check_output(known.out, "--out")
    chosen = {
        key: [word.strip() for word in value.split(",") if word.strip()]
        if value.__class__ is str
        else value
        for key in CHOICE
        for value in [getattr(known, key)]
    }
    rows, skipped = write_subset(Path(known.path), Path(known.out), chosen)
    for row in rows:
        print(
            f"{row.modality:12} {row.label:32} {row.cases:7} cases {row.images:8} images "
            f"{row.boxes:9} boxes"
        )
    print(f"wrote {known.out} ({TABLE} holds this table), {skipped} records left out (skipped.txt)")
