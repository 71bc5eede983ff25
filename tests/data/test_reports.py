"""Chest X-rays and reports: sections, the official files of MIMIC-CXR beside R2Gen's, and damage."""

import csv
import dataclasses
import gzip
import json
import re
import shutil

import pytest
from support.reading import everything, left_out, opened

from unimed_jax.data.reports import sections
from unimed_jax.data.store import pack
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError

SPLIT, META, LABELS = (f"mimic-cxr-2.0.0-{name}.csv" for name in ("split", "metadata", "chexpert"))
OWN = {"study", "view", "atelectasis", "pleural_effusion", "no_finding", "support_devices"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("official") / "set"
    write_twin("mimic_cxr", place, records=12, layout="official")
    for file in place.glob("*.gz"):  # plain, to be changed by tests
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    return place


@pytest.fixture
def twin(made, tmp_path):
    return shutil.copytree(made, tmp_path / "set")


REPORTS = {
    "FINAL REPORT\n INDICATION: pain\n\n FINDINGS:  \n \n Clear\n lungs.\n\n IMPRESSION: Normal.": (
        "Clear\n lungs.", "Normal.",
    ),
    "FINDINGS AND IMPRESSION:  No change.\n": ("No change.", "No change."),
    "Findings/Impression: No change.": ("No change.", "No change."),
    "findings and impressions : a\nNOTIFICATION: told": ("a", "a"),
    "FINDINGS\nClear.\nImpression\nNormal.\n": ("Clear.", "Normal."),
    "Finding: a 5 mm nodule: benign.\nIMPRESSIONS: b": ("a 5 mm nodule: benign.", "b"),
    "IMPRESSION: no findings: normal.\n RECOMMENDATION(S): None.": (None, "no findings: normal."),
    "IMPRESSION:  \n\nCHEST, 2 VIEWS: clear": (None, None),
    "IMPRESSION: first.\nADDENDUM: x\nIMPRESSION: second.\nIMPRESSION:\n": (None, "second."),
    "FINDINGS:\r\nClear.\r\nIMPRESSION:\r\nNormal.\r\n": ("Clear.", "Normal."),
    "The findings: are in the text.\nNo IMPRESSION: here.": (None, None),
    "FINDINGS: ET tube at 3 cm.\nET: no heading of two letters.\nPICC line:": (
        "ET tube at 3 cm.\nET: no heading of two letters.\nPICC line:", None,
    ),
    "": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(REPORTS)))
def test_sections_are_found_by_their_headings(number):
    report, (findings, impression) = list(REPORTS.items())[number]
    found = sections(report)
    assert (found.get("findings"), found.get("impression")) == (findings, impression)


def shared(data):
    """The examples without the facts that only the official files have."""
    return {
        (split, pack(dataclasses.replace(e, meta={k: v for k, v in e.meta.items() if k not in OWN})))
        for split, e in everything(data)
    }


def test_the_official_files_give_the_examples_of_r2gen(tmp_path):
    write_twin("mimic_cxr", tmp_path / "r2gen", records=12)
    write_twin("mimic_cxr", tmp_path / "set", records=12, layout="official")
    annotation, official = opened(tmp_path / "r2gen", "mimic_cxr"), opened(tmp_path / "set", "mimic_cxr")
    assert shared(annotation) == shared(official) and len(shared(official)) == 20
    for key in {key for _, e in everything(official) for key in e.images}:
        assert annotation.encoded(key) == official.encoded(key)
    lost = left_out(official)
    assert re.fullmatch(r"train: s\d+: its report has no findings", lost[0])
    assert re.fullmatch(r"train: s\d+: no report .*/p10/p10000000/s\d+\.txt", lost[1]) and len(lost) == 2
    for _, example in everything(official):
        assert example.meta["view"] in ("PA", "AP") and set(example.meta) <= OWN | {"template"}
        assert example.cluster == example.images[0].split("/")[1][1:]
    # Beside each other, the annotation is read unless the settings say otherwise.
    (tmp_path / "r2gen/annotation.json").rename(tmp_path / "set/annotation.json")
    assert not left_out(opened(tmp_path / "set", "mimic_cxr", id="beside"))
    again = opened(tmp_path / "set", "mimic_cxr", id="again", options={"layout": "official"})
    assert again.checksum == official.checksum
    with pytest.raises(UserError, match="option text of mimic_cxr has no effect on R2Gen's annotation"):
        opened(tmp_path / "set", "mimic_cxr", id="none", options={"text": "both"})


