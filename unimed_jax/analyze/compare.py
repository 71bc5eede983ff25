"""Compares scored runs answer by answer with the first of them: paired, clustered, corrected.

A side of a comparison is a folder that `evaluate` wrote, or a file of another tool's predictions,
whose questions and references are then those of a scored folder beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics import Metric, NotComputed, Record, of_task
from unimed_jax.evaluate.metrics.registry import find
from unimed_jax.evaluate.run import LARGEST_PREDICTIONS, read_predictions
from unimed_jax.evaluate.scores import SCHEMA
from unimed_jax.evaluate.statistics import LEVEL, Difference, mcnemar, paired, verdicts
from unimed_jax.parsing import json_lines, no_file, read_json, read_text
from unimed_jax.provenance import plain

UnitKey = tuple[str, str, str]  # set, split, task
LARGEST_NUMBER = 1e9  # of a box or a picture's side; far beyond any picture
NEEDED = ("id", "set", "split", "task", "template", "cluster", "reference", "prediction")
# Parts of a protocol id that say how a model is asked, not how its answers are scored.
ASKING = ("form=", "fit=")
CHOSEN = ("limit=", "only=")  # which items were scored: those that both sides have are compared
DECODING = ("max_new_tokens", "temperature", "top_p")  # settings that change answers, not protocols


@dataclasses.dataclass(frozen=True)
class Side:
    """Holds the kept answers of one run, and what its scores depend on."""

    name: str
    place: Path
    records: Mapping[UnitKey, Mapping[str, Record]]  # by unit and id
    metrics: Mapping[UnitKey, Metric]  # the primary ones
    protocols: Mapping[UnitKey, str]
    about: Mapping[str, Any]  # step, seed, settings' hash, split and notes
    decoding: Mapping[str, Any]  # settings of DECODING; not of a file


def compare(
    places: Sequence[str | Path], split: str = "", resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compares each run with the first, on the answers that both have.

    {level, resamples, split, runs: [{name, place, step, seed, ...}], tasks and templates: [{run,
    set, task, template, metric, n, clusters, first, value, difference, ci95, error, p, p_mcnemar,
    p_holm, verdict, detectable}], notes: [str]}. p is that of the clustered comparison
    (statistics.paired); for an exact score it is the larger of that and McNemar's. Tasks and
    templates are corrected (Holm) as one family each. Raises UserError for runs that cannot be
    compared.
    """
    if len(places) < 2:
        raise UserError("compare takes two runs or more, the first of which the others are set against.")
    sides = read_sides(places)
    first, *others = sides
    split = split or first.about["split"]
    notes: list[str] = []
    tasks: list[dict[str, Any]] = []
    templates: list[dict[str, Any]] = []
    for other in others:
        shared = _shared(first, other, split, notes)
        for unit, (ours, theirs) in shared.items():
            metric = first.metrics[unit]
            row = {"run": other.name, "set": unit[0], "task": unit[2], "metric": metric.name}
            try:
                measured = _Pair(metric, ours, theirs, resamples, seed)
            except NotComputed as missing:
                notes.append(f"{'/'.join(unit)} is not compared: its {metric.name} is {missing}")
                continue
            tasks.append({**row, "template": "", **measured.row()})
            kinds = sorted({record["template"] for record in ours})
            for template in kinds if len(kinds) > 1 else ():  # a single one is the task itself
                mask = np.array([record["template"] == template for record in ours])
                templates.append({**row, "template": template, **measured.row(mask)})
    if not tasks:
        raise UserError(f"{first.place}: {notes[-1]}; install it, or score the runs by another metric.")
    for rows in (tasks, templates):
        _judge(rows)
    return plain(
        {
            "schema": SCHEMA,
            "first": first.name,
            "level": LEVEL,
            "resamples": resamples,
            "split": split,
            "runs": [{"name": s.name, "place": str(s.place), **s.about} for s in sides],
            "tasks": tasks,
            "templates": templates,
            "notes": notes,
        }
    )


class _Pair:
    """Holds two models' measures of the same items."""

    def __init__(
        self,
        metric: Metric,
        theirs: Sequence[Record],
        ours: Sequence[Record],
        resamples: int,
        seed: int,
    ):
        self._theirs, self._ours = metric(theirs), metric(ours)
        self._clusters = [record["cluster"] for record in theirs]
        self._resamples, self._seed = resamples, seed

    def row(self, mask: np.ndarray | None = None) -> dict[str, Any]:
        """Compares the models on the items of a mask (all by default)."""
        chosen = np.ones(len(self._clusters), bool) if mask is None else mask
        ours, theirs = self._ours.where(chosen), self._theirs.where(chosen)
        found = paired([ours], [theirs], self._clusters, self._resamples, self._seed)
        right, wrong = ours.right, theirs.right
        exact = None
        # A metric of the answers that say something, say, may count other items for each model.
        if right is not None and wrong is not None and np.array_equal(ours.counts, theirs.counts):
            exact = mcnemar(right, wrong)
        counts = ours.counts | theirs.counts
        return {
            "n": int(counts.sum()),
            "clusters": len(set(np.asarray(self._clusters)[counts].tolist())),
            "first": theirs.value,
            "value": ours.value,
            "difference": found.value,
            "ci95": found.ci95,
            "error": found.error,
            "freedom": found.freedom,
            "p": found.p if exact is None or found.p is None else max(found.p, exact),
            "p_mcnemar": exact,
        }


