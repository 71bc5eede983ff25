"""Reads and writes checkpoints of the original Uni-Med: adapters, connector and AdamW's state.

The file is a dict: `model` (every tensor that trains; each expert's twice), `optimizer`, `config`,
`scaler`, `epoch`. Its tensors are torch's ([out, in] linears, one module per layer and expert), while
ours are [in, out], stacked over layers, experts concatenated; one table translates the names and
layouts in both directions.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed_jax.config import Config, ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.files import written_whole
from unimed_jax.interop.families.unimed_names import (
    duplicate_name,
    optimizer_order,
    original_config,
    router_halves,
    trainable_table,
)
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import (
    Arrays,
    Entry,
    Stored,
    Table,
    assembled,
    check,
    folded,
    published_shapes,
)
from unimed_jax.interop.tensors.torch_file import (
    Later,
    TorchFile,
    TorchTensor,
    TorchTensors,
    write_torch,
)

# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Holds Adam's state, each part by the path of a leaf."""

    # Steps in which the leaf took part: int32, [] or [rows, 1] if each row has a count of its own.
    count: dict[str, Any]  # type: ignore[assignment]  # hides tuple.count
    mean: dict[str, Any]  # mean of the gradients, float32
    square: dict[str, Any]  # mean of their squares, float32


def load_unimed(path: str | Path, config: ModelConfig, to: Destination) -> dict[str, Any]:
    """Loads adapters and connector from a checkpoint of the original; `to` as in `load_leaves`.

    Raises one UserError for all tensors and settings of the file that are not those of `config`.
    """
    tensors = _checked(TorchFile(path), config, to.leaves)
    return load_leaves(trainable_table(config), tensors, to)


def _checked(file: TorchFile, config: ModelConfig, leaves: Mapping[str, Any]) -> TorchTensors:
    """Returns the file's tensors after checking that they fit the model.

    An expert is stored twice in the file; the two copies must be the same.
    """
    tensors, table = file.tensors(), trainable_table(config)
    check(table, tensors, leaves, _differences(config, file.tree))
    for name in table.by_name():
        other = duplicate_name(name)
        if other not in tensors.tensors or tensors.tensors[other] == tensors.tensors[name]:
            continue  # the file lacks the copy, or both share one storage
        if not np.array_equal(tensors.read(other), tensors.read(name)):
            raise UserError(
                f"{file.path}: {other} and {name} are one tensor to the model but differ; get it again."
            )
    return tensors


def _differences(config: ModelConfig, tree: Any) -> list[str]:
    """Describes the settings in a file that change what its tensors mean and that differ from ours."""
    c = config.connector
    # The original has no word for it.
    found = [] if c.activation == "gelu" else [f"its activation is 'gelu', not {c.activation!r}"]
    named = ["projector_type", "resample_method", "resample_rate", "lora_r", "lora_alpha"]
    if c.is_moe:
        named += ["router_type", "num_experts"]
        named += ["router_method"] if c.router in ("soft", "sparse") else []
        named += ["sparse_topk"] if c.router == "sparse" else []
    ours, theirs = original_config(config), tree
    for key in ("config", "model"):
        theirs = theirs.get(key) if isinstance(theirs, dict) else None
    if not isinstance(theirs, dict):
        return found
    return found + [
        f"its {n} is {theirs[n]!r}, not {ours[n]!r}"
        for n in named
        if n in theirs and theirs[n] != ours[n]
    ]


def load_moments(path: str | Path, config: ModelConfig, to: Destination) -> Moments:
    """Loads AdamW's state, in float32, from a checkpoint of the original.

    It comes by the same paths as the leaves of `load_unimed`.

    A parameter without state gets count 0 and moments 0. Raises UserError for a state that is not
    this model's, or one that we cannot hold: parameters of one leaf of ours that took part in
    different numbers of steps.
    """
    file, table = TorchFile(path), trainable_table(config)
    expected = published_shapes(table, to.leaves)
    found = _states(file, config, expected)
    steps = {name: _step(file, name, found[name]["step"]) if name in found else 0 for name in expected}
    single = dataclasses.replace(to, dtypes=dict.fromkeys(table.paths(), np.float32))
    moments = []
    for kind in ("exp_avg", "exp_avg_sq"):
        # These zeros take no memory until they are read.
        nothing = {
            name: np.zeros(expected[name].shape, np.float32) for name in expected if name not in found
        }
        there = {
            name: entry[kind] for name, entry in found.items() if isinstance(entry[kind], TorchTensor)
        }
        tensors = Arrays(nothing, TorchTensors(file, there, f"{kind} of the optimizer in {file.path}"))
        moments.append(load_leaves(table, tensors, single))
    return Moments(_counts(file, table, steps), *moments)


