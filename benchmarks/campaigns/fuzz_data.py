"""Makes an endless series of damaged data files for the readers of data sets.

The files are records of LLaVA, info.json, and the manifest and the index of a prepared set.

`cases(seed)` yields (name, call); a call reads one damaged input and returns, or raises UserError.
Anything else that it raises is a finding.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources
from unimed_jax.data.store import Store, crc_of

Call = Callable[[], None]

TALK = [
    {"from": "human", "value": "<image>\nIs it clear?"},
    {"from": "gpt", "value": "no"},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "yes"},
]
RECORDS: list[Any] = [
    {"id": "1", "image": "a.png", "conversations": TALK, "answer_type": "CLOSED", "modality": "MRI"},
    {"id": 2, "image": ["a.png"], "conversations": TALK[:2], "domain": {"mri": True, "ct_scan": False}},
    {
        "id": "3",
        "conversations": [
            {"from": "human", "value": "What is a lung?"},
            {"from": "gpt", "value": "an organ"},
        ],
    },
]
INFO: Any = {"licence": "CC0", "citation": "nobody", "note": "made up", "cluster_word": "image"}

# What takes the place of any value, or of a key.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\u200b",
        "\ud800",
        "\udcff",
        "\0",
        "\ufeff",
        "x" * 5000,
        "../../a.png",
        "/etc/passwd",
        ".",
        "<image>",
    ),
    *([], {}, [[]], [None], ["\ud800"], {"\ud800": 1}, {"": ""}, [[[[[]]]]], ["a.png", "a.png"]),
]
# What takes the place of any byte, or comes between two.
BYTES = [
    *(b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"\\", b"\\ud800"),
    *(b"{", b"[", b",", b"\n", b"e9"),
]
# Files that are damaged as a whole.
WHOLES = [
    *(
        b"",
        b"\0" * 64,
        b"{",
        b"[",
        b"[]",
        b"{}",
        b"null",
        b"NaN",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe[\0]\0",
    ),
    *(
        b"[" + b"1," * 50_000 + b"1]",
        b'["' + b"\\u0000" * 1000 + b'"]',
        b"9" * 10_000,
        b"\x93NUMPY\x01\0",
    ),
]


def cases(seed: int) -> Iterator[tuple[str, Call]]:
    """Yields (name, call) endlessly, the same ones for the same seed.

    The files lie in a folder that is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="unimed_jax_fuzz_") as name:
        place = Path(name)
        raw, whole = place / "raw", place / "whole"
        (raw / "images").mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(raw / "images" / "a.png")
        (raw / "train.json").write_text(json.dumps(RECORDS))
        (data,) = _opened(raw, place / "first")
        shutil.copytree(data.folder, whole)
        makers = [_records(raw, place), _info(raw, place), _manifest(whole, place), _files(whole, place)]
        for i in itertools.count():
            rng = random.Random(seed << 32 | i)
            name, call = makers[i % len(makers)](rng)
            yield f"{name}, seed {seed}, case {i}", functools.partial(_quietly, call)


