"""What an evaluation leaves in the run's folder: metrics.json, predictions.jsonl, report.md and pictures.

Routing, where the connector has a router, comes as {"tv_trained": {value, ci95}, "tv_step0": {value, ci95},
"tv_token_router": 0.0, "mean_weights": [task][expert], "maps": [tasks, T, E] weights per visual token}, the
tasks in the order of config.VISUAL_TASKS; "maps" goes into routing.png alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from unimed_jax.config import Config
from unimed_jax.evaluate.report.markdown import markdown
from unimed_jax.evaluate.report.pictures import draw_predictions, draw_routing, token_grid
from unimed_jax.evaluate.tasks import summarise
from unimed_jax.provenance import plain


def write_report(
    folder: str | Path,
    config: Config,
    data_checksum: str,
    results: Mapping[str, Mapping],
    records: Sequence[Mapping],
    image: Callable[[str], np.ndarray],
    routing: Mapping | None = None,
) -> dict:
    """Writes all files of an evaluation into `folder` and returns what metrics.json holds.

    `results` maps "test" and "val" to the scores, `records` are the lines of both (tasks.evaluate);
    `image` reads a record's image (uint8 [H, W, 3]). Where matplotlib is missing report.md says so in
    place of the pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = summarise(config, data_checksum, results, routing)
    text = json.dumps(metrics, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
    pictures, note = ["predictions.png"], ""
    try:
        shown = [record for record in records if record["split"] == "test"] or list(records)
        draw_predictions(folder / "predictions.png", shown, image)
        if routing is not None:
            draw_routing(folder / "routing.png", routing, token_grid(config))
            pictures.append("routing.png")
    except ImportError as error:
        pictures, note = [], f"The pictures were not drawn: {error}; install matplotlib."
    (folder / "report.md").write_text(markdown(folder, config, metrics, pictures, note), encoding="utf-8")
    return metrics


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# report.md
# ---------------------------------------------------------------------------------------------
