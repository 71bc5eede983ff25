"""Compares the gradients that tasks and data sets send into the same parameters (Uni-Med, section 4.4).

run -> held-out batches of each (data set, task) -> gradients at the chosen leaves
    -> inner products of all pairs, part by part (an expert, the router, a layer)
    -> direction and magnitude similarity, conflicts, spectrum: of each group of parts
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unimed_jax import processes
from unimed_jax.analyze.conflict import measured
from unimed_jax.config import Config, ModelConfig
from unimed_jax.data.layout import Batch
from unimed_jax.errors import UserError
from unimed_jax.evaluate.tasks import Unit, open_sets, units_of
from unimed_jax.memory import available_bytes
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.rules import leaf_rules
from unimed_jax.runs.open import Run
from unimed_jax.train.held_out import HeldOut
from unimed_jax.train.loss import task_losses
from unimed_jax.train.optimizer import Leaves

RESAMPLES = 1000
SHARE_OF_MEMORY = 0.5  # of what there is, that gradients may take; if they need more, parts take turns


@dataclasses.dataclass(frozen=True)
class Part:
    """Names a slice of a leaf whose gradients are compared by themselves: an expert, a layer."""

    name: str  # "expert 0", "router", "decoder layer 3", or the leaf's path
    leaf: str
    axis: int = 0
    start: int = 0
    size: int | None = None  # None: the whole leaf

    def of(self, gradient: jax.Array) -> jax.Array:
        """Cuts the part out of gradients [K, *shape of the leaf]."""
        if self.size is None:
            return gradient
        return jax.lax.slice_in_dim(gradient, self.start, self.start + self.size, axis=1 + self.axis)


def parts_of(leaves: Mapping[str, Any], config: ModelConfig) -> list[Part]:
    """Cuts leaves into parts: experts and router of the connector, layers of encoder and decoder."""
    found: list[Part] = []
    for path, leaf in leaves.items():
        pieces = path.split("/")
        if path.startswith("connector/experts/") and config.connector.is_moe:
            # Experts share wide matrices (model/connector.py): up [C, E * H], up_bias [E * H],
            # down [E * H, D], bias [E, D].
            axis = 1 if pieces[-1] == "up" else 0
            size = leaf.shape[axis] // config.connector.experts
            found += [
                Part(f"expert {e}", path, axis, e * size, size) for e in range(config.connector.experts)
            ]
        elif path.startswith("connector/router/"):
            found.append(Part("router", path))
        elif path == "connector/task_tokens":
            found.append(Part("task tokens", path))
        elif pieces[0] == "connector":
            found.append(Part("projection", path))
        elif pieces[1] in ("layers", "blocks"):
            word = "LoRA, layer" if pieces[-1].startswith("lora_") else f"{pieces[0]} layer"
            found += [Part(f"{word} {i}", path, 0, i, 1) for i in range(leaf.shape[0])]
        else:
            found.append(Part(f"{pieces[0]} {pieces[1]}", path))
    return found


class Gradients:
    """Computes the gradients of units of a run at chosen leaves, for one batch at a time."""

    def __init__(self, run: Run, chosen: Sequence[str]):
        """Prepares one program for all units; `chosen` are paths of leaves."""
        config, coordinates = run.config, run.tokenizer.coordinate_start
        leaves = parameters(run.model)
        self.leaves = {path: leaves[path] for path in chosen}
        self._rest = {path: leaf for path, leaf in leaves.items() if path not in self.leaves}
        self._mesh = run.mesh
        self._share, self._shares = sharding.rows_of_process(run.mesh, config.data.rows)
        model = run.model

        def loss(leaves: Leaves, rest: Leaves, batch: Batch) -> jax.Array:
            full = with_parameters(model, {**rest, **leaves})
            losses, _ = task_losses(full, batch, config.loss, coordinates, None)
            return losses.tasks.sum() / jnp.maximum(losses.weight, 1e-30)

        self._program: Any = jax.jit(jax.grad(loss))

    def of(self, held_out: HeldOut, rows: Sequence[Sequence[int]]) -> Leaves:
        """Computes the gradient of the mean loss over the answers in some planned rows of a unit."""
        batch = held_out.batch(rows, self._share, self._shares)
        arrays = sharding.on_devices(batch, self._mesh, self._shares)
        return self._program(self.leaves, self._rest, arrays)


@jax.jit
def _products(gradients: jax.Array) -> jax.Array:
    """Computes the inner products [K, K] of gradients [K, *shape], in float32 throughout."""
    rest = tuple(range(1, gradients.ndim))
    return jax.lax.dot_general(gradients, gradients, ((rest, rest), ((), ())), precision="highest")


def shares_of_rows(rows: Sequence[Any], batches: int, capacity: int) -> list[list[Any]]:
    """Deals rows out to at most `batches` batches of at most `capacity`, all of about the same size."""
    count = min(batches, len(rows))
    return [list(rows[i::count][:capacity]) for i in range(count)]


def chosen_leaves(run: Run, matches: Sequence[str]) -> list[str]:
    """Lists the leaves whose gradients are compared.

    By default these are the connector's that train and the decoder's adapters. `matches` are
    patterns of paths, as in config.train.rules; frozen leaves may be named, too. Raises UserError if
    there is none.
    """
    leaves = parameters(run.model)
    if not matches:
        rules = leaf_rules(leaves, run.config.train, run.config.optimizer)
        found = [
            path
            for path in leaves
            if rules[path].train and (path.startswith("connector/") or "/lora_" in path)
        ]
        if not any(path.startswith("connector/") for path in found):
            raise UserError(
                f"{run.folder}: its connector does not train, so that tasks cannot pull at it; name "
                'other parameters with --match, for example --match="decoder/*".'
            )
        return found
    for pattern in matches:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in leaves):
            raise UserError(
                f'--match="{pattern}" names no parameter of {run.folder}; give a pattern of paths such '
                'as "connector/*" or "decoder/layers/*/lora_?".'
            )
    return [path for path in leaves if any(fnmatch.fnmatchcase(path, pattern) for pattern in matches)]


def units_for(config: Config, split: str) -> list[Unit]:
    """Lists the units of a split that are compared, each a task of a data set.

    Raises UserError if there are fewer than two.
    """
    evaluate = dataclasses.replace(config.evaluate, entries=(), splits=(split,), limit=0)
    units = units_of(dataclasses.replace(config, evaluate=evaluate), open_sets(config.data))[0]
    if len(units) < 2:
        names = ", ".join(unit.name for unit in units)
        raise UserError(
            f"only {names or 'nothing'} has held-out examples in split {split!r}; gradients are compared"
            " between two or more tasks or data sets, so choose another --split or run."
        )
    return units


def gram_by_part(
    run: Run,
    units: Sequence[Unit],
    chosen: Sequence[str],
    batches: int,
    scales: Sequence[float] | None = None,
) -> dict[Part, np.ndarray]:
    """Computes, for each part, the inner products float64 [U, B, U, B] of the units' gradients.

    B is the number of batches of the unit with the fewest rows, at most `batches`. scales: factors
    of the units' losses, 1 by default. Where all gradients do not fit into half of the memory, leaves
    take turns, and each turn goes through the batches again.
    """
    config = run.config
    held_out = [HeldOut(unit, config, run.tokenizer) for unit in units]
    count = min(batches, *(len(each.rows) for each in held_out))
    dealt = [shares_of_rows(each.rows, count, config.data.rows) for each in held_out]
    leaves = parameters(run.model)
    turns = _turns({path: leaves[path] for path in chosen}, len(units) * count)
    held = max(sum(leaves[path].size for path in turn) for turn in turns) * 4 * len(units) * count
    processes.say(
        f"{len(units)} units x {count} batches: gradients take {held / 2**20:,.0f} MiB at once, "
        f"in {len(turns)} {'pass' if len(turns) == 1 else 'passes'}"
    )
    found: dict[Part, np.ndarray] = {}
    total = len(turns) * len(units) * count
    with tqdm(total=total, desc="gradients", unit=" batches", leave=False, disable=None) as bar:
        for turn in turns:
            program = Gradients(run, turn)
            columns: dict[str, list[jax.Array]] = {path: [] for path in turn}
            for u, (each, groups) in enumerate(zip(held_out, dealt, strict=True)):
                for rows in groups:
                    gradient = program.of(each, rows)
                    scale = 1.0 if scales is None else scales[u]
                    for path in turn:
                        columns[path].append(gradient[path] * scale)
                    bar.update()
            for path in turn:
                stacked = jnp.stack(columns.pop(path))  # [U * B, *shape]
                for part in parts_of({path: leaves[path]}, config.model):
                    products = np.asarray(_products(part.of(stacked)), np.float64)
                    found[part] = products.reshape(len(units), count, len(units), count)
    return found


def _turns(leaves: Mapping[str, Any], copies: int) -> list[list[str]]:
    """Divides leaves into turns, each of which fits into the memory that gradients may take."""
    room = SHARE_OF_MEMORY * available_bytes() / (4 * copies)
    turns: list[list[str]] = [[]]
    used = 0
    for path, leaf in leaves.items():
        if turns[-1] and used + leaf.size > room:
            turns.append([])
            used = 0
        turns[-1].append(path)
        used += leaf.size
    return turns


def groups_of(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Groups parts by what reports show: each module as a whole, then its parts by name."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.leaf.split("/")[0], []).append(part)
    for part in parts:
        groups.setdefault(part.name, []).append(part)
    return groups


def joins(units: Sequence[Unit]) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Yields the ways to look at units: (kind, names, [K, U] means over units).

    Each unit by itself and, where a task has several sets or a set several tasks, by task and by set.
    """
    sets = list(dict.fromkeys(unit.source.id for unit in units))
    tasks = list(dict.fromkeys(unit.task for unit in units))
    one_set = len(sets) == 1
    names = [unit.task if one_set else f"{unit.source.id}/{unit.task}" for unit in units]
    yield "units", names, np.eye(len(units))
    for kind, labels, of in (
        ("tasks", tasks, [unit.task for unit in units]),
        ("sets", sets, [unit.source.id for unit in units]),
    ):
        if 1 < len(labels) < len(units):
            rows = np.array([[float(label == own) for own in of] for label in labels])
            yield kind, labels, rows / rows.sum(axis=1, keepdims=True)


def analyse(run: Run, split: str, matches: Sequence[str], batches: int) -> dict[str, Any]:
    """Measures a run; returns what `tug_of_war.json` holds of it."""
    units = units_for(run.config, split)
    chosen = chosen_leaves(run, matches)
    gram = gram_by_part(run, units, chosen, batches)
    return {
        "run": str(run.folder),
        "step": run.step,
        "connector": run.config.model.connector.kind,
        "split": split,
        "examples": {unit.name: len(unit.examples) for unit in units},
        **content(gram, units, run.config.seed),
    }


def content(gram: Mapping[Part, np.ndarray], units: Sequence[Unit], seed: int) -> dict[str, Any]:
    """Turns inner products into similarities, by kind of unit and by group of parts."""
    groups = groups_of(list(gram))
    return {
        kind: {
            "names": names,
            "groups": {
                group: measured(np.sum([gram[part] for part in parts], axis=0), joined, RESAMPLES, seed)
                for group, parts in groups.items()
            },
        }
        for kind, names, joined in joins(units)
    }
