"""Saves and reads the checkpoints of a run; no other file knows orbax.

A checkpoint is a folder named after the steps done. It holds arrays (trainable leaves, leaves that
no file could give back, optimiser moments, the step) and a note: what the caller says (settings'
hash, data position), shape, dtype and fingerprint of every array, and a checksum of itself. It is
written to a temporary folder and renamed, so it is there whole or not at all; what happens to it
later (a lost file, a flipped bit) shows when it is read, and the one before is used.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from unimed_jax import processes
from unimed_jax.errors import UserError
from unimed_jax.files import full_disk
from unimed_jax.finite import refuse_not_finite
from unimed_jax.model.quantised import leaf_of
from unimed_jax.parsing import parse_json, read_text

Leaves = dict[str, Any]  # path -> array

NOTE = "note.json"
SETTLE_SECONDS = 2.0  # waiting time after a save that failed
# endings of folders' names
UNFINISHED, DELETED, DAMAGED = ".orbax-checkpoint-tmp", ".deleted", ".damaged"
SAVE_SECONDS = 3600  # time after which a save counts as failed


def newest_note(folder: Path) -> tuple[int, dict]:
    """Returns (steps done, what the caller noted) of the newest checkpoint with a readable note.

    The answer is (0, {}) if there is no such checkpoint.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for step in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
        with contextlib.suppress(ValueError):
            return step, _note_of(folder / str(step))["note"]
    return 0, {}


def _note_of(checkpoint: Path) -> dict:
    """Reads the note beside a checkpoint's arrays; raises ValueError if it is damaged."""
    try:
        content = parse_json(read_text(checkpoint / "note" / NOTE), NOTE, finite=False)
    except UserError as error:  # the caller may take an older checkpoint
        raise ValueError(str(error)) from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise ValueError(f"{NOTE} is not as it was saved")
    return content


class Replaced(UserError):
    """Says that a run that trains has deleted the checkpoint that was being read."""


