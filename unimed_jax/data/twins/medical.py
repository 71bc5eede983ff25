"""Writes twins of the sets of Uni-Med's recipe that hold pictures.

They are SLAKE, Path-VQA, MedMNIST and MedPix.
"""

import base64
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.twins.random import count, pick, picture, words, write_json

SIZE = (48, 40)  # of most pictures, width and height
ORGANS = ("Left Lung", "Right Lung", "Heart", "Liver", "Spleen")


def _boxes(rng: np.random.Generator) -> list[dict[str, list[int]]]:
    """Draws labelled boxes as [x, y, width, height]."""
    found = []
    for number in rng.permutation(len(ORGANS))[: int(rng.integers(1, 4))]:
        x, y = int(rng.integers(0, SIZE[0] - 16)), int(rng.integers(0, SIZE[1] - 16))
        found.append({ORGANS[number]: [x, y, int(rng.integers(4, 16)), int(rng.integers(4, 16))]})
    return found


# ---- SLAKE -----------------------------------------------------------------------------------------
def slake(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the original layout of SLAKE.

    There are lists of image folders, and questions in two languages in each folder.
    """
    for split, rows in _slake(folder, records, rng).items():
        names = list(dict.fromkeys(row["img_name"].removesuffix("/source.jpg") for row in rows))
        (folder / f"{'validate' if split == 'val' else split}.txt").write_text(
            "".join(f"{name}\n" for name in names)
        )
        for name in names:
            some = [row for row in rows if row["img_name"] == f"{name}/source.jpg"]
            write_json(folder / "imgs" / name / "question.json", some)


def slake_flat(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the questions of a split in one list, as mirrors do."""
    for split, rows in _slake(folder, records, rng).items():
        write_json(folder / f"{'validate' if split == 'val' else split}.json", rows)


def _slake(folder: Path, records: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Writes the images and their boxes; returns the questions of each split."""
    found: dict[str, list[dict[str, Any]]] = {}
    image = qid = 0
    for split in ("train", "val", "test"):
        found[split] = []
        for _ in range(count(split, records)):
            image += 1
            picture(folder / f"imgs/xmlab{image}/source.jpg", rng, SIZE)
            write_json(folder / f"imgs/xmlab{image}/detection.json", _boxes(rng))
            about = {
                "img_id": image,
                "img_name": f"xmlab{image}/source.jpg",
                "location": pick(rng, ("Lung", "Abdomen")),
            }
            about |= {
                "modality": pick(rng, ("MRI", "CT", "X-Ray")),
                "base_type": "vqa",
                "triple": ["vhead", "_", "_"],
            }
            for language in ("en", "en", "zh"):
                closed = bool(rng.integers(2))
                row = {
                    "question": f"{words(rng)}?",
                    "answer": pick(rng, ("Yes", "No")) if closed else words(rng, 1, 3),
                }
                if language == "zh":
                    row = {
                        "question": "这张图片的成像方式是什么?",
                        "answer": pick(rng, ("磁共振", "左肺, 右肺")),
                    }
                row |= {
                    "q_lang": language,
                    "answer_type": "CLOSED" if closed and language == "en" else "OPEN",
                }
                found[split].append(about | row | {"content_type": "Organ", "qid": qid})
                qid += 1
    return found


# ---- Path-VQA --------------------------------------------------------------------------------------
def path_vqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the original layout of Path-VQA, a pickle of questions with scored answers a split."""
    (folder / "qas").mkdir()
    for split in ("train", "val", "test"):
        rows = []
        for i in range(count(split, records)):
            name = f"{split}_{i // 2:04d}"
            closed = bool(rng.integers(2))
            answer = pick(rng, ("yes", "no")) if closed else words(rng, 1, 4)
            rows.append(
                {
                    "img_id": name,
                    "sent": f"what is {words(rng)}?",
                    "label": {answer: 1},
                    "question_id": 7 * i,
                }
            )
            rows[-1] |= {"answer_type": "yes/no" if closed else "other", "question_type": "what"}
            picture(folder / "images" / split / f"{name}.jpg", rng, SIZE)
        (folder / f"qas/{split}_vqa.pkl").write_bytes(pickle.dumps(rows, protocol=pick(rng, (2, 3, 4))))


def path_vqa_tsv(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the questions of `path_vqa` as a table for each split, with pictures in base64.

    A picture stands in one of its rows; the others have the index of that row.
    """
    for split, rows in path_vqa_rows(folder, records, rng).items():
        lines = ["index\timage\tquestion\tanswer"]
        last = {image: i for i, (image, _, _) in enumerate(rows)}
        for i, (image, question, answer) in enumerate(rows):
            cell = base64.b64encode(image).decode() if last[image] == i else last[image]
            lines.append(f"{i}\t{cell}\t{question}\t{answer}")
        (folder / f"PathVQA_{split.upper()}.tsv").write_text("\n".join(lines) + "\n")


def path_vqa_rows(
    folder: Path, records: int, rng: np.random.Generator
) -> dict[str, list[tuple[bytes, str, str]]]:
    """Returns picture, question and answer of each question of `path_vqa`, by split."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path_vqa(Path(place), records, rng)
        found = {}
        for split in ("train", "val", "test"):
            rows = pickle.loads((Path(place) / f"qas/{split}_vqa.pkl").read_bytes())  # written just now
            images = Path(place) / "images" / split
            found[split] = [
                ((images / f"{row['img_id']}.jpg").read_bytes(), row["sent"], next(iter(row["label"])))
                for row in rows
            ]
    return found


# ---- MedMNIST --------------------------------------------------------------------------------------
def medmnist(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes four kinds of MedMNIST files.

    One set is in colour at 28 pixels and at 224, three are in grey, and one has several labels.
    """
    for size, ending in ((28, ""), (224, "_224")):
        _mnist(folder / f"dermamnist{ending}.npz", records, rng, size, 7, colour=True)
    for name, classes in (("organsmnist", 11), ("organcmnist", 11), ("pneumoniamnist", 2)):
        _mnist(folder / f"{name}_224.npz", records, rng, 224, classes, colour=False)
    _mnist(folder / "chestmnist_224.npz", records, rng, 224, 14, False, several=True)


def _mnist(
    file: Path,
    records: int,
    rng: np.random.Generator,
    size: int,
    classes: int,
    colour: bool,
    several: bool = False,
) -> None:
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        n = count(split, records)
        shape = (n, size, size, 3) if colour else (n, size, size)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        labels = rng.integers(0, 2, (n, classes)) if several else rng.integers(0, classes, (n, 1))
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    np.savez(file, **arrays)


# ---- MedPix ----------------------------------------------------------------------------------------
def medpix(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes RadFM's tables with the quirks of the real ones.

    Captions have commas and line breaks, some rows are of other types, and one lacks its image. A case
    names several images with commas, and some questions are about no image.
    """
    for split in ("train", "test"):
        lines = ["name,context,type"]
        for i in range(count(split, records)):
            name = f"{split}_{i:05d}.jpg"
            caption = json.dumps(f"{words(rng)}, {words(rng)}.")
            lines += [f"{name},{caption}", f'{name},"{words(rng)}\n{words(rng)}"'][i % 2 : i % 2 + 1]
            lines[-1] += ",caption"
            lines.append(f"{name},CT,modality")
            if not (split == "train" and i == 1):
                picture(folder / "images" / name, rng, SIZE)
        (folder / f"MedPix_single_{split}.csv").write_text("\n".join(lines) + "\n")
    for split in ("train", "test"):
        cases, asked = ["name,context,type,history"], ["name,question,answer,explanation"]
        for i in range(count(split, records)):
            names = [f"{split}_case{i}_{view}.jpg" for view in range(1 + i % 3)]
            for name in names:
                picture(folder / "images" / name, rng, SIZE)
            kind = ("findings", "diagnosis", "txFollowup", "Keywords")[i % 4]
            history = pick(rng, ("", f"A patient of {rng.integers(1, 90)} years, {words(rng)}."))
            cases.append(f'"{",".join(names)}","• {words(rng)}\n• {words(rng)}",{kind},"{history}"')
            answer = pick(rng, (words(rng), "3"))
            asked.append(f'{names[0] if i % 2 else ""},"Why, {words(rng)}?",{answer},{words(rng)}')
        for table, lines in (("multi", cases), ("questions", asked)):
            file = folder / f"MedPix_{table}_{split}.csv"
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
