"""`Example`: one question with its answer, and the data sets that hold them."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from unimed_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One record: its images (0..n), one task, question and answer.

    `question` is what the prompt's instruction is filled with: the question (vqa, qa), the words for
    the object (refer), the box in text form (identify), or empty where the task says all (caption, cls).
    """

    id: str  # unique within its data set
    task: str  # one of config.TASKS
    question: str
    answer: str
    images: tuple[str, ...] = ()  # keys for `Dataset.image`, in the order in which the prompt shows them
    box: tuple[int, int, int, int] | None = None  # x1, y1, x2, y2 in pixels, the ends outside the box
    cluster: str = ""  # what resampling keeps together (a slab, a patient); empty: the example itself
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)  # template, answer_type, plane, ...
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) turns before this one; chat forms train on them too


class Dataset(Protocol):
    """What every file in data/datasets provides through `load(source, data_config)`."""

    name: str
    checksum: str  # sha256 over the decoded records in key order, and the builder's version

    def examples(self, split: str) -> Sequence[Example]:
        """All examples of `train`, `val` or `test`, in a fixed order."""
        ...

    def image(self, key: str) -> np.ndarray:
        """uint8 [H, W, 3]; H and W as stored."""
        ...


class Joined:
    """Several data sets as one; ids, image keys and clusters carry the data set's name."""

    def __init__(self, datasets: Sequence[Dataset]):
        self._datasets = {d.name: d for d in datasets}
        if len(self._datasets) < len(datasets):
            names = ", ".join(d.name for d in datasets)
            raise UserError(f"config.data.sources: two data sets have one name ({names}); rename a folder or file.")
        self.name = "+".join(self._datasets)
        self.checksum = hashlib.sha256("".join(d.checksum for d in datasets).encode()).hexdigest()

    def examples(self, split: str) -> list[Example]:
        return [
            dataclasses.replace(
                example,
                id=f"{name}/{example.id}",
                images=tuple(f"{name}/{key}" for key in example.images),
                cluster=f"{name}/{example.cluster or example.id}",
            )
            for name, dataset in self._datasets.items()
            for example in dataset.examples(split)
        ]

    def image(self, key: str) -> np.ndarray:
        name, _, rest = key.partition("/")
        return self._datasets[name].image(rest)
