"""Collects a model's answers to the examples of all units, and writes them as they come.

A killed evaluation continues from them.

Examples are asked in calls that the settings and the data fix. A call that was answered before a kill
is read from the journal, any other is answered whole; so the answers do not depend on where the kill
fell. As a rule a call holds examples of several units, whose answers end when they end
(predict/engine.py). A model whose answers depend on their batch by definition is asked batch by batch:
like lengths together, so that a batch is not longer than it must be.
"""

import dataclasses
import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax import files, processes
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Unit, permute_images
from unimed_jax.predict.request import Picture


@dataclasses.dataclass(frozen=True)
class Question:
    """Asks about one example, with its own images or another's."""

    unit: Unit
    example: Example
    images: tuple[Picture, ...]  # none for text alone
    seed: int  # of sampling


class Call(NamedTuple):
    """Holds what is asked together: examples about their own images, and about others."""

    own: Sequence[Question]
    others: Sequence[Question | None]  # of the same examples; None: not asked

    @property
    def passes(self) -> list[list[Question]]:
        """Lists the questions about own images, and those about others if there are any."""
        others = [question for question in self.others if question is not None]
        return [list(self.own), *([others] if others else [])]


# The passes of a call -> the answers to each. The second argument is called as an answer to a question
# of the first pass ends, if the model knows when.
Answer = Callable[[Sequence[Sequence[Question]], Callable[[], Any]], list[list[str]]]
Answerer = Callable[[Sequence[Call]], Answer]  # takes all calls that may come
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
    answerer: Answerer,
    seed: int,
    journal: Journal | None = None,
    permute: bool = True,
    together: int = 0,
) -> dict[str, Answered]:
    """Answers every example of the units that the journal lacks, and returns the answers by id.

    The ids are those in predictions.jsonl. With a journal, an example with images is asked twice,
    the second time about another example's images (`permute_images`), unless `permute` is False.
    Without one it is asked once, and nothing is written or shown. together: examples of a call; 0:
    a batch of one unit.
    """
    answers = {} if journal is None else dict(journal.found)
    calls = calls_of(units, seed, journal is not None and permute, together)
    answer: Answer | None = None
    with progress(sum(len(call.own) for call in calls), shown=journal is not None) as bar:
        for call in calls:
            names = [question.unit.id_of(question.example) for question in call.own]
            bar.set_description(call.own[0].unit.name, refresh=False)
            until = bar.n + len(names)
            if not all(name in answers for name in names):
                answer = answer or answerer(calls)
                texts = answer(call.passes, bar.update)
                found = dict(zip(names, _answered(call, texts), strict=True))
                answers |= found
                if journal is not None:
                    journal.add(found)
            bar.update(until - bar.n)
    return answers


def calls_of(units: Sequence[Unit], seed: int, permute: bool, together: int) -> list[Call]:
    """Divides the examples of all units into calls, as `answer_units` asks them."""
    pictures: dict[tuple[str, str], Picture] = {}

    def picture(unit: Unit, key: str) -> Picture:
        read = functools.partial(unit.source.data.image, key)
        return pictures.setdefault((unit.source.id, key), Picture(key, read, unit.source.id))

    def question(unit: Unit, place: int, keys: Sequence[str], seed: int) -> Question:
        images = tuple(picture(unit, key) for key in keys)
        return Question(unit, unit.examples[place], images, seed % 2**32)

    pairs: list[list[tuple[Question, Question | None]]] = []  # batch by batch
    for unit in units:
        others = permute_images(unit.examples, seed) if permute else None
        for number, places in enumerate(batches(unit)):
            # By the batch's own seed and the place in it, so that a continued evaluation draws the same.
            pairs.append([])
            for i, place in enumerate(places):
                own = question(unit, place, unit.examples[place].images, number + seed + i)
                other = None
                if others is not None:
                    other = question(unit, place, others[place], number + seed + i)
                pairs[-1].append((own, other))
    if together:
        every = [pair for batch in pairs for pair in batch]
        pairs = [every[i : i + together] for i in range(0, len(every), together)]
    return [Call([own for own, _ in call], [other for _, other in call]) for call in pairs]


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


def _answered(call: Call, texts: Sequence[Sequence[str]]) -> Iterator[Answered]:
    """Puts the answers about own and other images together."""
    misled = iter(texts[1] if len(texts) > 1 else ())
    for own, other, text in zip(call.own, call.others, texts[0], strict=True):
        size = own.images[0].size if own.images else None
        if other is None:
            yield Answered(text, size)
        else:
            yield Answered(text, size, next(misled), [picture.name for picture in other.images])


def progress(total: int, shown: bool):
    """Makes a progress bar with examples/s and the time left, on process 0.

    In a log file a line every half minute.
    """
    from tqdm import tqdm

    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, unit=" examples", disable=not (shown and processes.leads()), mininterval=seconds
    )
