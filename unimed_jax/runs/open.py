"""Opens runs: reads the weights that they start from or have saved, and builds their models.

Weights of one run may come from another (`config.init` kind "run"), so opening recurses: open_run
-> _open -> initial_leaves -> _leaves_of_run -> _open of the other run, until a run whose `init`
names no run. All of them are laid over the same mesh, and no device ever holds more than its share
of a leaf that is sharded.
"""

import contextlib
import dataclasses
import fnmatch
import tempfile
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from unimed_jax.config import Changed, Config, MeshConfig
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError, nearest
from unimed_jax.finite import refuse_not_finite
from unimed_jax.interop.families.unimed_hf import (
    exported_config,
    exported_tokenizer,
    is_exported,
    load_exported,
)
from unimed_jax.interop.sources import SOURCES
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import folded
from unimed_jax.model import sharding
from unimed_jax.model.dispatch import upcycled
from unimed_jax.model.parameters import (
    abstract,
    parameters,
    stored_leaves,
    tree_bytes,
    with_parameters,
)
from unimed_jax.model.quantised import stored_like
from unimed_jax.model.unimed import UniMed, order_coordinates
from unimed_jax.rules import leaf_rules
from unimed_jax.runs import inputs
from unimed_jax.runs.checkpoint import Checkpoints, Replaced, fingerprints
from unimed_jax.runs.folder import load_text, missing_inputs, read_config, tokenizer_folder, with_changed
from unimed_jax.runs.inputs import Inputs
from unimed_jax.runs.origin import refuse_other_model


@dataclasses.dataclass
class Run:
    """Holds a model with what belongs to it.

    mesh: the devices over which its leaves lie, or None for one device.
    """

    folder: Path
    config: Config
    tokenizer: Tokenizer
    model: UniMed
    step: int
    mesh: Mesh | None = None
    notes: tuple[str, ...] = ()  # sentences about changed inputs, which its results repeat

    def inside(self) -> contextlib.AbstractContextManager:
        """Gives the context in which the model is to be called, so that it finds its mesh."""
        return sharding.inside(self.mesh)


def found_mesh(config: Config, trains: bool = True) -> Mesh | None:
    """Makes the mesh over the devices found.

    It is laid out as `config.mesh` says if that fits the devices, else automatically.

    A single device gets None. `trains=False` is for an exported model, to which the rules of training
    do not apply.
    """
    if trains:
        leaves = stored_leaves(config)
        rules = leaf_rules(leaves, config.train, config.optimizer)
        frozen = tree_bytes([leaf for path, leaf in leaves.items() if not rules[path].train])
    else:
        whole = sum(leaf.size for leaf in parameters(abstract(config.model)).values())
        frozen = whole * jnp.dtype(config.model.frozen_dtype).itemsize
    arguments = config.data.rows, frozen
    try:
        return sharding.make_mesh(config.mesh, *arguments)
    except UserError:  # trained on another number of devices
        return sharding.make_mesh(MeshConfig(), *arguments)


def initial_model(
    config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None
) -> tuple[UniMed, dict[str, str]]:
    """Makes the model before the first step, laid over the mesh.

    Also returns the source of every leaf.
    """
    leaves, sources = initial_leaves(config, tokenizer, mesh)
    return with_parameters(abstract(config.model), leaves), sources


