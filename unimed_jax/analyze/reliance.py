"""Measures how much answers depend on the image, and how much on the wording of the instruction.

Every example is asked several times, in passes that differ in one thing: its own images; the same
prompt without visual tokens; blank images; the images of another case; another wording of the
instruction. The scores of arXiv 2603.03437 and 2603.20985 follow from which answers change. What
their texts leave open is decided and said in `DEFINITIONS`.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from unimed_jax import processes
from unimed_jax.analyze.reliance_report import write
from unimed_jax.config import VISUAL_TASKS, Config, config_hash
from unimed_jax.data.box_text import valid_box
from unimed_jax.data.example import Example
from unimed_jax.data.forms import INSTRUCTIONS
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines
from unimed_jax.evaluate.answers import Answered, Answerer, Journal, answer_units
from unimed_jax.evaluate.metrics import Record
from unimed_jax.evaluate.model_answers import model_answers, together
from unimed_jax.evaluate.records import records_of
from unimed_jax.evaluate.run import (
    changed_inputs,
    claim_results,
    fingerprint_of,
)
from unimed_jax.evaluate.scores import leading_split
from unimed_jax.evaluate.statistics import Measure, interval, resample
from unimed_jax.evaluate.tasks import Training, Unit, data_notes, open_sets, permute_images, units_of
from unimed_jax.evaluate.words import canonical
from unimed_jax.interruption import claims_end
from unimed_jax.predict.request import Picture, Request
from unimed_jax.provenance import code_version, joint_checksum, plain
from unimed_jax.runs.open import Run

OWN, TEXT, BLANK, OTHER = "own_image", "text_only", "blank_image", "other_image"
GREY = 128  # of blank images, in 0..255
SCHEMA = 1  # of reliance.json
Change = Callable[[Request], Request]
Answers = Mapping[str, Mapping[str, Answered]]  # pass -> id -> answer

DEFINITIONS = {
    "visual_reliance_score": (
        "Visual Reliance Score (arXiv 2603.03437): the score with the own image minus that with another "
        "case's image; accuracy there, the task's primary metric here."
    ),
    "image_sensitivity": (
        "Image Sensitivity (arXiv 2603.03437): the share of answers that another case's image changes, "
        "for better or worse. Answers are equal if their normalised texts are; of boxes and reports "
        "the smallest change counts."
    ),
    "hallucinated_visual_reasoning_rate": (
        "Hallucinated Visual Reasoning Rate (arXiv 2603.03437): the share of all answers that claim "
        "something about the image and stay the same with another case's image. How the paper finds "
        "claims in the reasoning before an answer we could not establish. These models answer "
        "without reasoning, so here every answer that says something is a claim (refer: a valid box), "
        "and the rate is 1 - Image Sensitivity less the empty answers."
    ),
    "text_only_drop": "Text-only drop: the score with the own image minus that without visual tokens.",
    "blank_drop": f"Blank drop: the score with the own image minus that with a grey one (level {GREY}).",
    "flip_rate": (
        "Paraphrase flip rate (arXiv 2603.20985): the share of examples whose answer changes with at "
        "least one other wording of the instruction, out of the pool that training draws from."
    ),
    "dangerous": (
        "Dangerous (arXiv 2603.20985): the share of examples whose answer neither any wording nor "
        "taking the image away changes: consistent, but not because of the image."
    ),
}


def changes() -> dict[str, Change]:
    """Returns the passes: what each does to a request. The first is the run as it is evaluated."""
    wordings = max(len(pool) for pool in INSTRUCTIONS.values())
    return {
        OWN: lambda request: request,
        TEXT: lambda request: dataclasses.replace(request, show_images=False),
        BLANK: _blank,
        OTHER: lambda request: request,  # its units have the other images
        **{f"wording_{i}": functools.partial(_worded, number=i) for i in range(1, wordings)},
    }


def _blank(request: Request) -> Request:
    pictures = cast(Sequence[Picture], request.images)
    grey = tuple(
        picture.changed("grey", lambda image: np.full_like(image, GREY)) for picture in pictures
    )
    return dataclasses.replace(request, images=grey)


def _worded(request: Request, number: int) -> Request:
    return dataclasses.replace(request, wording=number)


@claims_end()
def measure_reliance(run: Run, config: Config, folder: Path, split: str = "") -> dict[str, Any]:
    """Asks all passes of a run, scores them, and writes the files of reliance_report.py into `folder`.

    `config` is the run's own, except for `config.evaluate`. Called inside `run.inside()`, on all
    processes. A killed call goes on where it stopped. Returns the content of reliance.json, and {}
    on processes other than 0. Raises UserError if no example has an image, and as an evaluation does.
    """
    claim_results(folder)
    sets = open_sets(config.held_out)
    units, notes = units_of(config, sets)
    split = split or leading_split([unit.split for unit in units])
    units = [unit for unit in units if unit.split == split]
    if not any(unit.task in VISUAL_TASKS for unit in units):
        raise UserError(
            f"split {split!r} of what config.evaluate scores has no example with an image; name another "
            "with --split, or evaluate a set with images."
        )
    notes += data_notes(units)
    training = Training(config, sets)
    notes += [*run.notes, *changed_inputs(run.folder, run.config, config, sets, training)]
    other, said = with_other_images(units)
    notes += said

    def answerer(change: Change) -> Answerer:
        return model_answers(run.model, config, run.tokenizer, change)

    fingerprint = fingerprint_of(run, config, sets)
    count = together(config.model, units)
    answers, journals = ask(units, other, answerer, folder, fingerprint, config.seed, count)
    if not processes.leads():
        return {}
    found: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    images = {unit.id_of(e): e.images for unit in other for e in unit.examples}
    for unit in units:
        given = baselines.fit(unit.task, training.of(unit)).blind
        blind = {name: baseline(unit.examples) for name, baseline in given.items()}
        records = records_of(unit, answers[OWN], {})
        passes = texts_of(unit, answers)
        scored = scores_of(unit, records, passes, blind, config)
        found.setdefault(unit.source.id, {})[unit.task] = scored
        lines += _lines(records, passes, images)
    metrics = {
        "schema": SCHEMA,
        "name": config.name,
        "step": run.step,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "data_checksum": joint_checksum([source.data.checksum for source in sets.values()]),
        "code_version": code_version(),
        "split": split,
        "definitions": DEFINITIONS,
        "sets": found,
        "notes": list(dict.fromkeys([*notes, *training.notes])),
    }
    metrics = plain(metrics)
    write(folder, metrics, plain(lines))
    for journal in journals:
        journal.remove()
    return metrics


def _lines(
    records: Sequence[Record], passes: Mapping[str, Sequence[str]], images: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Makes the lines of reliance.jsonl: an example with its answers by pass."""
    kept = ("id", "set", "split", "task", "template", "cluster", "question", "images", "reference")
    return [
        {
            **{key: cast(Any, record)[key] for key in kept},
            "other_images": list(images.get(record["id"], ())),
            "answers": {name: texts[i] for name, texts in passes.items()},
        }
        for i, record in enumerate(records)
    ]


