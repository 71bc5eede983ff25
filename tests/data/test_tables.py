"""Parquet tables of the Hugging Face hub: which files, which rows, and what is wrong with them."""

import os
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.reading import everything, left_out, opened

from unimed_jax.data.tables import parquet_files, parquet_rows
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError

TRAIN = "data/train-0000{}-of-00002.parquet"
SUMMED = "data/train-{:05d}-of-00002-{:x}0123456789abcde.parquet"  # as older sets of the hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub") / "set"
    write_twin("vqa_rad", place, records=18, layout="parquet")
    return place


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "set")


def rewrite(file, change):
    """Changes the columns of a table, {name: list}."""
    table = pyarrow.parquet.read_table(file)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    change(columns)
    types = {field.name: field.type for field in table.schema}
    for name, cells in columns.items():
        known = name == "image" and "height" not in str(cells)
        columns[name] = pyarrow.array(cells, types[name] if known else None)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def in_column(name, cell, row=3):
    return lambda columns: columns[name].__setitem__(row, cell)


def test_every_form_of_the_folder_gives_the_same_rows(folder, tmp_path):
    """Shards in their order, one file, folders of a split, a configuration above, links of a cache."""
    tables = [folder / TRAIN.format(number) for number in (0, 1)]
    test = folder / "data/test-00000-of-00001.parquet"
    expected = [record for file in tables for _, record in parquet_rows(file)]
    assert len(expected) > 16 and all(record["image"]["bytes"] for record in expected)
    whole = pyarrow.parquet.ParquetFile(tables[0])
    assert whole.num_row_groups > 1

    def place(name, files):
        for at, file in files.items():
            (tmp_path / name / at).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file, tmp_path / name / at)
        return tmp_path / name

    cache = "datasets--a--b"  # as the hub's own tool keeps it
    blobs = tmp_path / cache / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate((*tables, test)):
        shutil.copy(file, blobs / str(number))
    forms = {
        "hub": folder,
        "cache": place(f"{cache}/snapshots/1", {TRAIN.format(n): blobs / f"{n}" for n in (0, 1)}),
        "converted": place(
            "converted",
            {"default/train/0000.parquet": tables[0], "default/train/0001.parquet": tables[1]},
        ),
        "summed": place("summed", {SUMMED.format(n, 15 - n): tables[n] for n in (0, 1)}),
        "flat": place("flat", {"train.parquet": tables[0], "validation-00000-of-00001.parquet": test}),
        "split": place("split", {"train/0000.parquet": tables[0], "test/0000.parquet": test}),
    }
    for name, form in forms.items():
        found = [r for file in parquet_files(form, "train") for _, r in parquet_rows(file)]
        assert found == expected[: len(found)] and len(found) in (len(expected), whole.metadata.num_rows)
        assert bool(parquet_files(form, "val")) == (name == "flat")
    assert len(parquet_files(forms["converted"], "train")) == 2
    assert len(parquet_files(forms["summed"], "train")) == 2
    (forms["summed"] / SUMMED.format(0, 15)).unlink()
    with pytest.raises(UserError, match="shard 0 of 2 is missing beside train-00001-of-00002-e0123"):
        parquet_files(forms["summed"], "train")
    os.symlink(blobs / "2", forms["cache"] / "data/test-00000-of-00001.parquet")
    assert opened(forms["cache"], "vqa_rad").checksum == opened(folder, "vqa_rad").checksum


def test_rows_stream_with_the_memory_of_a_row_group(tmp_path):
    """Of 32 MB of pictures in row groups of 4 MB only a few MB are in memory at a time."""
    file, cells = tmp_path / "a.parquet", [np.random.default_rng(i).bytes(1 << 20) for i in range(32)]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), file, row_group_size=4)
    del cells
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    for _, record in parquet_rows(file):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        count += len(record["image"]) >> 20
    assert count == 32 and 1 << 20 < most < 24 << 20


