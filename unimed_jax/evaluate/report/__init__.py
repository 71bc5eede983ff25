"""Writes the files of an evaluation: metrics.json, predictions.jsonl, report.md and pictures.

Routing, if the connector has a router, comes as {"tv_trained": {value, ci95}, "tv_step0": {value,
ci95}, "tv_token_router": 0.0, "mean_weights": [task][expert], "maps": [tasks, T, E] weights per
visual token}, the tasks in the order of config.VISUAL_TASKS; "maps" is drawn in routing.png only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import files
from unimed_jax.config import Config
from unimed_jax.evaluate.report.markdown import markdown
from unimed_jax.evaluate.report.pictures import draw_predictions, draw_routing, token_grid
from unimed_jax.evaluate.report.reliability import draw_reliability
from unimed_jax.evaluate.scores import Scored
from unimed_jax.paths import ANALYSES
from unimed_jax.provenance import plain
from unimed_jax.runs.folder import RESULTS

_LINKS = "\n## Analyses\n"


def write_report(
    folder: str | Path,
    config: Config,
    metrics: Mapping[str, Any],
    scored: Sequence[Scored],
    image: Callable[[str, str], np.ndarray],
    routing: Mapping | None,
    again: str,
) -> None:
    """Writes all files of an evaluation into `folder` at once, in place of those of the one before.

    Where metrics.json stands, the others are whole and of the same evaluation. `metrics`: see
    scores.summarise; `image` reads the image (uint8 [H, W, 3]) of a set's id and a key; `again`:
    the argument of `evaluate` that makes the same scores. Without matplotlib report.md says so in
    place of the pictures.
    """
    records = [record for part in scored for record in part.records]
    with files.written_together(folder, RESULTS) as place:
        with (place / "predictions.jsonl").open("w", encoding="utf-8", newline="\n") as out:
            for record in records:
                out.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        pictures, note = ["predictions.png"], ""
        try:
            shown = [record for record in records if record["split"] == metrics["split"]]
            draw_predictions(place / "predictions.png", shown, image)
            leading = [part for part in scored if part.split == metrics["split"]]
            judged = [part for part in leading if "likelihood" in part.scores]
            if judged:
                draw_reliability(
                    place / "reliability.png",
                    [(f"{part.set}: {part.task}", part.scores["likelihood"]) for part in judged],
                )
                pictures.append("reliability.png")
            if routing is not None:
                draw_routing(place / "routing.png", routing, token_grid(config))
                pictures.append("routing.png")
        except ImportError as error:
            pictures, note = [], f"The pictures were not drawn: {error}; install matplotlib."
        text = markdown(again, config, metrics, pictures, note)
        files.write_text(place / "report.md", text + _links(Path(folder)))
        files.write_json(place / "metrics.json", metrics)


def link_pages(folder: Path) -> None:
    """Lets the report.md of a run name the pages in `folder`, a folder of analyses of that run."""
    report = folder.parent / "report.md"
    if folder.name in ANALYSES and report.is_file():
        text = report.read_text(encoding="utf-8").partition(_LINKS)[0]
        files.write_text(report, text + _links(folder.parent))


def _links(run: Path) -> str:
    """Writes the last section of report.md, or nothing if no analysis was made."""
    pages = [page for name in ANALYSES for page in sorted((run / name).glob("*.md"))]
    lines = [f"- [{_title(page)}]({page.parent.name}/{page.name})" for page in pages]
    return "\n".join([_LINKS, *lines, ""]) if lines else ""


def _title(page: Path) -> str:
    first = page.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ") or page.stem
