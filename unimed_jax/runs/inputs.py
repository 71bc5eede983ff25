"""Records the data and the tokenizer of a run, and notices when one of them has changed.

inputs.json in the run's folder, and the note of every checkpoint, hold:

    inputs    name -> state: "data/<set>" and "evaluate/<set>" (checksum of a set's store), "tokenizer"
    changes   inputs that had changed at a later start and were accepted: step, name, from, to

A state has one part or more, joined by slashes; two states are the same if they agree in one part.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unimed_jax import processes
from unimed_jax.config import Config
from unimed_jax.data.example import Dataset
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.files import write_json
from unimed_jax.parsing import read_json
from unimed_jax.runs.checkpoint import newest_note

FILE, CHECKPOINTS = "inputs.json", "checkpoints"
TOKENIZER = "tokenizer"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Holds the content of inputs.json."""

    inputs: Mapping[str, str]
    changes: tuple[Mapping[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """Returns the content of inputs.json as plain data."""
        return {"inputs": dict(self.inputs), "changes": [dict(change) for change in self.changes]}

    def notes(self) -> list[str]:
        """Describes each change in a sentence, which every result repeats."""
        return [
            f"{_what(change['name'])} changed after step {change['step']} ({change['from'][:8]} before, "
            f"{change['to'][:8]} since), which was accepted"
            for change in self.changes
        ]


def state_of_data(
    config: Config, train: Iterable[Dataset], held_out: Iterable[Dataset]
) -> dict[str, str]:
    """Names the state of every open data set.

    These are the sets of config.data, and those of config.evaluate if it has its own.
    """
    found = {f"data/{dataset.id}": dataset.checksum for dataset in train}
    if config.evaluate.sources:
        found |= {f"evaluate/{dataset.id}": dataset.checksum for dataset in held_out}
    return found


def state_of_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Names the state of a tokenizer, which lies in `folder`."""
    return {TOKENIZER: tokenizer.state(folder)}


def keep(folder: Path, config: Config, now: Mapping[str, str]) -> Inputs:
    """Writes inputs.json when training starts, and returns it.

    If there are several processes, the leader does so first.

    Raises UserError if an input has changed since an earlier start, unless config.data.changed or
    config.text.changed accepts that; then it is noted with the steps done.
    """
    before = kept(folder)
    after = _compared(folder, before, config, now)
    if after != before or not (folder / FILE).exists():
        write_json(folder / FILE, after.plain())
    for note in after.notes()[len(before.changes) :]:
        processes.say(f"{folder}: {note}; every result will say so.")
    return after


def compare(
    folder: Path, config: Config, now: Mapping[str, str], before: Inputs | None = None
) -> list[str]:
    """Compares inputs with those that a run was trained on.

    Returns what its results must say of changes.

    before: what to compare with, in place of what the folder says. Raises UserError as `keep` does;
    nothing is written.
    """
    return _compared(folder, before or kept(folder), config, now).notes()


def _compared(folder: Path, before: Inputs, config: Config, now: Mapping[str, str]) -> Inputs:
    """Returns `before` with what is new and what changed, if that is accepted.

    Raises UserError if not.
    """
    changes = []
    step, _ = newest_note(folder / CHECKPOINTS)
    for name, state in now.items():
        old = before.inputs.get(name, state)
        if same_state(old, state):
            continue
        _refuse(folder, name, old, state, config)
        changes.append({"step": step, "name": name, "from": old, "to": state})
    changed = {change["name"] for change in changes}
    same = {name: state for name, state in before.inputs.items() if name not in changed}
    return Inputs({**now, **same}, (*before.changes, *changes))


def _refuse(folder: Path, name: str, old: str, state: str, config: Config) -> None:
    """Raises UserError for an input that changed, unless the settings accept that."""
    if name == TOKENIZER:
        if config.text.changed == "refuse":
            raise UserError(
                f"{folder} was trained with another tokenizer than it finds now (fingerprint "
                f"{old[:8]} then, {state[:8]} now); restore its files, or set "
                "config.text.changed='accept', which every result will say."
            )
    elif config.data.changed == "refuse":
        raise UserError(
            f"{folder}: {_what(name)} is not what the run was trained with (checksum {old[:8]} "
            f"then, {state[:8]} now); restore its files, or set config.data.changed='accept', which "
            "every result will say."
        )


def _what(name: str) -> str:
    if name == TOKENIZER:
        return "the tokenizer"
    group, _, dataset = name.partition("/")
    return f"data set {dataset!r}" + (" of config.evaluate.sources" if group == "evaluate" else "")


def same_state(one: str, two: str) -> bool:
    """Says whether two states agree in one part, so that they are of one thing."""
    return any(a == b for a, b in zip(one.split("/"), two.split("/"), strict=False))


def kept(folder: Path) -> Inputs:
    """Reads what a run was trained on; empty for a new one, or one of an earlier version.

    Raises UserError if inputs.json is damaged, or is not that of the run's checkpoints.
    """
    file, inside = folder / FILE, None
    _, note = newest_note(folder / CHECKPOINTS)
    if "inputs" in note:
        inside = _parsed(note["inputs"], str(folder / CHECKPOINTS))
    if not file.exists():
        return inside or Inputs({})
    advice = "restore it, or remove it: the checkpoints hold the same"
    found = _parsed(read_json(file, advice), str(file))
    for name, state in (inside.inputs if inside else {}).items():
        known = [found.inputs.get(name, state)]
        known += [
            change[end] for change in found.changes if change["name"] == name for end in ("from", "to")
        ]
        if not any(same_state(state, other) for other in known):
            raise UserError(
                f"{file} is not that of the run's checkpoints ({_what(name)} differs); {advice}."
            )
    return found


def _parsed(content: Any, where: str) -> Inputs:
    """Checks the content of inputs.json; raises UserError if it has another form."""
    try:
        inputs = {str(name): str(state) for name, state in content["inputs"].items()}
        changes = [
            {"step": int(c["step"]), "name": str(c["name"]), "from": str(c["from"]), "to": str(c["to"])}
            for c in content["changes"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} does not say what the run was trained on ({error!r}); restore it, or remove it."
        ) from error
    return Inputs(inputs, tuple(changes))
