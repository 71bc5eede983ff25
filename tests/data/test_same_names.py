"""Pictures, labels, records and splits of one name stay separate, and changed labels are noticed."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from support.reading import everything, opened

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data import prepare
from unimed_jax.data.datasets import classes, open_sources
from unimed_jax.data.multiple_choice import options_of, right_letter
from unimed_jax.data.records import labelled_boxes
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60), grey, np.uint8)).save(path)


def later(path):
    """Sets the time of the last change to one that no clock could give now."""
    os.utime(path, (2e9, 2e9))


def test_pictures_of_one_name_beside_different_tables(tmp_path):
    for number, split in enumerate(("train", "test")):
        picture(tmp_path / f"set/{split}/images/1.png", 10 + 190 * number)
        table = f"question,A,B,answer,image\nIs it {split}?,yes,no,A,images/1.png\n"
        (tmp_path / f"set/{split}/data.csv").write_text(table)
    data = opened(tmp_path / "set", "choices")
    found = {split: data.image(example.images[0])[0, 0, 0] for split, example in everything(data)}
    assert found == {"train": 10, "test": 200}


def coco_of(folder, split, name, grey, where="{split}/{name}"):
    picture(folder / where.format(split=split, name=name), grey)
    content = {
        "images": [{"id": 1, "file_name": name, "width": 60, "height": 40}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 30, 20]}],
    }
    (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def test_splits_of_coco_that_use_the_same_file_names(tmp_path):
    coco_of(tmp_path / "set", "train", "0001.png", 20)
    coco_of(tmp_path / "set", "valid", "0001.png", 220)
    coco_of(tmp_path / "set", "test", "0002.png", 120)
    data = opened(tmp_path / "set", "coco")
    found = {(e.images[0], e.cluster): data.image(e.images[0])[0, 0, 0] for _, e in everything(data)}
    assert found == {
        ("train/0001.png",) * 2: 20,
        ("val/0001.png",) * 2: 220,
        ("0002.png",) * 2: 120,
    }


def test_made_splits_that_share_examples_are_refused(tmp_path):
    def splits(**rules):
        source = SourceConfig("support.squares", splits=rules, options={"images": 60})
        (data,) = open_sources(DataConfig((source,), cache=str(tmp_path)))
        return data

    for rules, sentence in (
        (
            {"train": "train[:80%] by cluster", "test": "train[80%:]"},
            "'train' (.*) and 'test' (.*) share",
        ),
        (
            {"val": "train[60%:]", "test": "train[80%:]"},
            "'val' (.*) and 'test' (.*) share [0-9]+ examples",
        ),
    ):
        with pytest.raises(UserError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
            splits(**rules)
    apart = splits(train="train[:60%]", val="train[60%:80%]", test="train[80%:]")
    ids = [example.id for _, example in everything(apart)]
    assert len(set(ids)) == len(ids)


def test_a_doubled_id_is_named_whatever_file_it_lies_in(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 300)
    rows = [{"question": f"What is {i}?", "answer": "a", "id": f"q{min(i, 8)}"} for i in range(10)]
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"task": "qa", "split": "train", **row}) for row in rows]
    (tmp_path / "set/train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="id '.*q8' stands twice"):
        opened(tmp_path / "set", "jsonl")


def test_an_index_counts_the_options_that_are_empty(tmp_path):
    options = options_of(["alpha", "", "gamma", "delta"], "w")
    assert list(options) == ["A", "C", "D"]
    assert [right_letter(options, i, "w") for i in (0, 2, 3)] == [("A", ""), ("C", ""), ("D", "")]
    assert right_letter(options, 1, "w") == ("", "its right option, B, is empty")
    assert right_letter(options_of(["", "alpha", "beta"], "w"), 2, "w", first=1) == ("B", "")
    with pytest.raises(UserError, match="answer 4 is none of 0 to 3"):
        right_letter(options, 4, "w")
    small = options_of({"a": "alpha", "b": "", "c": "gamma"}, "w")
    assert right_letter(small, 2, "w") == ("c", "")


def test_labels_that_are_a_letter_apart(tmp_path):
    file = tmp_path / "detection.json"
    pairs = (("ileum", "ilium"), ("lesion", "lesions"), ("Liver", "liver"))
    for pair in pairs:
        file.write_text(json.dumps([{label: [1, 2, 3, 4]} for label in pair]))
        assert [label for _, label, _ in labelled_boxes(file)] == list(pair)


def test_changed_labels_are_noticed(tmp_path):
    for name, grey in (("a/1", 10), ("a/2", 20), ("b/3", 30)):
        picture(tmp_path / f"classes/train/{name}.png", grey)
    before = opened(tmp_path / "classes", "classes")
    assert sorted(e.answer for _, e in everything(before)) == ["a", "a", "b"]
    os.rename(tmp_path / "classes/train/a/1.png", tmp_path / "classes/train/b/1.png")
    for name in "ab":
        later(tmp_path / "classes/train" / name)
    assert sorted(e.answer for _, e in everything(opened(tmp_path / "classes", "classes"))) == [*"abb"]
    # pictures that a table names lie in one folder, and are not listed one by one
    picture(tmp_path / "classes/val/4.png", 40)
    listed = prepare.fingerprint(classes.INFO, tmp_path / "classes")
    assert sorted(name for name, *_ in listed) == ["a", "b", "train", "val"]

    write_twin("slake", tmp_path / "slake", records=6)
    before = opened(tmp_path / "slake", "slake")
    file = sorted((tmp_path / "slake").glob("imgs/*/question.json"))[0]
    file.write_text(re.sub(r'"answer": "[^"]*"', '"answer": "mended"', file.read_text()))
    later(file)
    found = opened(tmp_path / "slake", "slake")
    assert "mended" in {e.answer for _, e in everything(found)} - {
        e.answer for _, e in everything(before)
    }
