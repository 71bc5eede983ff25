"""Preparing a set by several processes: the same store as by one, goes on after a kill, strict."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.reading import everything, left_out, opened

from unimed_jax import files
from unimed_jax import main as cli
from unimed_jax.config import DataConfig, ImageConfig, ReencodeConfig, SourceConfig
from unimed_jax.data import image_shards
from unimed_jax.data import store as store_module
from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.example import Example
from unimed_jax.data.grounding import fault
from unimed_jax.data.image_shards import encoded, processes
from unimed_jax.data.images import PLAIN
from unimed_jax.data.info import Info
from unimed_jax.data.prepare import How, prepared
from unimed_jax.data.store import RECORDS, Store, pack
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError

FIRST = r"made has a record that is left out \(train: train/0: its answer is empty\), which config"
INFO = Info("made", ("vqa", "qa"), splits=("train", "test"), files=("*",))


class Made:
    """Pictures as files, bytes and pixels, some of them damaged or missing, and questions of text."""

    INFO = INFO

    @staticmethod
    def read(folder, split, options, skipped):
        for i in range(options["count"]):
            name = f"{i // 2}.png"  # two questions an image, in a row
            if i % 11 == 3:
                skipped.append(f"{split}/{i}: the reader refuses it")
                continue
            if i % 7 == 0:
                yield Example(f"{split}/{i}", "qa", f"{i}?", "yes" if i % 3 else " "), ()
                continue
            pixels = np.full((4, 6, 3), i // 2, np.uint8)
            sources = [folder / name, pixels]
            if i % 5 == 0:
                sources[0] = (folder / name).read_bytes() if (folder / name).exists() else b""
            keys = (f"{split}/{name}", f"pixels/{i // 2}")
            yield Example(f"{split}/{i}", "vqa", f"{i}?", str(i), keys, cluster=f"c{i % 4}"), sources


def write_pictures(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count // 2):
        if i % 13 == 5:
            (folder / f"{i}.png").write_text("no picture")
        elif i % 13 != 9:
            Image.fromarray(rng.integers(0, 256, (8, 9, 3), np.uint8)).save(folder / f"{i}.png")


def checksum_by_definition(made, folder, options):
    """The checksum as data/store.py and the layout define it: one record after the other."""
    digest, stored = hashlib.sha256(f"{RECORDS}\0{made.INFO.version}".encode()), set()
    for split in made.INFO.splits:
        for example, sources in made.read(folder, split, options, []):
            contents = {}
            for key, source in zip(example.images, sources, strict=True):
                if isinstance(source, np.ndarray):
                    contents[key] = str(source.shape).encode() + source.tobytes()
                elif isinstance(source, bytes) or source.exists():
                    contents[key] = source if isinstance(source, bytes) else source.read_bytes()
                else:
                    contents[key] = b""
            whole = all(len(content) > 20 for content in contents.values())
            if not whole or not example.answer.strip():
                continue
            for key, content in contents.items():
                if key not in stored:
                    stored.add(key)
                    digest.update(f"\0{key}\0".encode() + hashlib.sha256(content).digest())
            digest.update(f"\0{split}\0".encode() + pack(example))
    return digest.hexdigest()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(image_shards, "FIRST", 4)
    monkeypatch.setattr(image_shards, "LAST", 16)


def content(store):
    keys = {key for split in store.splits for e in store.examples(split) for key in e.images}
    return (
        [(split, list(store.examples(split))) for split in store.splits],
        {key: store.image(key).tobytes() for key in keys},
        (store.folder / "skipped.txt").read_text(),
        store.checksum,
    )


def test_any_number_of_processes_prepares_the_same_store(tmp_path, small_chunks, monkeypatch):
    options = {"count": 150}
    write_pictures(tmp_path / "raw", 150)
    monkeypatch.setattr(store_module, "OPEN", 3)  # of more than ten shards
    found = {}
    for workers in (0, 2):
        with processes(workers) as pool:
            how, cache = How(workers=workers, pool=pool), tmp_path / str(workers)
            with pytest.raises(UserError, match=FIRST):
                prepared(Made, INFO, tmp_path / "raw", options, cache, how._replace(strict=True))
            store = prepared(Made, INFO, tmp_path / "raw", options, cache, how)
        found[workers] = content(store), sorted(path.name for path in store.folder.rglob("*"))
    assert found[0] == found[2]
    examples, images, skipped, checksum = found[0][0]
    assert checksum == checksum_by_definition(Made, tmp_path / "raw", options)
    assert [len(some) for _, some in examples] == [len(examples[0][1])] * 2 and len(images) > 150
    lines = skipped.splitlines()
    assert [int(re.search(r"train/(\d+)", line)[1]) for line in lines if line[:5] == "train"] == sorted(
        int(re.search(r"train/(\d+)", line)[1]) for line in lines if line[:5] == "train"
    )
    for words in ("the reader refuses it", "its answer is empty", "no image", "none of the formats"):
        assert words in skipped
    assert len([name for name in found[0][1] if name.startswith("images-")]) > 10
    assert not any("fact" in name or name.startswith(".") for name in found[0][1])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {tests!r}
import test_prepare as t
from unimed_jax.data import image_shards, prepare
image_shards.FIRST, image_shards.LAST = 4, 16
before = image_shards.store_chunk
def store_chunk(place, number, *given):
    if number == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(place, number, *given)
image_shards.store_chunk = store_chunk
prepare.prepared(t.Made, t.INFO, Path({raw!r}), {{"count": 150}}, Path({cache!r}))
"""


