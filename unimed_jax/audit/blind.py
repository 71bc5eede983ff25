"""Scores what needs no image: the majorities of the training part, on every later split."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from unimed_jax.data.example import Dataset, Example
from unimed_jax.evaluate import baselines
from unimed_jax.evaluate.metrics import Record, of_task
from unimed_jax.evaluate.metrics.published import clean_prediction, published_bleu
from unimed_jax.evaluate.tasks import TRAIN_SAMPLE

ANSWERED = ("vqa", "cls", "qa")  # tasks with short answers, which majorities can give


def blind_scores(dataset: Dataset) -> dict[str, Any]:
    """Scores each simple blind baseline of evaluation on every split but train.

    Returns split -> task -> {n, <baseline>: {<metric>: value, bleu1: value as published, templates:
    {template: exact match}}}. At most TRAIN_SAMPLE examples are fitted on.
    """
    if "train" not in dataset.splits:
        return {}
    out: dict[str, Any] = {}
    train = _bare(dataset, "train")
    step = max(1, -(-len(train) // TRAIN_SAMPLE))
    for split in dataset.splits:
        if split == "train":
            continue
        asked = _bare(dataset, split)
        for task in ANSWERED:
            own = [example for example in asked if example.task == task]
            learnt = [example for example in train[::step] if example.task == task]
            if own and learnt:
                out.setdefault(split, {})[task] = {"n": len(own)} | {
                    name: _scores(task, own, baseline(own))
                    for name, baseline in baselines.simple(task, learnt).items()
                }
    return out


def _bare(dataset: Dataset, split: str) -> list[Example]:
    """Reads what a majority needs of the examples with short answers."""
    meta: dict[tuple[str, str], dict[str, str]] = {}  # one for all that are alike

    def facts(example: Example) -> dict[str, str]:
        found = example.meta.get("template", ""), example.meta.get("answer_type", "")
        return meta.setdefault(found, {"template": found[0], "answer_type": found[1]})

    return [
        dataclasses.replace(example, id="", images=(), cluster="", history=(), meta=facts(example))
        for example in dataset.examples(split)
        if example.task in ANSWERED
    ]


def _scores(task: str, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    records = [
        cast(Record, {"prediction": answer, "reference": example.answer, "meta": example.meta})
        for example, answer in zip(examples, answers, strict=True)
    ]
    metrics = of_task(task)
    values = {metric.name: metric(records).value for metric in metrics}
    bleu1 = [published_bleu(clean_prediction(r["prediction"]), r["reference"])[0] for r in records]
    right = metrics[0](records).items[:, 0]  # exact match of each
    of_template: dict[str, list[float]] = {}
    for example, value in zip(examples, right.tolist(), strict=True):
        of_template.setdefault(example.meta["template"], []).append(value)
    return {
        **{name: value for name, value in values.items() if value == value},  # NaN: none counts
        "bleu1": sum(bleu1) / len(bleu1),
        "templates": {name: sum(some) / len(some) for name, some in sorted(of_template.items())},
    }
