"""A run's folder: what stands where in it, and `open_run`, from which every verb that reads one starts.

config.json       the settings, fidelity expanded       tokenizer/    a Hugging Face tokenizer folder
checkpoints/      see checkpoint.py                     log.jsonl     one line per logged step
contact_sheet.png images with their boxes               tensorboard/, lock: who trains here
metrics.json, predictions.jsonl, report.md, other *.png what the evaluation left
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError, nearest
from unimed_jax.interop.families.unimed_hf import exported_config, is_exported, load_exported
from unimed_jax.interop.sources import SOURCES
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import folded
from unimed_jax.model.dispatch import upcycled
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.sharding import inside, parameter_shardings
from unimed_jax.model.unimed import UniMed, order_coordinates
from unimed_jax.rules import leaf_dtypes, leaf_rules
from unimed_jax.runs.checkpoint import Checkpoints, fingerprints
from unimed_jax.runs.folder import load_text, missing_inputs, read_config, tokenizer_folder


@dataclasses.dataclass
class Run:
    folder: Path
    config: Config
    tokenizer: Tokenizer
    model: UniMed
    step: int
    mesh: Mesh | None = None  # over which the model's leaves lie

    def inside(self) -> contextlib.AbstractContextManager:
        """The context in which the model is to be called: that of the mesh."""
        return inside(self.mesh)


def initial_model(config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None) -> tuple[UniMed, dict[str, str]]:
    """The model before the first step, laid over the mesh, and the source of every leaf."""
    leaves, sources = initial_leaves(config, tokenizer, mesh)
    return with_parameters(abstract(config.model), leaves), sources


def initial_leaves(
    config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None, wanted: Sequence[str] = ("*",)
) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves before the first step whose paths match one of the patterns `wanted`, and the source of each.

    A function of the settings alone: the random numbers do not depend on the devices. Leaves that train are
    float32, the others of `config.model.frozen_dtype`, but for the routers of experts, which round to other experts.
    Only what is wanted, and of that only what no later source replaces, is made or read.
    """
    if tokenizer.size > config.model.decoder.vocab:
        raise UserError(
            f"config.model.decoder.vocab={config.model.decoder.vocab} is less than the tokenizer's {tokenizer.size} "
            "tokens; raise it."
        )
    shapes = parameters(abstract(config.model))
    rules = leaf_rules(shapes, config.train, config.optimizer)
    dtypes = leaf_dtypes(rules, config.model.frozen_dtype)
    places = None if mesh is None else parameter_shardings(shapes, mesh)
    still = {path for path in shapes if any(fnmatch.fnmatchcase(path, pattern) for pattern in wanted)}
    leaves: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for kind, path in reversed(config.init):
        if kind == "seed":
            found = _random_leaves(config, tokenizer, still, dtypes, places)
        elif kind == "run":
            found = _leaves_of_run(path, config, {p: shapes[p] for p in still}, dtypes, places)
        elif kind not in SOURCES:
            known = ("seed", "run", *SOURCES)
            raise UserError(f"config.init: {kind!r} is no source of weights{nearest(kind, known)} Choose from {known}.")
        elif not SOURCES[kind].among(still):
            continue
        else:
            found = SOURCES[kind].load(path, config.model, Destination(shapes, places, dtypes))
        taken = still & set(found)
        leaves |= {p: found[p] for p in taken}
        sources |= dict.fromkeys(taken, f"{kind} {path}".strip())
        still -= taken
    if still:
        raise UserError(
            f"config.init gives no {', '.join(folded(sorted(still))[:5])}; put ('seed', '') first, for random numbers."
        )
    order = [p for p in shapes if p in leaves]
    return {p: leaves[p] for p in order}, {p: sources[p] for p in order}


def _random_leaves(config: Config, tokenizer: Tokenizer, wanted, dtypes, places) -> dict[str, jax.Array]:
    def make() -> dict[str, jax.Array]:
        model = UniMed(config.model, nnx.Rngs(config.seed))
        if tokenizer.coordinate_start is not None:
            order_coordinates(model, tokenizer.coordinate_start)
        return {p: leaf.astype(dtypes[p]) for p, leaf in parameters(model).items() if p in wanted}

    return jax.jit(make, out_shardings=None if places is None else {p: places[p] for p in wanted})()


