"""Opens data sets by the name of the module that reads them.

Each module has `INFO` and `read`. It is one file here, or lies anywhere and is named with dots.

`read(folder, split, options, skipped)` yields (Example, sources of its images); see
data/prepare.py.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.example import Dataset
from unimed_jax.data.images import PLAIN
from unimed_jax.data.info import Info, described
from unimed_jax.data.prepare import How, Reader, prepared
from unimed_jax.data.records import check_links
from unimed_jax.data.selection import Selection
from unimed_jax.data.store import MANIFEST, Store
from unimed_jax.errors import UserError, nearest

_opened: dict[tuple[Path, int], Store] = {}  # by folder and time of its manifest: opened once a process


def open_sources(data: DataConfig, workers: int = 0, pool: Executor | None = None) -> list[Dataset]:
    """Opens one data set per source, in their order.

    Sources that differ in tasks or filters only share one.

    A set is prepared first if it has not been, by the `workers` processes of `pool` if there are any
    (data/image_shards.py). Raises UserError for anything wrong with a source.
    """
    sets = _sets(data)
    ids = _ids(sets, data)
    check_places(data)  # of all, before the first takes hours
    how = How(PLAIN, data.reencode, data.strict, workers, pool)
    opened = {identity: _open(ids[identity], sources, data, how) for identity, sources in sets.items()}
    return [opened[_identity(source, data)] for source in data.sources]


def to_prepare(
    data: DataConfig,
) -> list[tuple[str, Path | None, dict[str, Any], Path, How]]:
    """Lists the sets of the sources: reader, folder, options, cache, and how it is prepared."""
    return [
        (
            source.name,
            _folder(source, data),
            _plain(source.options),
            data.cache_folder,
            How(source.image, data.reencode, data.strict),
        )
        for source, *_ in _sets(data).values()
    ]


def _sets(data: DataConfig) -> dict[str, list[SourceConfig]]:
    """Groups the sources that read one and the same set, by what they have in common."""
    sets: dict[str, list[SourceConfig]] = {}
    for source in data.sources:
        sets.setdefault(_identity(source, data), []).append(source)
    return sets


def check_places(data: DataConfig) -> None:
    """Raises UserError for a source whose files are missing."""
    for source in data.sources:
        _folder(source, data)


def distinct(datasets: Iterable[Dataset]) -> list[Dataset]:
    """Gives the data sets without repetition, one per id."""
    return list({dataset.id: dataset for dataset in datasets}.values())


def path_of(source: SourceConfig, data: DataConfig) -> str:
    """Returns where a source's files are, which is its path, from `data.root` on.

    For a source without a path it is `<data.root>/<name>`.
    """
    given = source.path or (source.name if data.root else "")
    return str(Path(data.root, given)) if given else ""


def missing(source: SourceConfig, data: DataConfig) -> bool:
    """Says whether files are missing that the source's set is read from."""
    known = source.name in _names() or "." in source.name
    if known and reader_of(source.name).INFO.self_contained:
        return False
    path = path_of(source, data)
    return not (path and Path(path).exists())


def reader_of(name: str) -> Reader:
    """Returns the module that `name` names.

    Raises UserError if there is none, or if it lacks INFO or read.
    """
    known = _names()
    if name not in known and "." not in name:
        raise UserError(
            f"config.data.sources: {name!r} is not a data set{nearest(name, known)} "
            "Choose a file of unimed_jax/data/datasets or a dotted module (my_lab.my_data)."
        )
    module = f"{__name__}.{name}" if name in known else name
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever somebody's module raises, or no name of a module
        raise UserError(
            f"config.data.sources: module {name!r} does not import ({error}); check its name and "
            "PYTHONPATH."
        ) from error
    if not isinstance(getattr(found, "INFO", None), Info) or not callable(getattr(found, "read", None)):
        raise UserError(
            f"config.data.sources: module {name!r} is not a reader, because it lacks INFO (an Info) "
            "or read(folder, split, options, skipped); see docs/adding_a_dataset.md."
        )
    return cast(Reader, found)


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _identity(source: SourceConfig, data: DataConfig) -> str:
    """Returns what sources of one and the same set have in common."""
    fields: list[Any] = [source.id, source.name, path_of(source, data)]
    fields += [_plain(m) for m in (source.options, source.splits, source.info, asdict(source.image))]
    return json.dumps(fields, sort_keys=True, default=str)


def _plain(given: Mapping[Any, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(given), default=_plain_value))


def _plain_value(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)


def _ids(sets: dict[str, list[SourceConfig]], data: DataConfig) -> dict[str, str]:
    """Gives each data set its id.

    The id is the one in the settings, else the last part of the set's name. The stem of its path is
    added if two sets have the same name. Raises UserError if two ids are still equal.
    """
    default = {identity: s[0].id or s[0].name.rpartition(".")[2] for identity, s in sets.items()}
    out: dict[str, str] = {}
    for identity, sources in sets.items():
        found, source = default[identity], sources[0]
        path = path_of(source, data)
        if list(default.values()).count(found) > 1 and not source.id and path:
            found = f"{found}-{Path(path).stem}"
        if found in out.values():
            raise UserError(
                f"config.data.sources: two data sets have the id {found!r}; give each source with "
                "other files, options, splits or image settings an id of its own."
            )
        out[identity] = found
    return out


def _open(id: str, sources: list[SourceConfig], data: DataConfig, how: How) -> Selection:
    source = sources[0]
    reader, folder = reader_of(source.name), _folder(source, data)
    if folder is not None:
        check_links(folder, reader.INFO.files)
    info = described(reader.INFO, folder, source.info)
    how = how._replace(image=source.image)
    store = prepared(reader, reader.INFO, folder, _plain(source.options), data.cache_folder, how)
    key = store.folder, (store.folder / MANIFEST).stat().st_mtime_ns
    return Selection(_opened.setdefault(key, store), id, info, sources)


def _folder(source: SourceConfig, data: DataConfig) -> Path | None:
    """Returns where the files of a source are, or None if it needs none.

    Raises UserError if they are missing.
    """
    info = reader_of(source.name).INFO
    if info.self_contained:
        return None
    path = path_of(source, data)
    if not path or not Path(path).exists():
        raise UserError(
            f"config.data.sources: {path or 'the path of ' + repr(source.name)} does not exist; "
            f"give the folder that holds {', '.join(info.files)}."
        )
    return Path(path)
