"""Writes twins of data sets in the layouts of the Hugging Face hub: parquet tables.

Each is made from the twin of the original layout, so that both hold the same questions.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.twins import medical, questions

SHARDS = {"train": 2}  # files of a split; the others have one
ROWS = 4  # of a row group
HUB = {"train": "train", "val": "validation", "test": "test"}  # how the hub names splits


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
    folder: Path,
    split: str,
    rows: Sequence[dict[str, Any]],
    pictures: Sequence[str] = (),
    summed: bool = False,
) -> None:
    """Writes the table of a split as data/<split>-00000-of-0000n.parquet and so on.

    summed: with a checksum at the end of each name, as older sets of the hub have it.
    """
    count = min(SHARDS.get(split, 1), len(rows))
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        name = f"{split}-{number:05d}-of-{count:05d}"
        name += f"-{hashlib.sha256(name.encode()).hexdigest()[:16]}" if summed else ""
        write_table(folder / f"data/{name}.parquet", part, pictures)


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


def path_vqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the tables of Path-VQA: image, question, answer."""
    for split, found in medical.path_vqa_rows(folder, records, rng).items():
        rows = [
            {"image": {"bytes": image, "path": None}, "question": question, "answer": answer}
            for image, question, answer in found
        ]
        write_shards(folder, HUB[split], rows, ["image"], summed=True)


def slake(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the English questions of SLAKE as tables; boxes, ids and kinds of answers are lost."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        medical.slake_flat(Path(place), records, rng)
        for split, name in (("train", "train"), ("val", "validate"), ("test", "test")):
            rows = [
                {
                    "image": _bytes(Path(place) / "imgs" / row["img_name"]),
                    "question": row["question"],
                    "answer": row["answer"],
                }
                for row in json.loads((Path(place) / f"{name}.json").read_text())
                if row["q_lang"] == "en"
            ]
            write_shards(folder, HUB[split], rows, ["image"])


def pubmedqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes pqa_labeled: one split, beside it the list of test questions and an unlabelled table."""
    articles = _articles(folder, records, rng)
    rows = [
        {
            "pubid": int(pmid),
            "question": article["QUESTION"],
            "context": {
                "contexts": article["CONTEXTS"],
                "labels": article["LABELS"],
                "meshes": article["MESHES"],
            },
            "long_answer": article["LONG_ANSWER"],
            "final_decision": article["final_decision"],
        }
        for pmid, article in articles.items()
    ]
    write_table(folder / "pqa_labeled/train-00000-of-00001.parquet", rows)
    unlabelled = [{key: row[key] for key in list(row)[:-1]} for row in rows]
    write_table(folder / "pqa_unlabeled/train-00000-of-00001.parquet", unlabelled)


def pubmedqa_options(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes openlifescienceai's tables: yes, no and maybe are options, keys hold blanks."""
    articles = _articles(folder, records, rng)
    test = json.loads((folder / "test_ground_truth.json").read_text())
    (folder / "test_ground_truth.json").unlink()
    letters = {"yes": "A", "no": "B", "maybe": "C"}
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    trained = [pmid for pmid in articles if pmid not in test]
    for pmid, article in articles.items():
        answer = article["final_decision"]
        data = {
            "Context": article["CONTEXTS"],
            "Correct Answer": answer,
            "Correct Option": letters[answer],
            "Long Answer": article["LONG_ANSWER"],
            "Options": {letter: text for text, letter in letters.items()},
            "Question": article["QUESTION"],
        }
        part = "test" if pmid in test else "validation" if pmid in trained[-2:] else "train"
        parts[part].append({"id": pmid, "data": data, "subject_name": None})
    for part, rows in parts.items():
        write_shards(folder, part, rows)


def _articles(folder: Path, records: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Writes PubMedQA's list of test questions and returns the articles of the original."""
    questions.pubmedqa(folder, records, rng)
    articles = json.loads((folder / "ori_pqal.json").read_text())
    (folder / "ori_pqal.json").unlink()
    return articles


def medqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the tables of MedQA with four options, which have no dev."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        questions.medqa_four(Path(place), records, rng)
        for split in ("train", "test"):
            file = Path(place) / f"questions/US/4_options/phrases_no_exclude_{split}.jsonl"
            write_shards(folder, split, [json.loads(line) for line in file.read_text().splitlines()])
