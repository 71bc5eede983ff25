"""Measures which experts of the decoder the tokens of each task, data set and modality go to.

`experts.py` does the same for a chain of Med-MoE by the classes that its router was fitted on; this
serves any run with experts in the decoder, by what the examples say of themselves.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from unimed_jax import processes
from unimed_jax.analyze.examples import cluster_of, groups_of, table_of_data
from unimed_jax.analyze.experts import first_choices
from unimed_jax.analyze.routing import means
from unimed_jax.data.example import Example
from unimed_jax.data.layout import Encoder
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.predict.predictor import prompt_batch
from unimed_jax.runs.open import Run

KINDS = ("visual", "text")  # of tokens of a prompt


def analyse(run: Run, units: Sequence[Unit], keys: Sequence[str]) -> dict[str, Any]:
    """Measures which expert is the first choice of the tokens of the units' prompts.

    keys: of the examples' meta, by which groups are made. Returned: "layers" (numbers of the layers
    with experts), "experts", and "groups" kind -> name -> {examples, clusters, visual and text:
    {shares [layers, E], ci95 [layers, E] of [low, high]} or None without such tokens}. A share is the
    mean over examples of the share of an example's tokens. Text is the prompt without the visual
    tokens.
    """
    config = run.config
    shares: list[np.ndarray] = []
    of: list[Unit] = []
    examples: list[Example] = []
    total = sum(len(unit.examples) for unit in units)
    with tqdm(
        total=total, desc="routing", unit=" prompts", leave=False, disable=not processes.leads()
    ) as bar:
        for unit in units:
            for start in range(0, len(unit.examples), config.evaluate.batch):
                some = unit.examples[start : start + config.evaluate.batch]
                shares.append(_shares(run, unit, some))
                of += [unit] * len(some)
                examples += some
                bar.update(len(some))
    values = np.concatenate(shares)  # [examples, kinds, layers, E], NaN without such tokens
    clusters = np.array([cluster_of(unit, e) for unit, e in zip(of, examples, strict=True)])
    groups: dict[str, dict[str, Any]] = {}
    for kind, name, chosen in groups_of(of, examples, keys):
        entry: dict[str, Any] = {
            "examples": int(chosen.sum()),
            "clusters": len(set(clusters[chosen])),
        }
        for number, tokens in enumerate(KINDS):
            counts = chosen & np.isfinite(values[:, number, 0, 0])
            entry[tokens] = None
            if counts.any():
                mean, ci95 = means(
                    values[counts, number], clusters[counts], config.evaluate.bootstrap, config.seed
                )
                entry[tokens] = {"shares": mean, "ci95": ci95}
        groups.setdefault(kind, {})[name] = entry
    return {
        "layers": list(config.model.moe.numbers(config.model.decoder.depth)),
        "experts": config.model.moe.experts,
        "examples": table_of_data(units),
        "groups": groups,
    }


def _shares(run: Run, unit: Unit, examples: Sequence[Example]) -> np.ndarray:
    """Counts the first choices of some prompts: float64 [examples, kinds, layers, E]."""
    config, experts = run.config, run.config.model.moe.experts
    encoder = Encoder(run.tokenizer, config.text, config.model.tokens_per_image)
    pixels = [[unit.source.data.image(key) for key in example.images] for example in examples]
    batch = prompt_batch(encoder, config, run.tokenizer.pad, examples, pixels)
    chosen = np.asarray(first_choices(run.model, batch))  # [layers, B, S]
    visual, used = batch["visual"] >= 0, batch["segments"] != 0  # [B, S]
    found = np.full((len(examples), len(KINDS), len(chosen), experts), np.nan)
    for row in range(len(examples)):
        for number, places in enumerate((visual[row], used[row] & ~visual[row])):
            if places.any():
                one_hot = chosen[:, row, places, None] == np.arange(experts)
                found[row, number] = one_hot.mean(axis=1)
    return found
