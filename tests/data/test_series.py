"""Folders of DICOM series: order of slices, what is shown, patient data, the table, and damage."""

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from support.dicom_files import dicom_file, item
from support.reading import everything, left_out, opened

from unimed_jax.data import images
from unimed_jax.data.datasets import series
from unimed_jax.data.dicom_series import Slice, find_series, in_order, stripped
from unimed_jax.data.store import pack
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
FIRST = "1.2.826.0.1.2"  # the first study that has lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("series") / "set"
    write_twin("series", place, records=4)
    return place


@pytest.fixture
def twin(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


def rows(folder):
    with (folder / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def change_rows(folder, change):
    found = rows(folder)
    found = change(found) or found
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in found for key in row)))
        writer.writeheader()
        writer.writerows(found)


def read(folder, **options):
    """Reads the examples of all splits with their sources, without storing them."""
    skipped = []
    found = [
        pair for split in series.INFO.splits for pair in series.read(folder, split, options, skipped)
    ]
    return found, skipped


@pytest.fixture(scope="module")
def whole(made):
    return read(made)


def test_both_ways_of_nesting_give_the_same_examples_and_no_patient_data(tmp_path, made):
    write_twin("series", tmp_path / "flat", records=4, layout="flat")
    nested, flat = opened(made, "series", cache=tmp_path), opened(tmp_path / "flat", "series", id="flat")
    assert nested.checksum == flat.checksum
    ours, theirs = ([(s, pack(e)) for s, e in everything(data)] for data in (nested, flat))
    assert ours == theirs and {e.task for _, e in everything(nested)} == {"vqa", "cls", "caption"}
    assert left_out(nested) == [
        "train: P000/readme.txt: it is no DICOM file",
        "train: P001/ST0/SE1/IM0099.dcm: it holds no image",
        "train: series 1.2.826.0.1.1.1: labels.csv has no line for it or its study",
    ]
    assert {e.cluster for _, e in everything(nested)} == {f"TWIN{i:04d}" for i in range(3)}
    for file in nested.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for word in (b"Synthetic", b"19000101", b"Nowhere", b"shown to"):
                assert word not in content, (file, word)
    encoded = nested.encoded(nested.examples("train")[0].images[0])
    assert b"TWIN" not in encoded and FIRST.encode() not in encoded
    hashed = opened(made, "series", id="hashed", cache=tmp_path, options={"patients": "hashed"})
    assert len({e.cluster for _, e in everything(hashed)}) == 3
    assert not any("TWIN" in e.cluster for _, e in everything(hashed))


