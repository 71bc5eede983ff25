"""Compares the gradients that tasks and data sets send into the same parameters (Uni-Med, section 4.4).

run -> held-out batches of each side: a task of a data set
    -> gradients of each batch at the chosen leaves, piece by piece if they do not fit at once
    -> inner products of all pairs, of each group of parts (an expert, the router, a layer)
    -> direction and magnitude similarity, conflicts, spectrum (conflict.py)
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unimed_jax import processes
from unimed_jax.analyze.conflict import Measured
from unimed_jax.analyze.examples import held_out_units
from unimed_jax.analyze.parts import Part, groups_of, matching, parts_of
from unimed_jax.config import VISUAL_TASKS, Config
from unimed_jax.data.layout import Batch
from unimed_jax.errors import UserError
from unimed_jax.evaluate.answers import Journal
from unimed_jax.evaluate.run import fingerprint_of
from unimed_jax.evaluate.tasks import Unit
from unimed_jax.memory import available_bytes
from unimed_jax.model import sharding
from unimed_jax.model.parameters import parameters, with_parameters
from unimed_jax.model.quantised import Quantised
from unimed_jax.rules import leaf_rules
from unimed_jax.runs.open import Run
from unimed_jax.train.held_out import HeldOut
from unimed_jax.train.loss import task_losses
from unimed_jax.train.optimizer import Leaves

# Of the memory there is, that gradients may take: weights, activations and a copy need the rest.
SHARE_OF_MEMORY = 0.25
EXAMPLES_OF_A_ROW = 4  # are looked at, at most; more than that seldom share a row
PARTIAL = "tug_of_war.partial"  # folder of what was measured so far


@dataclasses.dataclass(frozen=True)
class Side:
    """Describes who pulls: a task of a data set, and the factor of its loss."""

    name: str
    unit: Unit
    factor: float = 1.0
    planted: bool = False  # a copy of a task, whose similarities to it are known


@dataclasses.dataclass(frozen=True)
class Products:
    """Holds the inner products [copies, copies] of one pass, by group of parts."""

    groups: dict[str, list[list[float]]]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Holds what was measured of one checkpoint of a run."""

    about: Mapping[str, Any]  # run, step, connector, split, examples, clusters, notes, batches
    # "units", "tasks", "sets", "planted" -> group of parts
    kinds: Mapping[str, Mapping[str, Measured]]

    @property
    def leading(self) -> tuple[str, Measured]:
        """Returns the first group of parts, the connector by default, with each side by itself."""
        return next(iter(self.kinds["units"].items()))

    def plain(self) -> dict[str, Any]:
        """Returns what tug_of_war.json holds of it."""
        kinds = {
            kind: {group: measured.plain() for group, measured in groups.items()}
            for kind, groups in self.kinds.items()
        }
        return {**self.about, **kinds}


def analyse(
    run: Run,
    split: str,
    matches: Sequence[str],
    batches: int,
    planted: bool = False,
    partial: Path | None = None,
    tasks: Sequence[str] = (),
) -> Analysis:
    """Measures a run; call it inside the run's mesh.

    tasks: only these (all by default). planted: also measure a task, the first with images if there is
    one, beside itself, beside itself with its loss negated, and with its loss times ten. Cosines must
    be 1, -1, 1, and magnitude similarities 1, 1, 20 / 101.
    partial: folder in which each pass is kept, so that a killed analysis goes on after the last one.
    """
    sides = sides_of(run.config, split, batches, tasks)
    if planted:
        # texts alone do not touch the connector
        first = next((side for side in sides if side.unit.task in VISUAL_TASKS), sides[0])
        sides += [
            Side(f"{first.name} {word}", first.unit, factor, planted=True)
            for word, factor in (("again", 1.0), ("negated", -1.0), ("x 10", 10.0))
        ]
    chosen = chosen_leaves(run, matches)
    rows = Batches(sides, run, batches)
    grams = gram_by_group(run, rows, chosen, _journal(run, rows, partial) if partial else None)
    kinds = {
        kind: {group: Measured(gram, joined, names) for group, gram in grams.items()}
        for kind, names, joined in joins(sides)
    }
    about = {
        "run": str(run.folder),
        "step": run.step,
        "connector": run.config.model.connector.kind,
        "router": run.config.model.connector.router if run.config.model.connector.is_moe else None,
        "split": split,
        "examples": {
            side.name: count
            for side, count in zip(sides, rows.examples, strict=True)
            if not side.planted
        },
        "clusters": {
            side.name: count
            for side, count in zip(sides, rows.clusters, strict=True)
            if not side.planted
        },
        "notes": [*run.notes, *rows.notes],
        "batches": rows.fingerprint,  # runs with the same one were measured on the same examples
    }
    return Analysis(about, kinds)


