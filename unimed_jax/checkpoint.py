"""Checkpoints of a run: the only file that knows orbax.

A checkpoint holds arrays (trainable leaves, leaves that no file could give back, optimiser moments, the
step) and a JSON note (settings' hash, data position). It is written to a temporary folder and renamed, so
it is there whole or not at all.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from unimed_jax.config import UserError

Leaves = dict[str, Any]  # path -> array

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it touches


class Checkpoints:
    """The numbered checkpoints in `folder`; the `keep` newest stay."""

    def __init__(self, folder: str | Path, keep: int = 2, read_only: bool = False):
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder} does not exist; give the folder of a run that has saved a checkpoint.")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only, create=not read_only)
        handlers = {
            "weights": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "note": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, weights: Leaves, optimizer: Any, note: dict) -> None:
        """Copies the arrays and writes them in the background."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(weights),
                optimizer=ocp.args.StandardSave(optimizer),
                note=ocp.args.JsonSave(note),
            ),
        )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def restore(self, weights: Leaves, optimizer: Any = None) -> tuple[Leaves, Any, dict]:
        """-> (weights, optimizer, note) of the newest checkpoint, shaped like the arguments.

        Without `optimizer` that part is not read. Raises UserError where there is no checkpoint, or its arrays
        are not those of the arguments (another model).
        """
        step = self.latest()
        if step is None:
            raise UserError(f"{self.folder} holds no checkpoint; train first, or give another run.")
        items = {"weights": weights} if optimizer is None else {"weights": weights, "optimizer": optimizer}
        saved = self._manager.item_metadata(step)
        for item, like in items.items():
            self._compare(f"{self.folder}/{step}/{item}", _shapes(saved[item].tree), _shapes(like))
        args = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, like)) for name, like in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args, note=ocp.args.JsonRestore()))
        return restored["weights"], restored.get("optimizer"), restored["note"]

    def saved_weights(self) -> set[str]:
        """Paths of the leaves that the newest checkpoint holds."""
        return set(self._manager.item_metadata(self.latest())["weights"].tree)

    @staticmethod
    def _compare(where: str, saved: dict[str, tuple], wanted: dict[str, tuple]) -> None:
        wrong = sorted({name for name, _ in set(saved.items()) ^ set(wanted.items())})
        if wrong:
            name = wrong[0]
            raise UserError(
                f"checkpoint {where} belongs to another model: {name} is {saved.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here ({len(wrong)} arrays differ); use the settings it was trained with."
            )


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
