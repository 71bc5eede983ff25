"""Measures which experts of the decoder the tokens of each class of a chain's router go to.

`decoder_routing.py` does it for any run, by what the examples say of themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax import files, processes
from unimed_jax.analyze import decoder_routing
from unimed_jax.config import Config
from unimed_jax.data.datasets import distinct, open_sources
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.parsing import read_json
from unimed_jax.provenance import plain
from unimed_jax.runs.folder import read_config
from unimed_jax.runs.open import Run, open_run
from unimed_jax.train.router import REPORT, labelled

LOAD = "experts.json"  # in the folder of the run with experts


def write_load(folder: Path, router: Path) -> dict[str, Any]:
    """Measures the run in `folder` on what its router's run was tested on, and writes experts.json.

    Returns the content of the file. Raises UserError if one of the two runs is not finished.
    """
    classes = read_json(router / REPORT, "train the router first")["classes"]
    run = open_run(folder)
    with run.inside():
        load = plain(expert_load(run, read_config(router), classes))
    if processes.leads():
        files.write_json(folder / LOAD, load)
    return load


def expert_load(run: Run, router: Config, classes: list[str]) -> dict[str, Any]:
    """Counts the first choices of the tokens of one prompt of each image that names its class.

    router: the settings that the router was fitted with, which say what a class is and which data
    sets are held out. Returned: {"layers": numbers of the layers with experts, "splits": {split:
    {class: {"images": n, "visual": shares [layers, experts], "text": likewise}}}}. Text is the rest
    of the prompt.
    """
    config, datasets = run.config, distinct(open_sources(router.held_out))
    layers, experts = config.model.moe.numbers(config.model.decoder.depth), config.model.moe.experts
    splits: dict[str, Any] = {}
    for split in router.evaluate.splits:
        some = labelled(datasets, split, router, classes)
        counts = np.zeros((len(classes), len(decoder_routing.KINDS), len(layers), experts))
        for start in range(0, len(some.examples), config.evaluate.batch):
            rows = slice(start, start + config.evaluate.batch)
            pixels = [
                [dataset.image(key) for key in example.images]
                for dataset, example in zip(some.datasets[rows], some.examples[rows], strict=True)
            ]
            found = decoder_routing.choices(run, some.examples[rows], pixels)
            np.add.at(counts, some.classes[rows], found)
        total = counts.sum(axis=-1, keepdims=True)
        shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
        splits[split] = {
            name: {
                "images": int((some.classes == i).sum()),
                "visual": shares[i, 0],
                "text": shares[i, 1],
            }
            for i, name in enumerate(classes)
        }
    return {"layers": list(layers), "classes": classes, "splits": splits}


def load_table(load: Mapping[str, Any]) -> str:
    """Makes a table of the shares, in per cent, with a row for each split, class and layer."""
    rows = []
    for split, of_class in load["splits"].items():
        for name, found in of_class.items():
            for at, layer in enumerate(load["layers"]):
                shares = (
                    " / ".join(f"{100 * share:.0f}" for share in found[kind][at])
                    for kind in ("visual", "text")
                )
                rows.append([split, f"{name} ({found['images']})", str(layer), *shares])
    experts = " / ".join(load["classes"])
    heading = ["split", "images", "layer", f"visual tokens to {experts}, %", "text tokens, %"]
    return markdown_table(heading, rows)