def test_views_and_texts_are_options(twin):
    rows = {row["dicom_id"]: row for row in csv.DictReader((twin / META).open())}
    several = opened(twin, "mimic_cxr", options={"images": 5})
    for _, example in everything(several):
        views = [rows[image.split("/")[-1][:-4]]["ViewPosition"] for image in example.images]
        assert views[0] in ("PA", "AP") and example.meta["view"] == ", ".join(
            v or "unknown" for v in views
        )
        assert example.meta["template"] == ("1 view" if len(views) == 1 else f"{len(views)} views")
    assert {len(e.images) for _, e in everything(several)} == {1, 2, 3}
    assert all(
        len(rows) and e.id.endswith(e.images[0].split("/")[-1][:-4]) for _, e in everything(several)
    )
    side = opened(twin, "mimic_cxr", id="side", options={"views": ["LATERAL"]})
    first = {e.meta["study"]: e.meta["view"] for _, e in everything(side)}
    lateral = {row["study_id"] for row in rows.values() if row["ViewPosition"] == "LATERAL"}
    assert {study for study, view in first.items() if view == "LATERAL"} == lateral & set(first)
    texts = {}
    for text in ("findings", "impression", "both"):
        data = opened(twin, "mimic_cxr", id=text, options={"text": text})
        texts[text] = {e.meta["study"]: e.answer for _, e in everything(data)}
        assert len(texts[text]) + data.skipped == 22
        assert all(
            " and no " in line or "has no" in line or "no report" in line for line in left_out(data)
        )
    assert set(texts["both"]) == set(texts["findings"]) & set(texts["impression"])
    for study, answer in texts["both"].items():
        assert answer == f"{texts['findings'][study]} {texts['impression'][study]}"
    (report,) = list((twin / "files").rglob(f"s{study}.txt"))
    report.write_text("FINDINGS AND IMPRESSION: Both\n at once.")
    data = opened(twin, "mimic_cxr", id="once", options={"text": "both"}, cache=twin.parent / "other")
    assert {e.meta["study"]: e.answer for _, e in everything(data)}[study] == "Both at once."


def test_labels_are_facts_to_choose_by(twin):
    whole = opened(twin, "mimic_cxr")
    rows = {row["study_id"]: row for row in csv.DictReader((twin / LABELS).open())}
    words = {"1.0": "positive", "0.0": "negative", "-1.0": "uncertain", "": None}
    for _, e in everything(whole):
        assert e.meta.get("pleural_effusion") == words[rows[e.meta["study"]]["Pleural Effusion"]]
    some = opened(twin, "mimic_cxr", id="some", only={"atelectasis": ("positive",)})
    assert 0 < len(everything(some)) < len(everything(whole))
    (twin / LABELS).unlink()
    (twin / META).write_text((twin / META).read_text())
    assert not any("atelectasis" in e.meta for _, e in everything(opened(twin, "mimic_cxr", id="less")))


def test_reports_lie_where_their_archive_is_unpacked(twin):
    before = [pack(e) for _, e in everything(opened(twin, "mimic_cxr"))]
    for number, place in enumerate(("mimic-cxr-reports/files", "mimic-cxr-reports")):
        for report in [*(twin / "files").rglob("*.txt"), *(twin / "mimic-cxr-reports").rglob("*.txt")]:
            target = twin / place / re.sub(r".*/(p10/)", r"\1", str(report))
            target.parent.mkdir(parents=True, exist_ok=True)
            report.rename(target)
        data = opened(twin, "mimic_cxr", cache=twin.parent / f"cache{number}")
        assert [pack(e) for _, e in everything(data)] == before
    (twin / "mimic-cxr-reports").rename(twin.parent / "away")
    (twin / "mimic-cxr-reports.zip").write_bytes(b"PK\5\6" + bytes(18))
    with pytest.raises(UserError, match="mimic-cxr-reports.zip is still packed; unpack it with"):
        opened(twin, "mimic_cxr", cache=twin.parent / "new")


