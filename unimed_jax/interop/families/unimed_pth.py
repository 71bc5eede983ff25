"""Uni-Med's own checkpoint: names and layouts in one table, the file in both directions, AdamW's state included.

The original stores torch tensors ([out, in] linears, one module per layer and expert); here layers are
stacked, experts concatenated and linears [in, out]. Its file is a dict: `model` (every tensor that trains, the
experts twice), `optimizer`, `config`, `scaler`, `epoch`.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimed_jax.config import VISUAL_TASKS, Config, ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.files import new_file
from unimed_jax.interop.families import hf, peft
from unimed_jax.interop.families.towers import eva_table
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Arrays, Entry, Stored, Table, assembled, check, folded, published_shapes
from unimed_jax.interop.tensors.torch_file import Later, TorchFile, TorchTensor, TorchTensors, write_torch
from unimed_jax.model.connector import visual_features

# --------------------------------------------------------------------------------------------------
# Names and settings
# --------------------------------------------------------------------------------------------------


def connector_table(config: ModelConfig) -> Table:
    """Task tokens, router and projection experts (or the dense projector)."""
    c = config.connector
    table: list[Entry] = []
    out = config.decoder.width
    if c.task_tokens:
        table += [Entry(f"task_tokens.{t}", "connector/task_tokens", (i,), "row") for i, t in enumerate(VISUAL_TASKS)]
    if not c.is_moe:
        for i in range(c.layers):
            name = "llm_proj" if c.kind == "linear" else f"llm_proj.{2 * i}"
            table.append(Entry(f"{name}.weight", f"connector/layers/{i}/kernel", layout="transpose"))
            table.append(Entry(f"{name}.bias", f"connector/layers/{i}/bias"))
        return Table(tuple(table))
    for e in range(c.experts):
        if c.kind == "moe_linear":
            block = (slice(None), slice(e * out, (e + 1) * out))
            table.append(Entry(f"moe_layers.{e}.0.weight", "connector/experts/up", block, "transpose"))
            table.append(Entry(f"moe_layers.{e}.0.bias", "connector/experts/bias", (e,)))
            continue
        part = slice(e * (c.hidden or out), (e + 1) * (c.hidden or out))
        table.append(Entry(f"moe_layers.{e}.0.weight", "connector/experts/up", (slice(None), part), "transpose"))
        table.append(Entry(f"moe_layers.{e}.0.bias", "connector/experts/up_bias", (part,)))
        table.append(Entry(f"moe_layers.{e}.2.weight", "connector/experts/down", (part,), "transpose"))
        table.append(Entry(f"moe_layers.{e}.2.bias", "connector/experts/bias", (e,)))
    if c.router in ("soft", "sparse"):
        start, widths = 0, {"task": c.task_token_width or visual_features(config), "token": visual_features(config)}
        for half in c.router_input.split("_"):  # the task half comes first, as published
            columns = (start, start + widths[half])
            start += widths[half]
            table.append(
                Entry("router.fc1.weight", f"connector/router/{half}_kernel", layout="transpose", columns=columns)
            )
        table.append(Entry("router.fc1.bias", "connector/router/bias"))
        table.append(Entry("router.fc2.weight", "connector/router/out_kernel", layout="transpose"))
        table.append(Entry("router.fc2.bias", "connector/router/out_bias"))
        return Table(tuple(table), ("llm_proj.*",))  # the experts again
    return Table(tuple(table), ("llm_proj.*", "router.*"))  # the router is there even where the routing reads none


def wrapped_lora_table(config: ModelConfig) -> Table:
    """Adapters in a decoder that PEFT has wrapped."""
    table = peft.peft_table(config, "llm_model.base_model.model.model.layers", ".default")
    return table + Table((), ("*.rotary_emb.inv_freq",))


def trainable_table(config: ModelConfig) -> Table:
    """What the original's checkpoint holds under `model`, in its order."""
    return wrapped_lora_table(config) + connector_table(config)


def decoder_table(config: ModelConfig) -> Table:
    """The frozen decoder in the original's full state: Hugging Face's LLaMA, wrapped by PEFT."""
    return hf.hf_decoder_table(config.decoder, "llm_model.base_model.model.", config.lora.targets)


