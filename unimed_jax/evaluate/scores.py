"""Scores records: those of one unit, those of several sets pooled, and all of metrics.json.

Records are the lines of predictions.jsonl (metrics.Record), so that kept predictions can be scored
again.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from unimed_jax.bounds import FrozenDict
from unimed_jax.config import VISUAL_TASKS, Config, TextConfig, config_hash, to_dict
from unimed_jax.data.forms import cut_words, form_of
from unimed_jax.evaluate.classes import class_scores
from unimed_jax.evaluate.labels import TRAINING
from unimed_jax.evaluate.metrics import Metric, NotComputed, Record, of_task
from unimed_jax.evaluate.metrics.captions import report_scores
from unimed_jax.evaluate.metrics.published import (
    answer_report,
    clean_prediction,
    identify_report,
    medmoe_report,
    published_equal,
    refer_report,
    vqa_report,
)
from unimed_jax.evaluate.metrics.text import is_closed
from unimed_jax.evaluate.statistics import Measure, interval, resample
from unimed_jax.provenance import code_version, joint_checksum, plain
from unimed_jax.settings import FIDELITY

SCHEMA = 1  # of metrics.json
PERMUTED = "permuted_images"

Measures = dict[str, Measure]  # metric -> measure


def score(
    task: str,
    records: Sequence[Record],
    config: Config,
    metrics: Sequence[Metric] = (),
    protocols: Mapping[str, str] = FrozenDict(),
) -> dict[str, Any]:
    """Scores the records of one task.

    {n, clusters, primary, corrected: {metric: {value, ci95}}, published: {metric: value}, blind and
    peers: {baseline: {metric: value}}, margin and peer_margin: {baseline, value, ci95}, protocol (of
    the primary metric), protocols (protocol.protocols, which is given), notes: [str], templates:
    {template: {n, value, ci95, blind: {baseline: value}, margin}}}, the last on the primary metric.
    ci95 is None where fewer than two clusters count, a margin without a baseline. What cannot be
    computed has the value None and `why`. vqa also counts n_open and n_closed; where labels were
    measured there is `likelihood` (classes.class_scores). Raises UserError if the primary metric cannot
    be computed.
    """
    metrics = metrics or of_task(task)
    table = _Table(records, metrics, config)
    blind, peers = table.of_baselines("blind"), table.of_baselines("peers")
    masks = _template_masks(records)
    table.enter(blind, peers, masks)
    table.draw()
    return {
        "n": len(records),
        "clusters": table.clusters,
        "primary": table.primary,
        "corrected": {name: table.estimate(("model", name)) for name in table.model}
        | {name: {"value": None, "ci95": None, "why": why} for name, why in table.lacking.items()},
        "published": _published(task, records, config.text),
        "blind": {name: _values(measures) for name, measures in blind.items()},
        "peers": {name: _values(measures) for name, measures in peers.items()},
        "margin": table.margin("blind", list(blind)),
        "peer_margin": table.margin("peers", list(peers)),
        "protocol": protocols.get(table.primary, ""),
        "protocols": dict(protocols),
        "notes": _notes(task, blind, table.clusters),
        "templates": {
            name: _template_score(table, name, mask, list(blind)) for name, mask in masks.items()
        },
        **(_answer_types(records) if task == "vqa" else {}),
        **_of_labels(records, config),
    }


def _of_labels(records: Sequence[Record], config: Config) -> dict[str, Any]:
    found = class_scores(records, config.evaluate.bootstrap, config.seed)
    return {} if found is None else {"likelihood": found}


def _template_masks(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Returns for each template which records are asked by it: bool [n]."""
    names = sorted({record["template"] for record in records} - {""})
    return {name: np.array([record["template"] == name for record in records]) for name in names}


def _template_score(
    table: "_Table", template: str, mask: np.ndarray, blind: Sequence[str]
) -> dict[str, Any]:
    """Scores the records of one template on the primary metric, model and blind baselines."""
    return {
        "n": int(mask.sum()),
        **table.estimate(("model", table.primary, template)),
        "blind": {name: table.value(("blind", name, template)) for name in blind},
        "margin": table.margin("blind", blind, template),
    }


def _answer_types(records: Sequence[Record]) -> dict[str, int]:
    """Counts open and closed questions."""
    closed = sum(is_closed(record["meta"]) for record in records)
    return {"n_open": len(records) - closed, "n_closed": closed}