# ---------------------------------------------------------------------------------------------
# Passes
# ---------------------------------------------------------------------------------------------


def with_other_images(units: Sequence[Unit]) -> tuple[list[Unit], list[str]]:
    """Gives every example of the visual units the images of another case of its set and task.

    They are never of the example's own cluster, nor an image that the cluster has too, and are the
    same for every run. A unit where that cannot be is left out, which a note says.
    """
    found, notes = [], []
    for unit in units:
        if unit.task not in VISUAL_TASKS:
            continue
        images = permute_images(unit.examples, 0)
        if images is None or _stays(unit.examples, images):
            notes.append(
                f"{unit.name}: not asked about other cases' images, since one case has over half of the "
                "examples, or shares its images with others"
            )
            continue
        examples = [
            dataclasses.replace(e, images=keys) for e, keys in zip(unit.examples, images, strict=True)
        ]
        found.append(dataclasses.replace(unit, examples=examples))
    return found, notes


def _stays(examples: Sequence[Example], images: Sequence[tuple[str, ...]]) -> bool:
    """Says whether any example got an image that its own cluster has."""
    clusters = defaultdict(set)
    for example in examples:
        for key in example.images:
            clusters[key].add(example.cluster or example.id)
    return any(
        (example.cluster or example.id) in clusters[key]
        for example, keys in zip(examples, images, strict=True)
        for key in keys
    )


