"""Writes the page and the picture of what ablation.py measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.drawing import heat, said_about
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.verdicts import with_interval


def page(content: Mapping[str, Any]) -> str:
    """Writes the table of ablation.md."""
    rows = [
        [
            name,
            entry["n"],
            entry["metric"],
            with_interval(entry["whole"]),
            *(with_interval(off, "+") + _star(off).replace("*", r" \*") for off in entry["off"]),
        ]
        for name, entry in content["units"].items()
    ]
    experts = [f"lost without {name}" for name in content["experts"]]
    return (
        f"# Experts switched off\n\n{said_about(content)}\n\n"
        f"{' '.join(_switched_off(content['experts']))} Lost: the score with all experts minus "
        "the score without this one, on the same questions (positive: the expert helps).\n\n"
        + markdown_table(["unit", "n", "metric", "all experts", *experts], rows)
        + "\n\n\\* helps or hurts: the difference holds after correction for all experts and units "
        "(Holm).\n"
    )


def _switched_off(names: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for each kind of expert among the names: what is done where one is off."""
    if any(name.startswith("expert") for name in names):
        yield (
            "One expert's weight is 0 at every visual token, and the weights of the others are scaled "
            "to sum to 1 again."
        )
    if any(name.startswith("decoder") for name in names):
        yield "An expert of the decoder is off in all layers, and its tokens go to their next choice."
    if "meta expert" in names:
        yield "Without the meta expert a token gets the output of its own experts alone."


def _star(off: Mapping[str, Any]) -> str:
    return "" if off["verdict"] == "undecided" else "*"


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Draws ablation.png: a row for each unit, a column for each expert."""
    from matplotlib.figure import Figure

    units, experts = content["units"], content["experts"]
    lost = np.array([[off["value"] for off in entry["off"]] for entry in units.values()])
    texts = [
        [
            f"{off['value']:+.3f}{_star(off)}"
            + (f"\n[{off['ci95'][0]:+.3f}, {off['ci95'][1]:+.3f}]" if off["ci95"] else "")
            for off in entry["off"]
        ]
        for entry in units.values()
    ]
    one_set = len({entry["set"] for entry in units.values()}) == 1
    rows = [
        f"{entry['task'] if one_set else name}\n{entry['metric']} {entry['whole']['value']:.3f}"
        for name, entry in units.items()
    ]
    figure = Figure(
        figsize=(1.25 * len(experts) + 2.6, 0.62 * len(rows) + 1.5),
        dpi=130,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots()
    most = max(float(np.abs(np.nan_to_num(lost)).max()), 0.01)
    columns = [f"without\n{name}" for name in experts]
    heat(axes, lost, rows, columns, "RdBu_r", (-most, most), texts)
    figure.suptitle(
        f"Score lost without an expert, {Path(content['run']).name}, split {content['split']!r}",
        fontsize=11,
        weight="bold",
    )
    axes.set_xlabel(
        "* holds after correction for all experts and units; red: the expert helps", fontsize=8.5
    )
    figure.savefig(path, format="png")
