"""Writes twins of data sets of questions, captions and classes."""

from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.twins.random import count, pick, picture, words, write_json, write_lines


# ---- VQA-RAD ---------------------------------------------------------------------------------------
def vqa_rad(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the original layout of VQA-RAD.

    It is one list with the split in phrase_type and one qid for each text; some answers are
    numbers.
    """
    rows = [_rad_row(i, rng, ("freeform", "para")) for i in range(count("train", records))]
    rows += [
        _rad_row(len(rows) + i, rng, ("test_freeform", "test_para"))
        for i in range(count("test", records))
    ]
    rows[0]["qid"] = "0"
    for row in rows:
        row |= {
            "qid_linked_id": f"{row['qid']:0>8}-0000-4000-8000-000000000000",
            "evaluation": "not evaluated",
        }
        row |= {"question_rephrase": "NULL", "question_relation": "NULL", "question_frame": "NULL"}
    write_json(folder / "VQA_RAD Dataset Public.json", rows, indent=3)
    for name in sorted({row["image_name"] for row in rows}):
        picture(folder / "VQA_RAD Image Folder" / name, rng)


def vqa_rad_mmq(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the layout of MMQ: two files, phrase_type without test_."""
    names = set()
    for split, kinds in (("train", ("freeform", "para", "frame")), ("test", ("freeform", "para"))):
        rows = [_rad_row(i, rng, kinds) for i in range(count(split, records))]
        names |= {row["image_name"] for row in rows}
        write_json(folder / f"{split}set.json", rows, indent=2)
    for name in sorted(names):
        picture(folder / "images" / name, rng)


def _rad_row(number: int, rng: np.random.Generator, kinds: tuple[str, ...]) -> dict[str, Any]:
    closed = bool(rng.integers(2))
    return {
        "qid": number,
        "image_name": f"synpic{10000 + int(rng.integers(8))}.jpg",
        "image_organ": pick(rng, ("HEAD", "CHEST", "ABD")),
        # Blanks and line breaks occur in the real file, too.
        "question": f"{words(rng).capitalize()}?" + pick(rng, ("", " ", "\t")),
        "answer": pick(rng, ("Yes", "No", "no ")) if closed else pick(rng, (words(rng, 1, 4), 3)),
        "answer_type": pick(rng, ("CLOSED", "CLOSED ")) if closed else "OPEN",
        "question_type": pick(rng, ("PRES", "POS", "PRES, ABN", "PRSE")),
        "phrase_type": pick(rng, kinds),
    }


# ---- MedPix 2.0 ------------------------------------------------------------------------------------
def medpix2(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the descriptions of MedPix 2.0 by split.

    A case has several images; there are placeholders, planes typed in many ways, and RGBA pictures.
    """
    every = []
    for part, split in enumerate(("train", "val", "test")):
        rows = []
        for i in range(count(split, records)):
            case = f"MPX{1000 * (part + 1) + i // 2}"
            modality = pick(rng, ("CT", "MR"))
            about = {
                "ACR Codes": "8.-1",
                "Age": str(rng.integers(1, 90)),
                "Caption": words(rng, 3, 20) + pick(rng, (".", ".\n", "")),
                "Figure Part": None,
                "Modality": pick(rng, (f"{modality} - noncontrast", f" {modality} - Montage of Images")),
                "Plane": pick(rng, ("Axial", "Transverse", "Coronal", "Sagittal", "Photograph", None)),
                "Sex": pick(rng, ("male", "female", "N/A")),
            }
            if i % 7 == 3:
                about["Caption"] = "Replace this - DESCRIPTION OF THE IMAGE OR FINDINGS."
            region = pick(
                rng,
                ("Head", "Thorax", "Abdomen", "Spine and Muscles", "Reproductive and Urinary System"),
            )
            name = f"{case}_synpic{20000 + 100 * part + i}"
            rows.append({"Type": modality, "U_id": case, "image": name, "Description": about})
            rows[-1] |= {"Location": "Chest, Pulmonary", "Location Category": region}
            picture(folder / "images" / f"{name}.png", rng, grey=bool(i % 2))
        every += rows
        write_lines(
            folder / f"splitted_dataset/descriptions_{'dev' if split == 'val' else split}.jsonl", rows
        )
    write_json(folder / "Descriptions.json", every, indent=4)


# ---- PubMedQA --------------------------------------------------------------------------------------
def pubmedqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes ori_pqal.json and the answers of its test half."""
    articles = {}
    for i in range(2 * records):
        articles[str(10_000_000 + 7 * i)] = {
            "QUESTION": f"Does {words(rng)}?",
            "CONTEXTS": [words(rng, 10, 30) + "." for _ in range(3)],
            "LABELS": ["BACKGROUND", "METHODS", "RESULTS"],
            "MESHES": ["Humans"],
            "YEAR": pick(rng, ("2011", None)),
            "reasoning_required_pred": "yes",
            "reasoning_free_pred": "yes",
            "final_decision": pick(rng, ("yes", "no", "maybe")),
            "LONG_ANSWER": words(rng, 10, 30) + ".",
        }
    test = {pmid: articles[pmid]["final_decision"] for pmid in list(articles)[1::2]}
    write_json(folder / "ori_pqal.json", articles, indent=4)
    write_json(folder / "test_ground_truth.json", test, indent=4)


# ---- MedQA -----------------------------------------------------------------------------------------
def medqa(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the questions with five options."""
    for split in ("train", "val", "test"):
        rows = [_examined(rng, "ABCDE") for _ in range(count(split, records))]
        write_lines(folder / f"questions/US/{'dev' if split == 'val' else split}.jsonl", rows)


def medqa_four(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the files of four options, next to those of five, which have the same questions."""
    medqa(folder, records, rng)
    for split in ("train", "val", "test"):
        name = "dev" if split == "val" else split
        rows = [_examined(rng, "ABCD") for _ in range(count(split, records))]
        write_lines(folder / f"questions/US/4_options/phrases_no_exclude_{name}.jsonl", rows)


def medqa_mainland(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the Chinese questions with five options, and with four."""
    for letters, place in (("ABCDE", "Mainland"), ("ABCD", "Mainland/4_options")):
        _chinese(folder / "questions" / place, records, rng, letters)


def medqa_taiwan(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the questions of Taiwan, which have four options."""
    _chinese(folder / "questions/Taiwan", records, rng, "ABCD")


def _chinese(folder: Path, records: int, rng: np.random.Generator, letters: str) -> None:
    for split in ("train", "val", "test"):
        rows = [
            _examined(rng, letters) | {"question": f"患者 {words(rng)}?", "meta_info": "卫生法规"}
            for _ in range(count(split, records))
        ]
        write_lines(folder / f"{'dev' if split == 'val' else split}.jsonl", rows)


def _examined(rng: np.random.Generator, letters: str) -> dict[str, Any]:
    options = {letter: f"{words(rng)} {letter.lower()}" for letter in letters}
    right = pick(rng, letters)
    found = {
        "question": f"A patient has {words(rng)}. What is next?",
        "answer": options[right],
        "options": options,
    }
    return found | {"meta_info": "step1", "answer_idx": right}


# ---- LLaVA-Med and Med-MoE -------------------------------------------------------------------------
def llava(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes a list of conversations for each split.

    Some have several turns, and one has an image that no longer exists.
    """
    for split, rows in _conversations(folder, records, rng).items():
        write_json(folder / f"{split}.json", rows)


def llava_lines(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes the conversations of `llava` as one JSON object on each line."""
    for split, rows in _conversations(folder, records, rng).items():
        write_lines(folder / f"{split}.jsonl", rows)


def llava_pairs(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes images with one caption each, as the files for alignment have them.

    All of it is for training.
    """
    rows: list[dict[str, Any]] = []
    for i in range(records):
        turns = [
            {"from": "human", "value": "<image>\nDescribe the image."},
            {"from": "gpt", "value": words(rng)},
        ]
        rows.append(
            {"id": str(i), "image": f"{i}.jpg", "domain": {"ct_scan": i % 2 == 0, "mri": i % 2 == 1}}
        )
        rows[-1]["conversatons"] = turns  # as LLaVA-Med spells it
        picture(folder / "images" / f"{i}.jpg", rng)
    write_json(folder / "train.json", rows)


def _conversations(
    folder: Path, records: int, rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for split in ("train", "val", "test"):
        rows: list[dict[str, Any]] = []
        for i in range(count(split, records)):
            turns = [{"from": "human", "value": f"<image>\n{words(rng).capitalize()}?"}]
            turns.append({"from": "gpt", "value": words(rng)})
            if i % 3 == 1:
                turns += [
                    {"from": "human", "value": f"And {words(rng)}?"},
                    {"from": "gpt", "value": words(rng)},
                ]
            image = f"{split}{i}.jpg"
            key = "conversatons" if i % 5 == 4 else "conversations"
            rows.append(
                {"id": f"{split}{i}", "image": image, key: turns, "modality": pick(rng, ("CT", "MR"))}
            )
            if i % 2:
                rows[-1]["answer_type"] = "OPEN"
            if not (split == "train" and i == 2):
                picture(folder / "images" / image, rng)
        asked = [
            {"from": "human", "value": f"{words(rng).capitalize()}?"},
            {"from": "gpt", "value": words(rng)},
        ]
        rows.append({"id": f"{split}-text", "conversations": asked})
        found[split] = rows
    return found


# ---- classes ---------------------------------------------------------------------------------------
def classes(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes one folder a class."""
    for split in ("train", "val", "test"):
        for i in range(count(split, records)):
            picture(folder / split / pick(rng, ("clear", "with fluid")) / f"{i:03d}.png", rng)


def classes_csv(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes a table for each split, with the patient next to path and label.

    One label is in quotation marks, and lines end in CRLF.
    """
    for split in ("train", "val", "test"):
        lines = ["path,label,cluster"]
        for i in range(count(split, records)):
            label = pick(rng, ("clear", '"fluid, left"'))
            lines.append(f"images/{split}{i}.png,{label},p{i // 2}")
            picture(folder / "images" / f"{split}{i}.png", rng)
        (folder / f"{split}.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode("utf-8-sig"))
