"""Conversations about images in the JSON of LLaVA-Med and Med-MoE.

A list of {"id", "image": name or list of one, "conversations": [{"from": "human" or "gpt", "value"}]}, with
"answer_type" and "modality" (or LLaVA-Med's "domain") where a file has them. `path` is such a file, all of it for
training, or a folder with train.json, and val.json and test.json where there are any; images lie in `images` beside,
or right there.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import processes
from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import IMAGE, turns_of
from unimed_jax.data.images import read_image
from unimed_jax.errors import UserError

VERSION = "1"  # part of the checksum
SPLITS = ("train", "val", "test")
_NAMED = 5  # records of the left out that are printed


class Llava:
    """One example a conversation: its last turn asks (task vqa, or qa without an image), those before are `history`.

    `left_out`: "<split>: <id>: <why>" for each record whose image no longer exists, or that shows several images, for
    which an example has no place. All other faults raise UserError.
    """

    def __init__(self, path: str | Path, tasks: Sequence[str] = ()):
        path = Path(path)
        files = {"train": path} if path.suffix == ".json" else {s: path / f"{s}.json" for s in SPLITS}
        if not files["train"].is_file():
            raise UserError(f"{files['train']} does not exist; give a JSON file, or a folder with train.json, as path.")
        folder = files["train"].parent
        self.name = path.stem if path.suffix == ".json" else path.name
        self.left_out: list[str] = []
        self._images = folder / "images" if (folder / "images").is_dir() else folder
        self._examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
        there = functools.cache(lambda parent: set(os.listdir(parent)) if parent.is_dir() else set())
        digest = hashlib.sha256(VERSION.encode())
        for split, file in files.items():
            for number, record in enumerate(_records(file)):
                where = f"{file}, record {number}"
                digest.update(f"\0{split}\0{json.dumps(record, sort_keys=True)}".encode())
                example, images = _example(record, where, f"{split}/{number}")
                reason = "several images" if len(images) > 1 else ""
                if len(images) == 1:
                    at = self._images / images[0]
                    reason = "" if at.name in there(at.parent) else f"no image {at}"
                if reason:
                    self.left_out.append(f"{split}: {record.get('id', number)}: {reason}")
                elif not tasks or example.task in tasks:
                    self._examples[split].append(example)
        self.checksum = digest.hexdigest()

    def examples(self, split: str) -> Sequence[Example]:
        if split not in self._examples:
            raise UserError(f"data set {self.name} has no split {split!r}; choose from {', '.join(SPLITS)}.")
        return self._examples[split]

    def image(self, key: str) -> np.ndarray:
        return read_image(self._images / key)


def _records(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); restore it.") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file} is no list of records; give a file in LLaVA's form.")
    return records


def _example(record: dict[str, Any], where: str, name: str) -> tuple[Example, list[str]]:
    """The record as an example, and the names of all its images. `where` is for errors."""
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
    return Example(name, task, question, answer, tuple(images), None, key or name, meta, tuple(history)), images


def _modality(record: dict[str, Any]) -> str:
    """`modality`, or the one that is true of LLaVA-Med's {"domain": {"mri": true, "ct_scan": false, ...}}."""
    domain = record.get("domain")
    true = [name for name, holds in domain.items() if holds is True] if isinstance(domain, dict) else []
    return str(record.get("modality") or (true[0] if len(true) == 1 else ""))


def load(source: SourceConfig, data: DataConfig) -> Llava:
    """The conversations of `source.path`; what was left out is counted, named in part, and listed in a file."""
    made = Llava(source.path, source.tasks)
    if made.left_out and processes.leads():
        data.cache_folder.mkdir(parents=True, exist_ok=True)
        listed = data.cache_folder / f"{made.name}_left_out.txt"
        listed.write_text("\n".join(made.left_out) + "\n", encoding="utf-8")
        used = sum(len(made.examples(split)) for split in SPLITS)
        print(
            f"{made.name}: {len(made.left_out)} records left out, {used} used "
            f"({'; '.join(made.left_out[:_NAMED])}{' ...' if made.left_out[_NAMED:] else ''}); all in {listed}",
            flush=True,
        )
    return made