def test_a_killed_command_goes_on_without_doing_finished_shards_again(
    tmp_path, small_chunks, monkeypatch
):
    raw, cache, options = tmp_path / "raw", tmp_path / "cache", {"count": 150}
    write_pictures(raw, 150)
    expected = content(prepared(Made, INFO, raw, options, tmp_path / "whole"))
    here = Path(__file__).parent
    tests = [str(here), str(here.parent)]  # this file, and `support`
    code = KILLED.format(tests=tests, raw=str(raw), cache=str(cache), at=6)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    (work,) = cache.glob(".made-*.unfinished")
    assert not [path for path in cache.iterdir() if path.name[0] != "."]  # nothing half under its name
    shards = sorted(work.glob("images-*"))
    assert len(shards) == 6 == len(list((work / "facts").glob("*.json")))
    before = {path.name: path.stat().st_mtime_ns for path in shards}
    # one shard is cut, one has lost its facts, one source of another has changed since
    os.truncate(shards[1], 40)
    (work / "facts/00002.json").write_text('{"identity": "')
    changed = json.loads((work / "facts/00003.json").read_text())["outcomes"]
    name = next(key for key, outcome in changed.items() if outcome[0] and key.startswith("train/"))
    os.utime(raw / name.removeprefix("train/"), (1, 1))
    (work / "images-09999.array_record").write_text("of an earlier try, which had more")
    done = []
    whole = image_shards.store_chunk
    monkeypatch.setattr(
        image_shards, "store_chunk", lambda place, n, *given: done.append(n) or whole(place, n, *given)
    )
    store = prepared(Made, INFO, raw, options, cache)
    assert content(store) == expected
    assert done[:3] == [1, 2, 3] and not {0, 4, 5} & set(done) and 6 in done
    after = {name: (store.folder / name).stat().st_mtime_ns for name in before}
    again = [name for name in before if before[name] != after[name]]
    assert again == [shards[i].name for i in (1, 2, 3)]
    assert not list(cache.glob(".made-*.unfinished"))
    assert not (store.folder / "images-09999.array_record").exists()


def test_what_was_left_of_another_set_a_week_ago_is_removed(tmp_path):
    write_twin("jsonl", tmp_path / "set", records=3)
    old, young = (tmp_path / f"cache/.{name}-0123456789.unfinished" for name in ("old", "young"))
    for folder in (old, young):
        (folder / "facts").mkdir(parents=True)
    for folder in (old / "facts", old):
        os.utime(folder, (time.time() - 8 * 24 * 3600,) * 2)
    opened(tmp_path / "set", "jsonl")
    assert not old.exists() and young.exists()


def test_strict_stops_at_the_first_record(tmp_path, small_chunks, monkeypatch):
    write_pictures(tmp_path / "raw", 60)
    options, cache = {"count": 60}, tmp_path / "cache"
    for seconds in (0.0, 60.0):  # after long work its shards are kept for when the record is mended
        monkeypatch.setattr(files, "WORTH_KEEPING", seconds)
        with pytest.raises(UserError, match=FIRST):
            prepared(Made, INFO, tmp_path / "raw", options, cache, How(strict=True))
        assert len(list(cache.glob(".made-*.unfinished"))) == (seconds == 0)
    store = prepared(Made, INFO, tmp_path / "raw", options, cache)
    assert store.skipped > 5
    with pytest.raises(UserError, match=FIRST):  # it is there already
        prepared(Made, INFO, tmp_path / "raw", options, cache, How(strict=True))


