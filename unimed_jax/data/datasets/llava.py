"""Conversations about images in the JSON of LLaVA-Med and Med-MoE.

A list of {"id", "image": name or list of names, "conversations": [{"from": "human" or "gpt",
"value"}]}, with "answer_type" and "modality" (or LLaVA-Med's "domain") where a file has them; or
such records one a line. `path` is a file of them, all of it for training, or a folder with
train.json, val.json and test.json, or some of them (.jsonl, too); images lie in `images` next to
it, or right there.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.forms import IMAGE, turns_of
from unimed_jax.data.image_shards import no_image
from unimed_jax.data.info import Info
from unimed_jax.data.records import inside, optional, records, short, word
from unimed_jax.errors import UserError

ENDINGS = (".json", ".jsonl")
SPELLINGS = ("conversations", "conversatons")  # the second is LLaVA-Med's own
FORM = "give a list of records in LLaVA's form, or one record a line"

INFO = Info(
    name="llava",
    tasks=("vqa", "qa"),
    cluster_word="image",
    files=tuple(f"{split}{ending}" for ending in ENDINGS for split in ("train", "val", "test")),
)


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields one example for each conversation, whose last turn is the question.

    The task is vqa, or qa without an image; the earlier turns are `history`.

    A record is skipped if the file of its image cannot be read. All other faults raise UserError.
    """
    assert folder is not None  # INFO names files
    file = _file(folder, split)
    if file is None:
        return
    images = file.parent / "images"
    if not images.is_dir():
        images = file.parent
    for number, (where, record) in enumerate(records(file, FORM, SPELLINGS)):
        example = _example(record, where, f"{split}/{number}")
        paths = tuple(inside(file.parent, images, name, where) for name in example.images)
        lost = next(filter(None, map(no_image, paths)), "")
        if lost:
            skipped.append(f"{record.get('id', number)}: {lost}")
        else:
            yield example, paths


def _file(folder: Path, split: str) -> Path | None:
    """Returns the file that holds a split, or None if the set has no such split."""
    if not folder.is_dir():
        if folder.suffix not in ENDINGS:
            raise UserError(f"{folder} is neither a folder nor a .json or .jsonl file; {FORM}, as path.")
        return folder if split == "train" else None
    found = [path for ending in ENDINGS if os.path.lexists(path := folder / f"{split}{ending}")]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} stand side by side; remove one of them.")
    # A set that is only tested on has no train.json.
    if split == "train" and not any(os.path.lexists(folder / name) for name in INFO.files):
        raise UserError(
            f"{folder / 'train.json'} does not exist; give a .json or .jsonl file, or a folder with "
            "train.json, as path."
        )
    return found[0] if found else None


def _example(record: dict[str, Any], where: str, name: str) -> Example:
    """Turns the record into an example; its image keys are the names of the files.

    `where` is for errors.
    """
    messages = next((record[key] for key in SPELLINGS if key in record), None)
    image = optional(record, "image", where) or []
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(entry, str) for entry in images):
        raise UserError(f"{where}: 'image' is {short(image)}; give a file's name, or a list of them.")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError(
            f"{where}: 'conversations' must be a list of {{'from': ..., 'value': ...}}; mend the record."
        )
    # An answer that is null counts as an empty one, which whoever prepares the set leaves out.
    turns = turns_of([message | {"value": message["value"] or ""} for message in messages], where)
    marks = [question.count(IMAGE) for question, _ in turns]
    if (
        any(IMAGE in answer for _, answer in turns)
        or sum(marks) != len(images)
        or sum(marks) != marks[0]
    ):
        raise UserError(
            f"{where}: {len(images)} images, and {IMAGE} {sum(marks)} times in its questions; write "
            "it once for each image, in the first question."
        )
    asked = [(question.replace(IMAGE, "").strip(), answer) for question, answer in turns]
    *history, (question, answer) = asked
    kind = word(record, "answer_type", where)
    facts = {"template": kind.lower(), "answer_type": kind, "modality": _modality(record, where)}
    meta = {key: value for key, value in facts.items() if value}
    task = "vqa" if images else "qa"
    key = images[0] if images else ""
    return Example(name, task, question, answer, tuple(images), None, key or name, meta, tuple(history))


def _is_message(message: Any) -> bool:
    """Says whether a value is a message, {"from": text, "value": text}.

    The value of an answer may be null.
    """
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("from"), str)
        or "value" not in message
    ):
        return False
    return isinstance(message["value"], str) or (message["value"] is None and message["from"] == "gpt")


def _modality(record: dict[str, Any], where: str) -> str:
    """Returns the modality of a record, from its `modality` or from LLaVA-Med's `domain`.

    `domain` is {"mri": true, "ct_scan": false, ...}; the one that is true counts.
    """
    domain = optional(record, "domain", where)
    true = [name for name, holds in domain.items() if holds is True] if isinstance(domain, dict) else []
    return word(record, "modality", where) or (true[0] if len(true) == 1 else "")