def vision_table(config: ModelConfig) -> Table:
    """The frozen vision encoder in the original's full state."""
    return eva_table(config.vision, "visual_encoder.")


def ln_vision_table() -> Table:
    """The norm behind the encoder, which the original builds fresh and never loads or trains."""
    return Table(
        (
            Entry("ln_vision.weight", "vision/output_norm/scale"),
            Entry("ln_vision.bias", "vision/output_norm/bias"),
        )
    )


def duplicate_name(name: str) -> str | None:
    """The name under which the original's modules hold an expert's tensor again."""
    return "llm_proj." + name.removeprefix("moe_layers.") if name.startswith("moe_layers.") else None


def optimizer_order(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Published parameters in the order of the original's AdamW: those that are decayed, those that are not.

    Within each the order of its modules: adapters layer by layer (q, k, v, o, gate, down, up; A, B), task tokens,
    experts, router. A parameter that never got a gradient has a number there but no state; the router has one even
    where the routing reads none.
    """
    names = list(trainable_table(config).by_name())
    if config.connector.is_moe and config.connector.router in ("hard", "constant"):
        names += [f"router.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    biases = [name for name in names if name.endswith(".bias")]
    return [name for name in names if name not in biases], biases


def original_config(config: ModelConfig) -> dict[str, Any]:
    """The original's names for our settings (its config's section `model`)."""
    c, lora = config.connector, config.lora
    return {
        "image_size": config.vision.image_size,
        "resample_rate": c.rate,
        "resample_method": c.aggregation,
        "has_moe": c.is_moe,
        "projector_type": c.kind,
        "num_experts": c.experts,
        "router_method": f"router_{c.router_input}",
        "num_task_tokens": c.task_tokens,
        "task_token_c": c.task_token_width or visual_features(config),
        "router_type": c.router,
        "sparse_topk": c.top_k,
        "sft_type": "lora" if lora.rank else "none",
        "lora_target_modules": [peft.adaptable_linears(config)[name].split(".")[-1] for name in lora.targets],
        "lora_r": lora.rank,
        "lora_alpha": peft.whole_number(lora.alpha),
        "lora_dropout": lora.dropout,
    }


def _differences(config: ModelConfig, tree: Any) -> list[str]:
    """Settings of a file that change what its tensors mean and are not ours, in words."""
    c = config.connector
    named = ["projector_type", "resample_method", "resample_rate", "lora_r", "lora_alpha"]
    if c.is_moe:
        named += ["router_type", "num_experts"]
        named += ["router_method"] if c.router in ("soft", "sparse") else []
        named += ["sparse_topk"] if c.router == "sparse" else []
    ours, theirs = original_config(config), tree
    for key in ("config", "model"):
        theirs = theirs.get(key) if isinstance(theirs, dict) else None
    if not isinstance(theirs, dict):
        return []
    return [f"its {n} is {theirs[n]!r}, not {ours[n]!r}" for n in named if n in theirs and theirs[n] != ours[n]]


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Adam's state by leaf: steps taken part in (int32, [] or [rows, 1] where rows count apart), both moments."""

    count: dict[str, Any]  # type: ignore[assignment]  # hides tuple.count
    mean: dict[str, Any]
    square: dict[str, Any]


def load_unimed(
    path: str | Path,
    config: ModelConfig,
    to: Destination,
) -> dict[str, Any]:
    """Adapters and connector from the original's checkpoint; `to` as in `load_leaves`.

    Raises one UserError for all tensors and settings of the file that are not those of `config`.
    """
    tensors = _checked(TorchFile(path), config, to.leaves)
    return load_leaves(trainable_table(config), tensors, to)


def _checked(file: TorchFile, config: ModelConfig, leaves: Mapping[str, Any]) -> TorchTensors:
    tensors, table = file.tensors(), trainable_table(config)
    check(table, tensors, leaves, _differences(config, file.tree))
    for name in table.by_name():
        other = duplicate_name(name)
        if other not in tensors.tensors or tensors.tensors[other] == tensors.tensors[name]:
            continue  # absent, or one storage
        if not np.array_equal(tensors.read(other), tensors.read(name)):
            raise UserError(f"{file.path}: {other} and {name} are one tensor to the model but differ; get it again.")
    return tensors