def initial_leaves(
    config: Config, tokenizer: Tokenizer, mesh: Mesh | None = None, wanted: Sequence[str] = ("*",)
) -> tuple[dict[str, Any], dict[str, str]]:
    """Makes or reads the leaves before the first step that match a pattern of `wanted`.

    Also returns each one's source.

    The leaves depend on the settings only: the random numbers do not depend on the devices. They are
    stored as `model.parameters.stored` says. Only what is wanted, and of that only what no later
    source replaces, is made or read. Without a mesh all of it lies on this process's first device.
    """
    tokenizer.check_fits(config.model.decoder.vocab)
    shapes = stored_leaves(config)
    to = Destination(shapes, None if mesh is None else sharding.parameter_shardings(shapes, mesh))
    still = {path for path in shapes if any(fnmatch.fnmatchcase(path, pattern) for pattern in wanted)}
    leaves: dict[str, Any] = {}
    sources: dict[str, str] = {}
    everything = tuple(wanted) == ("*",)
    for kind, path in reversed(config.init):
        if not still and not everything:  # a checkpoint holds all of them
            break
        if kind == "seed":
            found = _random_leaves(config, tokenizer, _chosen(still, path or "*", shapes), to)
        elif kind == "run":
            found = _leaves_of_run(Path(path), config, still, to, mesh)
            if not found and everything:
                raise UserError(
                    f"config.init: no parameter of run {path} fits this model; check config.model."
                )
        elif kind not in SOURCES:
            known = ("seed", "run", *SOURCES)
            raise UserError(
                f"config.init: {kind!r} is not a source of weights{nearest(kind, known)} Choose "
                f"from {known}."
            )
        elif not SOURCES[kind].among(still):
            if everything:
                raise UserError(
                    f"config.init: ({kind!r}, {path!r}) gives no parameter of this model that a "
                    "later source leaves; leave it out, or put it later."
                )
            continue
        else:
            found = SOURCES[kind].load(path, config.model, to)
        taken = still & set(found)
        leaves |= {p: found[p] for p in taken}
        sources |= dict.fromkeys(taken, kind if kind == "seed" else f"{kind} {path}".strip())
        still -= taken
    if still:
        raise UserError(
            f"config.init gives no {', '.join(folded(sorted(still))[:5])}; put ('seed', '') first, "
            "for random numbers."
        )
    order = [p for p in shapes if p in leaves]
    return {p: leaves[p] for p in order}, {p: sources[p] for p in order}


def _chosen(paths: AbstractSet[str], pattern: str, shapes: Mapping[str, Any]) -> set[str]:
    """Returns the paths that match the pattern of ("seed", pattern), which some parameter must."""
    if not fnmatch.filter(shapes, pattern):
        raise UserError(
            f"config.init: ('seed', {pattern!r}) matches no parameter{nearest(pattern, shapes)}"
        )
    return set(fnmatch.filter(paths, pattern))


def _random_leaves(
    config: Config, tokenizer: Tokenizer, wanted: AbstractSet[str], to: Destination
) -> dict[str, jax.Array]:
    """Draws the leaves that `config.seed` gives."""

    def make() -> dict[str, jax.Array]:
        model = UniMed(config.model, nnx.Rngs(config.seed))
        if tokenizer.coordinate_start is not None:
            order_coordinates(model, tokenizer.coordinate_start)
        drawn = {p: leaf for p, leaf in parameters(model).items() if p in wanted}
        return {p: stored_like(leaf, to.leaves[p]) for p, leaf in drawn.items()}

    return jax.jit(
        make, out_shardings=None if to.shardings is None else {p: to.sharding(p) for p in wanted}
    )()


