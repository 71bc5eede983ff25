"""Chooses the held-out examples and pictures that analyses of a run look at."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from unimed_jax.config import TASKS, VISUAL_TASKS, Config
from unimed_jax.data import fitting
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError, nearest
from unimed_jax.evaluate.tasks import Unit, open_sets, units_of


def held_out_units(config: Config, split: str, tasks: Sequence[str] = (), limit: int = 0) -> list[Unit]:
    """Opens the run's held-out sets and lists the units of one split, each a task of a data set.

    tasks: only these (all by default); limit: examples of a unit at most (0: all), one of each
    cluster in turn. Raises UserError for a task that is unknown or has no example in the split.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(
                f"--task={task} is not a task{nearest(task, TASKS)} Choose from {', '.join(TASKS)}."
            )
    evaluate = dataclasses.replace(config.evaluate, entries=(), splits=(split,), limit=limit)
    config = dataclasses.replace(config, evaluate=evaluate)
    units, _ = units_of(config, open_sets(config.held_out))
    for task in tasks:
        if all(unit.task != task for unit in units):
            there = ", ".join(dict.fromkeys(unit.task for unit in units))
            raise UserError(
                f"--task={task} has no example in split {split!r}, which holds {there or 'no task'}; "
                "choose another task, or another --split."
            )
    return [unit for unit in units if not tasks or unit.task in tasks]


@dataclasses.dataclass(frozen=True)
class Shown:
    """Holds one image as one example shows it to the connector."""

    unit: Unit
    example: Example
    key: str  # of the image in its data set

    @property
    def image(self) -> tuple[str, str]:
        """Returns what names the image among all sets."""
        return self.unit.source.id, self.key

    @property
    def task(self) -> int:
        """Returns the number of the example's task in VISUAL_TASKS."""
        return VISUAL_TASKS.index(self.unit.task)

    @property
    def cluster(self) -> str:
        """Returns what resampling keeps together."""
        return cluster_of(self.unit, self.example)

    def fitted(self, config: Config) -> np.ndarray:
        """Reads the image at the model's size: uint8 [size, size, 3]."""
        pixels = self.unit.source.data.image(self.key)
        return fitting.fit(pixels, config.data.fit, config.model.vision)


def cluster_of(unit: Unit, example: Example) -> str:
    """Names the cluster (slab, patient) of an example, apart from those of other sets."""
    return f"{unit.source.id}/{example.cluster or example.id}"


def shown_images(units: Sequence[Unit]) -> list[Shown]:
    """Lists every image of every example of the visual tasks.

    Raises UserError if there is none.
    """
    found = [
        Shown(unit, example, key)
        for unit in units
        if unit.task in VISUAL_TASKS
        for example in unit.examples
        for key in example.images
    ]
    if not found:
        names = ", ".join(unit.name for unit in units) or "nothing"
        raise UserError(f"no example of {names} has an image; choose a task with images, or a --split.")
    return found


def labelled(shown: Sequence[Shown], by: str) -> tuple[list[Shown], list[str]]:
    """Labels images by "task", by "set", or by a key of their example's meta.

    Images without a label are left out. Raises UserError if less than two labels are left.
    """
    label = {"task": lambda s: s.unit.task, "set": lambda s: s.unit.source.id}.get(
        by, lambda s: str(s.example.meta.get(by, ""))
    )
    kept = [(s, name) for s in shown if (name := label(s))]
    labels = [name for _, name in kept]
    _refuse_one_group(by, labels, ("task", "set"), [s.example for s in shown])
    return [s for s, _ in kept], labels


def check_keys(units: Sequence[Unit], keys: Sequence[str]) -> None:
    """Raises UserError for a key of the examples' meta that gives less than two groups."""
    examples = [example for unit in units for example in unit.examples]
    for key in keys:
        found = [str(example.meta[key]) for example in examples if example.meta.get(key)]
        _refuse_one_group(key, found, (), examples)


def _refuse_one_group(
    by: str, labels: Sequence[str], more: Sequence[str], examples: Sequence[Example]
) -> None:
    """Raises UserError if less than two labels are left; `more` may be chosen besides keys of meta."""
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        known = [*more, *sorted({key for example in examples for key in example.meta})]
        raise UserError(
            f"--by={by} gives {'the one group ' + repr(names[0]) if names else 'no group'}, and two are "
            f"compared; choose from {', '.join(known)}, or other --task or --split."
        )


def groups_of(
    units: Sequence[Unit], examples: Sequence[Example], keys: Sequence[str]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields the groups that results are listed by: kind, name, and which examples belong: bool [n].

    The kinds are the task, the data set, and each key of the examples' meta in `keys` (an example
    without it belongs to no group). A kind of fewer than two groups is left out, except for the task.
    """
    kinds: dict[str, list[str]] = {
        "task": [unit.task for unit in units],
        "set": [unit.source.id for unit in units],
        **{key: [str(example.meta.get(key, "")) for example in examples] for key in keys},
    }
    for kind, labels in kinds.items():
        names = [name for name in dict.fromkeys(labels) if name]
        if len(names) > 1 or kind == "task":
            for name in names:
                yield kind, name, np.array([label == name for label in labels])


def table_of_data(units: Sequence[Unit]) -> Mapping[str, int]:
    """Counts the examples of each unit, for the files that say what was measured."""
    return {unit.name: len(unit.examples) for unit in units}