def _judge(rows: Sequence[dict[str, Any]]) -> None:
    """Adds verdict, corrected p-value and smallest detectable difference to the rows of one table."""
    differences = [
        Difference(row["difference"], row["ci95"], row["p"], row["error"], row["freedom"])
        for row in rows
    ]
    compared = max(1, sum(row["p"] is not None for row in rows))
    for row, found, judged in zip(rows, differences, verdicts(differences), strict=True):
        row |= {**judged, "detectable": found.detectable(LEVEL / compared)}


# ---------------------------------------------------------------------------------------------
# What two sides share
# ---------------------------------------------------------------------------------------------


def _shared(
    first: Side, other: Side, split: str, notes: list[str]
) -> dict[UnitKey, tuple[list[Record], list[Record]]]:
    """Returns by unit the records of both sides with the same ids, in the first side's order.

    Notes count the items that only one side has. Raises UserError if there is no common item, or if
    the scores of a common unit are not comparable.
    """
    found: dict[UnitKey, tuple[list[Record], list[Record]]] = {}
    notes += [
        f"evaluate.{key} is {value!r} for {first.name} and {other.decoding[key]!r} for {other.name}"
        for key, value in first.decoding.items()
        if key in other.decoding and other.decoding[key] != value
    ]
    for unit in [unit for unit in first.records if unit[1] == split]:
        ours, theirs = first.records[unit], other.records.get(unit, {})
        names = [name for name in ours if name in theirs]
        if not names:
            notes.append(f"{'/'.join(unit)}: {other.name} has no answer that {first.name} has")
            continue
        check_comparable(first, other, unit, notes)
        found[unit] = [ours[name] for name in names], [theirs[name] for name in names]
        for side, count in ((first, len(ours)), (other, len(theirs))):
            if count > len(names):
                notes.append(f"{'/'.join(unit)}: {count - len(names)} items that only {side.name} has")
    if not found:
        counts = [
            sum(len(r) for unit, r in side.records.items() if unit[1] == split)
            for side in (first, other)
        ]
        raise UserError(
            f"{first.place} and {other.place} share no item of split {split!r} ({counts[0]} and "
            f"{counts[1]} items); compare runs that were scored on the same data sets and split."
        )
    notes += [
        f"{'/'.join(unit)}: only {other.name} has it"
        for unit in other.records
        if unit[1] == split and unit not in first.records
    ]
    return found


def check_comparable(first: Side, other: Side, unit: UnitKey, notes: list[str]) -> None:
    """Raises UserError if the two scores of a unit have other protocols, but for how was asked."""
    here, there = (
        [part for part in side.protocols[unit].split("/") if not part.startswith(CHOSEN)]
        for side in (first, other)
    )
    name = "/".join(unit)
    if here[0] != there[0]:
        raise UserError(
            f"{first.place} and {other.place} were scored on two revisions of a data set ({here[0]} and "
            f"{there[0]}), so {name} is not comparable; score both on the same data."
        )
    ways = [[part for part in parts if part.startswith(ASKING)] for parts in (here, there)]
    rules = [[part for part in parts if not part.startswith(ASKING)] for parts in (here, there)]
    if rules[0] != rules[1]:
        apart = [" ".join(p for p in mine if p not in yours) or "nothing" for mine, yours in
                 (rules, rules[::-1])]  # fmt: skip
        raise UserError(
            f"{first.place} and {other.place} were scored by two protocols on {name} ({apart[0]} and "
            f"{apart[1]}), which are not comparable; score one of them again as the other."
        )
    if ways[0] != ways[1]:
        words = [" ".join(way) or "as given" for way in ways]
        notes.append(f"{name}: {first.name} was asked {words[0]}, {other.name} {words[1]}")


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_sides(places: Sequence[str | Path]) -> list[Side]:
    """Reads every run folder, and then the files of predictions, beside the first of the folders.

    Raises UserError for what is neither, and if no folder is among them.
    """
    paths = [_folder_of(Path(place)) for place in places]
    names = _names(paths)
    folders = {i: read_folder(path, names[i]) for i, path in enumerate(paths) if path.is_dir()}
    if not folders:
        raise UserError(
            f"{', '.join(map(str, places))}: none is a scored folder, which holds the questions and "
            "references; name one, or score a file first (evaluate --predictions=FILE)."
        )
    asked = next(iter(folders.values()))
    return [
        folders[i] if i in folders else _read_file(path, names[i], asked) for i, path in enumerate(paths)
    ]


