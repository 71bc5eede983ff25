"""Writes the sections about training: logged values, routing, and how the tasks' gradients agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimed_jax.analyze.run_report.facts import Facts, names_of
from unimed_jax.analyze.run_report.markup import Markup, details, joined, prose, table, tag
from unimed_jax.analyze.run_report.plots import Series, curve, finite, heat
from unimed_jax.analyze.run_report.scores import not_measured, number_of, signed
from unimed_jax.analyze.tug_of_war_report import TITLES
from unimed_jax.config import VISUAL_TASKS
from unimed_jax.evaluate.report.markdown import routing_line
from unimed_jax.verdicts import with_interval

MOST_CURVES = 36
# what a log holds that is drawn in the open, in this order; the rest is folded
_FIRST = ("train/loss", "loss/", "valid/", "train/grad_norm", "train/lr")


# ---- curves ----------------------------------------------------------------------------------------
def curves(runs: Sequence[Facts]) -> Markup:
    """Draws every logged value, those of all runs in one figure."""
    keys = dict.fromkeys(key for run in runs for line in run.log for key in line)
    drawn: dict[str, Markup] = {}
    for key in keys:
        series = []
        for run in runs:
            steps, values = finite(run.log, key)
            if len(values):
                label = f"{run.sign}, " if run.sign else ""
                series.append(Series(number_of(run), label, steps, values))
        if series and key not in ("step", "epoch"):
            drawn[key] = curve(key, series)
    if not drawn:
        return tag("p", "No log of the training lies beside the scores.")
    first = [key for start in _FIRST for key in drawn if key == start or key.startswith(start)]
    first = list(dict.fromkeys(first))[:MOST_CURVES]
    routed = [key for key in drawn if key.startswith("routing/")][:MOST_CURVES]
    rest = [key for key in drawn if key not in first and key not in routed][:MOST_CURVES]
    return joined(
        (
            tag("p", "Point at a curve to read a step's value."),
            tag("div", *(drawn[key] for key in first), class_="curves"),
            details("Routing while training", _grid(drawn, routed)),
            details("Speed, memory and other logged values", _grid(drawn, rest)),
        )
    )


def _grid(drawn: Mapping[str, Markup], keys: Sequence[str]) -> Markup:
    return tag("div", *(drawn[key] for key in keys), class_="curves") if keys else Markup("")


# ---- routing ---------------------------------------------------------------------------------------
def routing(runs: Sequence[Facts]) -> Markup:
    """Shows the mean weight of each expert by task."""
    parts = []
    for run in runs:
        found = run.metrics.get("routing")
        if not found:
            continue
        weights = found["mean_weights"]
        head = [f"expert {i}" for i in range(len(weights[0]))]
        rows = dict(zip(VISUAL_TASKS, weights, strict=False))
        caption = f"{run.sign} Mean routing weight by task".strip()
        most = max(max(line) for line in weights)
        parts.append(tag("div", heat(head, rows, caption, most=most), prose(f"{routing_line(found)}.")))
    if not parts:
        return tag("p", "The connector has no experts.")
    about = (
        "The same images, routed under each task's token. Total variation is 0 where two tasks use the "
        "experts alike, and 1 where they have none in common."
    )
    return joined((tag("p", about), *parts))


# ---- tug-of-war ------------------------------------------------------------------------------------
def tug_of_war(runs: Sequence[Facts]) -> Markup:
    """Shows how the tasks' gradients agree, where that was measured."""
    parts = []
    for run in runs:
        if run.tug_of_war is None:
            parts.append(not_measured(run, "tug-of-war"))
            continue
        parts += [signed(run), _gradients(run.tug_of_war["runs"])]
    about = (
        "Gradients of each task's mean loss on held-out batches, at the same parameters. A cosine below "
        "0 is a conflict: a step for one task undoes some of the other."
    )
    return joined((tag("p", about), *parts))


_MATRICES = (("cos", "cosine", -1.0), ("magnitude", "magnitude similarity", 0.0))


def _gradients(measured: Sequence[Mapping[str, Any]]) -> Markup:
    """Shows both matrices of each run that was measured together, then the indices of all."""
    titles = names_of([Path(one["run"]) for one in measured])
    parts, found = [], {}
    for title, one in zip(titles, measured, strict=True):
        group, units = next(iter(one["units"].items()))
        names = units["names"]
        tables = [
            heat(names, dict(zip(names, units[key], strict=True)), f"{group}: {words}", least, 1.0)
            for key, words, least in _MATRICES
        ]
        found[title] = units["indices"]
        parts.append(tag("h3", f"{title} ({one['connector']}, step {one['step']})"))
        parts.append(tag("div", *tables, class_="side"))
        if units["absent"]:
            parts.append(tag("p", f"No gradient there: {', '.join(units['absent'])}."))
    rows = [
        [words, *(with_interval(indices.get(name)) for indices in found.values())]
        for name, words in TITLES.items()
    ]
    return joined((*parts, table(("index of all pairs [95 %]", *found), rows, "Tug-of-war in numbers")))