class Checkpoints:
    """Saves and reads numbered checkpoints, of which the `keep` newest and the best one stay.

    With several processes all of them make the same calls; the arrays may be global, and each
    process writes and reads its own shards.
    """

    def __init__(self, folder: str | Path, keep: int = 2, read_only: bool = False):
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(
                f"{self.folder} does not exist; give the folder of a run that has saved a checkpoint."
            )
        self._keep, self._read_only = keep, read_only
        self._writes = not read_only and jax.process_index() == 0
        self._saving: int | None = None
        self._best: int | None = None
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Kept open, so that a folder that somebody makes in the place of a deleted one is
            # another one.
            self._opened: int | None = os.open(self.folder, os.O_RDONLY)
            self._remove_leftovers()
        self._steps = self._on_disk()
        self._handler = ocp.CompositeCheckpointHandler(
            weights=ocp.StandardCheckpointHandler(),
            optimizer=ocp.StandardCheckpointHandler(),
            note=ocp.JsonCheckpointHandler(filename=NOTE),
        )
        self._orbax = ocp.AsyncCheckpointer(self._handler, timeout_secs=SAVE_SECONDS)

    def latest(self) -> int | None:
        """Returns the steps done at the newest checkpoint, None where there is none."""
        return self._steps[-1] if self._steps else None

    def steps(self) -> list[int]:
        """Lists the steps done at each checkpoint, in order."""
        return list(self._steps)

    def best(self) -> int | None:
        """Returns the steps done at the best checkpoint, as the newest readable note names it.

        The answer is None if there is no such note.
        """
        content = self._newest_note()
        best = None if content is None else content["best"]
        return best if best in self._steps else None

    def newest_note(self) -> dict:
        """Returns what the caller noted in the newest checkpoint whose note is readable.

        The answer is empty if there is no such checkpoint.
        """
        content = self._newest_note()
        return {} if content is None else content["note"]

    def _on_disk(self) -> list[int]:
        """Lists the steps of the checkpoints in the folder, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    # ---- writing -----------------------------------------------------------------------------------
    def save(
        self, step: int, weights: Leaves, optimizer: Any, note: dict, best: int | None = None
    ) -> None:
        """Copies the arrays and writes them in the background.

        `note`: whatever JSON can hold. `best`: the checkpoint (this one or an earlier one) that
        stays however old it is; one that was the best before goes when this one is on disk.
        """
        self.wait()
        refuse_not_finite(
            weights, f"step {step}", "nothing is saved, and the checkpoints before it stay"
        )
        self._best = best
        items = {"weights": weights, "optimizer": optimizer}
        content = {
            "note": note,
            "best": best,
            "arrays": {item: _describe(tree) for item, tree in items.items()},
        }
        arguments = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        arguments["note"] = ocp.args.JsonSave({**content, "checksum": _checksum(content)})
        self._saving = step
        self._attempt(self._orbax.save, self.folder / str(step), ocp.args.Composite(**arguments))

    def check(self) -> None:
        """Raises what has gone wrong in the background so far; cheap enough for every step."""
        self._attempt(self._orbax.check_for_errors)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._attempt(self._orbax.wait_until_finished)
        if self._saving is not None:
            self._steps.append(self._saving)
            self._saving = None
        for step in self._steps[: -self._keep]:  # they can go only now that the newer one is there
            if step != self._best:
                self._steps.remove(step)
                self._move(step, DELETED)
        self._remove_leftovers()

    def close(self) -> None:
        self.wait()
        self._orbax.close()
        if self._writes and self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def _attempt(self, call: Callable, *arguments) -> None:
        """Calls orbax; what fails leaves nothing of the save that was under way."""
        self._check_folder()
        try:
            call(*arguments)
        except Exception as error:
            saving, self._saving = self._saving, None
            self._check_folder()
            full = full_disk(error, self.folder)  # asked before the removal, which frees space
            # Threads of the failed save, which nothing waits for, make its folder again.
            end = time.monotonic() + SETTLE_SECONDS
            while time.monotonic() < end:
                self._remove_leftovers()
                time.sleep(0.05)
            if arguments or full or not isinstance(error, (OSError, ValueError)):
                raise
            # the arrays were fit to be saved; what failed is the writing, in the background
            raise UserError(
                f"checkpoint {self.folder}/{saving} could not be written ({_first_cause(error)}); "
                "see that nothing else removes files there, and give the same command again."
            ) from error

    def _check_folder(self) -> None:
        """Raises UserError if the folder was deleted, even if threads of orbax have made a new one."""
        if self._writes and self._opened is not None and not _is_folder(self.folder, self._opened):
            raise UserError(
                f"{self.folder} was deleted or moved while its run went on, so nothing more can be "
                "saved there; put it back, or choose another --workdir, and give the same command "
                "again."
            )

    def _move(self, step: int, ending: str) -> None:
        """Renames a checkpoint; a name without an ending never stands for a half of one."""
        if self._writes:
            target = self.folder / f"{step}{ending}"
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)

    def _remove_leftovers(self) -> None:
        """Removes what a killed save or deletion left."""
        if self._writes and self._saving is None:
            for path in self.folder.iterdir():
                if path.name.endswith((UNFINISHED, DELETED)):
                    shutil.rmtree(path, ignore_errors=True)

    # ---- reading -----------------------------------------------------------------------------------
    def restore(
        self, weights: Leaves, optimizer: Any = None, only: int | None = None
    ) -> tuple[Leaves, Any, dict]:
        """Reads weights, optimizer and note of the newest checkpoint that is whole.

        `latest()` then names it.

        `only`: of that checkpoint, and of no other if it is damaged. A run that trains meanwhile
        deletes old checkpoints: opened read-only, the newest is looked for again where that has
        happened to the one being read; where it has happened to `only`, `Replaced` is raised.

        The arguments are trees of arrays or jax.ShapeDtypeStruct: what comes back has their shapes,
        dtypes and, where they have one, sharding (else it lies on this process's first device),
        whatever it was saved with. Without `optimizer` that part is not read. A damaged checkpoint
        is reported on stderr and, unless opened read-only, renamed to `<step>.damaged`. Raises
        UserError where no checkpoint is whole, or its arrays are not those of the arguments
        (another model).
        """
        wanted = (
            {"weights": weights} if optimizer is None else {"weights": weights, "optimizer": optimizer}
        )
        reasons: dict[int, str] = {}
        if self._read_only:
            self._steps = processes.from_leader(self._steps)
        while left := [
            step for step in (self._steps if only is None else [only]) if step not in reasons
        ]:
            step, reason, note, found = left[-1], "", {}, {}
            try:
                note = self._note(step)
                for item, like in wanted.items():
                    self._compare(
                        f"{self.folder}/{step}/{item}",
                        _saved_shapes(note["arrays"][item]),
                        _shapes(like),
                    )
                found = self._read(step, wanted, note["arrays"])
            except UserError:
                raise
            except Exception as error:  # orbax and its parts raise many kinds
                reason = _first_cause(error)
            if _everywhere(not reason):
                changed = _changed(found, note["arrays"])
                if not changed:
                    self._give_up(reasons, step)
                    self._best = note["best"]
                    found = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found, wanted)
                    return found["weights"], found.get("optimizer"), note["note"]
                reason = f"{changed[0]} is not as it was saved"
            if self._read_only and not _everywhere(os.path.lexists(self.folder / str(step))):
                if only is not None:
                    raise Replaced(
                        f"{self.folder}/{step} was deleted by the run that trains there while it "
                        "was read; give the same command again, or wait until that run has ended."
                    )
                self._steps = processes.from_leader(self._on_disk())
                continue
            reasons[step] = reason or "another process cannot read it"
        if not reasons:
            raise UserError(f"{self.folder} holds no checkpoint; train first, or give another run.")
        listed = "; ".join(f"{step}: {reason}" for step, reason in reasons.items())
        raise UserError(
            f"{self.folder} holds only damaged checkpoints ({listed}); restore it, or train again."
        )

    def saved_weights(self) -> set[str]:
        """Returns the paths of the leaves that the newest checkpoint with a readable note holds."""
        content = self._newest_note()
        return set() if content is None else set(map(leaf_of, content["arrays"]["weights"]))

    def _newest_note(self) -> dict | None:
        """Reads the newest note that can be read; None without one."""
        while True:
            for step in reversed(self._steps):
                with contextlib.suppress(ValueError):
                    return self._note(step)
            steps = self._on_disk()
            if not self._read_only or steps == self._steps:
                return None
            self._steps = steps  # a run that trains has deleted those before

    def _note(self, step: int) -> dict:
        return _note_of(self.folder / str(step))

    def _read(self, step: int, wanted: dict[str, Any], saved: dict[str, dict]) -> dict[str, Any]:
        """Reads the arrays as saved, with the shardings of `wanted`."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def place(item: str, path, leaf) -> jax.ShapeDtypeStruct:
            sharding = getattr(leaf, "sharding", None) or here
            return jax.ShapeDtypeStruct(
                leaf.shape, jnp.dtype(saved[item][_name(path)]["dtype"]), sharding=sharding
            )

        arguments = {
            item: ocp.args.StandardRestore(
                jax.tree_util.tree_map_with_path(functools.partial(place, item), tree)
            )
            for item, tree in wanted.items()
        }
        # Not by way of the checkpointer, which would wait for a process that could not read its part.
        found = self._handler.restore(self.folder / str(step), ocp.args.Composite(**arguments))
        return {item: found[item] for item in wanted}

    def _give_up(self, reasons: dict[int, str], good: int) -> None:
        """Says which checkpoints newer than `good` are damaged, and frees their names for new ones."""
        for step, reason in reasons.items():
            self._steps.remove(step)
            self._move(step, DAMAGED)
            kept = f"is kept as {step}{DAMAGED}, and " if self._writes else ""
            if jax.process_index() == 0:
                print(
                    f"unimed_jax: checkpoint {self.folder}/{step} is damaged ({reason}); it "
                    f"{kept}{good} is used.",
                    file=sys.stderr,
                )

    @staticmethod
    def _compare(where: str, saved: dict[str, tuple], wanted: dict[str, tuple]) -> None:
        wrong = sorted({name for name, _ in set(saved.items()) ^ set(wanted.items())})
        if wrong:
            name = wrong[0]
            raise UserError(
                f"checkpoint {where} belongs to another model: {name} is "
                f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here "
                f"({len(wrong)} arrays differ); use the settings it was trained with."
            )


def _is_folder(path: Path, descriptor: int) -> bool:
    """Tells whether the path still leads to the folder that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


@jax.jit
def fingerprints(tree: Any) -> Any:
    """Computes a number (uint32 []) for each array of the tree, the same on any mesh.

    It is a sum of integers, which has no order.
    """
    return jax.tree.map(_fingerprint, tree)


def _fingerprint(x: Array) -> UInt32[Array, ""]:
    """Returns the sum, modulo 2^32, of a hash of every value's bits and place.

    For a given place the hash is one to one, so a single changed value never goes unseen.
    """
    if jnp.issubdtype(x.dtype, jnp.inexact) or x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(
            x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        )
    place = jnp.zeros(x.shape, jnp.uint32)  # places in row-major order; iotas are sharded as x is
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    odd = np.uint32(0x9E3779B9)
    mixed = x.astype(jnp.uint32) + place * odd
    mixed = (mixed ^ mixed >> 16) * odd
    return jnp.sum(mixed ^ mixed >> 15, dtype=jnp.uint32)


def _describe(tree: Any) -> dict[str, dict]:
    """Returns shape, dtype and fingerprint of each array by path, as JSON holds them."""
    numbers = jax.tree.leaves(jax.device_get(fingerprints(tree)))
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        _name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "fingerprint": int(number)}
        for (path, leaf), number in zip(leaves, numbers, strict=True)
    }


def _changed(found: dict[str, Any], saved: dict[str, dict]) -> list[str]:
    """Names the arrays that are not those that the note describes."""
    return [
        f"{item}/{name}"
        for item, tree in found.items()
        for name, entry in _describe(tree).items()
        if entry != saved[item][name]
    ]


def _first_cause(error: BaseException) -> str:
    """Names the first cause of an error in a few words.

    Errors that libraries raise because of it quote whole descriptions of stores.
    """
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _everywhere(true: bool) -> bool:
    """Tells whether a condition is true in every process."""
    if jax.process_count() == 1:
        return true
    return bool(multihost_utils.process_allgather(np.asarray(true)).all())


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _saved_shapes(arrays: dict[str, dict]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry["shape"]) for name, entry in arrays.items()}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {
        _name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _name(path) -> str:
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