def load_moments(
    path: str | Path,
    config: ModelConfig,
    to: Destination,
) -> Moments:
    """AdamW's state from the original's checkpoint, float32, by the paths of `load_unimed`.

    What has no state there yet has count 0 and moments 0. Raises UserError for a state that is not this model's, or
    one that we cannot hold: parameters of one leaf of ours that took part in different numbers of steps.
    """
    file, table = TorchFile(path), trainable_table(config)
    names, state = _optimizer(file, config)
    expected = published_shapes(table, to.leaves)
    found = {name: state[index] for index, name in names.items() if index in state and name in expected}
    for name, entry in found.items():
        if not isinstance(entry, dict) or entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError(
                f"{file.path}: the optimizer's state of {name} is not AdamW's; give an original checkpoint."
            )
    steps = {name: _step(file, name, found[name]["step"]) if name in found else 0 for name in expected}
    single = dataclasses.replace(to, dtypes=dict.fromkeys(table.paths(), np.float32))
    moments = []
    for kind in ("exp_avg", "exp_avg_sq"):
        # Never touched, the zeros take no memory until they are read.
        nothing = {name: np.zeros(expected[name].shape, np.float32) for name in expected if name not in found}
        there = {name: entry[kind] for name, entry in found.items() if isinstance(entry[kind], TorchTensor)}
        tensors = Arrays(nothing, TorchTensors(file, there, f"{kind} of the optimizer in {file.path}"))
        moments.append(load_leaves(table, tensors, single))
    return Moments(_counts(file, table, steps), *moments)


def _optimizer(file: TorchFile, config: ModelConfig) -> tuple[dict[int, str], dict[int, Any]]:
    """(number of a parameter -> its name, number -> state) of the file's optimizer."""
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
        raise UserError(
            f"{file.path}: its optimizer has {' + '.join(str(len(group)) for group in groups)} parameters, where this "
            f"model's has {' + '.join(str(len(names)) for names in wanted)} (decayed + not); check config.model."
        )
    return dict(zip(numbers, [name for names in wanted for name in names], strict=True)), state


def _step(file: TorchFile, name: str, step: Any) -> int:
    """Steps that a parameter took part in; torch keeps them as a tensor [], older versions as a number."""
    if isinstance(step, TorchTensor) and step.shape == ():
        step = file.read(step).item()
    if not isinstance(step, (int, float)) or not 0 <= step < 1 << 31 or step != int(step):
        raise UserError(f"{file.path}: the optimizer's step of {name} is no number of steps ({step}); get it again.")
    return int(step)


