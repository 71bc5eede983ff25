"""Data sets: one file each, found by name; every file provides `load(source, data) -> Dataset`."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.example import Dataset, Joined
from unimed_jax.errors import UserError, nearest

SELF_CONTAINED = ("brain", "domains")  # made from installed packages; all others read the files of `path`


def load_dataset(source: SourceConfig, data: DataConfig) -> Dataset:
    """The data set that `source.name` names. Raises UserError where there is none of that name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    module = importlib.import_module(f"{__name__}.{source.name}") if source.name in names else None
    load = getattr(module, "load", None)
    if load is None:
        raise UserError(
            f"config.data.sources: {source.name!r} is no data set{nearest(source.name, names)} "
            f"(each has its file in unimed_jax/data/datasets)."
        )
    return load(source, data)


def load_datasets(data: DataConfig) -> list[Dataset]:
    """One data set per source, in their order; sources of one name and path share one."""
    loaded: dict[tuple[str, str], Dataset] = {}
    out = []
    for source in data.sources:
        path = path_of(source, data)
        if (source.name, path) not in loaded:
            loaded[source.name, path] = load_dataset(dataclasses.replace(source, path=path, tasks=()), data)
        out.append(loaded[source.name, path])
    return out


def path_of(source: SourceConfig, data: DataConfig) -> str:
    """Where a source's files are: its path, from `data.root` on; without one, where the root has its name."""
    given = source.path or (source.name if data.root else "")
    return str(Path(data.root, given)) if given else ""


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """The distinct data sets as one, for evaluation."""
    distinct = list({id(d): d for d in datasets}.values())
    return distinct[0] if len(distinct) == 1 else Joined(distinct)
