"""The readers on the real files: published counts, splits and known traps.

Skipped where the data is not there.
"""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from unimed_jax.audit.questions import plain
from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.records import records
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


# ---- what readers and their users have to expect of the files --------------------------------------


def raw(root, *names):
    file = root.joinpath(*names)
    if not file.is_file():
        pytest.skip(f"needs {file}, which does not exist (docs/real_data.md)")
    return [record for _, record in records(file)]


def test_records_of_vqa_rad(real_data, cache):
    every = raw(real_data, "vqa_rad", "VQA_RAD Dataset Public.json")
    pictures = list((real_data / "vqa_rad" / "VQA_RAD Image Folder").iterdir())
    assert len(every) == 2248 and len(pictures) == 315
    assert len({record["image_name"] for record in every}) == 314
    phrases = Counter(record["phrase_type"] for record in every)
    assert phrases == {"freeform": 1206, "para": 591, "test_freeform": 308, "test_para": 143}
    assert [type(record["qid"]) for record in every].count(str) == 1
    assert sum(record["answer_type"] == "CLOSED " for record in every) == 2
    assert sum(type(record["answer"]) is int for record in every) == 5
    assert sum("\ufffd" in record["question"] + str(record["answer"]) for record in every) == 1
    data = opened(real_data, cache, "vqa_rad", "vqa_rad")
    closed = [e for e in data.examples("test") if e.meta["answer_type"] == "CLOSED"]
    assert sum(e.answer.lower() in ("yes", "no") for e in closed) == 251 and len(closed) == 272
    assert not any("\t" in e.question + e.answer for s in data.splits for e in data.examples(s))

    def same(split):
        return [(e.images, e.question, e.answer) for e in data.examples(split)]

    train, test = same("train"), same("test")
    assert len(train) - len(set(train)) == 3 and len(set(train) & set(test)) == 1
    assert len(set(train) - set(test)) == 1793  # rows of the hub's table


def test_records_of_mmq_and_of_the_re_split(real_data):
    official = raw(real_data, "vqa_rad", "VQA_RAD Dataset Public.json")
    tested = [record for record in official if record["phrase_type"].startswith("test_")]
    train, test = (raw(real_data, "vqa_rad_mmq", f"{split}set.json") for split in ("train", "test"))
    assert not {record["qid"] for record in train} & {record["qid"] for record in test}
    assert not any(record["phrase_type"].startswith("test") for record in train + test)
    frames = {(record["image_name"], plain(record["question_frame"])) for record in tested}
    asked = {(record["image_name"], plain(record["question"])) for record in tested}
    frame = [record for record in train if record["phrase_type"] == "frame"]
    assert len(frame) == 1267
    assert sum((record["image_name"], plain(record["question"])) in frames for record in frame) == 291
    assert sum((record["image_name"], plain(record["question"])) in asked for record in train) == 22
    again = {str(record["qid"]) for record in raw(real_data, "vqa_rad_resplit", "trainset.json")}
    assert sum(str(record["qid"]) in again for record in tested) == 376


def test_records_of_slake(real_data):
    every = {split: raw(real_data, "slake", f"{split}.json") for split in ("train", "validate", "test")}
    assert [len(some) for some in every.values()] == [9835, 2099, 2094]
    english = {split: [r for r in some if r["q_lang"] == "en"] for split, some in every.items()}
    assert [len(some) for some in english.values()] == [4919, 1053, 1061]
    assert [r["qid"] for some in every.values() for r in some if not r["answer"].strip()] == [1622]
    trained = {record["question"] for record in english["train"]}
    assert sum(record["question"] in trained for record in english["test"]) == 997
    closed = [record for record in english["test"] if record["answer_type"] == "CLOSED"]
    assert len(closed) == 416
    assert sum(record["answer"].lower() in ("yes", "no") for record in closed) == 355
    assert sum("," in record["answer"] for record in english["test"]) == 60
    images = {
        (split, language): {r["img_name"] for r in some if r["q_lang"] == language}
        for split, some in every.items()
        for language in ("en", "zh")
    }
    assert [len(images[split, "en"]) for split in every] == [450, 96, 96]
    for language in ("en", "zh"):
        assert not images["train", language] & (images["test", language] | images["validate", language])


def test_records_of_medpix2(real_data, cache):
    of_split = {
        split: raw(real_data, "medpix2", "splitted_dataset", f"descriptions_{split}.jsonl")
        for split in ("train", "dev", "test")
    }
    every = [record for some in of_split.values() for record in some]
    captions = [(record["U_id"], record["Description"]["Caption"]) for record in every]
    assert len(captions) - len(set(captions)) == 682
    waiting = [c.lower().startswith("replace this") for _, c in captions]
    assert sum(waiting) == 21 and sum(waiting[: len(of_split["train"])]) == 15
    assert sum(record["Description"]["Sex"] == "N/A" for record in every) == 67
    assert len({record["Description"]["Plane"] for record in every}) == 16
    places = Counter(record["Location Category"] for record in every)
    assert dict(places) == {
        "Head": 884,
        "Spine and Muscles": 355,
        "Thorax": 334,
        "Abdomen": 319,
        "Reproductive and Urinary System": 158,
    }
    halves = [
        record["image"]
        for part in (1, 2)
        for record in raw(real_data, "medpix2", "splitted_dataset", f"descriptions_train_{part}.jsonl")
    ]
    assert set(halves) <= {record["image"] for record in of_split["train"]}
    modes = Counter(
        Image.open(real_data / "medpix2" / "images" / f"{record['image']}.png").mode for record in every
    )
    assert modes["RGBA"] == 288


def test_records_of_pubmedqa(real_data, cache):
    file = real_data / "pubmedqa" / "ori_pqal.json"
    if not file.is_file():
        pytest.skip(f"needs {file}, which does not exist (docs/real_data.md)")
    articles = json.loads(file.read_bytes())
    assert len(articles) == 1000
    assert sum(article["YEAR"] is None for article in articles.values()) == 58
    words = sorted(len(" ".join(article["CONTEXTS"]).split()) for article in articles.values())
    assert words[len(words) // 2] == pytest.approx(200, abs=3) and words[-1] == 398
    official = json.loads((real_data / "pubmedqa" / "test_ground_truth.json").read_bytes())
    data = opened(real_data, cache, "pubmedqa", "pubmedqa")
    assert {e.cluster: e.answer for e in data.examples("test")} == official


def test_boxes_of_bccd(real_data, cache):
    data = opened(real_data, cache, "voc", "bccd", names=NAMES, per_image=0)
    left_out = (data.folder / "skipped.txt").read_text().splitlines()
    assert len({line.split(": ")[1] for line in left_out}) == 2  # images
    assert all(line.endswith("is empty") for line in left_out)
    boxes = sum(e.task == "identify" for s in data.splits for e in data.examples(s))
    assert boxes == 4888 - 2
    alone = [e for e in data.examples("test") if e.task == "refer" and e.meta["class"] == "Platelets"]
    assert len(alone) == 19
