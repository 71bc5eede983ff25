"""Reads folders of DICOM series with a table of questions or labels: tasks vqa, cls and caption.

    labels.csv           (or .tsv, .json, .jsonl)
    anything/below/it    DICOM files, named and nested in any way

Each line of the table asks about one series or one study:

| column   | holds                                                                          |
| -------- | ------------------------------------------------------------------------------ |
| series   | SeriesInstanceUID; or                                                          |
| study    | StudyInstanceUID, which shows slices of each of its series, by their number    |
| task     | vqa, cls or caption                                                            |
| question | vqa: what is asked; the others may leave it out                                |
| answer   | the answer, class or report                                                    |
| split    | train, val or test; without this column all are train                          |
| id       | its own over all splits; without it, the UID, task and a count                 |
| template | kind of question, by which scores are given; without it, the number of slices  |

The cluster is PatientID (or its digest by `patients="hashed"`), or the study where it is empty.
Slices are stored without any other data of the patient (data/dicom_series.py).
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.dicom_series import Series, find_series, stripped
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import at_least, check_keys, chosen_options, one_of, records, word
from unimed_jax.errors import UserError

TABLES = ("labels.csv", "labels.tsv", "labels.json", "labels.jsonl")
COLUMNS = ("series", "study", "task", "question", "answer", "split", "id", "template")
TASKS = ("vqa", "cls", "caption")

INFO = Info(name="series", tasks=TASKS, cluster_word="patient", files=TABLES)
OPTIONS = {
    "slices": "middle",  # of a series: the middle one, every `number`-th, or `number` of them evenly
    "number": 0,  # for every and even
    "patients": "id",  # cluster: PatientID as it is, or hashed
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[bytes, ...]]]:
    """Yields an example for each line of the table that is of this split, in the table's order.

    Files that cannot be used, and series without a line, are counted with the split train.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "series")
    _check(chosen)
    file = _table(folder)
    rows = [(where, row) for where, row in records(file)]
    for where, row in rows:
        _check_row(row, where)
    parts = {_split(row, where) for where, row in rows}
    if split not in parts and split != INFO.splits[0]:
        return
    faults: list[str] = []
    found = find_series(folder, (*TABLES, "info.json"), faults)
    of_study: dict[str, list[Series]] = {}
    for series in sorted(found.values(), key=lambda one: (one.number, one.uid)):
        of_study.setdefault(series.study, []).append(series)
    if split == INFO.splits[0]:
        asked = {word(row, key, where) for where, row in rows for key in ("series", "study")} - {""}
        faults += [
            f"series {series.uid}: {file.name} has no line for it or its study"
            for series in found.values()
            if series.uid not in asked and series.study not in asked
        ]
        skipped += faults
    counted: Counter[tuple[str, str]] = Counter()
    for where, row in rows:
        key = "series" if word(row, "series", where) else "study"
        uid, task = word(row, key, where), word(row, "task", where)
        counted[uid, task] += 1
        if _split(row, where) != split:
            continue
        some = [found[uid]] if key == "series" and uid in found else of_study.get(uid, [])
        if key == "series" and uid not in found or not some:
            skipped.append(f"{where}: there is no {key} {uid}")
            continue
        name = word(row, "id", where, numbers=True) or f"{uid}/{task}/{counted[uid, task]}"
        yield from _example(name, row, where, some, chosen, skipped)


def _example(
    name: str,
    row: Mapping[str, Any],
    where: str,
    some: list[Series],
    options: Mapping[str, Any],
    skipped: list[str],
) -> Iterator[tuple[Example, tuple[bytes, ...]]]:
    """Yields the example of a line with its slices, unless one of them cannot be read."""
    taken = {
        f"{series.uid}/{number:04d}": series.slices[number]
        for series in some
        for number in _numbers(len(series.slices), options["slices"], options["number"])
    }
    try:
        sources = tuple(stripped(one.path) for one in taken.values())
    except UserError as error:
        skipped.append(f"{name}: {str(error).rstrip('.')}")
        return
    patient = some[0].patient or some[0].study
    if options["patients"] == "hashed":
        patient = hashlib.sha256(patient.encode()).hexdigest()[:16]
    task = word(row, "task", where)
    template = word(row, "template", where) or f"{len(taken)} slice{'s' * (len(taken) > 1)}"
    modalities = list(dict.fromkeys(series.modality for series in some if series.modality))
    facts = {"template": template} | ({"modality": ", ".join(modalities)} if modalities else {})
    question, answer = word(row, "question", where), word(row, "answer", where, numbers=True)
    keys = tuple(taken)
    yield Example(name, task, question, answer, keys, None, patient, facts), sources


def _numbers(count: int, how: str, number: int) -> list[int]:
    """Chooses among `count` slices by their place."""
    if how == "every":
        return list(range(0, count, number))
    number = min(number or 1, count)
    return [(2 * i + 1) * count // (2 * number) for i in range(number)]  # the middles of equal parts


def _check(options: Mapping[str, Any]) -> None:
    how = one_of(options, "slices", ("middle", "every", "even"), "series")
    one_of(options, "patients", ("id", "hashed"), "series")
    if how != "middle":
        at_least(options, "number", 1, "series")
    elif options["number"]:
        raise UserError(
            f"config.data.sources: option number={options['number']!r} of series has no effect with "
            "slices='middle'; leave it out, or set slices='every' or 'even'."
        )


def _table(folder: Path) -> Path:
    some = [folder / name for name in TABLES if (folder / name).exists()]
    if len(some) != 1:
        what = f"several tables ({', '.join(path.name for path in some)})" if some else "no labels.csv"
        raise UserError(f"{folder} holds {what}; give one table with the columns {', '.join(COLUMNS)}.")
    return some[0]


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a line that cannot be understood."""
    check_keys(row, COLUMNS, where)
    if bool(word(row, "series", where)) == bool(word(row, "study", where)):
        raise UserError(f"{where}: it names a series and a study, or neither; give one of them.")
    task = word(row, "task", where, required=True)
    if task not in TASKS:
        raise UserError(f"{where}: task {task!r} is none of {', '.join(TASKS)}.")
    word(row, "answer", where, required=True, numbers=True)
    if task == "vqa" and not word(row, "question", where):
        raise UserError(f"{where}: task 'vqa' needs a question.")
    if _split(row, where) not in INFO.splits:
        raise UserError(f"{where}: split {row['split']!r} is none of {', '.join(INFO.splits)}.")


def _split(row: Mapping[str, Any], where: str) -> str:
    return word(row, "split", where) if "split" in row else INFO.splits[0]
