"""Reads MedPix in RadFM's tables: radiological images with their captions (task caption).

MedPix_single_{train,test}.csv    columns name, context, type; rows of type caption are taken
images/<name>                     or where the option `images` says
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options, inside, records, word
from unimed_jax.errors import UserError

INFO = Info(
    name="medpix",
    tasks=("caption",),
    splits=("train", "test"),
    licence="contributors to MedPix keep their rights",
    citation="Wu et al., RadFM, 2023; images and captions of medpix.nlm.nih.gov",
    cluster_word="image",
    files=tuple(f"MedPix_single_{split}.csv" for split in ("train", "test")),
)
OPTIONS = {"images": "images"}  # folder of the images, from the set's folder on


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the captions of a split in the order of the table.

    A row whose image is missing is skipped by name.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "medpix")
    file, images = folder / f"MedPix_single_{split}.csv", folder / chosen["images"]
    if not file.exists():
        raise UserError(f"{file} does not exist; give the folder of RadFM's tables as path.")
    for number, (where, record) in enumerate(records(file)):
        if word(record, "type", where, required=True) == "caption":
            name = word(record, "name", where, required=True)
            caption = " ".join(word(record, "context", where).split())
            example = Example(
                f"{split}/{number}", "caption", "", caption, (name,), None, name, {"template": "caption"}
            )
            yield example, (inside(folder, images, name, where),)