def _leaves_of_run(
    folder: Path, config: Config, wanted: AbstractSet[str], to: Destination, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Takes from another run the wanted leaves that have the same name and shape there.

    If only this model has experts, each of them starts as a copy of the other decoder's MLP of that
    layer. Raises UserError if what is taken would compute something else here.
    """
    other = _open(folder, mesh, changed="accept" if config.text.changed == "accept" else None)
    theirs, moe, depth = parameters(other.model), config.model.moe, config.model.decoder.depth
    fitting = {p for p, leaf in theirs.items() if p in to.leaves and leaf.shape == to.leaves[p].shape}
    refuse_other_model(
        folder, other.config.model, config.model, fitting & wanted, theirs.keys() - fitting
    )
    becomes_experts = (
        moe.experts and not other.config.model.moe.experts and other.config.model.decoder.depth == depth
    )
    del other  # each leaf is then freed as soon as it has been taken
    taken = {}

    def take(found: Mapping[str, jax.Array]) -> None:
        for path, leaf in found.items():
            if path in wanted and leaf.shape == to.leaves[path].shape:
                taken[path] = jax.device_put(stored_like(leaf, to.leaves[path]), to.sharding(path))

    layers = "decoder/layers/"
    for path in list(theirs):
        leaf = theirs.pop(path)
        if becomes_experts and path.startswith(f"{layers}mlp/"):
            leaf = leaf.astype(leaf.dtype)  # numbers, in place of codes
            take(_copied_to_experts(leaf, path, config, to))
        else:
            take({path: leaf})
    return taken


def _copied_to_experts(
    leaf: jax.Array, path: str, config: Config, to: Destination
) -> dict[str, jax.Array]:
    """Copies one leaf of a dense decoder's MLPs to the experts, each device making only its share."""
    layers = "decoder/layers/"
    name = path.removeprefix(f"{layers}mlp/")

    def copied(leaf: jax.Array) -> dict[str, jax.Array]:
        found = upcycled({name: leaf}, config.model.moe, config.model.decoder.depth)
        return {layers + ours: part for ours, part in found.items()}

    places = None if to.shardings is None else {p: to.sharding(p) for p in jax.eval_shape(copied, leaf)}
    return jax.jit(copied, out_shardings=places)(leaf)


def base_note(leaves: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, dict]:
    """Describes each leaf by its source and fingerprint, for a checkpoint's note.

    These are the base weights that the checkpoint depends on but does not store.
    """
    numbers = jax.device_get(fingerprints(dict(leaves)))
    return {
        # of a quantised kernel, that of codes and scales together
        path: {"source": sources[path], "fingerprint": sum(map(int, jax.tree.leaves(part))) % 2**32}
        for path, part in numbers.items()
    }


def check_base(folder: Path, saved: Mapping[str, dict], now: Mapping[str, dict]) -> None:
    """Raises UserError if a base weight of a checkpoint has changed since that was saved.

    Base weights are those that the checkpoint depends on and does not hold itself.
    """
    changed = [
        path
        for path, entry in now.items()
        if saved.get(path, entry)["fingerprint"] != entry["fingerprint"]
    ]
    if changed:
        raise UserError(
            f"{folder} was trained on other weights than {now[changed[0]]['source']} holds now "
            f"({', '.join(folded(changed)[:3])} differ); give those that it was trained on in "
            "config.init."
        )


def open_run(
    path: str | Path,
    mesh: Mesh | None = None,
    which: Literal["newest", "best"] | int = "newest",
    changed: Changed | None = None,
) -> Run:
    """Reads a run's folder: settings, tokenizer, and the model of its newest or best checkpoint.

    The best one is that of the highest or lowest `config.train.best`, measured while training; a
    number is that of the checkpoint after so many steps, 0 the model before training. The
    model is laid over `mesh`; without one over all devices found (see `found_mesh`). Leaves that
    the checkpoint does not hold are read again from where `config.init` says. A folder that `export
    --format=model` wrote is opened too. Raises UserError for whatever is missing, damaged or does
    not fit; for a tokenizer that is not the run's, unless `changed` (without it: the run's
    config.text.changed) accepts that.
    """
    folder = Path(path)
    return _open(
        folder, mesh or found_mesh(settings_of(folder), trains=not is_exported(folder)), which, changed
    )


def settings_of(folder: Path) -> Config:
    """Reads the settings of a run's folder, or of an exported model's."""
    return exported_config(folder) if is_exported(folder) else read_config(folder)


def _open(
    folder: Path, mesh: Mesh | None, which: str | int = "newest", changed: Changed | None = None
) -> Run:
    """Opens a run on this mesh, or on one device if that is None."""
    config = settings_of(folder)
    if changed is not None:
        config = with_changed(config, config.data.changed, changed)
    notes: list[str] = []
    shapes = parameters(abstract(config.model))
    places = None if mesh is None else sharding.parameter_shardings(shapes, mesh)
    if is_exported(folder):
        tokenizer = Tokenizer.load(folder)
        tokenizer.check_fits(config.model.decoder.vocab)
        exported = Inputs({inputs.TOKENIZER: state} if (state := exported_tokenizer(folder)) else {})
        notes = inputs.compare(folder, config, inputs.state_of_tokenizer(folder, tokenizer), exported)
        leaves, step = load_exported(folder, config.model, Destination(shapes, places)), 0
    else:
        place = tokenizer_folder(folder, config)
        tokenizer = Tokenizer.load(place)
        notes = inputs.compare(folder, config, inputs.state_of_tokenizer(place, tokenizer))
        leaves, step = _saved_leaves(folder, config, tokenizer, mesh, which)
    refuse_not_finite(leaves, str(folder), "train again, or give another run")
    return Run(
        folder,
        config,
        tokenizer,
        with_parameters(abstract(config.model), leaves),
        step,
        mesh,
        tuple(notes),
    )


def _saved_leaves(
    folder: Path, config: Config, tokenizer: Tokenizer, mesh: Mesh | None, which: str | int
) -> tuple[dict[str, jax.Array], int]:
    """Reads all leaves at one checkpoint, and the number of steps done there.

    Each leaf is read straight into its shards.
    """
    if which == 0:
        return initial_leaves(config, tokenizer, mesh)[0], 0
    while True:
        try:
            return _leaves_at(folder, config, tokenizer, mesh, which)
        except Replaced:  # another checkpoint is the best one now
            continue


def _leaves_at(
    folder: Path, config: Config, tokenizer: Tokenizer, mesh: Mesh | None, which: str | int
) -> tuple[dict[str, jax.Array], int]:
    """Reads the leaves at a numbered checkpoint, or at the one that is the newest or best one now.

    Raises Replaced if a run that trains deletes the best checkpoint meanwhile.
    """
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    if checkpoints.latest() is None:
        raise UserError(f"{folder} holds no checkpoint yet; continue its training first.")
    only = None
    if isinstance(which, int):
        only, there = which, checkpoints.steps()
        if which not in there:
            raise UserError(
                f"{folder} keeps no checkpoint after {which} steps; it has those after "
                f"{', '.join(map(str, there))}."
            )
    if which == "best":
        only = checkpoints.best()
        if only is None:
            raise UserError(f"{folder} holds no best checkpoint; set config.train.best before training.")
    shapes = stored_leaves(config)
    saved = checkpoints.saved_weights()
    base, sources = initial_leaves(config, tokenizer, mesh, [p for p in shapes if p not in saved])
    like = {p: leaf for p, leaf in shapes.items() if p in saved}
    if mesh is not None:
        like = sharding.placed(like, sharding.parameter_shardings(like, mesh))
    weights, _, note = checkpoints.restore(like, only=only)
    check_base(folder, note["base"], base_note(base, sources))
    step = checkpoints.latest() if only is None else only
    assert step is not None  # restore says so otherwise
    checkpoints.close()
    return {**base, **weights}, step


def open_config(config: Config) -> Run:
    """Opens the model that the weights of `config.init` make without any training.

    They may be base weights and an original checkpoint, for example.

    Raises UserError where a leaf that matters would be random.
    """
    lacks = missing_inputs(config, trains=False)
    if lacks:
        raise UserError(lacks)
    # A tokenizer made of a GGUF file is no run's.
    with tempfile.TemporaryDirectory() as place:
        tokenizer = load_text(Path(place), config, ())
    mesh = found_mesh(config)
    model, sources = initial_model(config, tokenizer, mesh)
    # An adapter that was never trained adds nothing, and the norm after the encoder is published as
    # it starts.
    harmless = ("*/lora_?", "vision/output_norm/*")
    random = [
        path
        for path, source in sources.items()
        if source == "seed" and not any(fnmatch.fnmatchcase(path, pattern) for pattern in harmless)
    ]
    refuse_not_finite(parameters(model), "the weights of config.init", "give others")
    if random:
        raise UserError(
            f"config.init gives random numbers for {', '.join(folded(random)[:5])}; name a source "
            f"of trained ones (kinds: {', '.join(SOURCES)}, run)."
        )
    return Run(Path(config.name), config, tokenizer, model, step=0, mesh=mesh)
