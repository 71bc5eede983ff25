"""One set in two layouts gives the same examples, as far as both layouts say the same."""

import dataclasses
import json

import pytest
from support.reading import everything, left_out, opened

from unimed_jax.data.store import pack
from unimed_jax.data.tables import parquet_rows
from unimed_jax.data.twins import write_twin
from unimed_jax.data.twins.hub import write_table
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
    before = [e.question for _, e in everything(data) if e.question.startswith("A patient of")]
    assert before and all(question.endswith("What is the diagnosis?") for question in before)
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


def change_table(file, change):
    """Changes the rows of a table, a list of objects."""
    rows = [record for _, record in parquet_rows(file)]
    change(rows)
    write_table(file, rows, ["image"] if "image" in rows[0] else [])


PQA, TEST = "pqa_labeled/train-00000-of-00001.parquet", "data/test-00000-of-00001*.parquet"
DAMAGE = {
    "pubmedqa/parquet, another column": (
        PQA,
        lambda rows: [row.update(PubID=row.pop("pubid")) for row in rows],
        "row 0: 'pubid' is missing; did you mean 'PubID'",
    ),
    "pubmedqa/parquet, a context that is null": (
        PQA,
        lambda rows: rows[3].update(context=None),
        "row 3: 'context' is None",
    ),
    "pubmedqa/parquet, contexts that are a text": (
        PQA,
        lambda rows: [row.update(context={"contexts": "x"}) for row in rows],
        "row 0: its contexts are no list of texts",
    ),
    "pubmedqa/parquet, an article twice": (
        PQA,
        lambda rows: rows.append(rows[0]),
        "stands twice",
    ),
    "pubmedqa/parquet, a lost test question": (PQA, lambda rows: rows.pop(1), "and 0 more, which"),
    "pubmedqa/options, an unknown letter": (
        TEST,
        lambda rows: rows[2]["data"].update({"Correct Option": "D"}),
        "row 2: 'Correct Option' is 'D'",
    ),
    "pubmedqa/options, an answer that is null": (
        TEST,
        lambda rows: rows[2]["data"].update({"Correct Option": None}),
        "row 2: 'answer_idx' is None",
    ),
    "pubmedqa/options, no ids": (TEST, lambda rows: [row.pop("id") for row in rows], "'id' is missing"),
    "medqa/parquet, an answer of another letter": (
        TEST,
        lambda rows: rows[1].update(answer_idx="E"),
        "row 1: answer .* is not option 'E'",
    ),
    "medqa/parquet, options that are a number": (
        TEST,
        lambda rows: [row.update(options=3) for row in rows],
        "row 0: 'options' is 3; give a text for each letter",
    ),
    "path_vqa/parquet, no questions": (
        TEST,
        lambda rows: [row.pop("question") for row in rows],
        "row 0: 'question' is missing",
    ),
    "slake/parquet, an answer that is a list": (
        TEST,
        lambda rows: [row.update(answer=[row["answer"]]) for row in rows],
        r"row 0: 'answer' is \[",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence_with_file_and_row(tmp_path, damage):
    file, change, match = DAMAGE[damage]
    name, _, layout = damage.partition(",")[0].partition("/")
    write_twin(name, tmp_path / "set", records=9, layout=layout)
    (table,) = (tmp_path / "set").glob(file)
    change_table(table, change)
    options = {"context": "contexts"} if name == "pubmedqa" else {}
    with pytest.raises(UserError, match=match) as caught:
        opened(tmp_path / "set", name, options=options)
    assert "\n" not in str(caught.value)


def test_answers_may_be_numbers_or_empty(tmp_path):
    """A column of numbers is read as text; a row without an answer is counted."""
    write_twin("slake", tmp_path / "set", records=9, layout="parquet")

    def numbers(rows):
        for number, row in enumerate(rows):
            row["answer"] = number if number else None

    (table,) = (tmp_path / "set").glob(TEST)
    change_table(table, numbers)
    data = opened(tmp_path / "set", "slake")
    assert [e.answer for e in data.examples("test")] == ["1", "2", "3", "4", "5"]
    assert left_out(data) == ["test: test/row0: its answer is empty"]
