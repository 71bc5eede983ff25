"""Writes twins of data sets in the layouts of the Hugging Face hub: parquet tables.

Each is made from the twin of the original layout, so that both hold the same questions.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.twins import questions

SHARDS = {"train": 2}  # files of a split; the others have one
ROWS = 4  # of a row group
Twin = Callable[[Path, int, np.random.Generator], None]


def write_table(file: Path, rows: Sequence[dict[str, Any]], pictures: Sequence[str] = ()) -> None:
    """Writes a parquet file as the hub does.

    pictures: columns of {"bytes", "path"}. The description of the columns is part of the file.
    """
    import pyarrow
    import pyarrow.parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        name: pyarrow.array([row[name] for row in rows], picture if name in pictures else None)
        for name in rows[0]
    }
    about = {"info": {"features": {name: {"_type": "Image"} for name in pictures}}}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file, row_group_size=ROWS)


def write_shards(
    folder: Path, split: str, rows: Sequence[dict[str, Any]], pictures: Sequence[str] = ()
) -> None:
    """Writes the table of a split as data/<split>-00000-of-0000n.parquet and so on."""
    count = min(SHARDS.get(split, 1), len(rows))
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        write_table(folder / f"data/{split}-{number:05d}-of-{count:05d}.parquet", part, pictures)


def _bytes(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": None}


def vqa_rad(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes VQA-RAD's tables: image, question, answer; the rows that stand twice are left out.

    Names of images, kinds of answers and the ids are lost.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        questions.vqa_rad(Path(place), records, rng)
        found = json.loads((Path(place) / "VQA_RAD Dataset Public.json").read_text())
        for split in ("train", "test"):
            rows, seen = [], set()
            for row in found:
                asked = row["image_name"], row["question"], str(row["answer"])
                if row["phrase_type"].startswith("test_") == (split == "test") and asked not in seen:
                    seen.add(asked)
                    picture = _bytes(Path(place) / "VQA_RAD Image Folder" / asked[0])
                    rows.append({"image": picture, "question": asked[1], "answer": asked[2]})
            write_shards(folder, split, rows, ["image"])