def _folder_of(path: Path) -> Path:
    """Returns the folder of a predictions.jsonl or metrics.json that evaluate wrote, else the path."""
    if path.name in ("predictions.jsonl", "metrics.json") and (path.parent / "metrics.json").is_file():
        return path.parent
    if not path.is_dir() and (reason := no_file(path)):
        raise UserError(f"{path} {reason}; name a scored run's folder or a file of predictions.")
    return path


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell them apart, numbered where none does."""
    whole = [path.resolve() for path in paths]
    longest = max(len(path.parts) for path in whole)
    for depth in range(1, longest + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(whole, start=1)]


def read_folder(folder: Path, name: str) -> Side:
    file = folder / "metrics.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no scores; score the run first (evaluate --run={folder}).")
    advice = f"score it again (evaluate --run={folder})"
    metrics = read_json(file, advice, LARGEST_PREDICTIONS)
    if not isinstance(metrics, dict) or metrics.get("schema") != SCHEMA:
        raise UserError(f"{file} was written by another version; {advice}.")
    records: dict[UnitKey, dict[str, Record]] = {}
    text = read_text(folder / "predictions.jsonl", advice, LARGEST_PREDICTIONS)
    for number, line in json_lines(text, str(folder / "predictions.jsonl")):
        where = f"{folder / 'predictions.jsonl'}, line {number}"
        if not _is_answer(line):
            raise UserError(f"{where}: not an answer; {advice}.")
        of_unit = records.setdefault((line["set"], line["split"], line["task"]), {})
        if line["id"] in of_unit:
            raise UserError(f"{where}: {line['id']!r} stands here a second time; {advice}.")
        of_unit[line["id"]] = cast(Record, line)
    if not records:
        raise UserError(f"{folder / 'predictions.jsonl'} holds no answer; {advice}.")
    try:
        scores = {
            (name, split, task): entry
            for name, splits in metrics["sets"].items()
            for split, tasks in splits.items()
            for task, entry in tasks.items()
        }
        if lost := set(records) - set(scores):
            raise UserError(f"{file} lacks scores of {'/'.join(min(lost))}; {advice}.")
        ours = {unit: _metric(metrics, unit, scores[unit]["primary"]) for unit in records}
        protocols = {unit: str(scores[unit]["protocol"]) for unit in records}
        decoding = {key: metrics["evaluate"][key] for key in DECODING}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no file of scores that evaluate wrote ({error}); {advice}."
        ) from error
    about = {key: metrics.get(key) for key in ("step", "seed", "config_hash", "split", "notes")}
    return Side(name, folder, records, ours, protocols, about, decoding)


def _is_answer(line: Any) -> bool:
    """Says whether a line of predictions.jsonl holds all that is read of it."""
    if not (
        isinstance(line, dict)
        and all(isinstance(line.get(key), str) for key in NEEDED)
        and isinstance(line.get("meta"), dict)
        and {"box", "image_size"} <= set(line)
    ):
        return False
    return line["task"] != "refer" or (
        _are_numbers(line["box"], 4)
        and _are_numbers(line["image_size"], 2)
        and min(line["image_size"]) > 0
    )


def _are_numbers(found: Any, count: int) -> bool:
    return (
        isinstance(found, list)
        and len(found) == count
        and all(type(n) in (int, float) and abs(n) <= LARGEST_NUMBER for n in found)
    )


def _metric(metrics: Mapping[str, Any], unit: UnitKey, primary: str) -> Metric:
    """Returns the primary metric of a unit, from the module that its entry names if one does."""
    for entry in metrics["evaluate"]["entries"]:
        if (entry["source"], entry["split"], entry["task"]) == unit and entry["metrics"]:
            return of_task(unit[2], entry["metrics"])[0]
    return find(primary)


def _read_file(file: Path, name: str, asked: Side) -> Side:
    """Reads another tool's predictions, whose questions are those of a scored folder."""
    given, doubled = read_predictions(file)
    records = {
        unit: {
            key: cast(Record, {**record, "prediction": given[key]})
            for key, record in of_unit.items()
            if key in given
        }
        for unit, of_unit in asked.records.items()
    }
    known = sum(map(len, records.values()))
    if not known:
        example = next(iter(next(iter(asked.records.values()))))
        raise UserError(
            f"{file} and {asked.place} share no item: none of its {len(given)} ids is known there, such "
            f"as {example!r}; ids are <set>/<split>/<id within the set> (see `data export`)."
        )
    notes = [f"{len(given) - known} ids are unknown in {asked.name}"] if len(given) > known else []
    notes += [f"{len(doubled)} ids are doubled, the first line counts"] if doubled else []
    rules = {  # scored like the folder's own, however it was asked
        unit: "/".join(part for part in protocol.split("/") if not part.startswith(ASKING))
        for unit, protocol in asked.protocols.items()
    }
    about = {"split": asked.about["split"], "notes": notes}
    kept = {unit: of_unit for unit, of_unit in records.items() if of_unit}
    return Side(name, file, kept, asked.metrics, rules, about, {})
