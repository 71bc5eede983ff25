"""One set in two layouts gives the same examples, as far as both layouts say the same."""

import dataclasses
import json

import pytest
from support.reading import everything, left_out, opened

from unimed_jax.data.store import pack
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError


def twins(place, name, *layouts, **fields):
    """Opens the twin of a set in several layouts."""
    for layout in layouts:
        write_twin(name, place / layout, records=12, layout=layout)
    return [opened(place / layout, name, id=layout, **fields) for layout in layouts]


def packed(data, splits=None, **changes):
    return [
        (split, pack(dataclasses.replace(example, **changes)))
        for split, example in everything(data)
        if split in (splits or data.splits)
    ]


def seen(data, **changes):
    """Examples with the pixels in place of the names of pictures."""
    return [
        (*pair, data.image(example.images[0]).tobytes())
        for pair, (_, example) in zip(
            packed(data, images=(), cluster="", **changes), everything(data), strict=True
        )
    ]


def test_path_vqa(tmp_path):
    """The table in base64 and that of the hub are one; the pickles name their pictures, too."""
    pickles, tsv, parquet = twins(tmp_path, "path_vqa", "original", "tsv", "parquet")
    assert packed(tsv) == packed(parquet) and seen(pickles) == seen(tsv) == seen(parquet)
    assert pickles.examples("val")[0].images[0].startswith("val/val_")
    assert {example.images[0].partition("/")[0] for example in parquet.examples("val")} == {"val"}


def test_slake(tmp_path):
    """The hub's table lacks boxes, ids and what is said of a question beside its answer."""
    original, table = twins(tmp_path, "slake", "flat", "parquet")
    fields = {"id": "", "meta": {}}
    asked = [row for row, (_, e) in zip(seen(original, **fields), everything(original), strict=True)
             if e.task == "vqa"]  # fmt: skip
    assert asked == seen(table, **fields) and len(asked) == 2 * (12 + 4 + 4)
    for _, example in everything(table):
        assert example.meta["answer_type_from"] == "yes/no rule" and example.meta["language"] == "en"
        assert example.meta["template"] == ("closed" if example.answer in ("Yes", "No") else "open")
    with pytest.raises(UserError, match="have no Chinese questions; get train.json"):
        opened(tmp_path / "parquet", "slake", options={"language": "zh"})
    (tmp_path / "flat/imgs").rename(tmp_path / "flat/imgs.zip")
    with pytest.raises(UserError, match="imgs.zip is packed; unpack it there"):
        opened(tmp_path / "flat", "slake", id="packed", options={"boxes": False})


@pytest.mark.parametrize("context", ["none", "contexts", "conclusion"])
def test_pubmedqa(tmp_path, context):
    layouts = "original", "parquet", "options"
    one, *others = twins(tmp_path, "pubmedqa", *layouts, options={"context": context, "words": 9})
    assert len(one.examples("test")) == len(one.examples("train")) == 12
    for other in others:
        assert sorted(packed(other)) == sorted(packed(one))
        assert packed(other, ["test"]) == packed(one, ["test"])
    assert packed(others[0]) == packed(one)


def test_pubmedqa_needs_its_list_of_test_questions(tmp_path):
    write_twin("pubmedqa", tmp_path / "set", records=6, layout="parquet")
    (tmp_path / "set/test_ground_truth.json").rename(tmp_path / "ids.json")
    with pytest.raises(UserError, match=r"get it too, .*github.com/pubmedqa/pubmedqa"):
        opened(tmp_path / "set", "pubmedqa")
    data = opened(tmp_path / "set", "pubmedqa", options={"test_ids": "../ids.json"})
    test = json.loads((tmp_path / "ids.json").read_text())
    assert {e.cluster for e in data.examples("test")} == set(test)


def test_medqa(tmp_path):
    """Four options in the original's file and in the hub's table, which has no dev."""
    for shown in (False, True):
        place = tmp_path / str(shown)
        write_twin("medqa", place / "four", records=12, layout="four")
        write_twin("medqa", place / "parquet", records=12, layout="parquet")
        four = opened(place / "four", "medqa", id="four", options={"options": 4, "shown": shown})
        table = opened(place / "parquet", "medqa", id="table", options={"shown": shown})
        assert table.splits == ("train", "test") and packed(table) == packed(four, table.splits)
    lines = (tmp_path / "True/four/questions/US/4_options/phrases_no_exclude_test.jsonl").read_text()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/phrases_no_exclude_test.jsonl").write_text(lines)
    (tmp_path / "flat/phrases_no_exclude_train.jsonl").write_text(lines)
    flat = opened(tmp_path / "flat", "medqa", options={"shown": True})
    assert packed(flat, ["test"]) == packed(table, ["test"]) and flat.splits == ("train", "test")
    for options, match in (
        ({"options": 5}, r"it has 4 options, and options=5 is set"),
        ({"region": "Japan"}, "option region='Japan' of medqa is none of 'US', 'Mainland', 'Taiwan'"),
        ({"region": "Taiwan"}, "holds no questions/Taiwan/train.jsonl"),
        ({"region": "Taiwan", "options": 5}, "Taiwan has no questions with five options; set options=4"),
    ):
        with pytest.raises(UserError, match=match):
            opened(tmp_path / "True/parquet", "medqa", options=options)


def test_every_table_of_medpix(tmp_path):
    """Cases name several images with commas; a question may be about none."""
    write_twin("medpix", tmp_path / "set", records=12)
    data = opened(tmp_path / "set", "medpix", id="plain")
    assert {e.meta["template"] for _, e in everything(data)} == {"caption"}
    tables = ["single", "multi", "questions"]
    data = opened(tmp_path / "set", "medpix", id="all", options={"tables": tables})
    some = list(data.examples("train"))
    cases = [e for e in some if "/multi/" in e.id]
    assert [len(e.images) for e in cases] == [1 + i % 3 for i in range(12) if i % 4 != 3]
    assert {e.question for e in cases if e.meta["template"] == "findings"} == {"What are the findings?"}
    asked = [e for e in some if "/questions/" in e.id]
    assert [e.task for e in asked] == ["qa", "vqa"] * 6
    unknown = [line for line in left_out(data) if "type 'Keywords' is unknown" in line]
    assert len(unknown) == 3 + 1 and data.skipped == len(unknown) + 1  # and a caption without image
    options = {"tables": tables[:2], "types": ["plane", "modality", "diagnosis"], "history": True}
    data = opened(tmp_path / "set", "medpix", id="some", options=options)
    kinds = {(e.task, e.meta["template"]) for _, e in everything(data)}
    assert kinds == {("cls", "modality"), ("vqa", "diagnosis")}
    told = [e.question for _, e in everything(data) if e.question.startswith("A patient of")]
    assert told and all(question.endswith("What is the diagnosis?") for question in told)
    for options, match in (
        (
            {"tables": ["multiple"]},
            "option tables of medpix names 'multiple'; choose from single, multi",
        ),
        ({"types": ["captions"]}, "option types of medpix names 'captions'"),
    ):
        with pytest.raises(UserError, match=match):
            opened(tmp_path / "set", "medpix", id="bad", options=options)
    (tmp_path / "set/MedPix_multi_test.csv").unlink()
    with pytest.raises(UserError, match="MedPix_multi_test.csv does not exist"):
        opened(tmp_path / "set", "medpix", id="lost", options={"tables": ["multi"]})