DAMAGE = {
    "a missing shard": (
        lambda p: (p / TRAIN.format(0)).unlink(),
        "shard 0 of 2 is missing beside train-00001-of-00002.parquet",
    ),
    "a file cut short": (
        lambda p: (p / TRAIN.format(1)).write_bytes((p / TRAIN.format(1)).read_bytes()[:-9]),
        "train-00001-of-00002.parquet cannot be read from row 0 on",
    ),
    "a damaged page": (
        lambda p: (p / TRAIN.format(0)).write_bytes(
            b"PAR1" + bytes(4000) + (p / TRAIN.format(0)).read_bytes()[4004:]
        ),
        "train-00000-of-00002.parquet cannot be read from row 0 on",
    ),
    "an empty file": (lambda p: (p / TRAIN.format(0)).write_bytes(b""), "cannot be read from row 0"),
    "a pointer of Git-LFS": (
        lambda p: (p / TRAIN.format(0)).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git-LFS",
    ),
    "a web page": (
        lambda p: (p / TRAIN.format(0)).write_text("<!DOCTYPE html>"),
        "is a web page",
    ),
    "a folder for a file": (
        lambda p: ((p / TRAIN.format(0)).unlink(), (p / TRAIN.format(0)).mkdir()),
        "is a folder, where a file belongs",
    ),
    "another column": (
        lambda p: rewrite(p / TRAIN.format(0), lambda c: c.update(questoin=c.pop("question"))),
        "row 0: 'question' is missing; did you mean 'questoin'",
    ),
    "a question that is null": (
        lambda p: rewrite(p / TRAIN.format(0), in_column("question", None)),
        "row 3: 'question' is None",
    ),
    "questions that are lists": (
        lambda p: rewrite(
            p / TRAIN.format(0), lambda c: c.update(question=[[q] for q in c["question"]])
        ),
        r"row 0: 'question' is \[",
    ),
    "pictures that are numbers": (
        lambda p: rewrite(
            p / TRAIN.format(0), lambda c: c.update(image=[{"height": 3} for _ in c["answer"]])
        ),
        "row 0: its image is {'height': 3}; give bytes or a path",
    ),
    "a path out of the folder": (
        lambda p: rewrite(
            p / TRAIN.format(0), in_column("image", {"bytes": None, "path": "../../x.jpg"})
        ),
        "row 3: image '../../x.jpg' lies outside",
    ),
    "two sets of tables": (
        lambda p: shutil.copytree(p / "data", p / "more"),
        "holds several sets of tables for train",
    ),
    "a part that the hub has converted": (
        lambda p: (
            (p / "partial-train").mkdir(),
            (p / TRAIN.format(0)).rename(p / "partial-train/0000.parquet"),
            (p / TRAIN.format(1)).unlink(),
        ),
        "partial-train is only the part of train that the hub has converted",
    ),
    "other numbers of shards": (
        lambda p: shutil.copy(p / TRAIN.format(0), p / "data/train-00000-of-00003.parquet"),
        "holds several sets of tables for train",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence_with_file_and_row(copy, damage):
    change, match = DAMAGE[damage]
    change(copy)
    with pytest.raises(UserError, match=match) as caught:
        opened(copy, "vqa_rad")
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_used_are_counted(copy):
    def change(columns):
        columns["image"][0] = None
        columns["image"][1] = {"bytes": None, "path": None}
        columns["image"][2] = {"bytes": None, "path": "lost.jpg"}
        columns["image"][3] = {"bytes": b"no picture", "path": "a.jpg"}
        columns["answer"][4] = "  "

    whole = opened(copy, "vqa_rad", id="whole")
    rewrite(copy / TRAIN.format(0), change)
    data = opened(copy, "vqa_rad")
    lines = left_out(data)
    reasons = ["it has no image", "it has no image", "no image .*lost.jpg", "", "its answer is empty"]
    assert data.skipped == len(lines) == 5
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True)):
        assert line.startswith(f"train: train/row{number}: ") and re.search(reason, line), line
    assert [e.id for _, e in everything(data)] == [e.id for _, e in everything(whole)][5:]


def test_pictures_may_lie_beside_the_table(copy):
    """A cell without bytes names a file from the set's folder on."""
    (first, *_), numbers = list(parquet_rows(copy / TRAIN.format(0))), range(2)
    (copy / "a.jpg").write_bytes(first[1]["image"]["bytes"])
    cell = {"bytes": None, "path": "a.jpg"}
    rewrite(copy / TRAIN.format(0), lambda c: [in_column("image", cell, i)(c) for i in numbers])
    data = opened(copy, "vqa_rad")
    some = data.examples("train")
    assert some[0].images == some[1].images == ("a.jpg",) and len(some[2].images[0]) == 16
    (copy / "a.txt").write_text("a")
    with pytest.raises(UserError, match="names images, and tables of the hub have no names"):
        opened(copy, "vqa_rad", options={"without": "a.txt"})


def test_vqa_rad_is_the_same_in_both_layouts(folder, tmp_path):
    """Questions, answers, splits and pixels; kinds are guessed, and names and ids are lost."""
    write_twin("vqa_rad", tmp_path / "set", records=18)
    original, table = opened(tmp_path / "set", "vqa_rad"), opened(folder, "vqa_rad", tmp_path / "c")

    def asked(data):
        """All that both hold, without the rows that stand twice."""
        return dict.fromkeys(
            (split, e.task, e.question, e.answer, data.image(e.images[0]).tobytes(), e.box, e.history)
            for split, e in everything(data)
        )

    assert list(asked(original)) == list(asked(table)) and len(asked(table)) == len(everything(table))
    for _, example in everything(table):
        closed = example.answer.lower() in ("yes", "no")
        assert example.meta == {
            "template": "closed" if closed else "open",
            "answer_type": "CLOSED" if closed else "OPEN",
            "answer_type_from": "yes/no rule",
        }
        assert example.cluster == example.images[0] and example.id.split("/")[1].startswith("row")