class _Table:
    """Holds named measures of the same records, drawn together so that differences are paired."""

    def __init__(self, records: Sequence[Record], metrics: Sequence[Metric], config: Config):
        self._records, self._metrics = records, metrics
        self._resamples, self._seed = config.evaluate.bootstrap, config.seed
        self._names = [record["cluster"] for record in records]
        self.clusters = len(set(self._names))
        self.primary = metrics[0].name
        self.lacking: dict[str, str] = {}  # metric -> why it is not computed
        every = self._measured([record["prediction"] for record in records])
        # A metric that no record counts for (open questions, if all are closed) is left out.
        counted = [name for name, measure in every.items() if np.isfinite(measure.value)]
        self.model = {name: every[name] for name in every if name in (self.primary, *counted)}
        self._measures: dict[tuple[str, ...], Measure] = {}
        self._draws: dict[tuple[str, ...], np.ndarray] = {}

    def _measured(self, predictions: Sequence[str], baseline: bool = False) -> Measures:
        given = [
            cast(Record, {**r, "prediction": p}) for r, p in zip(self._records, predictions, strict=True)
        ]
        found = {}
        for metric in self._metrics:
            if baseline and not metric.baselines and metric.name != self.primary:
                continue
            try:
                scorer = metric.leading if metric.name == self.primary else metric
                found[metric.name] = scorer(given)
            except NotComputed as missing:
                self.lacking[metric.name] = str(missing)
        return found

    def of_baselines(self, kind: str) -> dict[str, Measures]:
        """Measures the baselines that answered every record, by name."""
        answers = [
            cast(Mapping[str, Mapping[str, str]], record).get(kind) or {} for record in self._records
        ]
        names = [name for name in answers[0] if all(name in given for given in answers)]
        found = {name: self._measured([given[name] for given in answers], True) for name in names}
        return {
            name: {key: m for key, m in every.items() if key in self.model}
            for name, every in found.items()
        }

    def enter(
        self,
        blind: Mapping[str, Measures],
        peers: Mapping[str, Measures],
        templates: Mapping[str, np.ndarray],
    ) -> None:
        """Adds all measures that are to be drawn.

        These are the model's metrics and, on the primary metric, the scores of the baselines, and
        those of model and baselines by template.
        """
        for name, measure in self.model.items():
            self._add(("model", name), measure)
        baselines = [("blind", name, measures) for name, measures in blind.items()]
        baselines += [("peers", name, measures) for name, measures in peers.items()]
        for kind, name, measures in baselines:
            self._add((kind, name), measures[self.primary])
            for template, mask in templates.items():
                self._add((kind, name, template), measures[self.primary].where(mask))
        for template, mask in templates.items():
            self._add(("model", self.primary, template), self.model[self.primary].where(mask))

    def _add(self, key: tuple[str, ...], measure: Measure) -> None:
        self._measures[key] = measure

    def draw(self) -> None:
        """Draws all entered measures together."""
        draws = resample(list(self._measures.values()), self._names, self._resamples, self._seed)
        self._draws = dict(zip(self._measures, draws, strict=True))

    def value(self, key: tuple[str, ...]) -> float:
        return self._measures[key].value

    def estimate(self, key: tuple[str, ...]) -> dict[str, Any]:
        return {"value": self.value(key), "ci95": self._interval(key, self._draws[key])}

    def _interval(self, key: tuple[str, ...], draws: np.ndarray) -> list[float] | None:
        """Returns the interval of draws; None if fewer than two clusters count for the measure."""
        return interval(draws) if self._measures[key].varies(self._names) else None

    def margin(self, kind: str, names: Sequence[str], *template: str) -> dict[str, Any] | None:
        """Subtracts the best baseline from the model on the primary metric.

        Returns None if there is no baseline.
        """
        ours = ("model", self.primary, *template)

        def rank(name: str) -> float:
            value = self.value((kind, name, *template))
            return value if np.isfinite(value) else -np.inf

        best = max(names, key=rank, default=None)
        if best is None:
            return None
        theirs = (kind, best, *template)
        return {
            "baseline": best,
            "value": self.value(ours) - self.value(theirs),
            "ci95": self._interval(ours, self._draws[ours] - self._draws[theirs]),
        }


def _values(measures: Measures) -> dict[str, float]:
    return {name: measure.value for name, measure in measures.items()}


def _notes(task: str, blind: Mapping[str, Any], clusters: int) -> list[str]:
    notes = [] if clusters > 1 else ["all examples stand in one cluster, so there are no intervals"]
    if not set(blind) - {PERMUTED}:
        notes.append("no training example of the task, so no blind baseline is fitted")
    if PERMUTED not in blind and task in VISUAL_TASKS:
        notes.append(
            "no answers to permuted images: one image belongs to over half of the examples, or the "
            "answers are another tool's"
        )
    return notes


# ---------------------------------------------------------------------------------------------
# As published
# ---------------------------------------------------------------------------------------------


