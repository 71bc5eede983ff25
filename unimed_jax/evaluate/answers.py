"""Collects a model's answers to the examples of all units, and writes each batch as it comes.

A killed evaluation continues from them.

Batches are fixed by the examples: like lengths together, so that a batch of generation is not
longer than it must be. A batch that was answered before a kill is read from the journal, any other
is answered whole; so the answers do not depend on where the kill fell.
"""

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import files, processes
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Unit, permute_images

# Examples, the images of each (uint8 [H, W, 3]; none for text alone), a seed for sampling -> one
# answer each.
Answer = Callable[[Sequence[Example], Sequence[Sequence[np.ndarray]], int], list[str]]
JOURNAL = "predictions.partial.jsonl"


@dataclasses.dataclass(frozen=True)
class Answered:
    """Holds what a model said about one example."""

    prediction: str
    image_size: list[int] | None = None  # width, height of its first image
    permuted: str | None = None  # the answer to another example's images
    permuted_images: list[str] | None = None  # which


class Journal:
    """Keeps the answers so far, one line each, or whatever else is known of each question.

    Process 0 writes the file, all processes know its content.

    Lines of another fingerprint (other weights, settings or data) and damaged lines are dropped: a
    kill cuts the last one short, and a disk may change any, which the line's checksum shows.
    """

    def __init__(
        self, folder: Path, fingerprint: str, name: str = JOURNAL, kind: Callable[..., Any] = Answered
    ):
        """Takes the name of its file and the dataclass of its entries."""
        self._file, self._fingerprint = folder / name, fingerprint
        self.found: dict[str, Any] = {}  # id in predictions -> entry
        if processes.leads():
            folder.mkdir(parents=True, exist_ok=True)
        for line in processes.from_leader(self._read() if processes.leads() else None):
            name = line.pop("id")
            self.found[name] = kind(**line)

    def _read(self) -> list[dict[str, Any]]:
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return []
        kept = [entry for line in data.split(b"\n")[:-1] if (entry := self._entry(line)) is not None]
        whole = b"".join(map(self._line, kept))
        if whole != data:  # so that the next line begins at a line's beginning
            with files.written_whole(self._file) as file:
                file.write_bytes(whole)
        return kept

    def _entry(self, line: bytes) -> dict[str, Any] | None:
        """Reads one line, and returns None for a damaged one and for one of another fingerprint."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.pop("checksum", None) != _checksum(entry):
            return None
        return entry if entry.pop("fingerprint") == self._fingerprint else None

    def _line(self, entry: Mapping[str, Any]) -> bytes:
        """Makes a line of an entry, with fingerprint and checksum."""
        content = {"fingerprint": self._fingerprint, **entry}
        return (
            json.dumps({**content, "checksum": _checksum(content)}, separators=(",", ":")).encode()
            + b"\n"
        )

    def add(self, answered: Mapping[str, Any]) -> None:
        """Notes the answers of one batch; they survive a kill of this process."""
        if not processes.leads():
            return
        lines = [
            self._line({"id": name, **dataclasses.asdict(answer)}) for name, answer in answered.items()
        ]
        try:
            with self._file.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError as error:
            raise UserError(
                f"{self._file.parent} was deleted or moved while its answers were written there; "
                "put it back, or choose another folder, and give the same command again."
            ) from error

    def remove(self) -> None:
        """Deletes the file, after the answers have been written elsewhere."""
        if processes.leads():
            self._file.unlink(missing_ok=True)


def _checksum(content: Mapping[str, Any]) -> int:
    """Computes the CRC-32 of what a line says, in the order in which it says it."""
    return zlib.crc32(json.dumps(content).encode())


def answer_units(
    units: Sequence[Unit],
    answerer: Callable[[Unit], Answer],
    seed: int,
    journal: Journal | None = None,
    permute: bool = True,
) -> dict[str, Answered]:
    """Answers every example of the units that the journal lacks, and returns the answers by id.

    The ids are those in predictions.jsonl. With a journal, an example with images is asked twice,
    the second time about another example's images (`permute_images`), unless `permute` is False.
    Without one it is asked once, and nothing is written or shown.
    """
    answers = {} if journal is None else dict(journal.found)
    with progress(sum(len(unit.examples) for unit in units), shown=journal is not None) as bar:
        for unit in units:
            answer: Answer | None = None
            permuted = permute_images(unit.examples, seed) if journal is not None and permute else None
            bar.set_description(unit.name, refresh=False)
            for number, places in enumerate(batches(unit)):
                names = [unit.id_of(unit.examples[i]) for i in places]
                if not all(name in answers for name in names):
                    answer = answer or answerer(unit)
                    found = _answer_batch(unit, places, permuted, answer, number + seed)
                    batch = dict(zip(names, found, strict=True))
                    answers |= batch
                    if journal is not None:
                        journal.add(batch)
                bar.update(len(places))
    return answers


def batches(unit: Unit) -> Iterator[list[int]]:
    """Yields the places of the unit's examples, batch by batch, the shortest prompts first.

    Those with the fewest images come first, then those with the shortest questions.
    """

    def size(place: int) -> tuple[int, int]:
        example = unit.examples[place]
        return len(example.images), len(example.question)

    order = sorted(range(len(unit.examples)), key=size)
    for start in range(0, len(order), unit.batch):
        yield order[start : start + unit.batch]


def _answer_batch(
    unit: Unit,
    places: Sequence[int],
    permuted: Sequence[tuple[str, ...]] | None,
    answer: Answer,
    seed: int,
) -> list[Answered]:
    examples = [unit.examples[i] for i in places]
    pixels = [[unit.source.data.image(key) for key in example.images] for example in examples]
    texts = answer(examples, pixels, seed)
    sizes = [[images[0].shape[1], images[0].shape[0]] if images else None for images in pixels]
    if permuted is None:
        return [Answered(text, size) for text, size in zip(texts, sizes, strict=True)]
    others = [permuted[i] for i in places]
    misled = answer(examples, [[unit.source.data.image(key) for key in keys] for keys in others], seed)
    return [
        Answered(text, size, other, list(keys))
        for text, size, other, keys in zip(texts, sizes, misled, others, strict=True)
    ]


def progress(total: int, shown: bool):
    """Makes a progress bar with examples/s and the time left, on process 0.

    In a log file a line every half minute.
    """
    from tqdm import tqdm

    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, unit=" examples", disable=not (shown and processes.leads()), mininterval=seconds
    )
