"""Writes the page and the picture of what routing.py and decoder_routing.py measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.analyze.drawing import COLOURS, dots, said_about
from unimed_jax.evaluate.report.markdown import markdown_table

MOST_GROUPS = 8  # of a kind, in a panel


def page(content: Mapping[str, Any]) -> str:
    """Writes the tables of routing.md."""
    parts = ["# Routing", said_about(content)]
    if content["connector_routing"] is not None:
        parts += _connector_page(content["connector_routing"])
    if content["decoder_routing"] is not None:
        parts += _decoder_page(content["decoder_routing"])
    return "\n\n".join(parts) + "\n"


def _connector_page(found: Mapping[str, Any]) -> list[str]:
    experts = [f"expert {e}" for e in range(found["experts"])]
    rows = [
        [kind, name, entry["images"], entry["clusters"], f"{entry['experts_used']:.2f}"]
        + _cells(entry["weights"], entry["ci95"])
        for kind, groups in found["groups"].items()
        for name, entry in groups.items()
    ]
    causes = [[cause, *_cells([e["value"]], [e["ci95"]])] for cause, e in found["causes"].items()]
    between = found["between_tasks"]
    pairs = [
        [
            f"{a} - {b}",
            *_cells(
                [between["distance"][i][j]],
                None if between["ci95"] is None else [between["ci95"][i][j]],
            ),
        ]
        for i, a in enumerate(between["names"])
        for j, b in enumerate(between["names"])
        if i < j
    ]
    places = []
    for task, entry in found["places"].items():
        weights = np.array(entry["weights"])  # [T, E]
        for e, name in enumerate(experts):
            least, most = int(weights[:, e].argmin()), int(weights[:, e].argmax())
            cells = [
                f"{place}: "
                + _cells(
                    [weights[place, e]], None if entry["ci95"] is None else [entry["ci95"][place][e]]
                )[0]
                for place in (least, most)
            ]
            places.append([task, name, *cells])
    return [
        "## Connector",
        "Mean weight of each expert for the images of a group, each under its own task. Experts used: "
        "the exponential of the entropy of a visual token's weights, averaged.",
        markdown_table(["by", "group", "images", "clusters", "experts used", *experts], rows),
        "What the weights vary with: shares of their variance over images, tasks and places, every "
        "image under the token of every task (our measure; the shares sum to 1).",
        markdown_table(["cause", "share of the variance"], causes),
        "How far apart two tasks route the same images (total variation: 0 alike, 1 no common expert).",
        markdown_table(["tasks", "distance"], pairs),
        "The visual tokens, numbered in raster order, where an expert weighs least and most.",
        markdown_table(["task", "expert", "least at", "most at"], places),
    ]


def _decoder_page(found: Mapping[str, Any]) -> list[str]:
    experts = [f"expert {e}" for e in range(found["experts"])]
    rows = []
    for kind, groups in found["groups"].items():
        for name, entry in groups.items():
            for tokens in ("visual", "text"):
                if entry[tokens] is None:
                    continue
                for at, layer in enumerate(found["layers"]):
                    ci95 = entry[tokens]["ci95"]
                    cells = _cells(entry[tokens]["shares"][at], None if ci95 is None else ci95[at])
                    rows.append([kind, name, entry["examples"], tokens, layer, *cells])
    return [
        "## Decoder",
        "Share of a prompt's tokens whose first choice is each expert, in each layer with experts.",
        markdown_table(["by", "group", "examples", "tokens", "layer", *experts], rows),
    ]


def _cells(values, ci95) -> list[str]:
    """Writes values with their intervals; "-" for None."""
    ends = [None] * len(values) if ci95 is None else ci95
    return [
        "-"
        if value is None or not np.isfinite(value)
        else f"{value:.3f}" + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "")
        for value, low_high in zip(values, ends, strict=True)
    ]


def draw(path: Path, content: Mapping[str, Any], grid: tuple[int, int]) -> None:
    """Draws routing.png; grid: rows and columns of an image's visual tokens."""
    from matplotlib.figure import Figure

    connector, decoder = content["connector_routing"], content["decoder_routing"]
    heights = []
    if connector is not None:
        heights += [2.9 * len(connector["groups"]), 1.5, 1.25 * len(connector["places"]) + 0.6]
    if decoder is not None:
        heights.append(2.6 * len(decoder["groups"]) * len(decoder["layers"]))
    experts = max(part["experts"] for part in (connector, decoder) if part is not None)
    figure = Figure(
        figsize=(max(8.0, 1.5 * experts + 2.5), sum(heights) + 0.4),
        dpi=130,
        facecolor="white",
        layout="constrained",
    )
    figure.suptitle(
        f"Routing of {Path(content['run']).name}, step {content['step']}, split {content['split']!r}",
        fontsize=12,
        weight="bold",
    )
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if connector is not None:
        _draw_groups(parts.pop(0), connector)
        _draw_causes(parts.pop(0), connector["causes"])
        _draw_places(parts.pop(0), connector, grid)
    if decoder is not None:
        _draw_decoder(parts.pop(0), decoder)
    figure.savefig(path, format="png")


