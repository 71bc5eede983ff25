"""Tabulates how much of each margin over blind survives on a head that was never seen.

    python benchmarks/other_head.py runs/seed0 runs/seed1 runs/seed2 [--atlases=DIR]

Each RUN is a finished run of configs/brain_tiny.py whose folder `colin` holds its scores on the other
head (docs/evidence.md has the commands). Nothing is answered again: kept answers are scored. "own
head" are the kinds of questions that the other head can be asked too. --atlases=DIR, the folder of
the other head's files, also says how far the boxes of the two atlases agree on the same slices.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import run as run_script
from harness import table

from unimed_jax.config import VISUAL_TASKS
from unimed_jax.data.datasets import brain, colin
from unimed_jax.data.datasets.brain import icbm152
from unimed_jax.errors import UserError
from unimed_jax.evaluate.metrics.boxes import iou
from unimed_jax.evaluate.run import LARGEST_PREDICTIONS
from unimed_jax.evaluate.scores import score
from unimed_jax.parsing import json_lines, read_text
from unimed_jax.runs.folder import read_config
from unimed_jax.verdicts import with_interval

LACKS = ("ventricle", "brainstem", "callosum")  # words of structures that the other atlas lacks
ADVICE = "score the run on both heads (docs/evidence.md)"
HEADS = {"own head": "brain", "brain alone": "colin", "with skull": "colin_skull"}


def askable(record: Mapping[str, Any]) -> bool:
    """Says whether a question about the own head could be asked about the other one."""
    meta = record["meta"]
    if meta.get("map") != "t1" or meta.get("template") == "map":
        return False
    words = record["question"] + " " + record["reference"]
    return record["task"] == "caption" or not any(word in words for word in LACKS)


def records(run: Path, head: str) -> list[dict[str, Any]]:
    """Reads the kept answers of a run about one head."""
    file = run / "predictions.jsonl" if head == "own head" else run / "colin" / "predictions.jsonl"
    text = read_text(file, ADVICE, LARGEST_PREDICTIONS)
    found = [record for _, record in json_lines(text, str(file), ADVICE)]
    found = [r for r in found if (r["set"], r["split"]) == (HEADS[head], "test")]
    return [r for r in found if askable(r)] if head == "own head" else found


def row(task: str, head: str, scores: Sequence[Mapping[str, Any]], own: Sequence[float]) -> list[str]:
    """Makes a line of the table: one task on one head, all runs."""

    def each(values) -> str:
        return " / ".join(values)

    primary, margins = scores[0]["primary"], [found["margin"] for found in scores]
    names = dict.fromkeys(margin["baseline"].replace("_", " ") for margin in margins)
    blind = [
        found["blind"][margin["baseline"]][primary]
        for found, margin in zip(scores, margins, strict=True)
    ]
    # without a margin on the own head there is none to keep
    kept = [m["value"] / whole if whole > 0 else None for m, whole in zip(margins, own, strict=True)]
    return [
        f"`{task}`, {primary}",
        head,
        str(scores[0]["n"]),
        each(f"{found['corrected'][primary]['value']:.3f}" for found in scores),
        f"{each(f'{value:.3f}' for value in blind)} ({', '.join(names)})",
        each(with_interval(margin, "+") for margin in margins),
        each("-" if share is None else f"{share:.0%}" for share in kept),
    ]


def agreement(folder: Path) -> list[list[str]]:
    """Lists how far two atlases agree: the mean IoU of their boxes of each structure, sides together.

    A structure that the brain set does not box on that slice counts as 0.
    """
    slices = [brain.draw_slices(head, "test") for head in (icbm152.load(), colin.load(folder))]
    own, other = ({each.key: each.boxes for each in some} for some in slices)
    found: dict[str, list[float]] = {}
    for key, boxes in other.items():
        for name, box in boxes.items():
            there = own[key].get(name)
            overlap = iou(np.array(box), np.array(there)) if there else 0.0
            found.setdefault(name.removeprefix("left ").removeprefix("right "), []).append(overlap)
    found["all"] = [overlap for some in found.values() for overlap in some]
    return [[name, str(len(some)), f"{np.mean(some):.3f}"] for name, some in found.items()]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options.add_argument("--atlases", type=Path, metavar="DIR")
    known = options.parse_args()
    runs, lines = known.runs, []
    for task in VISUAL_TASKS:
        own: list[float] = []
        for head in HEADS:
            chosen = [[r for r in records(run, head) if r["task"] == task] for run in runs]
            for run, some in zip(runs, chosen, strict=True):
                if not some or not set.intersection(*(set(record["blind"]) for record in some)):
                    raise UserError(
                        f"{run} has no answers beside blind ones about task {task} of {HEADS[head]!r}; "
                        f"{ADVICE}."
                    )
            scores = [
                score(task, some, read_config(run)) for run, some in zip(runs, chosen, strict=True)
            ]
            own = own or [found["margin"]["value"] for found in scores]
            lines.append(row(task, head, scores, own))
    heads = ["task, metric", "head", "n", "model", "best blind", "margin [95 %]", "of the own head's"]
    print(table(heads, lines))
    if known.atlases:
        print("\n" + table(["structure", "boxes", "mean IoU"], agreement(known.atlases)))


if __name__ == "__main__":
    run_script(main)
