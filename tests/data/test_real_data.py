"""The readers on the real files: published counts, splits and known traps.

Skipped where the data is not there.
"""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.twins.hub import write_shards, write_table

NAMES = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}


def opened(root, cache, name, folder, **options):
    if not (root / folder).is_dir():
        pytest.skip(f"needs {root / folder}, which does not exist (docs/real_data.md)")
    source = SourceConfig(name, path=folder, options=options)
    (data,) = open_sources(DataConfig((source,), root=str(root), cache=cache))
    return data


def tasks(data, split):
    return Counter((e.task, e.meta["template"]) for e in data.examples(split))


def test_vqa_rad(real_data, cache):
    data = opened(real_data, cache, "vqa_rad", "vqa_rad")
    assert tasks(data, "train") == {("vqa", "closed"): 1027, ("vqa", "open"): 770} and data.skipped == 0
    assert tasks(data, "test") == {("vqa", "closed"): 272, ("vqa", "open"): 179}
    images = {split: {e.images for e in data.examples(split)} for split in data.splits}
    assert len(images["train"] | images["test"]) == 314
    # The published split is by question.
    assert sum(e.images in images["train"] for e in data.examples("test")) == 446


def test_vqa_rad_in_the_layout_of_mmq(real_data, cache):
    data = opened(real_data, cache, "vqa_rad", "vqa_rad_mmq", images="../vqa_rad/VQA_RAD Image Folder")
    assert [len(data.examples(split)) for split in ("train", "test")] == [3064, 451]
    official = opened(real_data, cache, "vqa_rad", "vqa_rad")

    def asked(some):
        return Counter((e.images, e.question, e.answer) for e in some.examples("test"))

    assert asked(data) == asked(official)


def test_vqa_rad_as_the_hub_has_it(real_data, cache, tmp_path):
    """A table made of the original, without its 3 doubled rows and the one that test has, too."""
    original = opened(real_data, cache, "vqa_rad", "vqa_rad")
    pictures = {
        key: (real_data / "vqa_rad/VQA_RAD Image Folder" / key).read_bytes()
        for split in original.splits
        for e in original.examples(split)
        for key in e.images
    }
    seen = {(e.images, e.question, e.answer) for e in original.examples("test")}
    rows = {"test": list(original.examples("test")), "train": []}
    for e in original.examples("train"):
        if (e.images, e.question, e.answer) not in seen:
            seen.add((e.images, e.question, e.answer))
            rows["train"].append(e)
    for split, examples in rows.items():
        cells = [
            {
                "image": {"bytes": pictures[e.images[0]], "path": None},
                "question": e.question,
                "answer": e.answer,
            }
            for e in examples
        ]
        write_shards(tmp_path / "hub", split, cells, ["image"])
    data = opened(tmp_path, tmp_path / "cache", "vqa_rad", "hub")
    assert [len(data.examples(split)) for split in ("train", "test")] == [1793, 451]
    for split, examples in rows.items():
        assert [(e.question, e.answer) for e in data.examples(split)] == [
            (e.question, e.answer) for e in examples
        ]
    assert tasks(data, "test")["vqa", "closed"] == 251  # of 272: by yes and no alone
    assert len({e.images for split in data.splits for e in data.examples(split)}) == 314


def test_medpix2(real_data, cache):
    data = opened(real_data, cache, "medpix2", "medpix2")
    of_split = {split: {e.images for e in data.examples(split)} for split in data.splits}
    assert {split: len(images) for split, images in of_split.items()} == {
        "train": 1653,
        "val": 197,
        "test": 200,
    }
    cases = {split: {e.cluster for e in data.examples(split)} for split in data.splits}
    assert {split: len(some) for split, some in cases.items()} == {"train": 535, "val": 67, "test": 69}
    assert not cases["train"] & cases["test"] and not cases["train"] & cases["val"]