def test_slices_are_chosen_by_their_order_in_space(made):
    def shown(**options):
        found = read(made, **options)[0]
        return {example.id: example for example, _ in found}, {
            key: source
            for example, sources in found
            for key, source in zip(example.images, sources, strict=True)
        }

    heights = {}
    for path in made.rglob("*.dcm"):
        header = dcmread(path)
        if "Rows" in header:
            key = header.get("ImagePositionPatient", [0, 0, header.InstanceNumber])[2]
            heights.setdefault(header.SeriesInstanceUID, []).append((key, path))
    middle, _ = shown()
    second, sources = shown(slices="every", number=2)
    three, _ = shown(slices="even", number=3)
    for row in rows(made):
        if not row["series"]:
            continue
        stack = [path for _, path in sorted(heights[row["series"]])]
        name, count = f"{row['series']}/vqa/1", len(stack)
        keys = [f"{row['series']}/{i:04d}" for i in range(count)]
        assert middle[name].images == (keys[count // 2],)
        assert second[name].images == tuple(keys[::2])
        assert len(three[name].images) == 3 and three[name].images[1] == keys[count // 2]
        assert second[name].meta["modality"] == dcmread(stack[0]).Modality
        assert second[name].meta["template"] == f"{-(-count // 2)} slices"
        for key, path in zip(keys[::2], stack[::2], strict=True):
            np.testing.assert_array_equal(images.read_image(sources[key]), images.read_image(path))
    (study,) = [row["study"] for row in rows(made) if row["id"] == "train1"]
    # Of a study each series, by SeriesNumber, which falls in the twin.
    assert [key.rpartition("/")[0] for key in middle["train1"].images] == [f"{study}.2", f"{study}.1"]
    assert middle["train1"].meta["template"] == "report"
    assert [series._numbers(10, "even", n) for n in (1, 2, 5, 20)] == [
        [5], [2, 7], [1, 3, 5, 7, 9], list(range(10)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "direction, positions, right",
    [
        ([1, 0, 0, 0, 1, 0], [[0, 0, 9], [0, 0, -3], [0, 0, 2]], [1, 2, 0]),  # axial: feet to head
        ([0, 1, 0, 0, 0, -1], [[5, 0, 0], [9, 0, 0], [-5, 0, 0]], [1, 0, 2]),  # sagittal, by its normal
        ([1, 0, 0, 0, 0.6, -0.8], [[0, 0, 0], [0, -8, -6], [0, 8, 6]], [1, 0, 2]),  # oblique
        ([1, 0, 0, 0, 1, 0], [[0, 0, 1], [0, 0, 1.00001], [0, 0, 0]], [2, 0, 1]),  # one place: by number
        ([], [[0, 0, 3], [0, 0, 2], [0, 0, 1]], [0, 1, 2]),  # no directions: by number
        ([1, 0, 0, 0, 1, 0], [[0, 0, 3], [], [0, 0, 1]], [0, 1, 2]),  # a position lacks: by number
        (None, [[0, 0, 3], [0, 0, 2], [0, 0, 1]], [0, 1, 2]),  # three planes: by number
    ],
)
def test_a_stack_is_ordered_along_its_normal(direction, positions, right):
    turned = [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1]]
    slices = [
        Slice(
            Path(f"{i}"),
            f"{9 - i}",
            float(i),
            tuple(p),
            tuple(turned[i] if direction is None else direction),
        )
        for i, p in enumerate(positions)
    ]
    assert [int(one.path.name) for one in in_order(slices[::-1])] == right


FILES = sorted(
    path
    for path in Path(str(get_testdata_file("CT_small.dcm", download=False))).parent.glob("*.dcm")
    if path.stat().st_size < 100_000
)


def test_stripped_files_show_the_same(tmp_path):
    """On small files that pydicom brings: compressed, big endian, deflated, without a preamble."""
    same = 0
    for path in FILES:
        try:
            before = images.read_image(path)
        except UserError:
            continue
        data = stripped(path)
        np.testing.assert_array_equal(before, images.read_image(data), err_msg=path.name)
        whole, bare = dcmread(path, force=True), dcmread(tmp_path / _written(tmp_path, data))
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "InstitutionName", "StudyDate"):
            assert keyword not in bare
            value = str(whole.get(keyword) or "").encode()
            assert len(value) < 5 or value not in data, (path.name, keyword)
        assert stripped(tmp_path / "file") == data  # nothing is left to strip
        same += 1
    assert same >= 30


def _written(folder, data):
    (folder / "file").write_bytes(data)
    return "file"


def test_sequences_are_stripped_too(tmp_path):
    group = item(
        FrameVOILUTSequence=[item(WindowCenter=40, WindowWidth=400, PatientName="Doe^Jane")],
        FrameContentSequence=[item(FrameComments="Doe")],
    )
    array = np.arange(64, dtype=np.uint16).reshape(8, 8)
    fields = {
        "SharedFunctionalGroupsSequence": [group],
        "PixelDataProviderURL": "http://doe",
        "PatientID": "Doe",
    }
    (tmp_path / "file").write_bytes(dicom_file(array, **fields))
    data = stripped(tmp_path / "file")
    assert b"Doe" not in data and b"doe" not in data
    np.testing.assert_array_equal(images.read_image(data), images.read_image(tmp_path / "file"))


def one(folder, name="P002/ST0/SE0/IM0000.dcm"):
    return folder / name


def rewritten(path, **fields):
    data = dcmread(path)
    for keyword, value in fields.items():
        setattr(data, keyword, value)
    data.save_as(path, enforce_file_format=True)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


SKIPPED = {
    "a pipe": (lambda p: pipe(one(p)), "IM0000.dcm: it is a pipe or a device"),
    "a folder that is a link": (
        lambda p: (p / "more").symlink_to(p / "P002"),
        "more: it is a link; put a copy in its place",
    ),
    "no bytes": (lambda p: one(p).write_bytes(b""), "IM0000.dcm: it is empty"),
    "other bytes": (lambda p: one(p).write_bytes(b"x" * 500), "IM0000.dcm: it is no DICOM file"),
    "a link": (
        lambda p: (one(p).unlink(), one(p).symlink_to(one(p, "P003/ST0/SE0/IM0000.dcm"))),
        "IM0000.dcm: it is a link",
    ),
    "no series": (lambda p: rewritten(one(p), SeriesInstanceUID=""), "it has no SeriesInstanceUID"),
    "no name of its own": (lambda p: rewritten(one(p), SOPInstanceUID=""), "it has no SOPInstanceUID"),
    "another patient's": (
        lambda p: rewritten(one(p, "P002/ST0/SE0/IM0001.dcm"), PatientID="other"),
        "its series 1.2.826.0.1.3.1 has files of another patient or study",
    ),
    "a slice twice": (
        lambda p: shutil.copy(one(p), one(p).with_name("copy.dcm")),
        "copy.dcm: it is the same slice as IM0000.dcm",
    ),
    "a cut header": (
        lambda p: one(p).write_bytes(one(p).read_bytes()[:300]),
        "IM0000.dcm: (it holds no image|image .* cannot be read as DICOM|it has no)",
    ),
    "a line too many": (
        lambda p: change_rows(p, lambda c: c.append({**c[0], "series": "1.2.3"})),
        "there is no series 1.2.3",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_cannot_be_used_is_counted_by_name(whole, twin, case):
    damage, match = SKIPPED[case]
    damage(twin)
    (examples, before), (found, after) = whole, read(twin)
    new = [line for line in after if line not in before]
    assert len(new) == 1 and re.search(match, new[0]), new
    assert len(found) == len(examples)  # of a stack that has lost a slice another one is shown


def test_pixels_that_are_cut_are_named(twin):
    for path in one(twin).parent.glob("*.dcm"):
        path.write_bytes(path.read_bytes()[:-900])
    lost = [line for line in read(twin)[1] if "1.2.826.0.1.3" in line]
    assert lost and all("is cut: its pixels have 60 of 960 bytes" in line for line in lost)


REFUSED = {
    "an unknown column": (
        lambda c: c[0].update(anwser="x"),
        "key 'anwser' is unknown; did you mean 'answer'",
    ),
    "neither series nor study": (
        lambda c: c[0].update(series=""),
        "line 2: it names a series and a study, or",
    ),
    "both": (lambda c: c[0].update(study="1.2"), "names a series and a study, or neither"),
    "an unknown task": (
        lambda c: c[1].update(task="vga"),
        "line 3: task 'vga' is none of vqa, cls, caption",
    ),
    "a task with boxes": (lambda c: c[0].update(task="refer"), "task 'refer' is none of vqa"),
    "no question": (lambda c: c[0].update(question=""), "task 'vqa' needs a question"),
    "an unknown split": (lambda c: c[0].update(split="dev"), "split 'dev' is none of train, val, test"),
    "an id twice": (lambda c: [row.update(id="a") for row in c[:2]] and None, "id 'a' stands twice"),
    "no column of answers": (
        lambda c: [{k: v for k, v in row.items() if k != "answer"} for row in c],
        "'answer' is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_cannot_be_understood_is_one_sentence(twin, case):
    change, match = REFUSED[case]
    change_rows(twin, change)
    with pytest.raises(UserError, match=match) as caught:
        opened(twin, "series") if "twice" in match else read(twin)
    assert "\n" not in str(caught.value)


def test_there_is_one_table(twin):
    shutil.copy(twin / "labels.csv", twin / "labels.tsv")
    with pytest.raises(UserError, match=r"several tables \(labels.csv, labels.tsv\); give one table"):
        read(twin)
    for name in ("labels.csv", "labels.tsv"):
        (twin / name).unlink()
    with pytest.raises(UserError, match="holds no labels.csv; give one table with the columns series"):
        read(twin)


def test_a_table_of_one_split_needs_no_other_column(twin):
    given = ("series", "study", "task", "question", "answer")
    change_rows(twin, lambda c: [{key: row[key] for key in given} for row in c])
    assert len(read(twin)[0]) == 17 == len(list(series.read(twin, "train", {}, [])))


def test_options_of_series_are_checked(made):
    for options, match in (
        ({"slices": "first"}, "option slices='first' of series is none of 'middle', 'every', 'even'"),
        ({"slices": "every"}, "option number=0 of series is less than 1"),
        ({"number": 3}, "option number=3 of series has no effect with slices='middle'"),
        ({"patients": "name"}, "option patients='name' of series is none of 'id', 'hashed'"),
    ):
        with pytest.raises(UserError, match=match):
            list(series.read(made, "train", options, []))


def test_headers_cost_little(made):
    skipped = []
    found = find_series(made, series.TABLES, skipped)
    assert len(found) == 8 and len(skipped) == 2
    assert all(one.patient.startswith("TWIN") and one.slices for one in found.values())
