"""Prepared data sets: built once and whole, opened at random.

Every fault one sentence.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import squares
from support.opened import NAME, opened

from unimed_jax import files
from unimed_jax.config import DataConfig, ImageConfig, SourceConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.prepare import prepared
from unimed_jax.data.store import Store, crc_of, pack, unpack
from unimed_jax.errors import UserError


def folder_of(cache):
    (found,) = (path for path in cache.iterdir() if path.is_dir())
    return found


def test_what_is_read_is_what_was_given(tmp_path):
    (data,) = opened(tmp_path)
    memory = squares.Squares()
    assert (
        data.id == "squares" and data.splits == ("train", "val", "test") and data.info.licence == "CC0"
    )
    for split in data.splits:
        assert list(data.examples(split)) == memory.examples(split)
        assert data.examples(split)[7] == memory.examples(split)[7]
        assert list(data.examples(split)[10:13]) == memory.examples(split)[10:13]
        mine, theirs = data.columns(split), memory.columns(split)
        for name in ("task", "images", "ids"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        for column in ("cluster", "meta"):
            one, two = (c.cluster if column == "cluster" else c.meta("prompt") for c in (mine, theirs))
            assert [one.texts[i] for i in one.codes] == [two.texts[i] for i in two.codes]
    np.testing.assert_array_equal(data.image("val3"), memory.image("val3"))
    with pytest.raises(UserError, match="data set squares has no image 'val99'"):
        data.image("val99")
    with pytest.raises(UserError, match="no split 'vall'; did you mean 'val'"):
        data.examples("vall")


def test_a_digest_follows_from_the_image_and_from_how_it_is_read(tmp_path):
    one, another = (SourceConfig(NAME, id=id, options={"images": 8}) for id in "ab")
    black = dataclasses.replace(one, id="c", image=ImageConfig(background="black"))
    data, again, other = opened(tmp_path, one, another, black)
    keys = [f"{split}{i}" for split in ("train", "val") for i in range(8)]
    digests = [data.digest(key) for key in keys]
    pixels = [data.image(key).tobytes() for key in keys]
    assert all(len(digest) == 32 for digest in digests)
    assert [digests.index(digest) for digest in digests] == [pixels.index(each) for each in pixels]
    assert digests == [again.digest(key) for key in keys]
    assert not {*digests} & {other.digest(key) for key in keys}


def test_every_field_survives():
    example = Example(
        "a", "vqa", "q\n", "ü", ("x", "y"), (1, 2, 3, 4), "c", {"k": "v"}, (("why", "so"),)
    )
    assert unpack(pack(example)) == example
    assert unpack(pack(Example("b", "qa", "", ""))) == Example("b", "qa", "", "")


def test_it_is_built_once_and_opened_once(tmp_path, monkeypatch):
    (first,) = opened(tmp_path)
    monkeypatch.setattr(squares, "read", None)
    monkeypatch.setattr(squares, "read", lambda *given: pytest.fail("built again"))
    (second,) = opened(tmp_path)
    assert first._store is second._store


def test_a_changed_reader_is_prepared_again_and_says_so(tmp_path, monkeypatch, capsys):
    opened(tmp_path)
    monkeypatch.setattr(squares, "INFO", dataclasses.replace(squares.INFO, version="2"))
    before = folder_of(tmp_path).name
    opened(tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("squares: prepared again") and before in said and said.count("\n") == 1


def cut(path, size):
    os.truncate(path, size)


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def altered(at, **changes):
    manifest = json.loads((at / "manifest.json").read_text())
    (at / "manifest.json").write_text(json.dumps(manifest | changes))


def rewritten(at, **changes):
    """Changes the manifest as one who knows its checksum."""
    manifest = json.loads((at / "manifest.json").read_text()) | changes
    (at / "manifest.json").write_text(json.dumps(manifest | {"crc32": crc_of(manifest)}))


DAMAGE = {
    "an index cut short": (
        lambda at: cut(at / "index" / "task.npy", 150),
        r"task.npy has 150 of its \d+ bytes",
    ),
    "a shard missing": (
        lambda at: (at / "images-00000.array_record").unlink(),
        "images-00000.array_record does not",
    ),
    "a shard cut": (
        lambda at: cut(at / "examples-00000.array_record", 99),
        "examples-00000.array_record has 99 of",
    ),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "manifest.json does not exist"),
    "half a manifest": (lambda at: cut(at / "manifest.json", 50), "manifest.json is not JSON"),
    "a manifest of garbage": (
        lambda at: (at / "manifest.json").write_bytes(b"\x93NUMPY\0"),
        "0x93 is not UTF-8",
    ),
    "a manifest of nesting": (
        lambda at: (at / "manifest.json").write_text("[" * 99_999),
        "is nested too deep",
    ),
    "a manifest of nothing": (
        lambda at: (at / "manifest.json").write_text("{}"),
        "is not what was written",
    ),
    "a manifest of another": (
        lambda at: altered(at, checksum="0"),
        "manifest.json is not what was written",
    ),
    "a manifest without parts": (
        lambda at: rewritten(at, splits=None),
        "is not what was written .AttributeError",
    ),
    "an empty folder": (lambda at: [shutil.rmtree(at), at.mkdir()], "is not a prepared data set"),
    "a file for the folder": (
        lambda at: [shutil.rmtree(at), at.write_text("")],
        "is not a prepared data set",
    ),
    "a byte of the index": (
        lambda at: flipped(at / "index" / "ids.npy", 200),
        "ids.npy has changed since",
    ),
    "a folder for an index": (
        lambda at: [(at / "index" / "ids.npy").unlink(), (at / "index" / "ids.npy").mkdir()],
        "ids.npy does not exist",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_one_sentence(tmp_path, damage):
    opened(tmp_path)
    harm, sentence = DAMAGE[damage]
    harm(folder_of(tmp_path))
    with pytest.raises(UserError, match=f"{sentence}.*delete that folder and run again"):
        opened(tmp_path)


def test_no_flipped_bit_of_a_store_goes_unnoticed(tmp_path):
    """Any bit of any file: what is read is what was written, or one sentence."""
    opened(tmp_path)
    at, rng = folder_of(tmp_path), random.Random(0)

    def read():
        store = Store(at)
        pixels = [store.image(key).tobytes() for key in ("train3", "val3")]
        return (
            [list(store.examples(split)) for split in store.splits],
            pixels,
            store.checksum,
            store.info,
        )

    whole, noticed, flips = read(), 0, 0
    for path in sorted(path for path in at.rglob("*") if path.is_file()):
        before = path.read_bytes()
        for place in rng.sample(range(len(before)), min(len(before), 6)):
            flipped(path, place)
            try:
                assert read() == whole, (path.name, place)
            except UserError:
                noticed += 1
            path.write_bytes(before)
            flips += 1
    assert flips > 60 and noticed > flips / 2


def test_a_store_of_another_form_is_refused(tmp_path):
    opened(tmp_path)
    file = folder_of(tmp_path) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 0}))
    with pytest.raises(
        UserError, match="was prepared in form 0, and this version reads form 3; delete that folder"
    ):
        opened(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept in .*set config.data.cache"):
        opened(tmp_path / "file")


def noise(count=400):
    """A reader of images that do not compress, 12 kB each."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 64, 64, 3), np.uint8)
    return reader(
        *((Example(f"e{i}", "vqa", "q", "a", (f"i{i}",)), (image,)) for i, image in enumerate(images))
    )