def _states(
    file: TorchFile, config: ModelConfig, expected: Mapping[str, Stored]
) -> dict[str, dict[str, Any]]:
    """Gives the optimizer's state of each expected parameter that has one, by published name."""
    names, state = _optimizer(file, config)
    found = {
        name: state[number] for number, name in names.items() if number in state and name in expected
    }
    for name, entry in found.items():
        if not isinstance(entry, dict) or entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError(
                f"{file.path}: the optimizer's state of {name} is not AdamW's; give an original "
                "checkpoint."
            )
    return found


def _optimizer(file: TorchFile, config: ModelConfig) -> tuple[dict[int, str], dict[int, Any]]:
    """Reads the file's optimizer: (number of a parameter -> its name, number -> its state)."""
    optimizer = file.tree.get("optimizer") if isinstance(file.tree, dict) else None
    wanted = optimizer_order(config)
    try:
        groups = [list(group["params"]) for group in optimizer["param_groups"]]  # type: ignore[index]
        state = {**optimizer["state"]}  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{file.path} holds no optimizer's state; give a checkpoint in the original's format."
        ) from error
    numbers = [number for group in groups for number in group]
    known = {number for number in numbers if type(number) is int}
    fits = [len(group) for group in groups] == [len(names) for names in wanted]
    if not fits or len(known) < len(numbers) or state.keys() - known:
        there = " + ".join(str(len(group)) for group in groups)
        here = " + ".join(str(len(names)) for names in wanted)
        raise UserError(
            f"{file.path}: its optimizer has {there} parameters, but this model's has {here} "
            "(decayed + not); check config.model."
        )
    return dict(zip(numbers, [name for names in wanted for name in names], strict=True)), state


def _step(file: TorchFile, name: str, step: Any) -> int:
    """Reads the number of steps of a parameter.

    It is a tensor [] in torch, and a number in older versions of torch.
    """
    if isinstance(step, TorchTensor) and step.shape == ():
        step = file.read(step).item()
    if not isinstance(step, (int, float)) or not 0 <= step < 1 << 31 or step != int(step):
        raise UserError(
            f"{file.path}: the optimizer's step of {name} is not a number of steps ({step}); get it "
            "again."
        )
    return int(step)