def _journal(run: Run, batches: "Batches", partial: Path) -> Journal:
    """Opens the file of a run's passes, which no other run, examples or code share."""
    sets = {side.unit.source.id: side.unit.source for side in batches.sides}
    factors = [side.factor for side in batches.sides]
    facts = (run.folder.resolve(), fingerprint_of(run, run.config, sets), batches.fingerprint, factors)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Journal(partial, name, f"{name}.jsonl", Products)


# ---- what is compared ------------------------------------------------------------------------------
def sides_of(config: Config, split: str, batches: int, tasks: Sequence[str] = ()) -> list[Side]:
    """Lists each task of each data set that has held-out examples; tasks: only these.

    Raises UserError if there are fewer than two.
    """
    limit = batches * config.data.rows * EXAMPLES_OF_A_ROW
    units = held_out_units(config, split, tasks, limit)
    if len(units) < 2:
        names = ", ".join(unit.name for unit in units)
        raise UserError(
            f"only {names or 'nothing'} has examples in split {split!r}, and gradients are compared "
            "between two tasks or data sets or more; choose another --split or run."
        )
    one_set = len({unit.source.id for unit in units}) == 1
    return [Side(unit.task if one_set else f"{unit.source.id}/{unit.task}", unit) for unit in units]


def joins(sides: Sequence[Side]) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Yields the ways to look at sides: (kind, names, [K, U] means over sides).

    Each side by itself and, where a task has several sets or a set several tasks, by task and by set;
    last, copies beside what they are copies of.
    """
    each, real = np.eye(len(sides)), [i for i, side in enumerate(sides) if not side.planted]
    yield "units", [sides[i].name for i in real], each[real]
    for kind, of in (
        ("tasks", [sides[i].unit.task for i in real]),
        ("sets", [sides[i].unit.source.id for i in real]),
    ):
        labels = list(dict.fromkeys(of))
        if 1 < len(labels) < len(real):
            rows = np.stack([each[[i for i in real if of[i] == label]].mean(axis=0) for label in labels])
            yield kind, labels, rows
    if len(real) < len(sides):
        copied = sides[len(real)].unit
        shown = [next(i for i in real if sides[i].unit is copied), *range(len(real), len(sides))]
        yield "planted", [sides[i].name for i in shown], each[shown]


def chosen_leaves(run: Run, matches: Sequence[str]) -> list[str]:
    """Lists the paths of the leaves whose gradients are compared.

    By default these are the connector's that train and LoRA's. `matches` are patterns of paths, as
    in config.train.rules; frozen leaves may be named, too. Raises UserError if there is none.
    """
    leaves = parameters(run.model)
    if matches:
        found = matching(list(leaves), matches, "--match")
        for path in found:
            if isinstance(leaves[path], Quantised):
                raise UserError(
                    f"--match names {path}, which {run.folder} stores as {leaves[path].kind} codes, and "
                    "codes have no gradient; name other parameters."
                )
        return found
    rules = leaf_rules(leaves, run.config.train, run.config.optimizer)
    found = [
        path
        for path in leaves
        if rules[path].train and (path.startswith("connector/") or "/lora_" in path)
    ]
    if not any(path.startswith("connector/") for path in found):
        raise UserError(
            f"{run.folder}: its connector does not train, so that tasks cannot pull at it; name other "
            'parameters, for example --match="decoder/*".'
        )
    return found


class Batches:
    """Deals the held-out examples of each side out to the same number of batches, of one shape."""

    def __init__(self, sides: Sequence[Side], run: Run, batches: int):
        """Makes at most `batches` of each side, as many as the one with the fewest examples has."""
        data, units = run.config.data, {side.unit.name: side.unit for side in sides}
        held_out = {
            name: HeldOut(unit, run.config, run.tokenizer, skip_long=True)
            for name, unit in units.items()
        }
        for name, each in held_out.items():
            if not each.numbers:
                raise UserError(
                    f"{name} has no example that fits into a row of this run; choose another --split."
                )
            if skipped := len(units[name].examples) - len(each.numbers):
                processes.say(f"{name}: {skipped} examples fit into no row and are left out")
        fewest = min(held_out, key=lambda name: len(held_out[name].numbers))
        self.count = min(batches, len(held_out[fewest].numbers))
        self.notes = [
            f"{self.count} batches in place of {batches}, as {fewest} has no more examples; for more, "
            "leave it out (--task) or choose another --split"
        ] * (self.count < batches)
        dealt = {
            name: [each.plan(each.numbers[i :: self.count])[: data.rows] for i in range(self.count)]
            for name, each in held_out.items()
        }
        # As few rows as hold the largest batch and divide as well among the devices.
        most, rows = max(len(group) for groups in dealt.values() for group in groups), data.rows
        shares = 1 if run.mesh is None else run.mesh.size
        while rows % (2 * shares) == 0 and rows // 2 >= most:
            rows //= 2
        self.sides, self._dealt, self._held_out = sides, dealt, held_out
        self._mesh = run.mesh
        self._share = sharding.share_of_process(run.mesh, rows)

    @property
    def examples(self) -> list[int]:
        """Counts the examples of each side."""
        return [sum(map(len, sum(self._dealt[side.unit.name], []))) for side in self.sides]

    @property
    def clusters(self) -> list[int]:
        """Counts the clusters, such as patients, that the examples of each side come from."""
        found = []
        for name in (side.unit.name for side in self.sides):
            examples = self._held_out[name].unit.examples
            used = [examples[i] for rows in self._dealt[name] for row in rows for i in row]
            found.append(len({example.cluster or example.id for example in used}))
        return found

    @property
    def fingerprint(self) -> str:
        """Identifies the examples of every batch."""
        numbers = hashlib.sha256()
        for name, groups in self._dealt.items():
            examples = self._held_out[name].unit.examples
            ids = [[[examples[i].id for i in row] for row in group] for group in groups]
            numbers.update(repr((name, ids)).encode())
        return numbers.hexdigest()[:16]

    def __iter__(self) -> Iterator[tuple[Side, Any]]:
        """Yields all batches of the first side, then those of the next, laid out on the devices."""
        for side in self.sides:
            for rows in self._dealt[side.unit.name]:
                held_out = self._held_out[side.unit.name]
                batch = held_out.batch(rows, self._share.rows)
                yield side, sharding.on_devices(batch, self._mesh, self._share)


# ---- gradients and their inner products ------------------------------------------------------------
def gram_by_group(
    run: Run, batches: Batches, chosen: Sequence[str], journal: Journal | None = None
) -> dict[str, np.ndarray]:
    """Computes, for each group of parts, inner products float64 [U, B, U, B] of gradients.

    They are gradients of the mean loss over the answers of a batch, without dropout. Where those of
    all batches do not fit into a share of the memory, pieces of the leaves take turns, and each turn
    goes through the batches again; turns that the journal holds are read from there. Raises UserError
    for a gradient that is not finite.
    """
    leaves = parameters(run.model)
    shapes = {path: leaves[path].shape for path in chosen}
    parts = parts_of(shapes, run.config.model)
    groups = groups_of(parts)
    sides, count = len(batches.sides), batches.count
    copies = sides * count
    allowed = SHARE_OF_MEMORY * available_bytes()
    turns = turns_of(shapes, parts, allowed / (4 * copies))
    held = max(sum(piece.count(shapes[piece.leaf]) for _, piece in turn) for turn in turns)
    processes.say(
        f"{run.folder}, step {run.step}: {sides} tasks x {count} batches; their gradients take "
        f"{4 * held * copies / 2**20:,.0f} MiB at once ({allowed / 2**20:,.0f} may be), in "
        f"{len(turns)} {'pass' if len(turns) == 1 else 'passes'}"
    )
    found = {group: np.zeros((copies, copies)) for group in groups}
    hidden = None if processes.leads() else True  # None: shown on a terminal
    with tqdm(total=len(turns) * copies, desc="gradients", leave=False, disable=hidden) as bar:
        for turn in turns:
            name = hashlib.sha256(repr(turn).encode()).hexdigest()[:16]
            if journal is not None and name in journal.found:
                of_turn = {g: np.array(rows) for g, rows in journal.found[name].groups.items()}
                bar.update(copies)
            else:
                of_turn = _of_turn(run, batches, turn, groups, bar)
                if journal is not None:
                    journal.add({name: Products({g: rows.tolist() for g, rows in of_turn.items()})})
            for group, values in of_turn.items():
                found[group] += values
    return {group: values.reshape(sides, count, sides, count) for group, values in found.items()}


def _of_turn(
    run: Run,
    batches: Batches,
    turn: Sequence[tuple[Part, Part]],
    groups: Mapping[str, Sequence[Part]],
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """Goes through the batches once and computes the products [copies, copies] of a turn, by group."""
    program = Gradients(run, [piece for _, piece in turn])
    columns: list[list[jax.Array]] = [[] for _ in turn]
    for side, batch in batches:
        for column, gradient in zip(columns, program.of(batch, side.factor), strict=True):
            column.append(gradient)
        bar.update()
    found: dict[str, np.ndarray] = {}
    for part, _ in turn:
        values = np.asarray(program.products(columns.pop(0)), np.float64)
        if not np.isfinite(values).all():
            raise UserError(
                f"{run.folder}: gradients at step {run.step} are not finite, so that they have no "
                "direction; choose another checkpoint."
            )
        for group, parts in groups.items():
            if part in parts:
                found[group] = found[group] + values if group in found else values
    return found


def turns_of(
    shapes: Mapping[str, Sequence[int]], parts: Sequence[Part], most: float
) -> list[list[tuple[Part, Part]]]:
    """Divides parts into turns of at most `most` numbers: (the part, a piece of it) each.

    A part that is larger is cut into pieces; one that cannot be cut has a turn of its own.
    """
    turns: list[list[tuple[Part, Part]]] = [[]]
    used = 0
    for part in parts:
        for piece in part.split(shapes[part.leaf], most):
            size = piece.count(shapes[part.leaf])
            if turns[-1] and used + size > most:
                turns.append([])
                used = 0
            turns[-1].append((part, piece))
            used += size
    return turns


class Gradients:
    """Computes gradients of held-out batches at some pieces of a run's leaves."""

    def __init__(self, run: Run, pieces: Sequence[Part]):
        """Prepares one program for all tasks."""
        config, coordinates, model = run.config, run.tokenizer.coordinate_start, run.model
        leaves = parameters(model)
        self._leaves = {piece.leaf: leaves[piece.leaf] for piece in pieces}
        self._rest = {path: leaf for path, leaf in leaves.items() if path not in self._leaves}

        def loss(leaves: Leaves, rest: Leaves, batch: Batch, factor: jax.Array) -> jax.Array:
            full = with_parameters(model, {**rest, **leaves})
            losses, _ = task_losses(full, batch, config.loss, coordinates, None)
            return factor * losses.tasks.sum() / losses.weight

        @jax.jit
        def gradients(leaves: Leaves, rest: Leaves, batch: Batch, factor: jax.Array):
            found = jax.grad(loss)(leaves, rest, batch, factor)
            return [piece.of(found[piece.leaf]).astype(jnp.float32) for piece in pieces]

        whole = {} if run.mesh is None else {"out_shardings": sharding.everywhere(run.mesh)}

        @functools.partial(jax.jit, **whole)
        def products(columns: Sequence[jax.Array]) -> jax.Array:
            stacked = jnp.stack(columns)
            rest = tuple(range(1, stacked.ndim))
            return jax.lax.dot_general(stacked, stacked, ((rest, rest), ((), ())), precision="highest")

        self._program, self._products = gradients, products

    def of(self, batch: Any, factor: float) -> list[jax.Array]:
        """Computes the gradient of `factor` times the mean loss over a batch's answers, by piece."""
        return self._program(self._leaves, self._rest, batch, np.float32(factor))

    def products(self, columns: Sequence[jax.Array]) -> jax.Array:
        """Computes the inner products [K, K] of K arrays, in float32 at the highest precision."""
        return self._products(columns)
