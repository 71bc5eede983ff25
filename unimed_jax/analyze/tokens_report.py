"""Writes the page and the picture of what tokens.py measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.drawing import COLOURS, said_about
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.verdicts import with_interval

TITLES = {
    "before": "before the connector\n(own images)",
    "after": "after the connector\n(own images)",
    "same": "after the connector\n(same images, every task)",
    "shift": "what the task changes\n(same images, less their mean)",
}


def page(content: Mapping[str, Any]) -> str:
    """Writes the table of tokens.md."""
    rows = []
    for view in content["views"].values():
        score = view["separation"]
        low, high = score["shuffled"]
        shares = view["variance_shown"]
        rows.append(
            [
                view["what"],
                score["n"],
                with_interval(score, "+"),
                f"{low:+.3f} to {high:+.3f}",
                with_interval(view["classified"]),
                "-" if shares is None else f"{sum(shares):.0%}",
                ", ".join(f"{name} {value:+.3f}" for name, value in score["by_label"].items()),
            ]
        )
    head = [
        "visual tokens",
        "tokens",
        "silhouette",
        "labels shuffled",
        "classified",
        "variance in the picture",
    ]
    return (
        f"# Visual tokens by {content['by']}\n\n{said_about(content)}\n\n"
        "The silhouette is computed in the tokens' own space, not in the picture's two dimensions: 1 is "
        "apart, 0 is mixed, below 0 is nearer to another label. Beside it stands the range that 95 % of "
        "200 shuffles of the labels among images give. Classified: balanced accuracy of a linear "
        "classifier on clusters that it was not fitted on; "
        f"{_chance(content)} would be chance.\n\n"
        + markdown_table([*head, f"silhouette of each {content['by']}"], rows)
        + "\n"
    )


def _chance(content: Mapping[str, Any]) -> str:
    view = next(iter(content["views"].values()))
    return f"{1 / len(view['separation']['by_label']):.2f}"


def draw(
    path: Path, content: Mapping[str, Any], points: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Draws tokens.png: a panel for each view, coloured by label, with its score above it."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(str(label) for _, own in points.values() for label in own))
    figure = Figure(
        figsize=(3.7 * len(points) + 1.3, 4.7), dpi=130, facecolor="white", layout="constrained"
    )
    figure.suptitle(
        f"Visual tokens of {Path(content['run']).name} by {content['by']}, "
        f"{content['projection']}, split {content['split']!r}",
        fontsize=12,
        weight="bold",
    )
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, (name, (places, own)) in zip(panels, points.items(), strict=True):
        view = content["views"][name]
        score = view["separation"]
        order = np.random.default_rng(0).permutation(len(places))  # so that no label covers another
        colours = np.array([COLOURS[labels.index(str(label)) % len(COLOURS)] for label in own])
        axes.scatter(*places[order].T, c=colours[order], s=9, alpha=0.65, linewidths=0)
        low, high = score["shuffled"]
        axes.set_title(
            f"{TITLES[name]}\nsilhouette {with_interval(score, '+')}\n"
            f"shuffled {low:+.3f} to {high:+.3f}\n"
            f"classified {with_interval(view['classified'])}, chance {_chance(content)}",
            fontsize=8.5,
        )
        shares = view["variance_shown"]
        for set_label, i in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
            set_label(
                f"component {i + 1}" + (f" ({shares[i]:.0%})" if shares else ""),
                fontsize=8.5,
            )
        axes.set(xticks=[], yticks=[])
    for number, label in enumerate(labels):
        colour = COLOURS[number % len(COLOURS)]
        panels[-1].scatter([], [], color=colour, s=28, label=label)
    panels[-1].legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, format="png")