def _leaves_of_run(path: str, config: Config, wanted, dtypes, places) -> dict[str, jax.Array]:
    """What a finished run has of the same name and shape; of a dense decoder's MLPs copies where there are experts."""
    other = open_run(path)
    theirs, depth = parameters(other.model), config.model.decoder.depth
    if config.model.moe.experts and not other.config.model.moe.experts and other.config.model.decoder.depth == depth:
        prefix = "decoder/layers/"
        mlp = {p.removeprefix(f"{prefix}mlp/"): leaf for p, leaf in theirs.items() if p.startswith(f"{prefix}mlp/")}
        theirs |= {prefix + p: leaf for p, leaf in upcycled(mlp, config.model.moe, depth).items()}
    fits = [p for p, leaf in wanted.items() if p in theirs and theirs[p].shape == leaf.shape]
    if not fits:
        raise UserError(f"config.init: no parameter of run {path} fits this model; check config.model.")
    taken = {p: theirs[p].astype(dtypes[p]) for p in fits}
    return taken if places is None else {p: jax.device_put(leaf, places[p]) for p, leaf in taken.items()}


def base_note(leaves: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, dict]:
    """Source and fingerprint of each leaf, for a checkpoint's note: what it does not hold, but stands on."""
    numbers = jax.device_get(fingerprints(dict(leaves)))
    return {path: {"source": sources[path], "fingerprint": int(number)} for path, number in numbers.items()}


def check_base(folder: Path, saved: Mapping[str, dict], now: Mapping[str, dict]) -> None:
    """Raises UserError where a leaf that a checkpoint stands on is another one than when it was saved."""
    changed = [path for path, entry in now.items() if saved.get(path, entry)["fingerprint"] != entry["fingerprint"]]
    if changed:
        raise UserError(
            f"{folder} was trained on other weights than {now[changed[0]]['source']} holds now "
            f"({', '.join(folded(changed)[:3])} differ); give those that it was trained on in config.init."
        )


def open_run(path: str | Path) -> Run:
    """Reads a run's folder: settings, tokenizer, and the model of its newest checkpoint.

    Leaves that the checkpoint does not hold are read again from where `config.init` says. A folder that
    `export --format=model` wrote is opened too.
    """
    folder = Path(path)
    if is_exported(folder):
        config = exported_config(folder)
        leaves = load_exported(folder, config.model, Destination(parameters(abstract(config.model))))
        model = with_parameters(abstract(config.model), leaves)
        return Run(folder, config, Tokenizer.load(folder), model, step=0)
    config = read_config(folder)
    tokenizer = Tokenizer.load(tokenizer_folder(folder, config))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    if checkpoints.latest() is None:
        raise UserError(f"{folder} holds no checkpoint yet; continue its training first.")
    shapes = parameters(abstract(config.model))
    saved = checkpoints.saved_weights()
    base, sources = initial_leaves(config, tokenizer, wanted=[p for p in shapes if p not in saved])
    weights, _, note = checkpoints.restore({p: leaf for p, leaf in shapes.items() if p in saved})
    check_base(folder, note["base"], base_note(base, sources))
    step = checkpoints.latest()
    assert step is not None  # restore says so otherwise
    checkpoints.close()
    return Run(folder, config, tokenizer, with_parameters(abstract(config.model), {**base, **weights}), step)


def open_config(config: Config) -> Run:
    """What the weights of `config.init` make without training: base weights and a checkpoint of the original, say.

    Raises UserError where a leaf that matters would be random.
    """
    lacks = missing_inputs(config, trains=False)
    if lacks:
        raise UserError(lacks)
    folder = Path(f"runs/{config.name}")
    tokenizer = load_text(folder, config, ())
    model, sources = initial_model(config, tokenizer)
    # An adapter that was never trained adds nothing, and the norm behind the encoder is published as it starts.
    harmless = ("*/lora_?", "vision/output_norm/*")
    random = [
        path
        for path, source in sources.items()
        if source == "seed" and not any(fnmatch.fnmatchcase(path, pattern) for pattern in harmless)
    ]
    if random:
        raise UserError(
            f"config.init gives random numbers for {', '.join(folded(random)[:5])}; name a source of trained ones "
            f"(kinds: {', '.join(SOURCES)}, run)."
        )
    return Run(folder, config, tokenizer, model, step=0)