def _quietly(call: Call) -> None:
    """Runs the call without what it prints, such as records that are left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        call()


# ---- inputs ----------------------------------------------------------------------------------------
def _opened(raw: Path, cache: Path, **fields: Any):
    source = SourceConfig("llava", path=str(raw), **fields)
    return open_sources(DataConfig((source,), cache=str(cache)))


def _read_all(store: Any) -> None:
    """Reads every example, column and image of an open set."""
    for split in store.splits:
        for example in store.examples(split):
            for key in example.images:
                store.image(key)
        columns = store.columns(split)
        for name in columns.meta_keys:
            column = columns.meta(name)
            _ = [column.texts[code] for code in column.codes if code >= 0]
        _ = list(columns.cluster.texts)


def _records(raw: Path, place: Path) -> Callable[[random.Random], tuple[str, Call]]:
    def make(rng: random.Random) -> tuple[str, Call]:
        here = place / "records"
        text, how = _damaged(RECORDS, rng)

        def call() -> None:
            shutil.rmtree(here, ignore_errors=True)
            (here / "images").mkdir(parents=True)
            shutil.copy(raw / "images" / "a.png", here / "images")
            (here / "train.json").write_bytes(text)
            for data in _opened(here, here / "cache"):
                _read_all(data)

        return f"records, {how}", call

    return make


def _info(raw: Path, place: Path) -> Callable[[random.Random], tuple[str, Call]]:
    def make(rng: random.Random) -> tuple[str, Call]:
        text, how = _damaged(INFO, rng)
        here = place / "info"

        def call() -> None:
            if not here.exists():
                shutil.copytree(raw, here)
            (here / "info.json").write_bytes(text)
            (data,) = _opened(here, place / "info-cache")
            "\n".join(
                [data.info.licence, data.info.note, data.info.citation, data.info.cluster_word]
            ).encode()

        return f"info.json, {how}", call

    return make


def _manifest(whole: Path, place: Path) -> Callable[[random.Random], tuple[str, Call]]:
    def make(rng: random.Random) -> tuple[str, Call]:
        content = json.loads((whole / "manifest.json").read_text())
        # half of them have the right checksum, as an informed attacker would write it
        signed = rng.random() < 0.5
        if signed:
            changed = _changed(content, rng)
            if isinstance(changed, dict):
                changed["crc32"] = crc_of(changed)
            text, how = json.dumps(changed).encode(), "values and checksum"
        else:
            text, how = _damaged(content, rng)

        def call() -> None:
            _read_all(Store(_copied(whole, place / "manifest", {"manifest.json": text})))

        return f"manifest, {how}", call

    return make


def _files(whole: Path, place: Path) -> Callable[[random.Random], tuple[str, Call]]:
    files = sorted(path for path in whole.rglob("*") if path.is_file())

    def make(rng: random.Random) -> tuple[str, Call]:
        file = rng.choice(files)
        name = str(file.relative_to(whole))
        data = bytearray(file.read_bytes())
        how = rng.choice(("flipped", "cut", "zeros", "longer", "gone", "folder"))
        if how == "flipped" and data:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[rng.randrange(len(data) + 1) :]
        elif how == "zeros" and data:
            start = rng.randrange(len(data))
            data[start : start + 40] = bytes(len(data[start : start + 40]))
        elif how == "longer":
            data += rng.randbytes(rng.randint(1, 50))

        def call() -> None:
            here = _copied(whole, place / "files", {name: bytes(data)})
            if how in ("gone", "folder"):
                (here / name).unlink()
            if how == "folder":
                (here / name).mkdir()
            _read_all(Store(here))

        return f"store, {name} {how}", call

    return make


def _copied(whole: Path, here: Path, changed: dict[str, bytes]) -> Path:
    """Copies a prepared set with other contents of some files."""
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(whole, here)
    for name, data in changed.items():
        (here / name).write_bytes(data)
    return here


# ---- damage ----------------------------------------------------------------------------------------
def _damaged(content: Any, rng: random.Random) -> tuple[bytes, str]:
    """Writes damaged JSON to a file and says how it is damaged.

    The values, the lines or the bytes may be others, or the file may hold something else altogether.
    """
    how = rng.choice(("values", "values", "values", "lines", "bytes", "bytes", "whole"))
    if how == "whole":
        return rng.choice(WHOLES), how
    if how == "bytes":
        data = bytearray(json.dumps(content, ensure_ascii=rng.random() < 0.5).encode())
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            kind = rng.randrange(4)
            data[place : place + kind] = rng.choice(BYTES) if kind < 3 else b""
        return bytes(data), how
    changed = _changed(content, rng)
    if how == "lines" and isinstance(changed, list):
        return "\n".join(json.dumps(part) for part in changed).encode(), how
    return json.dumps(changed).encode(), how


def _changed(content: Any, rng: random.Random) -> Any:
    """Copies JSON with one to three values or keys replaced, removed, doubled or nested."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        holders = list(_holders(content))
        if not holders:
            break
        holder, key = rng.choice(holders)
        how = rng.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[str(rng.choice(VALUES))] = holder.pop(key)
        elif how == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == 3:
            depth = rng.choice((1, 3, 60, 110))
            for _ in range(depth):
                holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def _holders(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every (list or object, index or key) within."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield content, key
            yield from _holders(value)
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield content, i
            yield from _holders(value)