def _published(task: str, records: Sequence[Record], text: TextConfig) -> Mapping[str, float | str]:
    """Scores by the published rules, and returns {} for qa, which Uni-Med's code does not evaluate.

    The scores of vqa are Med-MoE's, in per cent, if a chat form asks, else Uni-Med's.
    """
    predictions = [record["prediction"] for record in records]
    if task == "refer":
        boxes = [cast(tuple[float, float, float, float], record["box"]) for record in records]
        sizes = [cast(tuple[int, int], record["image_size"]) for record in records]
        return refer_report(predictions, boxes, sizes)
    references = [record["reference"] for record in records]
    if task == "vqa" and form_of(text).published == "Med-MoE":
        kinds = [record["meta"].get("answer_type", "") for record in records]
        return medmoe_report(list(zip(predictions, references, strict=True)), kinds)
    if text.max_words is not None:
        references = [cut_words(reference, text.max_words) for reference in references]
    pairs = list(zip(map(clean_prediction, predictions), references, strict=True))
    if task == "vqa":
        return _flat(vqa_report(pairs, [is_closed(record["meta"]) for record in records]))
    if task == "identify":
        return identify_report(pairs)
    if task == "cls":
        return {"accuracy": answer_report(pairs, published_equal)["accuracy"]}
    return report_scores(pairs) if task == "caption" else {}


def _flat(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Flattens {"all": {"f1": 1}, "open": {"f1": 0}} to {"f1": 1, "open_f1": 0}."""
    return {
        name if part == "all" else f"{part}_{name}": value
        for part in ("all", "open", "closed")
        for name, value in parts.get(part, {}).items()
    }


# ---------------------------------------------------------------------------------------------
# Several sets
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scored:
    """Holds the results of one unit.

    They are its place in metrics.json, its metrics, its records and their scores.
    """

    set: str
    split: str
    task: str
    metrics: tuple[Metric, ...]
    records: Sequence[Record]
    scores: Mapping[str, Any]


def pooled(parts: Sequence[Scored], config: Config) -> dict[str, Any]:
    """Scores one split and task over several sets as if they were one.

    Templates and clusters carry the set's id, so that equal names stay apart. Baselines and metrics
    are those that all sets have.
    """
    first = parts[0]
    if len(parts) == 1:
        templates = {f"{first.set}/{name}": part for name, part in first.scores["templates"].items()}
        return {**first.scores, "templates": templates}
    records = [_prefixed(record, part.set) for part in parts for record in part.records]
    shared = [metric for metric in first.metrics if all(metric in part.metrics for part in parts)]
    if not shared:
        names = ", ".join(part.set for part in parts)
        return {
            "n": len(records),
            "notes": [f"{names} have no metric in common, so they are not pooled"],
        }
    every = [part.scores["protocols"] for part in parts]
    protocols = {
        name: "+".join(ids[name] for ids in every)
        for name in every[0]
        if all(name in ids for ids in every)
    }
    return score(first.task, records, config, shared, protocols)


def _prefixed(record: Record, name: str) -> Record:
    changed: dict[str, Any] = {
        key: f"{name}/{value}" if (value := record[key]) else value for key in ("cluster", "template")
    }
    given = record.get("likelihood")
    if given and given["rule"] == TRAINING:  # equal templates of two sets have labels of their own
        changed["likelihood"] = {**given, "group": f"{name}/{given['group']}"}
    return cast(Record, {**record, **changed})


# ---------------------------------------------------------------------------------------------
# metrics.json
# ---------------------------------------------------------------------------------------------


def leading_split(splits: Sequence[str]) -> str:
    """Returns the split that reports show first: test if it was scored, else the first one."""
    return "test" if "test" in splits or not splits else splits[0]


def summarise(
    config: Config,
    scored: Sequence[Scored],
    data: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
    step: int | None = None,
    routing: Mapping | None = None,
) -> dict[str, Any]:
    """Returns the content of metrics.json.

    `data`: set id -> {checksum, licence, citation, note, cluster_word}. Of `routing` (see report/)
    everything but the arrays is kept.
    """
    sets: dict[str, dict] = {}
    groups: dict[str, dict[str, list[Scored]]] = {}
    for part in scored:
        sets.setdefault(part.set, {}).setdefault(part.split, {})[part.task] = part.scores
        groups.setdefault(part.split, {}).setdefault(part.task, []).append(part)
    summary = {
        "schema": SCHEMA,
        "name": config.name,
        "config_hash": config_hash(config),
        "step": step,
        "data_checksum": joint_checksum([entry["checksum"] for entry in data.values()]),
        "code_version": code_version(),
        "fidelity": config.fidelity,
        "knobs": {key: operator.attrgetter(key)(config) for key in FIDELITY["default"]},
        "seed": config.seed,
        "evaluate": to_dict(config.evaluate),
        "data": data,
        "notes": list(notes),
        "split": leading_split(list(groups)),
        "sets": sets,
        "pooled": {
            split: {task: pooled(parts, config) for task, parts in tasks.items()}
            for split, tasks in groups.items()
        },
    }
    if routing is not None:
        summary["routing"] = {key: value for key, value in routing.items() if key != "maps"}
    return plain(summary)