@pytest.mark.parametrize("free_bytes", [0, 1 << 20, 3 << 20])
def test_a_full_disk_while_a_set_is_built_is_one_sentence(small_disk, free_bytes):
    """array_record's error carries neither a number nor the system's words."""
    made, cache = noise(), small_disk / "cache"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(bytes(free - free_bytes))
    with pytest.raises(
        UserError, match="No space left on device.*(free some space|config.data.cache)"
    ) as error:
        prepared(made, made.INFO, None, {}, cache)
    assert "\n" not in str(error.value)
    # nothing half, nothing hidden
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]
    (small_disk / "ballast").unlink()
    assert len(prepared(made, made.INFO, None, {}, cache).examples("train")) == 400


def test_a_disk_without_inodes_is_one_sentence(small_disk):
    made = noise(3)
    limited = subprocess.run(
        ["mount", "-o", "remount,nr_inodes=6", str(small_disk)], capture_output=True
    )
    if limited.returncode:
        pytest.skip("cannot limit the disk's inodes")
    with pytest.raises(UserError, match="No space left on device"):
        prepared(made, made.INFO, None, {}, small_disk / "cache")
    assert not [path for path in (small_disk / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("words", ["chunk writer is unhealthy", "Failed to append record"])
def test_a_full_disk_is_noticed_whatever_array_record_says(tmp_path, monkeypatch, words):
    def full(self, record):
        raise RuntimeError(words)

    monkeypatch.setattr("unimed_jax.data.prepare.ArrayRecordWriter.write", full, raising=False)
    made = noise(3)
    # the disk has room: a fault of ours, with its traceback
    with pytest.raises(RuntimeError, match=words):
        prepared(made, made.INFO, None, {}, tmp_path)
    monkeypatch.setattr(files, "_refusal", lambda folder: "No space left on device")
    with pytest.raises(
        UserError, match="could not be written .No space left on device.*free some space"
    ):
        prepared(made, made.INFO, None, {}, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# ---- two at once, and kills ------------------------------------------------------------------------


def slow(folder, split, options, skipped):
    for pair in squares.read(folder, split, options, skipped):
        time.sleep(0.002)
        yield pair


class Slow:
    INFO, read = squares.INFO, staticmethod(slow)


def build(cache, queue):
    started = time.monotonic()
    store = prepared(Slow, Slow.INFO, None, {}, cache)
    queue.put((store.checksum, time.monotonic() - started))


def test_of_two_builders_the_second_waits_and_finds_it(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=build, args=(tmp_path, queue)) for _ in range(3)]
    [w.start() for w in workers]
    results = [queue.get(timeout=60) for _ in workers]
    [w.join() for w in workers]
    assert len({checksum for checksum, _ in results}) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder_of(tmp_path).name]


def test_a_killed_build_leaves_nothing_half(tmp_path):
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=build, args=(tmp_path, context.Queue()))
    worker.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".squares-*/examples-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name[0] != "."]
    assert list(tmp_path.glob(".squares-*/"))
    store = prepared(Slow, Slow.INFO, None, {}, tmp_path)
    assert len(store.examples("train")) == 144 and not list(tmp_path.glob(".squares-*/manifest.json"))
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1  # the remains are gone


