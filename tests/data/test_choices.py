"""Multiple-choice questions: every way to write one is one example, and damage is said or counted."""

import base64
import csv
import io
import json
import re
from string import ascii_lowercase

import numpy as np
import pytest
from PIL import Image
from support.reading import everything, left_out, opened

from unimed_jax.data.store import pack
from unimed_jax.data.twins import write_twin
from unimed_jax.data.twins.hub import write_table
from unimed_jax.errors import UserError

TEXTS = ["left lung", "right lung", "heart", "none"]
RIGHT = [0, 3, 2, 1]


def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 7, 3), 30 * number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def row(number, **fields):
    return {"id": f"q{number}", "question": f"What is number {number}?"} | fields


def columns(form, texts=TEXTS):
    return {
        form.format(c, C=c.upper(), n=n + 1): text
        for n, (c, text) in enumerate(zip("abcd", texts, strict=True))
    }


def write(folder, name, rows):
    """Writes the rows as the file's ending says."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if file.suffix == ".parquet":
        write_table(file, rows, [key for key in rows[0] if key.startswith("image")])
    elif file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "".join(json.dumps(record) + "\r\n" for record in rows)
        file.write_text(lines if file.suffix == ".jsonl" else json.dumps(rows))


TEXTUAL = {
    "json, an object, letters": (
        "a_train.json",
        dict(options=dict(zip("ABCD", TEXTS, strict=True))),
        "ABCD",
        {},
    ),
    "jsonl, a list, indices": ("train.jsonl", dict(choices=TEXTS), [0, 1, 2, 3], {}),
    "jsonl, pairs, indices from 1 on": (
        "train.jsonl",
        dict(options=[{"key": c, "value": text} for c, text in zip("ABCD", TEXTS, strict=True)]),
        [1, 2, 3, 4],
        dict(first=1),
    ),
    "json, labels and texts": (
        "train.json",
        dict(choices=dict(label=list("ABCD"), text=TEXTS)),
        "ABCD",
        {},
    ),
    "csv, columns, letters in brackets": (
        "train.csv",
        columns("Choice {C}"),
        ["(a)", "B.", "c)", "D:"],
        {},
    ),
    "csv, columns, digits": ("train.csv", columns("option_{}"), "0123", {}),
    "csv, columns with letters before the texts": (
        "train.csv",
        {f"Choice {c}": f" {c}:{text} " for c, text in zip("ABCD", TEXTS, strict=True)},
        "ABCD",
        {},
    ),
    "csv, numbered columns, digits from 1 on": (
        "train.csv",
        columns("option{n}"),
        "1234",
        dict(first=1),
    ),
    "tsv, columns A to D, texts": ("train.tsv", columns("{C}"), TEXTS, {}),
    "tsv, the text of a list": ("train.tsv", dict(options=str(TEXTS)), "ABCD", {}),
    "csv, the text of an object": (
        "train.csv",
        dict(options=json.dumps(dict(zip("ABCD", TEXTS, strict=True)))),
        [f"{text.upper()}." for text in TEXTS],
        {},
    ),
    "parquet, an object with a null": (
        "train-00000-of-00001.parquet",
        dict(options=dict(zip("ABCDE", [*TEXTS, None], strict=True))),
        "ABCD",
        {},
    ),
    "json, a list, letters before the texts of answers": (
        "train.json",
        dict(options=TEXTS),
        [f"({c.lower()}) {text}" for c, text in zip("ABCD", TEXTS, strict=True)],
        {},
    ),
    "parquet, columns, indices": ("train.parquet", columns("op{}"), [0, 1, 2, 3], {}),
    "parquet, columns, numbers with a point": (
        "train.parquet",
        columns("op{}"),
        [0.0, 1.0, 2.0, 3.0],
        {},
    ),
    "other names": (
        "train.csv",
        columns("wahl_{}"),
        "ABCD",
        dict(choices=[f"wahl_{c}" for c in "abcd"]),
    ),
}


def test_one_question_in_every_form_is_one_example(tmp_path):
    """Files, options and answers of sixteen kinds give the same bytes."""
    found = {}
    for number, (form, (name, options, answers, more)) in enumerate(TEXTUAL.items()):
        rows = [row(i, **options, answer=answers[right]) for i, right in enumerate(RIGHT)]
        write(tmp_path / str(number), name, rows)
        data = opened(tmp_path / str(number), "choices", id=str(number), options=more)
        found[form] = [pack(example) for _, example in everything(data)]
    first, *others = found
    assert len(found[first]) == 4 and data.skipped == 0
    for form in others:
        assert found[form] == found[first], form
    for example, right in zip(data.examples("train"), RIGHT, strict=True):
        assert example.task == "qa" and example.answer == TEXTS[right]
        assert example.question == f"What is number {example.id[-1]}? " + " ".join(
            f"({letter}) {text}" for letter, text in zip("ABCD", TEXTS, strict=True)
        )
        assert example.meta["letter"] == "ABCD"[right] and example.cluster == example.id
    plain = opened(tmp_path / "0", "choices", id="plain", options={"shown": False})
    assert plain.examples("train")[0].question == "What is number 0?"


def test_pictures_in_every_form_are_the_same(tmp_path):
    """Bytes, base64 and files; a list, several columns, none."""
    names = [f"p{number}.png" for number in range(3)]
    for place in ("", "images", "figures", "elsewhere"):
        for number, name in enumerate(names):
            (tmp_path / f"paths{place}" / place).mkdir(parents=True, exist_ok=True)
            (tmp_path / f"paths{place}" / place / name).write_bytes(png(number))
    struct = [{"bytes": png(number), "path": "same.png"} for number in range(3)]
    b64 = [base64.b64encode(png(number)).decode() for number in range(3)]
    asked = columns("{C}") | {"answer": "A"}
    forms = {
        "parquet": (
            "test.parquet",
            [
                {"image_1": struct[0], "image_2": struct[1]},
                {"image_1": struct[2], "image_2": None},
                {"image_1": None, "image_2": None},
            ],
            {},
        ),
        "tsv": ("test.tsv", [{"image": str(b64[:2])}, {"image": b64[2]}, {"image": ""}], {}),
        "json": (
            "test.json",
            [{"images": b64[:2]}, {"images": [f"data:image/png;base64,{b64[2]}"]}, {"images": []}],
            {},
        ),
        "paths": ("test.jsonl", [{"images": names[:2]}, {"images": names[2]}, {"images": None}], {}),
        "pathsimages": (
            "test.csv",
            [{"Image_Path": str(names[:2])}, {"Image_Path": names[2]}, {"Image_Path": ""}],
            {},
        ),
        "pathsfigures": (
            "test.csv",
            [{"Bild": str(names[:2])}, {"Bild": names[2]}, {"Bild": ""}],
            {"image": ["Bild"]},
        ),
        "pathselsewhere": (
            "test.csv",
            [{"image": str(names[:2])}, {"image": names[2]}, {"image": ""}],
            {"images": "elsewhere"},
        ),
    }
    found = {}
    for form, (name, cells, options) in forms.items():
        rows = [row(i, **asked, **cell) for i, cell in enumerate(cells)]
        write(tmp_path / form, name, rows)
        data = opened(tmp_path / form, "choices", id=form, options=options)
        some = list(data.examples("test"))
        assert [e.task for e in some] == ["vqa", "vqa", "qa"] and data.splits == ("test",)
        assert [[data.image(k)[0, 0, 0] for k in e.images] for e in some] == [[0, 30], [60], []]
        assert [e.cluster for e in some] == [*(e.images[0] for e in some[:2]), "test/q2"]
        found[form] = [pack(e) for e in some]
    assert found["parquet"] == found["tsv"] == found["json"]
    assert len({tuple(some) for form, some in found.items() if form.startswith("paths")}) == 1


def test_a_picture_may_be_named_by_the_row_that_holds_it(tmp_path):
    """Before that row or after it; a number of no row is a path, which does not exist."""
    b64 = base64.b64encode(png(3)).decode()
    cells = enumerate(["2", "2", b64, "2", "9"])
    rows = [{"index": i} | row(i, **ASKED) | {"image": cell} for i, cell in cells]
    write(tmp_path / "set", "test.tsv", rows)
    data = opened(tmp_path / "set", "choices")
    assert {data.image(e.images[0])[0, 0, 0] for e in data.examples("test")} == {90}
    assert len(data.examples("test")) == 4 and left_out(data)[0].endswith("/9")


def test_splits_are_said_by_names_folders_or_a_column(tmp_path):
    rows = [row(i, **columns("{C}"), answer="B", part=part, patient=7)
            for i, part in enumerate(("train", "dev", "Testing", "validation"))]  # fmt: skip
    write(tmp_path / "column", "all.csv", rows)
    options = {"split": "part", "cluster": "patient", "meta": {"kind": "part"}}
    data = opened(tmp_path / "column", "choices", id="column", options=options)
    assert {s: [e.id for e in data.examples(s)] for s in data.splits} == {
        "train": ["train/q0"],
        "val": ["val/q1", "val/q3"],
        "test": ["test/q2"],
    }
    assert data.examples("train")[0].cluster == "7" and data.examples("val")[0].meta["kind"] == "dev"
    write(tmp_path / "set/dev", "one.csv", rows[:1])
    write(tmp_path / "set/subject_b", "x-test.jsonl", rows[1:2])
    write(tmp_path / "set/subject_a", "x-test.jsonl", rows[2:3])
    write(tmp_path / "set", "rest.csv", rows[3:])
    (tmp_path / "set/info.json").write_text('{"licence": "CC0"}')
    data = opened(tmp_path / "set", "choices")
    ids = {s: [e.id for e in data.examples(s)] for s in data.splits}
    assert ids == {"val": ["val/q0"], "test": ["test/q2", "test/q1"], "train": ["train/q3"]}
    one = opened(tmp_path / "set/rest.csv", "choices", id="one")
    assert one.splits == ("train",) and one.info.licence != "CC0"
    write(tmp_path / "set", "train_2.csv", rows[:1])
    write(tmp_path / "set", "train.csv", rows[:1])
    with pytest.raises(UserError, match=r"train.csv and train_2.csv both hold train.*option `files`"):
        opened(tmp_path / "set", "choices", id="two")
    data = opened(tmp_path / "set", "choices", id="two", options={"files": ["train_2.csv"]})
    assert [e.id for _, e in everything(data)] == ["train/q0"]


ASKED = columns("{C}") | {"answer": "B"}
DAMAGE = {
    "an index out of range": (
        ASKED | {"answer": "4"},
        {},
        "answer 4 is none of 0 to 3, .*option `first`",
    ),
    "an index that counts from 1": (ASKED | {"answer": "0"}, {"first": 1}, "answer 0 is none of 1 to 4"),
    "a letter that is a text": (
        columns("{C}", "BA01") | {"answer": "A"},
        {},
        "answer 'A' may be a text or a letter; .*`answers`",
    ),
    "digits that are a text": (
        columns("{C}", "0213") | {"answer": "1"},
        {},
        "answer '1' may be a text or a index",
    ),
    "no question": (
        {"frage": "x"} | ASKED,
        {"question": "Frage"},
        "'Frage' is missing; did you mean 'frage'",
    ),
    "no column of answers": (columns("{C}"), {}, "no column holds the answer"),
    "another column of options": (ASKED, {"choices": ["A", "Z"]}, "'Z' is missing"),
    "another column of images": (ASKED, {"image": ["x"]}, "'x' is missing"),
    "another column of meta": (ASKED, {"meta": {"a": "x"}}, "'x' is missing"),
    "more options than letters": (
        {"options": [f"text {i}" for i in range(30)], "answer": "text 28"},
        {},
        "'options' has 30 options, and there are 26 letters; give",
    ),
    "more columns of options than letters": (
        {f"option{i}": f"text {i}" for i in range(1, 31)} | {"answer": "text 28"},
        {},
        "has 30 options, and there are 26 letters",
    ),
    "more named columns than letters": (
        {f"wahl{i}": f"text {i}" for i in range(1, 31)} | {"answer": "text 2"},
        {"choices": [f"wahl{i}" for i in range(1, 31)]},
        "has 30 options, and there are 26 letters",
    ),
    "labels without a text": (
        {"choices": {"label": ["A", "B", "C"], "text": ["x", "y"]}, "answer": "A"},
        {},
        "'choices' is .*; give a text for each letter",
    ),
    "one letter for two options": (
        {"options": [{"key": c, "value": c * 2} for c in "AAB"], "answer": "B"},
        {},
        "'options' is .*; give a letter of its own for each text",
    ),
    "options that are a number": ({"options": 3, "answer": "A"}, {}, "'options' is '?3"),
    "a way to answer that there is not": (
        ASKED,
        {"answers": "word"},
        "option answers='word' of choices",
    ),
    "an index to begin with": (ASKED, {"first": 2}, "option first=2 of choices is none of 0, 1"),
    "an unknown split": (ASKED | {"part": "x"}, {"split": "part"}, "split 'x' is none of train"),
    "a picture out of the folder": (ASKED | {"image": "../x.png"}, {}, "image '../x.png' lies outside"),
    "base64 that is none": (ASKED | {"image": "?" * 2000}, {}, "its image is not base64"),
    "no such file": (ASKED, {"files": ["*.xml"]}, r"holds no \*.xml; give the folder"),
    "an empty question": (ASKED | {"question": None}, {}, "'question' is None; give a text"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence_with_file_and_record(tmp_path, damage):
    record, options, match = DAMAGE[damage]
    write(tmp_path / "set", "train.jsonl", [row(1) | record, row(0, **ASKED)])
    with pytest.raises(UserError, match=match) as caught:
        opened(tmp_path / "set", "choices", options=options)
    assert "\n" not in str(caught.value)
    if "option " not in match and "files" not in options:
        assert "train.jsonl, line" in str(caught.value)


def test_a_doubled_id_is_one_sentence(tmp_path):
    write(tmp_path / "set", "train.csv", [row(0, **ASKED), row(0, **ASKED)])
    with pytest.raises(UserError, match="id 'train/q0' stands twice"):
        opened(tmp_path / "set", "choices")


@pytest.mark.parametrize("form", ["a list", "columns of numbers", "columns of letters"])
def test_as_many_options_as_letters(tmp_path, form):
    """The 26th option is read like the others; empty ones after it need no letter."""
    texts = [f"text {i}" for i in range(26)]
    options = {
        "a list": {"options": [*texts, "", None]},
        "columns of numbers": {f"option{i + 1}": text for i, text in enumerate([*texts, "", None])},
        "columns of letters": {f"op{c}": t for c, t in zip(ascii_lowercase, texts, strict=True)},
    }[form]
    write(tmp_path / "set", "train.jsonl", [row(0, **options, answer="text 25")])
    ((_, example),) = everything(opened(tmp_path / "set", "choices"))
    assert example.meta["letter"] == "Z" and example.question.endswith("(Y) text 24 (Z) text 25")


UNUSABLE = {
    "no answer": ({"answer": None}, "it has no answer"),
    "a blank answer": ({"answer": ""}, "it has no answer"),
    "-1 for no answer": ({"answer": -1}, r"it has no answer \(-1\)"),
    "a question mark": ({"answer": "?"}, r"it has no answer \(\?\)"),
    "an unknown letter": ({"answer": "E"}, "its answer 'E' is none of its options"),
    "the letter of an empty option": ({"answer": "D", "D": ""}, "its answer 'D' is none"),
    "two answers": ({"answer": ["A", "B"]}, r"its answer \['A', 'B'\], not one option|is \['A', 'B'\]"),
    "an answer of another letter": ({"answer_idx": "A"}, "'answer_idx' says A, its answer 'B'"),
    "a lost image": ({"image": "lost.png"}, "no image .*lost.png"),
    "an image without content": ({"image": {"bytes": None, "path": None}}, "it has no image"),
    "a picture that is none": ({"image": "note.txt"}, "note.txt"),
    "an open question without an answer": (
        {c: None for c in "ABCD"} | {"answer": " "},
        "its answer is empty",
    ),
}


def test_records_that_cannot_be_used_are_counted(tmp_path):
    """Each is named with its reason; the question between them stays."""
    rows = [row(i, **ASKED) | change for i, (change, _) in enumerate(UNUSABLE.values())]
    write(tmp_path / "set", "train.jsonl", [*rows, row(99, **ASKED)])
    (tmp_path / "set/note.txt").write_text("no picture")
    data = opened(tmp_path / "set", "choices")
    assert [e.id for _, e in everything(data)] == ["train/q99"]
    lines = left_out(data)
    assert len(lines) == len(UNUSABLE) == data.skipped
    for number, ((_, reason), line) in enumerate(zip(UNUSABLE.values(), lines, strict=True)):
        assert line.startswith(f"train: train/q{number}: ") and re.search(reason, line), line


def test_quirks_of_public_sets(tmp_path):
    """Options that a question repeats, marks of pictures, open questions, packed pictures."""
    write_twin("choices", tmp_path / "mmmu", records=12, layout="mmmu")
    data = opened(tmp_path / "mmmu", "choices", id="mmmu")
    some = list(data.examples("val"))
    assert {e.meta["template"] for e in some} == {"multiple choice", "open"}
    assert all("<image" not in e.question and e.question.startswith("image 1 ") for e in some)
    assert {len(e.images) for e in some} == {1, 2, 3} and data.skipped == 2 * 4
    write_twin("choices", tmp_path / "xpert", records=9, layout="medxpertqa")
    data = opened(tmp_path / "xpert", "choices", id="xpert")
    for _, example in everything(data):
        assert example.question.count("(A)") == 1 and "Answer Choices" not in example.question
        assert (example.task == "vqa") == example.id.split("/")[1].startswith("MM")
    write_twin("choices", tmp_path / "omni", records=9, layout="omnimedvqa")
    data = opened(tmp_path / "omni", "choices", id="omni")
    assert len(data.examples("train")) == 18 and data.skipped == 0
    assert {e.meta["modality"] for _, e in everything(data)} == {"Fundus Photography", "X-Ray"}
    write_twin("choices", tmp_path / "pmc", records=9, layout="pmc_vqa")
    assert not any(":" in e.question for _, e in everything(opened(tmp_path / "pmc", "choices", id="p")))
    (tmp_path / "pmc/figures").rename(tmp_path / "pmc/images.zip")
    with pytest.raises(UserError, match="unpack images.zip there"):
        opened(tmp_path / "pmc", "choices", tmp_path / "other")


def test_medmcqa_counts_from_1_in_its_original(tmp_path):
    """The hub's indices begin at 0, those of the original at 1; a wrong setting is not silent."""
    asked = [columns("op{}") | {"cop": right} for right in RIGHT]
    write(tmp_path / "hub", "train.parquet", [row(i, **some) for i, some in enumerate(asked)])
    shifted = [row(i, **some | {"cop": some["cop"] + 1}) for i, some in enumerate(asked)]
    write(tmp_path / "original", "train.json", shifted)
    (tmp_path / "original/train.json").write_text("\n".join(map(json.dumps, shifted)))
    hub = opened(tmp_path / "hub", "choices", id="hub")
    with pytest.raises(UserError, match="line 2: answer 4 is none of 0 to 3"):
        opened(tmp_path / "original", "choices", id="wrong")
    original = opened(tmp_path / "original", "choices", id="original", options={"first": 1})
    assert [pack(e) for _, e in everything(original)] == [pack(e) for _, e in everything(hub)]
