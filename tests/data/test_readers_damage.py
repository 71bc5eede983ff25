"""Every reader on deliberate damage: one sentence with file and record, or a counted line."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from support.reading import left_out, opened

from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_line(path, change, line=0):
    lines = path.read_text().splitlines()
    record = json.loads(lines[line])
    change(record)
    lines[line] = json.dumps(record)
    path.write_text("\n".join(lines))


RAD, MEDPIX = "VQA_RAD Dataset Public.json", "splitted_dataset/descriptions_train.jsonl"
DAMAGE = {
    "an answer that is another option": (
        "medqa",
        "questions/US/dev.jsonl",
        lambda p: change_line(p, lambda c: c.update(answer="none of these")),
        "line 1: answer 'none of these' is not option",
    ),
    "two images of one id": (
        "coco",
        "annotations/instances_train2017.json",
        lambda p: change_json(p, lambda c: c["images"].append(c["images"][0])),
        "the id 5 stands twice among 'images'",
    ),
    "a list for a category": (
        "coco",
        "annotations/instances_train2017.json",
        lambda p: change_json(p, lambda c: c["annotations"][1].update(category_id=[1])),
        "annotation 2: its category_id",
    ),
    "a name that leaves the folder": (
        "voc",
        "ImageSets/Main/train.txt",
        lambda p: p.write_text("../../../x"),
        "lies outside",
    ),
    "a list that is cut short": (
        "vqa_rad",
        RAD,
        lambda p: p.write_text(p.read_text()[:-50]),
        r"Public.json.* is not JSON",
    ),
    "an object for a list": ("vqa_rad", RAD, lambda p: p.write_text("3"), "is not a list of records"),
    "a misspelt key": (
        "vqa_rad",
        RAD,
        lambda p: change_json(p, lambda c: c[0].update(questoin=c[0].pop("question"))),
        r"record 0: 'question' is missing; did you mean 'questoin'\?",
    ),
    "a question that is a list": (
        "vqa_rad",
        RAD,
        lambda p: change_json(p, lambda c: c[0].update(question=["a"])),
        r"record 0: 'question' is \['a'\]",
    ),
    "a path out of the folder": (
        "vqa_rad",
        RAD,
        lambda p: change_json(p, lambda c: c[0].update(image_name="../../x.jpg")),
        "lies outside",
    ),
    "a doubled id": (
        "vqa_rad",
        RAD,
        lambda p: change_json(p, lambda c: c.append(c[-1])),
        "stands twice",
    ),
    "no such file": (
        "vqa_rad",
        RAD,
        lambda p: p.unlink(),
        "holds neither 'VQA_RAD Dataset Public.json' nor",
    ),
    "a pointer of Git-LFS": (
        "medpix2",
        MEDPIX,
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a pointer of Git-LFS",
    ),
    "a web page": (
        "medpix2",
        MEDPIX,
        lambda p: p.write_text("<!DOCTYPE html><html></html>"),
        "is a web page",
    ),
    "a text for an object": (
        "medpix2",
        MEDPIX,
        lambda p: change_line(p, lambda c: c.update(Description="x")),
        "line 1: 'Description' is 'x'",
    ),
    "no test list": (
        "pubmedqa",
        "test_ground_truth.json",
        lambda p: p.unlink(),
        "test_ground_truth.json does not exist; get it too",
    ),
    "an unknown article": (
        "pubmedqa",
        "test_ground_truth.json",
        lambda p: change_json(p, lambda c: c.update({"1": "yes"})),
        "names 1 and 0 more",
    ),
    "XML cut short": (
        "voc",
        "Annotations/train_00000.xml",
        lambda p: p.write_text(p.read_text()[:90]),
        "is not XML",
    ),
    "XML with entities": (
        "voc",
        "Annotations/train_00000.xml",
        lambda p: p.write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"),
        "declares entities",
    ),
    "a word for a corner": (
        "voc",
        "Annotations/train_00000.xml",
        lambda p: p.write_text(p.read_text().replace("<xmin>", "<xmin>x", 1)),
        "bndbox/xmin is 'x",
    ),
    "a list without its annotation": (
        "voc",
        "Annotations/val_00000.xml",
        lambda p: p.unlink(),
        "does not exist; restore it",
    ),
    "a box of three numbers": (
        "coco",
        "annotations/instances_train2017.json",
        lambda p: change_json(p, lambda c: c["annotations"][1]["bbox"].pop()),
        "give .x, y, width, height",
    ),
    "an unknown category": (
        "coco",
        "annotations/instances_train2017.json",
        lambda p: change_json(p, lambda c: c["annotations"][1].update(category_id=99)),
        "annotation 2: its category_id",
    ),
    "two files of a split": (
        "coco",
        "annotations/instances_val2017.json",
        lambda p: p.with_name("instances_val2014.json").write_bytes(p.read_bytes()),
        "has several files for val",
    ),
    "a row with more fields": (
        "classes/csv",
        "train.csv",
        lambda p: p.write_bytes(p.read_bytes() + b"a,b,c,d\r\n"),
        "line 11 has 4 fields, not 3",
    ),
    "an open quotation mark": (
        "classes/csv",
        "train.csv",
        lambda p: p.write_bytes(p.read_bytes() + b'"a,b'),
        "not a table",
    ),
    "no label": (
        "classes/csv",
        "train.csv",
        lambda p: p.write_bytes(p.read_bytes().replace(b"label", b"lable")),
        "line 2: 'class' is missing",
    ),
    "an unknown key": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.update(anwser="x")),
        "line 1: key 'anwser' is unknown; did you mean 'answer'",
    ),
    "a task with a box too many": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.update(box=[0, 0, 1, 1])),
        "'vqa' takes no box",
    ),
    "a task without its box": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.pop("box"), 3),
        "line 4: task 'refer' needs a box",
    ),
    "an unknown split": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.update(split="dev")),
        "split 'dev' is none of train, val",
    ),
    "meta that is no text": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.update(meta={"a": 1})),
        "'meta' is {'a': 1}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence_with_file_and_record(tmp_path, damage):
    name, file, change, match = DAMAGE[damage]
    name, _, layout = name.partition("/")
    write_twin(name, tmp_path / "set", records=9, layout=layout)
    change(tmp_path / "set" / file)
    with pytest.raises(UserError, match=match) as caught:
        opened(tmp_path / "set", name)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]


SKIPPED = {
    "an image of another size than COCO says": (
        "coco",
        "val/val_00001.jpg",
        lambda p: Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(p),
        "has 9 x 9 pixels, its annotation says 64 x 48",
    ),
    "a missing image": (
        "voc",
        "JPEGImages/val_00001.jpg",
        lambda p: p.unlink(),
        "val: val_00001: no image",
    ),
    "an image of another size": (
        "voc",
        "JPEGImages/val_00001.jpg",
        lambda p: Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(p),
        "has 9 x 9 pixels, its annotation says 64 x 48",
    ),
    "a box outside": (
        "voc",
        "Annotations/val_00001.xml",
        lambda p: p.write_text(p.read_text().replace("<xmax>", "<xmax>9", 1)),
        "leaves its image of 64 x 48 pixels",
    ),
    "an annotation of no image": (
        "coco",
        "annotations/instances_val2017.json",
        lambda p: change_json(
            p, lambda c: c["annotations"].append(c["annotations"][1] | {"image_id": 4, "id": 9999})
        ),
        "val: annotation 9999: there is no image 4",
    ),
    "an empty answer": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.update(answer=" ")),
        "its answer is empty",
    ),
    "a box without area": (
        "jsonl",
        "data.jsonl",
        lambda p: change_line(p, lambda c: c.update(box=[5, 5, 5, 9]), 3),
        "box .* is empty",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_record_that_cannot_be_used_is_counted_and_named(tmp_path, case):
    name, file, change, match = SKIPPED[case]
    write_twin(name, tmp_path / "whole", records=9)
    whole = opened(tmp_path / "whole", name)
    write_twin(name, tmp_path / "set", records=9)
    change(tmp_path / "set" / file)
    data = opened(tmp_path / "set", name)
    new = [
        line
        for line in left_out(data)
        if line.replace(f"{tmp_path}/set", f"{tmp_path}/whole") not in left_out(whole)
    ]
    assert len(new) == 1 and data.skipped == whole.skipped + 1
    assert re.search(match, new[0]), new[0]


def test_options_are_checked(tmp_path):
    write_twin("voc", tmp_path / "set", records=3)
    for options, match in (
        ({"refr": []}, r"voc has no option 'refr'; did you mean 'refer'"),
        ({"refer": ["biggest"]}, "option refer='biggest' of voc is none of 'unique'"),
        ({"frame": -1}, "option frame=-1 of voc is less than 0"),
        ({"frame": "80"}, "option frame='80' of voc is not of the same type as its default 0"),
        ({"refer": "unique"}, "option refer='unique' of voc is not of the same type"),
        ({"names": ["a"]}, "option names=.'a'. of voc is not of the same type"),
        ({"per_image": True}, "option per_image=True of voc is not of the same type"),
    ):
        with pytest.raises(UserError, match=match):
            opened(tmp_path / "set", "voc", options=options)
    with pytest.raises(UserError, match="there is no twin of 'vqarad'; did you mean 'vqa_rad'"):
        write_twin("vqarad", tmp_path / "x")
    with pytest.raises(UserError, match="voc has no layout 'x'"):
        write_twin("voc", tmp_path / "x", layout="x")


BINARY = {"path_vqa": "qas/test_vqa.pkl", "medmnist": "dermamnist.npz"}
JUNK = {
    "empty": b"",
    "text": b"[]",
    "nested": b"(" * 100_000,
    "magic": b"PK\3\4" + bytes(40),
    "numbers": b"\x93NUMPY\1\0\xff\xff",
    "opcodes": b"\x80\4]\x94(}\x94(K\1K\2us",
}


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_file_that_is_anything_else_is_one_sentence(name, tmp_path):
    write_twin(name, tmp_path / "twin", 3)
    folder = tmp_path / "twin"
    options = {"name": "dermamnist", "size": 28} if name == "medmnist" else {}
    (file,) = folder.rglob(BINARY[name].rpartition("/")[2])
    whole = file.read_bytes()
    damages = JUNK | {"half": whole[: len(whole) // 2], "reversed": whole[::-1]}
    for what, content in damages.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file.name}.*get it again") as caught:
            opened(folder, name, tmp_path / "cache", options=options)
        assert str(caught.value).isprintable(), what
    file.unlink()
    os.mkfifo(file)  # opening it would wait for ever
    with pytest.raises(UserError, match="is a pipe or a device"):
        opened(folder, name, tmp_path / "cache", options=options)
