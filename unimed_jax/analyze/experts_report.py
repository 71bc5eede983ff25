"""Writes the page and the picture of what expert_weights.py measured."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.drawing import dots, heat, said_about
from unimed_jax.evaluate.report.markdown import markdown_table


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
        moves = [f"{weights['move_cosine'][a][b]:+.3f}"] if "moved" in weights else []
        rows.append(
            [
                f"{a} - {b}",
                f"{weights['relative_distance'][a][b]:.3f}",
                f"{made['relative_distance'][a][b]:.3f}{ends}",
                *moves,
            ]
        )
    return rows


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Draws experts.png: distances of weights and outputs, norms and moves."""
    from matplotlib.figure import Figure

    weights, made = content["weights"], content["outputs"]
    experts = [str(e) for e in range(len(weights["norm"]))]
    figure = Figure(figsize=(11.5, 3.9), dpi=130, facecolor="white", layout="constrained")
    figure.suptitle(
        f"Experts of {Path(content['run']).name}, step {content['step']}", fontsize=12, weight="bold"
    )
    first, second, third = figure.subplots(1, 3)
    for axes, matrix, title in (
        (first, weights["relative_distance"], "distance of the weights (relative)"),
        (second, made["relative_distance"], "distance of the outputs (relative)"),
    ):
        heat(axes, np.array(matrix), experts, experts, "viridis", (0, 2**0.5))
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("expert", fontsize=8.5)
    _bars(third, weights, experts)
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
