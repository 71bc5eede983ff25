"""Measures which experts of the decoder the tokens of each task, data set and modality go to.

It serves any run with experts in the decoder, by what the examples say of themselves;
`chain_experts.py` does the same by the classes that the router of a Med-MoE chain was fitted on.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from unimed_jax import processes
from unimed_jax.analyze.examples import cluster_of, groups_of, table_of_data
from unimed_jax.analyze.routing import means
from unimed_jax.data.example import Example
from unimed_jax.data.layout import Encoder
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.model.sharding import constrain
from unimed_jax.model.unimed import Batch, UniMed
from unimed_jax.predict.plain import prompt_batch
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
                pixels = [[unit.source.data.image(key) for key in example.images] for example in some]
                shares.append(_shares(choices(run, some, pixels)))
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


def choices(run: Run, examples: Sequence[Example], pixels: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Counts how many tokens of each prompt prefer each expert: float64 [examples, kinds, layers, E].

    pixels: of each example's images, uint8 [H, W, 3].
    """
    config, experts = run.config, run.config.model.moe.experts
    encoder = Encoder(run.tokenizer, config.text, config.model.tokens_per_image)
    batch = prompt_batch(encoder, config, run.tokenizer.pad, examples, pixels)
    chosen = np.asarray(_first_choices(run.model, batch))  # [layers, B, S]
    visual, used = batch["visual"] >= 0, batch["segments"] != 0  # [B, S]
    found = np.zeros((len(examples), len(KINDS), len(chosen), experts))
    for row in range(len(examples)):
        for number, places in enumerate((visual[row], used[row] & ~visual[row])):
            one_hot = chosen[:, row, places, None] == np.arange(experts)
            found[row, number] = one_hot.sum(axis=1)
    return found


def _shares(found: np.ndarray) -> np.ndarray:
    """Divides counts [..., E] by their sum; NaN where there is none."""
    total = found.sum(axis=-1, keepdims=True)
    return np.divide(found, total, out=np.full_like(found, np.nan), where=total > 0)


@jax.jit
def _first_choices(model: UniMed, batch: Batch) -> Int[Array, "layers B S"]:
    """Computes the expert that each token prefers, in every layer with experts."""
    routing = model(batch).experts
    assert routing is not None
    chosen = routing.experts[..., 0].reshape(-1, *jnp.shape(batch["tokens"]))
    return constrain(chosen, None, None, None)  # every process reads all of it