def test_images_of_vqa_rad_are_found_in_medpix2(real_data, cache):
    whole = opened(real_data, cache, "medpix2", "medpix2")
    data = opened(real_data, cache, "medpix2", "medpix2", without="../vqa_rad/VQA_RAD Image Folder")
    lost = {
        split: len({e.images for e in whole.examples(split)} - {e.images for e in data.examples(split)})
        for split in data.splits
    }
    assert lost == {"train": 17, "val": 1, "test": 1}
    rad = opened(real_data, cache, "vqa_rad", "vqa_rad")
    tested = {Path(key).stem for e in rad.examples("test") for key in e.images}
    trained = {key.rpartition("_")[2] for e in whole.examples("train") for key in e.images}
    assert len(tested & trained) == 9


def test_pubmedqa(real_data, cache):
    data = opened(real_data, cache, "pubmedqa", "pubmedqa")
    assert Counter(e.answer for e in data.examples("test")) == {"yes": 276, "no": 169, "maybe": 55}
    assert Counter(e.answer for s in data.splits for e in data.examples(s)) == {
        "yes": 552,
        "no": 338,
        "maybe": 110,
    }


def test_pubmedqa_as_the_hub_has_it(real_data, cache, tmp_path):
    """A table made of the original gives its examples, in its order."""
    original = opened(real_data, cache, "pubmedqa", "pubmedqa", context="contexts")
    (tmp_path / "hub").mkdir()
    ids = real_data / "pubmedqa/test_ground_truth.json"
    rows = [
        {
            "pubid": int(pmid),
            "question": found["QUESTION"],
            "context": {"contexts": found["CONTEXTS"], "labels": found["LABELS"]},
            "long_answer": found["LONG_ANSWER"],
            "final_decision": found["final_decision"],
        }
        for pmid, found in json.loads((real_data / "pubmedqa/ori_pqal.json").read_text()).items()
    ]
    write_table(tmp_path / "hub/pqa_labeled/train-00000-of-00001.parquet", rows)
    data = opened(tmp_path, tmp_path / "c", "pubmedqa", "hub", context="contexts", test_ids=str(ids))
    assert data.checksum == original.checksum and len(data.examples("test")) == 500


def test_slake_as_the_hub_has_it(real_data, cache, tmp_path):
    """A table made of the English questions, with a picture of one colour for each image."""
    if not (real_data / "slake").is_dir():
        pytest.skip(f"needs {real_data / 'slake'}, which does not exist (docs/real_data.md)")
    closed = {}
    for split, name in (("train", "train"), ("validation", "validate"), ("test", "test")):
        found = json.loads((real_data / f"slake/{name}.json").read_text())
        found = [row for row in found if row["q_lang"] == "en"]
        rows = []
        for row in found:
            picture = io.BytesIO()
            Image.new("RGB", (1, 1), (row["img_id"] // 256, row["img_id"] % 256, 0)).save(picture, "PNG")
            rows.append(
                {
                    "image": {"bytes": picture.getvalue(), "path": None},
                    "question": row["question"],
                    "answer": row["answer"],
                }
            )
        write_shards(tmp_path / "hub", split, rows, ["image"])
        closed[split] = sum(row["answer_type"].strip() == "CLOSED" for row in found)
    data = opened(tmp_path, tmp_path / "cache", "slake", "hub")
    # train 1622 has no answer
    assert [len(data.examples(s)) for s in data.splits] == [4918, 1053, 1061] and data.skipped == 1
    assert closed["test"] == 416 and tasks(data, "test")["vqa", "closed"] == 355
    images = [{e.images for e in data.examples(split)} for split in data.splits]
    assert [len(some) for some in images] == [450, 96, 96] and not images[0] & images[2]


def test_bccd(real_data, cache):
    data = opened(real_data, cache, "voc", "bccd", names=NAMES, per_image=0)
    assert {s: len({e.images for e in data.examples(s)}) for s in data.splits} == {
        "train": 205,
        "val": 87,
        "test": 72,
    }
    boxes = Counter(
        e.meta["class"] for s in data.splits for e in data.examples(s) if e.task == "identify"
    )
    # two boxes are empty
    assert boxes == {"RBC": 4155 - 2, "WBC": 372, "Platelets": 361} and data.skipped == 2
    assert sum(e.task == "refer" for e in data.examples("test")) == 84
