"""The files of an evaluation: metrics.json, predictions.jsonl, report.md and pictures.

Routing, if the connector has a router, comes as {"tv_trained": {value, ci95}, "tv_step0": {value, ci95},
"tv_token_router": 0.0, "mean_weights": [task][expert], "maps": [tasks, T, E] weights per visual token}, the
tasks in the order of config.VISUAL_TASKS; "maps" is drawn in routing.png only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.config import Config
from unimed_jax.evaluate.report.markdown import markdown
from unimed_jax.evaluate.report.pictures import draw_predictions, draw_routing, token_grid
from unimed_jax.evaluate.scores import Scored
from unimed_jax.files import new_file
from unimed_jax.provenance import plain


def write_report(
    folder: str | Path,
    config: Config,
    metrics: Mapping[str, Any],
    scored: Sequence[Scored],
    image: Callable[[str, str], np.ndarray],
    routing: Mapping | None,
    again: str,
) -> None:
    """Writes all files of an evaluation into `folder`, metrics.json last: where it stands, the others are whole.

    `metrics`: see scores.summarise; `image` reads the image (uint8 [H, W, 3]) of a set's id and a key; `again`: the
    argument of `evaluate` that makes the same scores. Without matplotlib report.md says so in place of the pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = [record for part in scored for record in part.records]
    with new_file(folder / "predictions.jsonl") as file, file.open("w", encoding="utf-8", newline="\n") as out:
        for record in records:
            out.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
    pictures, note = ["predictions.png"], ""
    try:
        shown = [record for record in records if record["split"] == metrics["split"]]
        draw_predictions(folder / "predictions.png", shown, image)
        if routing is not None:
            draw_routing(folder / "routing.png", routing, token_grid(config))
            pictures.append("routing.png")
    except ImportError as error:
        pictures, note = [], f"The pictures were not drawn: {error}; install matplotlib."
    with new_file(folder / "report.md") as file:
        file.write_text(markdown(again, config, metrics, pictures, note), encoding="utf-8")
    with new_file(folder / "metrics.json") as file:
        file.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
