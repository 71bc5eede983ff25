"""The six tasks: answers of a model on true and on permuted images, scored beside blind baselines."""

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unimed_jax.config import TASKS, Config, TextConfig, config_hash, to_dict
from unimed_jax.data.example import Dataset, Example
from unimed_jax.data.forms import cut_words, form_of, text_to_box
from unimed_jax.errors import UserError
from unimed_jax.evaluate import baselines
from unimed_jax.evaluate.metrics import PRIMARY, corrected_measures
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
from unimed_jax.provenance import code_version, plain
from unimed_jax.settings import FIDELITY

# Examples and the images of each (uint8 [H, W, 3]) -> one answer each.
Answer = Callable[[Sequence[Example], Sequence[Sequence[np.ndarray]]], list[str]]
PERMUTED = "permuted_images"


def evaluate(
    answer: Answer, dataset: Dataset, train_examples: Sequence[Example], config: Config, split: str
) -> tuple[dict[str, dict], list[dict]]:
    """Answers and scores every task of one split.

    Returns ({task: scores}, records): scores as `score` gives them for all of config.TASKS, also those
    without an example (n 0); records are the lines of predictions.jsonl. Baselines are fitted on
    `train_examples` alone. Raises UserError where there is no example at all.
    """
    examples = dataset.examples(split)
    if not examples:
        raise UserError(
            f"data set {dataset.id!r} has no example in split {split!r}; choose another in "
            "config.evaluate.splits or check the data."
        )
    scores, records = {}, []
    for task in TASKS:
        chosen = select([example for example in examples if example.task == task], config.evaluate.limit)
        lines = _answer_task(answer, dataset, chosen, train_examples, config, split) if chosen else []
        scores[task] = score(task, lines, config)
        records += lines
    return scores, records