def test_strict_is_a_setting_of_the_data(tmp_path):
    write_twin("medpix2", tmp_path / "set", records=30)
    source = SourceConfig("medpix2", path=str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"medpix2 has a record .*placeholder.*; mend the record"):
        open_sources(DataConfig((source,), cache=str(tmp_path / "cache"), strict=True))
    (data,) = open_sources(DataConfig((source,), cache=str(tmp_path / "cache")))
    assert "placeholder" in left_out(data)[0]


def test_errors_come_in_the_order_of_the_records(tmp_path):
    """A later error of the reader does not hide the record at which strict stops."""

    class Broken:
        INFO = Info("made", ("vqa",), splits=("train",))

        @staticmethod
        def read(folder, split, options, skipped):
            yield Example("a", "vqa", "q", "a", ("k",)), ("no.png",)
            raise UserError("the table ends here.")

    with pytest.raises(UserError, match="the table ends here"):
        prepared(Broken, Broken.INFO, None, {}, tmp_path)
    with pytest.raises(UserError, match="train: a: no image no.png"):
        prepared(Broken, Broken.INFO, None, {}, tmp_path, How(strict=True))


# ---- encoded again ---------------------------------------------------------------------------------
def kind_of(data):
    return {b"\x89PN": "png", b"\xff\xd8\xff": "jpeg", b"RIF": "webp", b"II*": "tiff"}[data[:3]]


def test_images_are_encoded_again_only_if_asked(tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 256, (30, 40, 1), np.uint8), 3, axis=2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=99)
    for name in ("a.png", "a.jpg"):
        original = (tmp_path / name).read_bytes()
        kind = kind_of(original)
        for settings in (ReencodeConfig(), ReencodeConfig(size=40), ReencodeConfig(size=41)):
            outcome, data = encoded("k", tmp_path / name, PLAIN, settings)
            assert data == original and outcome.sizes is None
            assert outcome.digest == hashlib.sha256(original).hexdigest()
        outcome, data = encoded("k", tmp_path / name, PLAIN, ReencodeConfig(size=20))
        assert kind_of(data) == kind and outcome.sizes == (40, 30, 20, 15)
        for wanted in ("png", "jpeg", "webp"):
            outcome, data = encoded("k", original, PLAIN, ReencodeConfig(format=wanted))
            assert kind_of(data) == wanted and outcome.sizes is None
    good, poor = (
        encoded("k", tmp_path / "a.png", PLAIN, ReencodeConfig(format="jpeg", quality=q))
        for q in (95, 20)
    )
    assert len(good[1]) > 2 * len(poor[1]) and good[0].digest != poor[0].digest
    outcome, _ = encoded("k", original[:200], PLAIN, ReencodeConfig(size=20))
    assert outcome.reason.startswith("image") and not outcome.digest


