"""Conversations about images in the JSON of LLaVA-Med and Med-MoE.

A list of {"id", "image": name or list of one, "conversations": [{"from": "human" or "gpt", "value"}]}, with
"answer_type" and "modality" (or LLaVA-Med's "domain") where a file has them. `path` is such a file, all of it for
training, or a folder with train.json, val.json and test.json, or some of them; images lie in `images` next to it, or
right there.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.forms import IMAGE, turns_of
from unimed_jax.data.info import Info
from unimed_jax.errors import UserError
from unimed_jax.files import read_json

LARGEST = 8 << 30  # bytes of a JSON file; the largest public ones have one

INFO = Info(
    name="llava",
    tasks=("vqa", "qa"),
    cluster_word="image",
    files=("train.json", "val.json", "test.json"),
)


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """One example a conversation: its last turn asks (task vqa, or qa without an image), those before are `history`.

    A record whose image no longer exists is skipped. All other faults raise UserError.
    """
    assert folder is not None  # INFO names files
    file = folder / f"{split}.json"
    if folder.suffix == ".json":
        file = folder if split == "train" else folder.with_suffix(".none")
    # A set that is only tested on has no train.json.
    if split == "train" and not file.is_file() and not any((folder / name).is_file() for name in INFO.files):
        raise UserError(f"{file} does not exist; give a JSON file, or a folder with train.json, as path.")
    images = file.parent / "images"
    if not images.is_dir():
        images = file.parent
    for number, record in enumerate(_records(file)):
        example = _example(record, f"{file}, record {number}", f"{split}/{number}")
        paths = tuple(images / name for name in example.images)
        lost = [path for path in paths if not path.is_file()]
        if lost:
            skipped.append(f"{record.get('id', number)}: no image {lost[0]}")
        else:
            yield example, paths


def _records(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    records = read_json(file, "restore it", LARGEST)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file} is not a list of records; give a file in LLaVA's form.")
    return records


def _example(record: dict[str, Any], where: str, name: str) -> Example:
    """The record as an example; its image keys are the names of the files. `where` is for errors."""
    messages = record.get("conversations", record.get("conversatons"))  # the second is LLaVA-Med's own spelling
    image = record.get("image") or []
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(entry, str) for entry in images):
        raise UserError(f"{where}: 'image' is {image!r}; give a file's name, or a list of them.")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("from"), str) and isinstance(m.get("value"), str) for m in messages
    ):
        raise UserError(f"{where}: 'conversations' must be a list of {{'from': ..., 'value': ...}}; mend the record.")
    turns = turns_of(messages, where)
    marks = [question.count(IMAGE) for question, _ in turns]
    if any(IMAGE in answer for _, answer in turns) or sum(marks) != len(images) or sum(marks) != marks[0]:
        raise UserError(
            f"{where}: {len(images)} images, and {IMAGE} {sum(marks)} times in its questions; write it once for "
            "each image, in the first question."
        )
    asked = [(question.replace(IMAGE, "").strip(), answer) for question, answer in turns]
    *history, (question, answer) = asked
    kind = str(record.get("answer_type", "")).strip()
    facts = {"template": kind.lower(), "answer_type": kind, "modality": _modality(record)}
    meta = {key: value for key, value in facts.items() if value}
    task = "vqa" if images else "qa"
    key = images[0] if images else ""
    return Example(name, task, question, answer, tuple(images), None, key or name, meta, tuple(history))


def _modality(record: dict[str, Any]) -> str:
    """`modality`, or the one that is true of LLaVA-Med's {"domain": {"mri": true, "ct_scan": false, ...}}."""
    domain = record.get("domain")
    true = [name for name, holds in domain.items() if holds is True] if isinstance(domain, dict) else []
    return str(record.get("modality") or (true[0] if len(true) == 1 else ""))
