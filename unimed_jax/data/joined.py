"""`joined`: several data sets as one, for what looks at all of them (tokenizer, router labels)."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.info import Info


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """The distinct data sets as one."""
    distinct = list({dataset.id: dataset for dataset in datasets}.values())
    return distinct[0] if len(distinct) == 1 else Joined(distinct)


class Joined:
    """Several data sets as one; ids, image keys and clusters begin with the data set's id."""

    def __init__(self, datasets: Sequence[Dataset]):
        """`datasets` have different ids."""
        self._datasets = {dataset.id: dataset for dataset in datasets}
        self.id = "+".join(self._datasets)
        self.info = Info(self.id, tuple(dict.fromkeys(task for d in datasets for task in d.info.tasks)))
        self.checksum = hashlib.sha256("".join(d.checksum for d in datasets).encode()).hexdigest()
        self.splits = tuple(dict.fromkeys(split for d in datasets for split in d.splits))

    def examples(self, split: str) -> list[Example]:
        return [
            dataclasses.replace(
                example,
                id=f"{name}/{example.id}",
                images=tuple(f"{name}/{key}" for key in example.images),
                cluster=f"{name}/{example.cluster or example.id}",
            )
            for name, dataset in self._datasets.items()
            if split in dataset.splits
            for example in dataset.examples(split)
        ]

    def image(self, key: str) -> np.ndarray:
        name, _, rest = key.partition("/")
        return self._datasets[name].image(rest)