def _counts(file: TorchFile, table: Table, steps: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Turns steps by published name into counts by leaf, as in `Moments`."""
    counts = {}
    for path in table.paths():
        entries = table.of_leaf(path)
        own = [steps[entry.name] for entry in entries]
        if entries[0].layout == "row":  # each row of our leaf is a parameter in the file
            counts[path] = np.array(own, np.int32)[:, None]  # [rows, 1]
        elif len(set(own)) == 1:
            counts[path] = np.array(own[0], np.int32)
        else:
            names = ", ".join(folded(entry.name for entry in entries))
            raise UserError(
                f"{file.path}: the optimizer's steps of {names} differ ({min(own)} to {max(own)}), "
                "but are one count here; start with a new optimizer."
            )
    return counts


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def export_unimed(
    out: str | Path,
    config: Config,
    leaves: Mapping[str, Any],
    moments: Any = None,
    like: str | Path | None = None,
    epoch: int | None = None,
) -> None:
    """Writes a checkpoint in the original's format (which names its files checkpoint_{epoch}.pth).

    leaves: adapters and connector, by path, and nothing else that trained.
    moments: Adam's state of the same leaves, with fields as in `Moments`; with None the optimizer
        starts new.
    like: an original checkpoint, which gives what is not ours: tensors that our model does not
        hold, settings, groups, scaler, epoch. Without it those tensors are absent, which the
        original's loader allows, and the settings are those of `config`.

    Raises UserError for what the format cannot hold, and if `out` exists already.
    """
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another file, or remove it.")
    table = trainable_table(config.model)
    _refuse_unrepresentable(config.model, leaves, table)
    dtypes: dict[str, Any] = {}
    if like is None:
        tree = _new_checkpoint(config)
        decayed, others = optimizer_order(config.model)
        names = dict(enumerate(decayed + others))
    else:
        file = TorchFile(like)
        _checked(file, config.model, leaves)
        dtypes = {name: stored.dtype for name, stored in file.tensors("model").stored.items()}
        names, _ = _optimizer(file, config.model)
        tree = file.to_write(file.tree)
    entries = table.by_name()
    ours = _to_write(entries, leaves, dtypes)
    tree["model"].update(ours)
    tree["model"].update(
        {other: tensor for name, tensor in ours.items() if (other := duplicate_name(name))}
    )
    if epoch is not None:
        tree["epoch"] = epoch
    not_ours = {
        number: part
        for number, part in tree["optimizer"]["state"].items()
        if names[number] not in entries
    }
    tree["optimizer"]["state"] = not_ours | _states_to_write(names, entries, moments, leaves, dtypes)
    with written_whole(out) as path:
        write_torch(path, tree)


def _states_to_write(
    names: Mapping[int, str],
    entries: Mapping[str, list[Entry]],
    moments: Any,
    leaves: Mapping[str, Any],
    dtypes: Mapping[str, Any],
) -> dict[int, Any]:
    """Makes torch's state of AdamW, by the number of a parameter.

    A parameter that took part in no step has no state.
    """
    if moments is None:
        return {}
    moved = {
        name: group for name, group in entries.items() if all(e.path in moments.mean for e in group)
    }
    mean, square = _to_write(moved, moments.mean, dtypes), _to_write(moved, moments.square, dtypes)
    state = {}
    for number, name in names.items():
        step = _step_of(moved[name], moments.count, leaves) if name in moved else 0
        if step:
            state[number] = {
                "step": np.array(step, np.float32),
                "exp_avg": mean[name],
                "exp_avg_sq": square[name],
            }
    return state


def _refuse_unrepresentable(config: ModelConfig, leaves: Mapping[str, Any], table: Table) -> None:
    """Raises one UserError for everything that the original cannot compute or hold."""
    c = config.connector
    routed = c.is_moe and c.router in ("soft", "sparse")
    representable = {
        "aggregation": c.aggregation != "block",
        "activation": c.activation == "gelu",
        "hidden": c.hidden in (None, config.decoder.width) or not c.has_hidden,
        "router_hidden": c.router_hidden in (None, 4 * sum(router_halves(config).values()))
        or not routed,
    }
    problems = [
        f"config.model.connector.{field}={getattr(c, field)!r}"
        for field, fits in representable.items()
        if not fits
    ]
    known = set(table.paths())
    others = folded(path for path in leaves if path not in known)
    if others:
        problems.append(f"the trained {', '.join(others)}")
    if problems:
        raise UserError(
            f"Uni-Med's checkpoint cannot hold {'; '.join(problems)}; export the complete model in "
            "another format."
        )


def _to_write(
    entries: Mapping[str, list[Entry]], leaves: Mapping[str, Any], dtypes: Mapping[str, Any]
) -> dict[str, Later]:
    """Prepares the published tensors of these leaves; each is computed only when it is written.

    dtypes: by published name; a tensor without an entry keeps the dtype of its leaves.
    """

    def make(name: str) -> np.ndarray:
        return assembled(entries[name], leaves).astype(shapes[name].dtype, copy=False)

    shapes = published_shapes(
        Table(tuple(entry for group in entries.values() for entry in group)), leaves
    )
    shapes = {
        name: Stored(shape, np.dtype(dtypes.get(name, dtype))) for name, (shape, dtype) in shapes.items()
    }
    return {name: Later(shapes[name], functools.partial(make, name)) for name in entries}


def _step_of(entries: Iterable[Entry], counts: Mapping[str, Any], leaves: Mapping[str, Any]) -> int:
    """Counts the steps in which a published parameter took part."""
    steps = set()
    for entry in entries:
        shape = tuple(leaves[entry.path].shape)
        first = tuple(part.start for part in entry.block(shape))
        steps.add(int(np.broadcast_to(np.asarray(counts[entry.path]), shape)[first]))
    assert len(steps) == 1, "the parts of one published parameter took part in the same steps"
    return steps.pop()


def _new_checkpoint(config: Config) -> dict[str, Any]:
    """Makes the tree of a checkpoint without tensors, with our settings: one epoch of all steps."""
    o = config.optimizer
    common = {
        "lr": o.lr,
        "betas": o.betas,
        "eps": o.eps,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }
    decayed, others = optimizer_order(config.model)
    numbers = list(range(len(decayed) + len(others)))
    return {
        "model": OrderedDict(),
        "optimizer": {
            "state": {},
            "param_groups": [
                {"weight_decay": o.weight_decay, **common, "params": numbers[: len(decayed)]},
                {"weight_decay": 0, **common, "params": numbers[len(decayed) :]},
            ],
        },
        "config": {
            "model": original_config(config.model),
            "run": {
                "init_lr": o.lr,
                "min_lr": o.min_lr,
                "warmup_lr": o.warmup_lr,
                "warmup_steps": o.warmup_steps,
                "weight_decay": o.weight_decay,
                "lr_sched": "linear_warmup_cosine_lr",
                "seed": config.seed,
                "max_epoch": 1,
                "iters_per_epoch": config.train.steps,
            },
            "datasets": {},
        },
        "scaler": None,
        "epoch": 0,
    }
