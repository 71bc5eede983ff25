"""Defines `Example`, one question with its answer, and `Dataset`, which holds examples.

`Features` stands in for the pixels of a data set's images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from unimed_jax.data.info import Info


@dataclasses.dataclass(frozen=True)
class Example:
    """Holds one record: its images (0..n), one task, question and answer.

    `question` is what the prompt's instruction is filled with: the question (vqa, qa), the words for
    the object (refer), the box in text form (identify), or empty if the task says all (caption, cls).
    """

    id: str  # unique within its data set
    task: str  # one of config.TASKS
    question: str
    answer: str
    images: tuple[str, ...] = ()  # keys for `Dataset.image`, in the order in which the prompt shows them
    box: tuple[int, int, int, int] | None = None  # x1, y1, x2, y2 in pixels, the ends outside the box
    cluster: str = ""  # what resampling keeps together (a slab, a patient); empty: the example itself
    # template, answer_type, plane, ...
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # (question, answer) turns before this one; chat forms train on them too
    history: tuple[tuple[str, str], ...] = ()


class Dataset(Protocol):
    """Describes an open data set, whose examples and images can be read in any order.

    `Selection` is the one that is read from disk.

    If it has `columns(split)` (data/columns.py), the pipeline groups from them; else it looks at
    every example once.
    """

    id: str  # its name in scores, reports and record names
    info: Info
    checksum: str  # sha256 over the decoded records in order, and the reader's version
    splits: tuple[str, ...]  # those that have an example

    def examples(self, split: str) -> Sequence[Example]:
        """Returns the examples of a split in a fixed order, which are read when they are asked for.

        They should not be copied into a list.
        """
        ...

    def image(self, key: str) -> np.ndarray:
        """Returns the pixels of an image in the size in which it is stored, uint8 [H, W, 3]."""
        ...

    def digest(self, key: str) -> bytes:
        """Returns 32 bytes that two images share only if they have the same pixels."""
        ...


class Features(Protocol):
    """Describes what an encoder has made of images; features.py keeps it on disk."""

    shape: tuple[int, int]  # patches, width

    def read(self, digest: bytes) -> np.ndarray:
        """Returns the features of the image with a `Dataset.digest`, bfloat16 [patches, width]."""
        ...