def select(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples (0: all), the same for every seed: one of each cluster in turn, in random order."""
    if not limit or len(examples) <= limit:
        return list(examples)
    rng = np.random.default_rng(0)
    groups = defaultdict(list)
    for i in rng.permutation(len(examples)):
        groups[examples[i].cluster or examples[i].id].append(i)
    turns = sorted((turn, rank, i) for rank, group in enumerate(groups.values()) for turn, i in enumerate(group))
    return [examples[i] for i in sorted(i for *_, i in turns[:limit])]


def permute_images(examples: Sequence[Example], seed: int) -> list[tuple[str, ...]] | None:
    """For each example the images of another one; None where that cannot be.

    The images are permuted, none keeps its place, and none stays within its cluster (slab, patient)
    unless one cluster holds more than half of the examples. Sorted by cluster and turned by the size of
    the largest, each example lands outside its own.
    """
    rng = np.random.default_rng(seed)
    for key in (lambda e: e.cluster or e.id, lambda e: e.images):
        groups = defaultdict(list)
        for i in rng.permutation(len(examples)):
            groups[key(examples[i])].append(int(i))
        turn = max(map(len, groups.values()))
        if 2 * turn > len(examples):
            continue
        order = [i for group in groups.values() for i in group]
        images: list[tuple[str, ...]] = [()] * len(examples)
        for place, i in enumerate(order):
            images[i] = examples[order[(place + turn) % len(order)]].images
        if all(given != example.images for given, example in zip(images, examples, strict=True)):
            return images
    return None


def _answer_task(
    answer: Answer,
    dataset: Dataset,
    examples: Sequence[Example],
    train: Sequence[Example],
    config: Config,
    split: str,
) -> list[dict]:
    """Records of one task: true answers, the model's, the blind ones."""
    batch = config.evaluate.batch
    fitted = baselines.fit(examples[0].task, train)  # first: what is wrong with the records shows before the wait
    blind = {name: [baseline(example) for example in examples] for name, baseline in fitted.items()}
    predictions, sizes = _answers(answer, dataset, examples, [example.images for example in examples], batch)
    permuted = permute_images(examples, config.seed) if all(example.images for example in examples) else None
    if permuted:
        blind[PERMUTED] = _answers(answer, dataset, examples, permuted, batch)[0]
    return [
        {
            "id": example.id,
            "task": example.task,
            "split": split,
            "template": example.meta.get("template", ""),
            "cluster": example.cluster or example.id,
            "question": example.question,
            "images": list(example.images),
            "reference": example.answer,
            "prediction": predictions[i],
            "box": list(_true_box(example, sizes[i])) if example.task == "refer" else _listed(example.box),
            "image_size": _listed(sizes[i]),
            "meta": dict(example.meta),
            "blind": {name: answers[i] for name, answers in blind.items()},
            "permuted_images": list(permuted[i]) if permuted else None,
        }
        for i, example in enumerate(examples)
    ]


def _answers(
    answer: Answer, dataset: Dataset, examples: Sequence[Example], images: Sequence[Sequence[str]], batch: int
) -> tuple[list[str], list[tuple[int, int] | None]]:
    """Answers in the order given, and (width, height) in pixels of each example's first image."""
    predictions = [""] * len(examples)
    sizes: list[tuple[int, int] | None] = [None] * len(examples)
    # Like lengths together: a batch of generation is as long as its longest prompt.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].question))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        arrays = [[dataset.image(key) for key in images[i]] for i in places]
        found = answer([examples[i] for i in places], arrays)
        for i, shown, text in zip(places, arrays, found, strict=True):
            predictions[i] = text
            if shown:
                sizes[i] = (shown[0].shape[1], shown[0].shape[0])
    return predictions, sizes


def _listed(values) -> list[int] | None:
    return None if values is None else [int(v) for v in values]


def _true_box(example: Example, size) -> tuple[float, float, float, float]:
    """The box of a REC record in pixels: its own, else its answer's."""
    if example.box is not None:
        x1, y1, x2, y2 = (int(v) for v in example.box)
        return x1, y1, x2, y2
    percent = text_to_box(example.answer)
    if percent is None:
        raise UserError(f"record {example.id}: task 'refer' needs a box or an answer {{<x1><y1><x2><y2>}}; mend it.")
    x1, y1, x2, y2 = (v / 100 * size[i % 2] for i, v in enumerate(percent))
    return x1, y1, x2, y2


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def score(task: str, records: Sequence[Mapping], config: Config) -> dict:
    """Scores of one task's records (also read back from predictions.jsonl).

    {n, clusters, primary, corrected: {metric: {value, ci95}}, published: {metric: value}, blind: {baseline:
    {metric: value}}, margin: {baseline, value, ci95}, notes: [str]}; vqa, qa and cls also per_template:
    {template: {n, value, ci95, blind: {baseline: value}}} on the primary metric. ci95 is None for fewer than
    two clusters; margin is None without a baseline.
    """
    primary, settings = PRIMARY[task], config.evaluate
    if not records:
        return {
            "n": 0,
            "clusters": 0,
            "primary": primary,
            "corrected": {},
            "published": {},
            "blind": {},
            "margin": None,
            "notes": ["this split has no example of the task"],
        }
    clusters = [record["cluster"] for record in records]
    enough = len(set(clusters)) > 1
    names = list(records[0]["blind"])
    measures = _measures(task, records, [record["prediction"] for record in records])
    blind = {name: _measures(task, records, [record["blind"][name] for record in records]) for name in names}

    templates = sorted({record["template"] for record in records}) if task in ("vqa", "qa", "cls") else []
    masks = {template: [record["template"] == template for record in records] for template in templates}
    parts = [measures[primary].where(mask) for mask in masks.values()]
    best = max(names, key=lambda name: blind[name][primary].value, default=None)
    rivals = [blind[best][primary]] if best else []
    draws = resample([*measures.values(), *parts, *rivals], clusters, settings.bootstrap, config.seed)
    intervals = [interval(draw) if enough else None for draw in draws]

    notes = [] if enough else ["all examples stand in one cluster, so there are no intervals"]
    if not set(names) - {PERMUTED}:
        notes.append("no training example of the task, so no blind baseline is fitted")
    if PERMUTED not in names and task != "qa":
        notes.append("the images could not be permuted: one of them belongs to over half of the examples")
    result = {
        "n": len(records),
        "clusters": len(set(clusters)),
        "primary": primary,
        "corrected": {
            name: {"value": measure.value, "ci95": ci95}
            for (name, measure), ci95 in zip(measures.items(), intervals, strict=False)
        },
        "published": _published(task, records, config.text),
        "blind": {name: {metric: m.value for metric, m in scores.items()} for name, scores in blind.items()},
        "margin": None,
        "notes": notes,
    }
    if best:
        difference = draws[list(measures).index(primary)] - draws[-1]
        result["margin"] = {
            "baseline": best,
            "value": measures[primary].value - blind[best][primary].value,
            "ci95": interval(difference) if enough else None,
        }
    if templates:
        result["per_template"] = {
            template: {
                "n": int(np.sum(masks[template])),
                "value": part.value,
                "ci95": ci95,
                "blind": {name: blind[name][primary].where(masks[template]).value for name in names},
            }
            for template, part, ci95 in zip(templates, parts, intervals[len(measures) :], strict=False)
        }
    if task == "vqa":
        closed = sum(is_closed(record["meta"]) for record in records)
        result |= {"n_open": len(records) - closed, "n_closed": closed}
    return result


def _measures(task: str, records: Sequence[Mapping], predictions: Sequence[str]) -> dict[str, Measure]:
    return corrected_measures(
        task,
        predictions,
        [record["reference"] for record in records],
        boxes=[record["box"] for record in records],
        sizes=[record["image_size"] for record in records],
        closed=[is_closed(record["meta"]) for record in records],
    )


def _published(task: str, records: Sequence[Mapping], text: TextConfig) -> Mapping[str, float | str]:
    """Scores by the published rules; {} for qa, which Uni-Med's code does not evaluate.

    Those of vqa are Med-MoE's, in per cent, where its chat form asks, and Uni-Med's else.
    """
    predictions = [record["prediction"] for record in records]
    if task == "refer":
        boxes, sizes = [record["box"] for record in records], [record["image_size"] for record in records]
        return refer_report(predictions, boxes, sizes)
    references = [record["reference"] for record in records]
    if task == "vqa" and form_of(text).published == "Med-MoE":
        kinds = [record["meta"].get("answer_type", "") for record in records]
        return medmoe_report(list(zip(predictions, references, strict=True)), kinds)
    if text.max_words is not None:
        references = [cut_words(reference, text.max_words) for reference in references]
    pairs = list(zip(map(clean_prediction, predictions), references, strict=True))
    if task == "vqa":
        parts = vqa_report(pairs, [is_closed(record["meta"]) for record in records])
        return {
            name if part == "all" else f"{part}_{name}": value
            for part in ("all", "open", "closed")
            for name, value in parts.get(part, {}).items()
        }
    if task == "identify":
        return identify_report(pairs)
    if task == "cls":
        return {"accuracy": answer_report(pairs, published_equal)["accuracy"]}
    return report_scores(pairs) if task == "caption" else {}


# ---------------------------------------------------------------------------------------------
# metrics.json
# ---------------------------------------------------------------------------------------------


def summarise(
    config: Config, data_checksum: str, results: Mapping[str, Mapping], routing: Mapping | None = None
) -> dict:
    """What metrics.json holds: the test tasks at the top, validation beside, and what made them.

    `results` maps "test" and "val" to the scores of `evaluate`; a split that was not evaluated has no
    tasks. Of `routing` (see report.py) everything but the arrays is kept.
    """
    knobs = {key: operator.attrgetter(key)(config) for key in FIDELITY["default"]}
    summary = {
        "name": config.name,
        "config_hash": config_hash(config),
        "data_checksum": data_checksum,
        "code_version": code_version(),
        "fidelity": config.fidelity,
        "knobs": knobs,
        "seed": config.seed,
        "evaluate": to_dict(config.evaluate),
        "split": "test",
        "tasks": results.get("test", {}),
        "validation": {"tasks": results.get("val", {})},
    }
    if routing is not None:
        summary["routing"] = {key: value for key, value in routing.items() if key != "maps"}
    return plain(summary)