def _draw_groups(figure, found: Mapping[str, Any]) -> None:
    columns = [f"expert {e}" for e in range(found["experts"])]
    panels = figure.subplots(len(found["groups"]), 1, squeeze=False)[:, 0]
    for axes, (kind, groups) in zip(panels, found["groups"].items(), strict=True):
        shown = dict(list(groups.items())[:MOST_GROUPS])
        dots(
            axes,
            {name: (entry["weights"], entry["ci95"]) for name, entry in shown.items()},
            columns,
            1 / found["experts"],
        )
        left = len(groups) - len(shown)
        title = f"mean weight by {kind}" + (f" ({left} more groups in routing.md)" if left else "")
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_ylabel("routing weight", fontsize=8.5)
        axes.legend(fontsize=7.5, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_causes(figure, causes: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    left = 0.0
    for number, (cause, entry) in enumerate(causes.items()):
        share = entry["value"]
        if share is None or not np.isfinite(share):
            axes.text(0.5, 0, "the weights do not vary", ha="center", va="center", fontsize=9)
            break
        axes.barh(0, share, left=left, color=COLOURS[number], label=f"{cause} {share:.1%}")
        left += share
    axes.set(yticks=[], xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.tick_params(labelsize=8)
    axes.set_title("what the weights vary with (shares of their variance)", fontsize=9.5, loc="left")
    if left:
        axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _draw_places(figure, found: Mapping[str, Any], grid: tuple[int, int]) -> None:
    places, experts = found["places"], found["experts"]
    maps = {task: np.array(entry["weights"]) for task, entry in places.items()}
    low = min(each.min() for each in maps.values())
    high = max(each.max() for each in maps.values())
    high = max(high, low + 1e-6)
    panels = figure.subplots(len(maps), experts, squeeze=False)
    for row, (task, weights) in zip(panels, maps.items(), strict=True):
        for e, axes in enumerate(row):
            shown = axes.imshow(
                weights[:, e].reshape(grid),
                vmin=low,
                vmax=high,
                cmap="cividis",
                extent=(0, 1, 1, 0),
            )
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(task, fontsize=9)
    for e, axes in enumerate(panels[0]):
        axes.set_title(f"expert {e}", fontsize=8.5)
    figure.suptitle("mean weight by place in the image", fontsize=9.5, x=0.02, ha="left")
    figure.colorbar(shown, ax=panels.ravel().tolist(), shrink=0.8).ax.tick_params(labelsize=8)


def _draw_decoder(figure, found: Mapping[str, Any]) -> None:
    columns = [f"expert {e}" for e in range(found["experts"])]
    kinds, layers = list(found["groups"].items()), found["layers"]
    panels = figure.subplots(len(kinds) * len(layers), 2, squeeze=False, sharey=True)
    for k, (kind, groups) in enumerate(kinds):
        for at, layer in enumerate(layers):
            row = panels[k * len(layers) + at]
            for axes, tokens in zip(row, ("visual", "text"), strict=True):
                shown = {
                    name: (
                        entry[tokens]["shares"][at],
                        None if entry[tokens]["ci95"] is None else entry[tokens]["ci95"][at],
                    )
                    for name, entry in list(groups.items())[:MOST_GROUPS]
                    if entry[tokens] is not None
                }
                dots(axes, shown, columns, 1 / found["experts"])
                axes.set_title(f"decoder layer {layer}, {tokens} tokens, by {kind}", fontsize=8.5)
                axes.set_ylim(-0.03, 1.03)
            row[0].set_ylabel("share of first choices", fontsize=8.5)
            row[1].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
