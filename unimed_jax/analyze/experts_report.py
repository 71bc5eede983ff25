"""Writes the page and the picture of what expert_weights.py and updates.py measured."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.drawing import dots, heat, said_about
from unimed_jax.analyze.updates import WHOLE
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.verdicts import number

COLUMNS = 4  # matrices of updates in a row of the picture


def page(content: Mapping[str, Any]) -> str:
    """Writes the tables of experts.md."""
    weights, made = content["weights"], content["outputs"]
    parts = [
        "# Weights of the experts",
        said_about(content),
        markdown_table(_head(weights), _rows(weights, made)),
        "Distances over the root of the mean of the two squared norms: 0 is equal, 1.41 unrelated. Of "
        "the weights, hidden units in their order; of the outputs for the same visual tokens "
        f"({made['images']} images), whatever the order.",
        markdown_table(_pair_head(weights), _pairs(weights, made)),
    ]
    updates = content["updates"]
    if updates is not None:
        parts += [
            "## Updates of single tasks",
            "Each task alone trains the connector from here: "
            f"{updates['steps']} steps of the run's Adam, started afresh, on held-out batches, "
            f"{updates['repeats']} times on other batches (our definition). Cosine of the updates of "
            "two tasks in all parameters of the connector, averaged over their repeats; on the diagonal "
            "that of a task with itself, which tells how much the batches alone change. Two tasks that "
            "want the same reach about the root of the product of their diagonals. The picture shows "
            "the parts.",
            markdown_table(["", *updates["names"]], _update_rows(updates)),
        ]
    return "\n\n".join(parts) + "\n"


def _head(weights: Mapping[str, Any]) -> list[str]:
    moved = ["moved", "of the norm at the start"] if "moved" in weights else []
    return ["part", "norm", *moved, "norm of the output"]


def _rows(weights: Mapping[str, Any], made: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for e, norm in enumerate(weights["norm"]):
        moved = []
        if "moved" in weights:
            moved = [f"{weights['moved'][e]:.3f}", f"{weights['moved_relative'][e]:.1%}"]
        rows.append([f"expert {e}", f"{norm:.3f}", *moved, f"{made['norm'][e]:.3f}"])
    for name, entry in weights["others"].items():
        moved = [f"{entry['moved']:.3f}", f"{entry['moved_relative']:.1%}"] if "moved" in entry else []
        rows.append([name, f"{entry['norm']:.3f}", *moved, "-"])
    return rows


def _pair_head(weights: Mapping[str, Any]) -> list[str]:
    moves = ["cosine of their moves"] if "moved" in weights else []
    return ["experts", "distance of the weights", "distance of the outputs", *moves]


def _pairs(weights: Mapping[str, Any], made: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for a, b in combinations(range(len(weights["norm"])), 2):
        ends = "" if made["ci95"] is None else " [{:.3f}, {:.3f}]".format(*made["ci95"][a][b])
        moves = [number(_known(weights["move_cosine"][a][b]), "+")] if "moved" in weights else []
        rows.append(
            [
                f"{a} - {b}",
                f"{weights['relative_distance'][a][b]:.3f}",
                f"{made['relative_distance'][a][b]:.3f}{ends}",
                *moves,
            ]
        )
    return rows


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _update_rows(updates: Mapping[str, Any]) -> list[list[str]]:
    names, whole = updates["names"], updates["groups"][WHOLE]
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, value in enumerate(whole["cos"][i]):
            ends = whole["ci95"][i][j] if whole["ci95"] else None
            text = "-" if value is None else f"{value:+.3f}"
            cells.append(text + (f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else ""))
        rows.append([name, *cells])
    return rows


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Draws experts.png: distances, norms and moves above, the updates of single tasks below."""
    from matplotlib.figure import Figure

    weights, made, updates = content["weights"], content["outputs"], content["updates"]
    experts = [str(e) for e in range(len(weights["norm"]))]
    groups = {} if updates is None else updates["groups"]
    lines = -(-len(groups) // COLUMNS)
    tasks = 0 if updates is None else len(updates["names"])
    cell = max(2.6, 0.5 * tasks + 0.9)
    heights = [3.4] + ([cell * lines + 0.3] if lines else [])
    figure = Figure(
        figsize=(max(11.5, COLUMNS * cell + 0.8), sum(heights) + 0.5),
        dpi=130,
        facecolor="white",
        layout="constrained",
    )
    figure.suptitle(
        f"Experts of {Path(content['run']).name}, step {content['step']}", fontsize=12, weight="bold"
    )
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    first, second, third = parts[0].subplots(1, 3)
    for axes, matrix, title in (
        (first, weights["relative_distance"], "distance of the weights (relative)"),
        (second, made["relative_distance"], "distance of the outputs (relative)"),
    ):
        heat(axes, np.array(matrix), experts, experts, "viridis", (0, 2**0.5))
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("expert", fontsize=8.5)
    _bars(third, weights, experts)
    if lines:
        assert updates is not None
        parts[1].suptitle(
            "cosine of the updates that each task alone causes (diagonal: with itself, other batches)",
            fontsize=9.5,
        )
        panels = parts[1].subplots(lines, COLUMNS, squeeze=False).ravel()
        for axes, (name, entry) in zip(panels, groups.items(), strict=False):
            matrix = np.array(entry["cos"], np.float64)  # NaN for None
            heat(axes, matrix, updates["names"], updates["names"], "RdBu", (-1, 1))
            axes.set_title(name, fontsize=9)
            axes.tick_params(axis="x", rotation=40)
        for axes in panels[len(groups) :]:
            axes.axis("off")
    figure.savefig(path, format="png")


def _bars(axes, weights: Mapping[str, Any], experts: list[str]) -> None:
    """Draws norms and moves of the experts side by side."""
    shown = {"norm": (weights["norm"], None)}
    if "moved" in weights:
        shown["moved since the start"] = (weights["moved"], None)
    dots(axes, shown, experts)
    axes.set_ylim(bottom=0)
    axes.set_title("norm of the weights", fontsize=9.5)
    axes.set_xlabel("expert", fontsize=8.5)
    axes.legend(fontsize=8, frameon=False)