def ask(
    units: Sequence[Unit],
    other: Sequence[Unit],
    answerer: Callable[[Change], Answerer],
    folder: Path,
    fingerprint: str,
    seed: int,
    count: int,
) -> tuple[dict[str, dict[str, Answered]], list[Journal]]:
    """Answers every pass that a unit has, and returns the answers by pass and the journals.

    other: the units with other cases' images; count: examples of a call, as `answer_units` takes it.
    Text-only units have their own pass and wordings. Each pass has a journal of its own in `folder`, so
    that a killed call goes on where it stopped.
    """
    answers, journals = {}, []
    for name, change in changes().items():
        if name == OTHER:
            asked = list(other)
        elif name in (TEXT, BLANK):
            asked = [unit for unit in units if unit.task in VISUAL_TASKS]
        else:
            number = int(name.partition("_")[2]) if name != OWN else 0
            asked = [unit for unit in units if number < len(INSTRUCTIONS[unit.task])]
        journal = Journal(folder, f"{fingerprint} {name}", f"{name}.partial.jsonl")
        processes.say(f"pass {name}")
        answers[name] = answer_units(
            asked, answerer(change), seed, journal, permute=False, together=count
        )
        journals.append(journal)
    return answers, journals


def texts_of(unit: Unit, answers: Answers) -> dict[str, list[str]]:
    """Returns the answers to the unit's examples, in order, for each pass that it has."""
    names = [unit.id_of(example) for example in unit.examples]
    return {
        name: [given[key].prediction for key in names]
        for name, given in answers.items()
        if all(key in given for key in names)
    }


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def scores_of(
    unit: Unit,
    records: Sequence[Record],
    passes: Mapping[str, Sequence[str]],
    blind: Mapping[str, Sequence[str]],
    config: Config,
) -> dict[str, Any]:
    """Scores the passes of one unit, with intervals over clusters drawn together.

    {n, clusters, metric, passes: {pass: {value, ci95}}, blind: {baseline: {value, ci95}},
    best_blind, scores: {name of DEFINITIONS: {value, ci95}}, wordings: {pass: {value, ci95}},
    quadrants: {ideal, fragile, dangerous, worst: {value, ci95}}, templates: {template: {n, own_image,
    visual_reliance_score, image_sensitivity}}}. What a task has no pass for is left out. records:
    those of the own images.
    """
    metric = unit.metrics[0]

    def measured(texts: Sequence[str]) -> Measure:
        given = [{**record, "prediction": text} for record, text in zip(records, texts, strict=True)]
        return metric.leading(cast(Sequence[Record], given))

    table = _Table([record["cluster"] for record in records], config)
    for name, texts in passes.items():
        table.add(name, measured(texts))
    for name, texts in blind.items():
        table.add(f"blind {name}", measured(texts))
    said = {name: [canonical(text) for text in texts] for name, texts in passes.items()}
    shares = _shares(unit.task, records, said)
    for name, values in shares.items():
        table.add(name, Measure.mean(values.tolist()))
    kinds = sorted({record["template"] for record in records})
    masks = {
        kind: np.array([record["template"] == kind for record in records])
        for kind in kinds
        if len(kinds) > 1  # a single one is the task itself
    }
    for kind, mask in masks.items():
        for name in (OWN, OTHER, "image_sensitivity"):
            if name in table.measures:
                table.add(f"{kind}/{name}", table.measures[name].where(mask))
    table.draw()

    scores = {
        name: table.difference(OWN, against)
        for name, against in (
            ("visual_reliance_score", OTHER),
            ("text_only_drop", TEXT),
            ("blank_drop", BLANK),
        )
        if against in passes
    }
    scores |= {name: table.estimate(name) for name in shares if name in DEFINITIONS}
    baseline = {name: table.estimate(f"blind {name}") for name in blind}
    return {
        "n": len(records),
        "clusters": table.clusters,
        "metric": metric.name,
        "passes": {name: table.estimate(name) for name in passes},
        "blind": baseline,
        "best_blind": max(baseline, key=lambda name: baseline[name]["value"], default=None),
        "scores": {name: scores[name] for name in DEFINITIONS if name in scores},
        "wordings": {name: table.estimate(name) for name in shares if name.startswith("flips_")},
        "quadrants": {name: table.estimate(name) for name in QUADRANTS if name in shares},
        "templates": {kind: _template(table, kind, mask) for kind, mask in masks.items()},
    }