def _counts(file: TorchFile, table: Table, steps: Mapping[str, int]) -> dict[str, np.ndarray]:
    counts = {}
    for path in table.paths():
        entries = table.of_leaf(path)
        own = [steps[entry.name] for entry in entries]
        if entries[0].layout == "row":  # one parameter there for every row of ours
            counts[path] = np.array(own, np.int32)[:, None]  # [rows, 1]
        elif len(set(own)) == 1:
            counts[path] = np.array(own[0], np.int32)
        else:
            names = ", ".join(folded(entry.name for entry in entries))
            raise UserError(
                f"{file.path}: the optimizer's steps of {names} differ ({min(own)} to {max(own)}), but are one count "
                "here; start the optimizer anew."
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

    leaves: adapters and connector, and nothing else that trained, by path; moments: Adam's state of the same leaves
    with fields as in `Moments` (None: the optimizer starts anew); like: an original checkpoint, from which comes what
    is not ours: tensors that our model does not hold, settings, groups, scaler, epoch. Without it those tensors
    are absent, which the original's loader allows, and the settings are those of `config`. Raises UserError for what
    the format cannot hold, and where `out` is there already.
    """
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another file, or remove it.")
    table = trainable_table(config.model)
    _representable(config.model, leaves, table)
    if like is None:
        tree, names, state = _fresh(config), dict(enumerate(sum(optimizer_order(config.model), []))), {}
        dtypes = {}
    else:
        file = TorchFile(like)
        _checked(file, config.model, leaves)
        dtypes = {name: stored.dtype for name, stored in file.tensors("model").stored.items()}
        names, _ = _optimizer(file, config.model)
        tree = file.to_write(file.tree)
        state = tree["optimizer"]["state"]
    entries = table.by_name()
    ours = _to_write(entries, leaves, dtypes)
    tree["model"].update(ours)
    tree["model"].update({other: tensor for name, tensor in ours.items() if (other := duplicate_name(name))})
    if epoch is not None:
        tree["epoch"] = epoch
    state = {number: part for number, part in state.items() if names[number] not in entries}
    if moments is not None:
        moved = {name: group for name, group in entries.items() if all(e.path in moments.mean for e in group)}
        mean, square = _to_write(moved, moments.mean, dtypes), _to_write(moved, moments.square, dtypes)
        for number, name in names.items():
            step = _step_of(moved[name], moments.count, leaves) if name in moved else 0
            if step:
                state[number] = {
                    "step": np.array(step, np.float32),
                    "exp_avg": mean[name],
                    "exp_avg_sq": square[name],
                }
    tree["optimizer"]["state"] = state
    with new_file(out) as path:
        write_torch(path, tree)


def _representable(config: ModelConfig, leaves: Mapping[str, Any], table: Table) -> None:
    """Raises one UserError for all that the original cannot compute or hold."""
    c = config.connector
    routed = c.is_moe and c.router in ("soft", "sparse")
    inputs = sum(
        {"task": c.task_token_width or visual_features(config), "token": visual_features(config)}[half]
        for half in c.router_input.split("_")
    )
    problems = [
        f"config.model.connector.{field}={getattr(c, field)!r}"
        for field, fits in (
            ("aggregation", c.aggregation != "block"),
            ("activation", c.activation == "gelu"),
            ("hidden", c.hidden in (None, config.decoder.width) or c.kind != "moe_mlp"),
            ("router_hidden", c.router_hidden in (None, 4 * inputs) or not routed),
        )
        if not fits
    ]
    known = set(table.paths())
    others = folded(path for path in leaves if path not in known)
    problems += [f"the trained {', '.join(others)}"] if others else []
    if problems:
        raise UserError(
            f"Uni-Med's checkpoint cannot hold {'; '.join(problems)}; export the complete model in another format."
        )


def _to_write(
    entries: Mapping[str, list[Entry]], leaves: Mapping[str, Any], dtypes: Mapping[str, Any]
) -> dict[str, Later]:
    """Published tensors of these leaves, in the given dtypes (theirs where none is)."""

    def make(name: str) -> np.ndarray:
        return assembled(entries[name], leaves).astype(shapes[name].dtype, copy=False)

    shapes = published_shapes(Table(tuple(entry for group in entries.values() for entry in group)), leaves)
    shapes = {name: Stored(shape, np.dtype(dtypes.get(name, dtype))) for name, (shape, dtype) in shapes.items()}
    return {name: Later(shapes[name], functools.partial(make, name)) for name in entries}


def _step_of(entries: Iterable[Entry], counts: Mapping[str, Any], leaves: Mapping[str, Any]) -> int:
    """Steps that a published parameter took part in."""
    steps = set()
    for entry in entries:
        shape = tuple(leaves[entry.path].shape)
        first = tuple(part.start for part in entry.block(shape))
        steps.add(int(np.broadcast_to(np.asarray(counts[entry.path]), shape)[first]))
    assert len(steps) == 1, "the parts of one published parameter took part in the same steps"
    return steps.pop()


def _fresh(config: Config) -> dict[str, Any]:
    """A checkpoint of ours without tensors: one epoch of all steps."""
    o, steps = config.optimizer, config.train.steps
    common = {
        **{"lr": o.lr, "betas": o.betas, "eps": o.eps, "amsgrad": False, "maximize": False, "foreach": None},
        **{"capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True},
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
                **{"init_lr": o.lr, "min_lr": o.min_lr, "warmup_lr": o.warmup_lr, "warmup_steps": o.warmup_steps},
                **{"weight_decay": o.weight_decay, "lr_sched": "linear_warmup_cosine_lr", "seed": config.seed},
                **{"max_epoch": 1, "iters_per_epoch": steps},
            },
            "datasets": {},
        },
        "scaler": None,
        "epoch": 0,
    }