# ---- what a reader may do wrong --------------------------------------------------------------------


def reader(*pairs, **info):
    """A reader whose train split is `pairs`."""

    class Made:
        INFO = Info("made", ("vqa", "qa"), **info)

        @staticmethod
        def read(folder, split, options, skipped):
            if split == "train":
                yield from pairs

    return Made


BLACK = np.zeros((2, 2, 3), np.uint8)
FAULTS = {
    "one id twice": (
        [(Example("a", "qa", "q", "a"), ()), (Example("a", "qa", "r", "b"), ())],
        "id 'a' stands twice",
    ),
    "nothing": ([], "data set made has no example; check its path and options"),
    "no image": ([(Example("a", "vqa", "q", "a"), ())], "record made/a: task 'vqa' needs an image"),
    "image for text": (
        [(Example("a", "qa", "q", "a", ("k",)), (BLACK,))],
        "record made/a: .*takes no image",
    ),
    "unknown task": ([(Example("a", "vga", "q", "a"), ())], "record made/a: task 'vga' is unknown"),
    "a blank answer": (
        [(Example("a", "qa", "q", " \n"), ())],
        "1 records left out: train: a: its answer is empty",
    ),
    "an id of halves": (
        [(Example("\ud800", "qa", "q", "a"), ())],
        r"record made/.ud800: its id holds half of a surrogate",
    ),
    "a cluster of halves": (
        [(Example("a", "qa", "q", "a", cluster="\udc00"), ())],
        "record made/a: its cluster holds half",
    ),
    "a key of meta": (
        [(Example("a", "qa", "q", "a", meta={"\udc00": "b"}), ())],
        "record made/a: its meta holds half",
    ),
    "a template": (
        [(Example("a", "qa", "q", "a", meta={"template": "\udc00"}), ())],
        "record made/a: its meta holds half",
    ),
    "a number for a text": (
        [(Example("a", "qa", "q", 7), ())],
        "record made/a: its answer is 7, which is no text",
    ),
    "a number in meta": (
        [(Example("a", "qa", "q", "a", meta={"b": 7}), ())],
        "record made/a: its meta is 7, which is no",
    ),
    "a folder as image": (
        [(Example("a", "vqa", "q", "a", ("k",)), (".",))],
        "train: a: image . is a folder, where a file",
    ),
    "lost files": (
        [(Example("a", "vqa", "q", "a", ("k",)), ("no.png",))],
        "1 records left out: train: a: no image no",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_reader_is_one_sentence(tmp_path, fault):
    pairs, sentence = FAULTS[fault]
    made = reader(*pairs)
    with pytest.raises(UserError, match=sentence):
        prepared(made, made.INFO, None, {}, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_other_numbers_than_the_expected_ones_are_said_once(tmp_path, capsys):
    made = reader((Example("a", "qa", "q", "a"), ()))
    (split,) = prepared(made, made.INFO, None, {}, tmp_path / "plain").splits
    right = dataclasses.replace(made.INFO, counts={split: 1})
    prepared(made, right, None, {}, tmp_path)
    wrong = dataclasses.replace(made.INFO, counts={split: 3, "more": 2})
    # the counts are those without options
    prepared(made, wrong, None, {"some": 1}, tmp_path / "options")
    assert "than expected" not in capsys.readouterr().out
    for _ in range(2):
        prepared(made, wrong, None, {}, tmp_path)
    said = capsys.readouterr().out
    assert (
        said.count(f"made: other numbers of examples than expected ({split} 1, not 3; more 0, not 2)")
        == 1
    )


MODULES = {
    "nowhere.at_all": (None, "module 'nowhere.at_all' does not import .No module named 'nowhere'"),
    "lab.broken": (
        "import not_there",
        "module 'lab.broken' does not import .No module named 'not_there'",
    ),
    "lab.bare": ("x = 1", "module 'lab.bare' is not a reader, because it lacks INFO .an Info. or read"),
}


@pytest.mark.parametrize("name", [*MODULES, "brian"])
def test_a_name_that_is_not_a_reader(tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(tmp_path))
    text, sentence = MODULES.get(name, (None, "'brian' is not a data set; did you mean 'brain'"))
    (tmp_path / "lab").mkdir()
    if text:
        (tmp_path / "lab" / f"{name.partition('.')[2]}.py").write_text(text)
    for module in [m for m in sys.modules if m.split(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UserError, match=f"config.data.sources: {sentence}"):
        open_sources(DataConfig((SourceConfig(name),), cache=str(tmp_path)))


def test_a_generic_source_takes_its_passport_from_info_json_and_the_settings(tmp_path):
    (tmp_path / "raw").mkdir()
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    (tmp_path / "raw" / "train.json").write_text(json.dumps([{"conversations": talk}]))
    fields = {"name": "llava", "path": str(tmp_path / "raw")}

    def info(**given):
        (data,) = open_sources(
            DataConfig((SourceConfig(**fields, info=given),), cache=str(tmp_path / "cache"))
        )
        return data.info

    assert info().licence == "licence not stated"
    (tmp_path / "raw" / "info.json").write_text(
        json.dumps({"licence": "CC BY 4.0", "note": "one clinic"})
    )
    assert (info().licence, info().note) == ("CC BY 4.0", "one clinic")
    assert info(licence="mine").licence == "mine"
    (tmp_path / "raw" / "info.json").write_text(json.dumps({"license": "CC BY 4.0"}))
    with pytest.raises(UserError, match="info.json: key 'license' is unknown; did you mean 'licence'"):
        info()


def test_a_contact_sheet_of_text_alone_is_left_out(tmp_path):
    from unimed_jax.data.contact_sheet import contact_sheet

    (texts,) = opened(tmp_path, tasks=("qa",))
    assert (
        contact_sheet([texts], tmp_path / "sheet.png") is None and not (tmp_path / "sheet.png").exists()
    )
    (all_tasks,) = opened(tmp_path)
    assert contact_sheet([texts, all_tasks], tmp_path / "sheet.png") == tmp_path / "sheet.png"
