"""Reads any lab's own data, one JSON object a line: all six tasks, 0 to n images, boxes in pixels.

    {"id": "case7/1", "images": ["case7/a.png"], "task": "vqa",
     "question": "Is there a fracture?", "answer": "no",
     "split": "train", "cluster": "case7", "meta": {"modality": "X-ray"}}

`path` is such a file, or a folder of them; images lie in the file's folder. SCHEMA says what each
key may hold, and `python -m unimed_jax.main data schema` prints it. A record with `boxes` in place
of a task, a question and an answer stands for the questions that data/grounding.py makes of them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.config import TASKS
from unimed_jax.data import grounding
from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.example import Example
from unimed_jax.data.grounding import Labelled
from unimed_jax.data.image_shards import no_image
from unimed_jax.data.info import Info
from unimed_jax.data.records import (
    Record,
    check_keys,
    chosen_options,
    inside,
    records,
    short,
    size_of,
    word,
)
from unimed_jax.errors import UserError

GROUNDED = ("refer", "identify")  # tasks with a box
_BOX = {
    "type": "array",
    "items": {"type": "number", "minimum": 0},
    "minItems": 4,
    "maxItems": 4,
    "description": (
        "x1, y1, x2, y2 in pixels of the upright image, from its upper left corner; the ends are outside"
    ),
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A record of the data set `jsonl`",
    "type": "object",
    "properties": {
        "id": {"type": ["string", "integer"], "description": "its own over all splits"},
        "images": {
            "type": "array",
            "items": {"type": "string"},
            "description": "paths, from the file's folder on",
        },
        "task": {"enum": list(TASKS)},
        "question": {
            "type": "string",
            "description": "refer: the words for the thing; caption: may be absent",
        },
        "answer": {
            "type": "string",
            "description": "refer: may be absent, the box says it; identify: the name",
        },
        "box": _BOX | {"description": f"tasks refer and identify: {_BOX['description']}"},
        "boxes": {
            "type": "array",
            "description": "in place of task, question and answer: the things in the only image",
            "items": {
                "type": "object",
                "properties": {"label": {"type": "string"}, "box": _BOX},
                "required": ["label", "box"],
                "additionalProperties": False,
            },
        },
        "split": {"enum": ["train", "val", "test"]},
        "cluster": {"type": "string", "description": "what belongs together, a patient for example"},
        "meta": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["id", "split"],
    "oneOf": [{"required": ["task"]}, {"required": ["boxes"]}],
    "additionalProperties": False,
}

INFO = Info(name="jsonl", tasks=TASKS, files=("*.jsonl",))


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the records of a split, in the order of the files and their lines."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, grounding.OPTIONS, "jsonl")
    grounding.check_options(chosen, "jsonl")
    for file in sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]:
        for where, record in records(file, "give one object a line"):
            check_keys(record, tuple(SCHEMA["properties"]), where)
            if word(record, "split", where, required=True) not in INFO.splits:
                raise UserError(
                    f"{where}: split {record['split']!r} is none of {', '.join(INFO.splits)}."
                )
            if record["split"] == split:
                yield from _examples(record, file.parent, where, chosen, skipped)


def _examples(
    record: Record, folder: Path, where: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the examples that one record describes."""
    name = word(record, "id", where, required=True, numbers=True)
    keys = record.get("images", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{where}: 'images' is {short(keys)}; give a list of paths.")
    paths = tuple(inside(folder, folder, key, where) for key in keys)
    meta = record.get("meta", {})
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise UserError(f"{where}: 'meta' is {short(meta)}; give an object of texts.")
    cluster = word(record, "cluster", where)
    cluster = cluster or (keys[0] if keys else "")
    if "boxes" in record:
        for example in _questions(record, name, keys, paths, where, options, skipped):
            yield dataclasses.replace(example, cluster=cluster, meta={**example.meta, **meta}), paths
        return
    task = word(record, "task", where, required=True)
    question, answer = word(record, "question", where), word(record, "answer", where)
    box = None
    if ("box" in record) != (task in GROUNDED):
        raise UserError(
            f"{where}: task {task!r} "
            + (
                "takes no box; leave it out."
                if "box" in record
                else "needs a box; give [x1, y1, x2, y2] in pixels."
            )
        )
    if "box" in record:
        box = _box(record["box"], where)
        size = _size(paths, where)
        reason = size if isinstance(size, str) else grounding.fault(box, *size)
        if reason:
            skipped.append(f"{name}: {reason}")
            return
        text = box_to_text(box, *size)
        question, answer = (question, text) if task == "refer" else (text, answer)
    yield Example(name, task, question, answer, tuple(keys), box, cluster, meta), paths


def _questions(
    record: Record,
    name: str,
    keys: Sequence[str],
    paths: Sequence[Path],
    where: str,
    options: Mapping[str, Any],
    skipped: list[str],
) -> Iterator[Example]:
    """Yields the questions about the labelled boxes of a record."""
    found = record["boxes"]
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and entry.keys() == {"label", "box"} for entry in found
    ):
        raise UserError(
            f"{where}: 'boxes' is {short(found)}; give a list of {{'label': ..., 'box': ...}}."
        )
    size = _size(paths, where)
    if isinstance(size, str):
        skipped.append(f"{name}: {size}")
        return
    things = grounding.usable(
        (
            (name, Labelled(word(entry, "label", where, required=True), _box(entry["box"], where)))
            for entry in found
        ),
        size,
        skipped,
    )
    for example in grounding.questions(keys[0], things, size, options, cluster="", meta={}):
        yield dataclasses.replace(example, id=name + example.id.removeprefix(keys[0]))


def _box(value: Any, where: str) -> tuple[int, int, int, int]:
    """Reads a box, rounded to whole pixels."""
    if not isinstance(value, list) or len(value) != 4 or not all(type(v) in (int, float) for v in value):
        raise UserError(f"{where}: a box is {short(value)}; give [x1, y1, x2, y2] in pixels.")
    x1, y1, x2, y2 = (round(v) for v in value)
    return x1, y1, x2, y2


def _size(paths: Sequence[Path], where: str) -> tuple[int, int] | str:
    """Returns the size of the only image, or why its boxes cannot be used."""
    if len(paths) != 1:
        raise UserError(f"{where}: its boxes are about {len(paths)} images; give exactly one.")
    return no_image(paths[0]) or size_of(paths[0])