def change(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        text = re.sub(old, new, text, count=1)
    path.write_text(text)


def pack_cut(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


DAMAGE = {
    "no tables": (
        SPLIT,
        lambda p: p.unlink(),
        "neither annotation.json nor mimic-cxr-2.0.0-split.csv",
    ),
    "no metadata": (META, lambda p: p.unlink(), "nor mimic-cxr-2.0.0-metadata.csv"),
    "a misspelt column": (
        SPLIT,
        lambda p: change(p, ("study_id", "studyid")),
        "'study_id' is missing; did you mean 'studyid'",
    ),
    "a column less": (
        META,
        lambda p: change(p, ("ViewPosition", "View")),
        "'ViewPosition' is missing",
    ),
    "a split of another name": (
        SPLIT,
        lambda p: change(p, (",train\n", ",dev\n")),
        "split 'dev' is none of train, validate, test",
    ),
    "a patient in words": (
        SPLIT,
        lambda p: change(p, (",100000", ",x10000")),
        "'subject_id' is 'x1",
    ),
    "a study of two patients": (
        SPLIT,
        lambda p: p.write_text(p.read_text() + "abc,50000000,10009999,train\n"),
        "study 50000000 is of patient 10000000 too",
    ),
    "an image twice": (
        SPLIT,
        lambda p: p.write_text(p.read_text() + p.read_text().splitlines()[1]),
        "of study 50000000 stands twice",
    ),
    "an image out of the folder": (
        SPLIT,
        lambda p: change(p, (r"\n[-0-9a-f]+(?=,50000001,)", "\n" + "../" * 9 + "x")),
        "lies outside",
    ),
    "a label in words": (
        LABELS,
        lambda p: change(p, (r",-?[01]\.0", ",yes")),
        "is 'yes', which is none of 1.0, 0.0, -1.0",
    ),
    "a row that is cut": (
        LABELS,
        lambda p: p.write_text(p.read_text().rstrip().rpartition(",")[0]),
        "has 5 fields, not 6",
    ),
    "two tables": (
        SPLIT,
        lambda p: p.with_name("mimic-cxr-2.1.0-split.csv").write_text("x"),
        "several tables of split",
    ),
    "a table that is cut": (SPLIT, pack_cut, "split.csv.gz cannot be unpacked"),
    "no gzip at all": (
        SPLIT,
        lambda p: p.rename(p.with_name(f"{p.name}.gz")),
        "split.csv.gz cannot be unpacked",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_to_the_tables_is_one_sentence(twin, case):
    file, damage, match = DAMAGE[case]
    damage(twin / file)
    with pytest.raises(UserError, match=match) as caught:
        opened(twin, "mimic_cxr")
    assert "\n" not in str(caught.value)


def test_a_study_that_cannot_be_used_is_counted(twin):
    whole = opened(twin, "mimic_cxr")
    some = [e for e in whole.examples("train")]
    (twin / "files" / some[0].images[0]).unlink()
    (twin / "files" / some[1].images[0]).write_bytes(b"")
    report = (twin / "files" / some[2].images[0]).parent.with_suffix(".txt")
    report.write_text("")
    lacking = some[3].images[0].split("/")[-1][:-4]
    change(twin / META, (rf"(?<=\n){lacking},[^\n]*\n", ""))
    data = opened(twin, "mimic_cxr", id="less")
    new = [line for line in left_out(data) if line not in left_out(whole)]
    assert len(new) == 4 and len(data.examples("train")) == len(some) - 3
    for match in ("no image", "it is empty", "has no findings", "lacks image"):
        assert any(match in line for line in new), (match, new)


def test_options_of_reports_are_checked(twin):
    for options, match in (
        ({"text": "finding"}, "option text='finding' of mimic_cxr is none of 'findings'"),
        ({"layout": "jpg"}, "option layout='jpg' of mimic_cxr is none of"),
        ({"views": [1]}, "option views of mimic_cxr takes a list of texts"),
        ({"images": 0}, "option images=0 of mimic_cxr is less than 1"),
    ):
        with pytest.raises(UserError, match=match):
            opened(twin, "mimic_cxr", options=options)


def test_iu_xray_has_one_to_five_views_and_two_annotations(tmp_path):
    write_twin("iu_xray", tmp_path / "set", records=10)
    data = opened(tmp_path / "set", "iu_xray")
    file = tmp_path / "set/annotation.json"
    content = json.loads(file.read_text())
    listed = {record["id"]: record for split in content.values() for record in split}
    for _, example in everything(data):
        assert list(example.images) == listed[example.id.split("/")[1]]["image_path"]
        assert example.cluster == example.id.split("/")[1] and "XXXX" in example.answer
    assert {len(e.images) for _, e in everything(data)} == {1, 2, 3, 4, 5}
    two = opened(tmp_path / "set", "iu_xray", id="two", options={"images": 2})
    assert {len(e.images) for _, e in everything(two)} == {1, 2}
    # The other annotation in circulation splits the studies differently, and has keys more.
    content["train"] += [record | {"split": "train"} for record in content.pop("val")[1:]]
    content["val"] = [content["train"].pop(0)]
    file.write_text(json.dumps(content))
    other = opened(tmp_path / "set", "iu_xray", id="other")
    assert len(other.examples("val")) == 1 and len(other.examples("train")) == 11
    assert {e.id.split("/")[1]: e.answer for _, e in everything(other)}.items() <= {
        name: " ".join(record["report"].split()) for name, record in listed.items()
    }.items()