def test_a_chosen_frame_is_what_is_encoded_again(tmp_path):
    """The settings of reading are used once: what is stored has one frame, whatever its size was."""

    class Pages:
        INFO = Info("made", ("vqa",), splits=("train",))

        @staticmethod
        def read(folder, split, options, skipped):
            yield Example("a", "vqa", "q", "a", ("k",)), (tmp_path / "pages.tif",)

    pages = [Image.new("RGB", (9, 6), (shade, 0, 0)) for shade in (10, 20, 30)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    last = How(ImageConfig(frame="last"))
    for size in (0, 5, 100):
        how = last._replace(reencode=ReencodeConfig(size=size))
        store = prepared(Pages, Pages.INFO, None, {}, tmp_path / "cache", how)
        assert store.image("k").max() == 30 and max(store.image("k").shape) == (5 if size == 5 else 9)
        assert kind_of(store.encoded("k")) == ("png" if size else "tiff")
        assert store.films == (not size)


def test_smaller_images_are_another_set_with_fitting_boxes(tmp_path):
    write_twin("voc", tmp_path / "set", records=6)
    cache, source = str(tmp_path / "cache"), SourceConfig("voc", path=str(tmp_path / "set"))
    small = ReencodeConfig(size=40)
    (one,) = open_sources(DataConfig((source,), cache=cache))
    (two,) = open_sources(DataConfig((source,), cache=cache, reencode=small))
    assert one.folder != two.folder and one.checksum != two.checksum
    (again,) = open_sources(DataConfig((source,), cache=cache, reencode=small))
    assert again.folder == two.folder
    boxes = 0
    for (_, a), (_, b) in zip(everything(one), everything(two), strict=True):
        assert (a.question, a.answer, a.images) == (b.question, b.answer, b.images)
        big, little = one.image(a.images[0]), two.image(b.images[0])
        assert max(little.shape) == 40 < max(big.shape)
        if a.box:
            boxes += 1
            shares = [
                np.array(box) / (2 * [image.shape[1], image.shape[0]])
                for box, image in ((a.box, big), (b.box, little))
            ]
            np.testing.assert_allclose(*shares, atol=0.04)
    assert boxes > 4


def test_a_box_at_the_edge_stays_in_its_smaller_image(tmp_path):
    """A box in the last pixels of an image, rounded, would lie outside of the smaller one."""
    boxes = {
        "right": (1020, 100, 1024, 140), "bottom": (100, 508, 140, 512),
        "corner": (1023, 511, 1024, 512), "whole": (0, 0, 1024, 512), "dot": (500, 200, 501, 201),
    }  # fmt: skip

    class Edges:
        INFO = Info("made", ("refer",), splits=("train",))

        @staticmethod
        def read(folder, split, options, skipped):
            for name, box in boxes.items():
                text = box_to_text(box, 1024, 512)
                pixels = np.zeros((512, 1024, 3), np.uint8)
                yield Example(name, "refer", name, text, ("k",), box), (pixels,)

    how = How(reencode=ReencodeConfig(size=64))
    store = prepared(Edges, Edges.INFO, None, {}, tmp_path / "cache", how)
    found = {example.id: example.box for example in store.examples("train")}
    assert found == {
        "right": (63, 6, 64, 9), "bottom": (6, 31, 9, 32), "corner": (63, 31, 64, 32),
        "whole": (0, 0, 64, 32), "dot": (31, 12, 32, 13),
    }  # fmt: skip
    assert not any(fault(box, 64, 32) for box in found.values())


# ---- the command -----------------------------------------------------------------------------------
CONFIG = """
from unimed_jax.config import default_config
def get_config():
    config = default_config()
    config.data.sources = (dict(name="voc"), dict(name="medpix2"), dict(name="voc", tasks=("refer",)))
    config.evaluate.sources = (dict(name="jsonl"),)
    config.data.root, config.data.cache = "{root}", "{root}/cache"
    return config
"""


def test_the_command_prepares_every_set_of_a_config(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text(CONFIG.format(root=tmp_path))
    for name in ("voc", "medpix2"):
        write_twin(name, tmp_path / name, records=6)
    words = ["data", "prepare", f"--config={file}", "--workers=0"]
    assert cli.main(words) == 2  # before anything is prepared
    assert f"{tmp_path}/jsonl does not exist" in capsys.readouterr().err
    write_twin("jsonl", tmp_path / "jsonl", records=6)
    assert cli.main([*words, "--image-size=30", "--image-format=jpeg", "--image-quality=80"]) == 0
    said = capsys.readouterr().out.splitlines()
    named = [line.split(":")[0] for line in said if "records left out; checksum" in line]
    assert named == ["voc", "medpix2", "jsonl"]
    assert said[-1].startswith("train with --config.data.reencode.size=30 --config.data.reencode.fo")
    stores = [Store(path) for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert {store.id for store in stores} == {"voc", "medpix2", "jsonl"}
    (voc,) = (store for store in stores if store.id == "voc")
    key = voc.examples("train")[0].images[0]
    assert kind_of(voc.encoded(key)) == "jpeg" and max(voc.image(key).shape) == 30
    assert cli.main([*words, "--strict"]) == 2
    assert "data set voc has a record that is left out (train: train_00000: " in capsys.readouterr().err
    for wrong, sentence in {
        "--workers=-1": "--workers=-1 cannot be; give 0 to 1024",
        "--image-size=x": "config.data.reencode.size",
        "--image-quality=50": "config.data.reencode.quality=50 has no effect",
        "--image-format=gif": "config.data.reencode.format: 'gif' is unknown; choose from '', png",
    }.items():
        assert cli.main([*words, wrong]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_processes_end_with_the_command(tmp_path):
    """Killed or stopped while two processes work: none of them lives on, and the next start ends it."""
    write_twin("voc", tmp_path / "voc", records=60)
    file = tmp_path / "c.py"
    file.write_text(
        CONFIG.format(root=tmp_path)
        .replace(', dict(name="medpix2")', "")
        .replace('(dict(name="jsonl"),)', "()")
    )
    words = [sys.executable, "-m", "unimed_jax.main", "data", "prepare", f"--config={file}"]
    for number in (signal.SIGKILL, signal.SIGINT):
        running = subprocess.Popen([*words, "--workers=2", "--image-size=20"], start_new_session=True)
        deadline = time.monotonic() + 60
        while not children(running.pid) and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.02)
        mine = children(running.pid)
        running.send_signal(number)
        assert running.wait(60) in (-number, 128 + number)
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in mine) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert mine and not any(alive(pid) for pid in mine)
    done = subprocess.run([*words, "--workers=2", "--image-size=20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
