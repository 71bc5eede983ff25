"""Switches experts off, one at a time, and measures what each task loses.

An expert of the connector that is off gets weight 0 at every visual token, and the weights of the others
are scaled to sum to 1 again; where it was the only one (hard routing, or one kept expert), the visual
token is 0. An expert of the decoder is off in all layers, and its tokens go to their next choice; the
meta expert (Med-MoE) adds nothing where it is off. The answers are those of the evaluation, to the same
questions with the same settings, so that losses are paired.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unimed_jax import processes
from unimed_jax.analyze.routing import has_mixture
from unimed_jax.config import VISUAL_TASKS, Config
from unimed_jax.errors import UserError
from unimed_jax.evaluate.answers import Journal
from unimed_jax.evaluate.metrics import Record
from unimed_jax.evaluate.run import answered_records, fingerprint_of
from unimed_jax.evaluate.statistics import Difference, Measure, paired, verdicts, with_interval
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.model.unimed import UniMed
from unimed_jax.runs.open import Run

WHOLE = "all experts"
# What a model with all experts being better or worse says of the expert that is off.
VERDICTS = {"better": "helps", "worse": "hurts", "undecided": "undecided"}
PARTIAL = "ablation.partial"  # folder of the answers so far


def without_expert(model: UniMed, expert: int) -> UniMed:
    """Makes a copy of the model in which one expert of the connector is off; the arrays are shared."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    experts = copy.connector.experts
    assert experts is not None
    copy.connector.kept = nnx.Variable(jnp.ones(experts.count).at[expert].set(0.0))
    return copy


def without_decoder_expert(model: UniMed, expert: int) -> UniMed:
    """Makes a copy of the model in which one expert of the decoder is off in all layers."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    moe, experts = copy.decoder.layers.moe, model.config.moe.experts
    layers = len(model.config.moe.numbers(model.config.decoder.depth))
    moe.kept = nnx.Variable(jnp.ones((layers, experts)).at[:, expert].set(0.0))
    return copy


def without_meta_expert(model: UniMed) -> UniMed:
    """Makes a copy of the model whose decoder has no meta expert in any layer."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    copy.decoder.layers.moe.meta = None
    return copy


def has_decoder_experts(config: Config) -> bool:
    """Says whether a decoder has experts, of which one can be switched off.

    The only one cannot, as its tokens have no next choice, but for the meta expert.
    """
    moe = config.model.moe
    return bool(moe.numbers(config.model.decoder.depth)) and (moe.experts > 1 or moe.meta)


def without_each(model: UniMed, config: Config) -> dict[str, UniMed]:
    """Makes the models that lack one expert each, by the name of that expert."""
    found: dict[str, UniMed] = {}
    if has_mixture(config):
        found |= {f"expert {e}": without_expert(model, e) for e in range(config.model.connector.experts)}
    if has_decoder_experts(config):
        moe = config.model.moe
        if moe.experts > 1:  # a token of the only one has no next choice
            others = {e: without_decoder_expert(model, e) for e in range(moe.experts)}
            found |= {f"decoder expert {e}": other for e, other in others.items()}
        if moe.meta:
            found["meta expert"] = without_meta_expert(model)
    return found


def analyse(run: Run, units: Sequence[Unit], folder: Path) -> dict[str, Any]:
    """Answers the units' questions with all experts and without each of them.

    folder: where answers are kept (`PARTIAL`), so that a killed analysis goes on; the caller removes
    them once what follows from them is written. Returned:
    "experts" (names), "units" name -> {task, set, n, clusters, metric, whole, off: for each expert
    {value (the loss: with all experts minus without this one), ci95, p, score, p_holm, verdict}}.
    Raises UserError if only the connector has experts and no unit has an image.
    """
    if not has_decoder_experts(run.config):
        units = [unit for unit in units if unit.task in VISUAL_TASKS]
    if not units:
        raise UserError(
            "no task with images is left, and only those pass the connector's experts; choose another "
            "--task or --split."
        )
    experts = without_each(run.model, run.config)
    models = {WHOLE: run.model} | {f"without {name}": model for name, model in experts.items()}
    answered: dict[str, dict[str, list[Record]]] = {}
    partial = folder / PARTIAL
    for number, (name, model) in enumerate(models.items()):
        processes.say(f"{name} ({number + 1} of {len(models)})")
        journal = Journal(partial / str(number), fingerprint(run, units, name))
        answered[name] = answered_records(model, run.config, run.tokenizer, units, journal)
    return {"experts": list(experts), "units": losses(units, answered, run.config)}


def losses(
    units: Sequence[Unit], answered: Mapping[str, Mapping[str, Sequence[Record]]], config: Config
) -> dict[str, Any]:
    """Compares the answers without each expert with those of the whole model, unit by unit.

    answered: name of the model, the whole one first -> name of the unit -> its records. Verdicts are
    corrected for all experts and units together.
    """
    whole, *off = answered
    resamples, seed = config.evaluate.bootstrap, config.seed
    found: dict[str, Any] = {}
    lost: list[Difference] = []
    for unit in units:
        metric = unit.metrics[0]
        measures: list[Measure] = [metric.leading(answered[name][unit.name]) for name in (whole, *off)]
        clusters = [record["cluster"] for record in answered[whole][unit.name]]
        own = [paired(measures[:1], [each], clusters, resamples, seed) for each in measures[1:]]
        lost += own
        found[unit.name] = {
            "set": unit.source.id,
            "task": unit.task,
            "n": len(unit.examples),
            "clusters": len(set(clusters)),
            "metric": metric.name,
            "whole": with_interval(measures[0], clusters, resamples, seed),
            "off": [
                {"value": each.value, "ci95": each.ci95, "p": each.p, "score": measure.value}
                for each, measure in zip(own, measures[1:], strict=True)
            ],
        }
    entries = [entry for unit in found.values() for entry in unit["off"]]
    for entry, said in zip(entries, verdicts(lost), strict=True):
        entry["p_holm"] = said["p_holm"]
        entry["verdict"] = VERDICTS[said["verdict"]]
    return found


def fingerprint(run: Run, units: Sequence[Unit], name: str) -> str:
    """Returns a text that names all that the answers of one model depend on."""
    sets = {unit.source.id: unit.source for unit in units}
    asked = [[unit.name, len(unit.examples)] for unit in units]
    facts = [name, asked, fingerprint_of(run, run.config, sets)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
