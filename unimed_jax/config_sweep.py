"""Declares the settings of a sweep: one base config, variants of it by name, and seeds."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from unimed_jax.bounds import (
    Between,
    Characters,
    Distinct,
    Filled,
    FolderName,
    FrozenDict,
    Name,
    Part,
    Place,
)
from unimed_jax.config import Task

Seed = Annotated[int, Between(0, 2**32 - 1)]
Changes = Mapping[Name, Any]  # dotted name of a setting -> its value: {"train.steps": 600}


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Describes a sweep: what is varied, how often, and against what it is compared."""

    # config file of every variant, with :argument if it takes one; relative to the sweep's own file
    base: Annotated[str, Filled(), Characters(4096)]
    # by name; each holds what differs from the base, by dotted name: {"model.connector.kind": "linear"}
    variants: Annotated[Mapping[Part, Changes], Filled()]
    baseline: Part  # the variant that the others are compared with
    # Of the sweep's folder in runs/; empty: the file's name, and its argument after a _
    name: Annotated[str, Characters(1000), FolderName(nested=True)] = ""
    seeds: Annotated[tuple[Seed, ...], Filled(), Distinct()] = (
        0,
        1,
        2,
    )  # each variant is trained so often
    settings: Changes = FrozenDict()  # what all variants change of the base
    # Runs from which variants start, by name, in their order: config files. Each is trained once a seed;
    # `init` of a variant names it as ("run", "runs/<name of that config>").
    stages: Mapping[Part, Place] = FrozenDict()
    # Metrics that are compared, by task; a task that is not named: its main one
    scores: Mapping[Task, Annotated[tuple[Name, ...], Filled(), Distinct()]] = FrozenDict()