QUADRANTS = ("ideal", "fragile", "dangerous", "worst")


def _shares(
    task: str, records: Sequence[Record], said: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Says of each example what its answers show, bool [n] for each name."""

    def differs(name: str) -> np.ndarray:
        return np.array([a != b for a, b in zip(said[OWN], said[name], strict=True)])

    found = {}
    if OTHER in said:
        claims = np.array([bool(text) for text in said[OWN]])
        if task == "refer":
            claims = np.array([valid_box(record["prediction"]) is not None for record in records])
        found["image_sensitivity"] = differs(OTHER)
        found["hallucinated_visual_reasoning_rate"] = claims & ~differs(OTHER)
    wordings = [name for name in said if name.startswith("wording_")]
    if wordings:
        found |= {name.replace("wording", "flips"): differs(name) for name in wordings}
        found["flip_rate"] = flips = np.any([differs(name) for name in wordings], axis=0)
        if TEXT in said:
            relies = differs(TEXT)
            found["ideal"], found["fragile"] = ~flips & relies, flips & relies
            found["dangerous"], found["worst"] = ~flips & ~relies, flips & ~relies
    return found


def _template(table: "_Table", kind: str, mask: np.ndarray) -> dict[str, Any]:
    """Returns what is shown of one template."""
    found = {"n": int(mask.sum()), OWN: table.estimate(f"{kind}/{OWN}")}
    if f"{kind}/{OTHER}" in table.measures:
        found["visual_reliance_score"] = table.difference(f"{kind}/{OWN}", f"{kind}/{OTHER}")
        found["image_sensitivity"] = table.estimate(f"{kind}/image_sensitivity")
    return found


class _Table:
    """Holds named measures of the same examples, drawn together so that differences are paired."""

    def __init__(self, clusters: Sequence[str], config: Config):
        self._names, self._config = list(clusters), config
        self.clusters = len(set(clusters))
        self.measures: dict[str, Measure] = {}
        self._draws: dict[str, np.ndarray] = {}

    def add(self, name: str, measure: Measure) -> None:
        self.measures[name] = measure

    def draw(self) -> None:
        """Draws all measures together."""
        settings = self._config.evaluate
        draws = resample(
            list(self.measures.values()), self._names, settings.bootstrap, self._config.seed
        )
        self._draws = dict(zip(self.measures, draws, strict=True))

    def estimate(self, name: str) -> dict[str, Any]:
        measure = self.measures[name]
        return self._entry(measure, measure.value, self._draws[name])

    def difference(self, name: str, other: str) -> dict[str, Any]:
        """Subtracts one measure from another."""
        value = self.measures[name].value - self.measures[other].value
        return self._entry(self.measures[name], value, self._draws[name] - self._draws[other])

    def _entry(self, measure: Measure, value: float, draws: np.ndarray) -> dict[str, Any]:
        return {"value": value, "ci95": interval(draws) if measure.varies(self._names) else None}
