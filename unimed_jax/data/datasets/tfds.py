"""Reads sets that tensorflow-datasets has prepared as array_record files.

They may hold classes, questions or captions.

`path` is the folder of a version, with dataset_info.json and features.json: .../my_set/1.0.0.
TensorFlow is not needed. By default the feature `label` gives the class (task cls); the options
name the features of other tasks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.config import VISUAL_TASKS
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import chosen_options, inside, one_of, short
from unimed_jax.errors import UserError, nearest
from unimed_jax.parsing import refuse_stand_in

SPELT = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}

INFO = Info(
    name="tfds", tasks=("cls", "vqa", "qa", "caption"), files=("dataset_info.json", "features.json")
)
OPTIONS = {
    "task": "cls",
    "image": "image",  # names of features; empty: there is none
    "question": "",
    "answer": "label",
    "cluster": "",  # what belongs together, a patient for example
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[bytes, ...]]]:
    """Yields the records of a split in their order; images are passed on as they are encoded."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "tfds")
    task = one_of(chosen, "task", INFO.tasks, "tfds")
    builder = _builder(folder)
    names = {role: chosen[role] for role in ("image", "question", "answer", "cluster") if chosen[role]}
    if task not in VISUAL_TASKS:
        names.pop("image", None)
    _check_features(builder, names, folder)
    found = next((name for name in SPELT[split] if name in builder.info.splits), None)
    if found is None:
        return
    import tensorflow_datasets

    decoders = {names["image"]: tensorflow_datasets.decode.SkipDecoding()} if "image" in names else None
    labels = getattr(builder.info.features[names["answer"]], "names", None)
    for number, record in _records(builder, found, decoders, folder):
        key = f"{split}/{number}"
        if labels is not None and not 0 <= int(record[names["answer"]]) < len(labels):
            skipped.append(f"{key}: its class {record[names['answer']]} has no name")  # -1: not given
            continue
        texts = {role: _text(record[name], folder) for role, name in names.items() if role != "image"}
        if labels is not None:
            texts["answer"] = labels[int(record[names["answer"]])]
        keys, image = ((key,), (record[names["image"]],)) if "image" in names else ((), ())
        question, cluster = texts.get("question", ""), texts.get("cluster", key)
        yield (
            Example(key, task, question, texts["answer"], keys, None, cluster, {"template": task}),
            image,
        )


def _records(builder: Any, split: str, decoders: Any, folder: Path) -> Iterator[tuple[int, Any]]:
    """Yields the records of a split with their numbers."""
    number = -1
    try:
        source = builder.as_data_source(split, decoders=decoders)
        for number in range(len(source)):
            yield number, source[number]
    except (OSError, ValueError, RuntimeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}, {split}, record {number}, cannot be read ({reason}); prepare the set again."
        ) from error


def _builder(folder: Path) -> Any:
    """Opens a prepared set; only then is the package imported, which takes a second."""
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        refuse_stand_in(inside(folder, folder, file.name, str(folder)))
    import tensorflow_datasets

    try:
        return tensorflow_datasets.builder_from_directory(str(folder))
    except Exception as error:  # whatever it raises about files that somebody else wrote
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is not a set that tensorflow-datasets has prepared ({reason}); give the "
            "folder of a version, with dataset_info.json and features.json."
        ) from error


def _check_features(builder: Any, names: Mapping[str, str], folder: Path) -> None:
    """Raises UserError for a feature that the set lacks."""
    features = list(builder.info.features)
    for role, name in names.items():
        if name not in features:
            raise UserError(
                f"{folder} has no feature {name!r}{nearest(name, features)} It has "
                f"{', '.join(features)}; set the source's option {role}."
            )
    if "answer" not in names:
        raise UserError(f"{folder}: the option answer is empty; name a feature ({', '.join(features)}).")


def _text(value: Any, folder: Path) -> str:
    """Turns a feature into text: bytes as UTF-8, a number as it is written."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if getattr(value, "ndim", 0):
        raise UserError(
            f"{folder}: a feature holds {short(value)}, which is no text and no class; choose another."
        )
    return str(value)
