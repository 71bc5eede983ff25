"""From a config file to a checked `Config`: types, `fidelity` expanded, and what one field alone cannot know."""

import dataclasses
import importlib.util
import math
import re
import traceback
import types
import typing
from pathlib import Path

import ml_collections

from unimed_jax.config import TASKS, VISUAL_TASKS, Config, LoraConfig, ModelConfig
from unimed_jax.errors import UserError, nearest

# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def load_config_file(path: str):
    """Runs `path.py` or `path.py:argument` and returns its ConfigDict."""
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        folder = Path(file).parent
        have = [str(p) for p in folder.glob("*.py")] if folder.is_dir() else []
        raise UserError(f"--config={file} does not exist{nearest(file, have)}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        settings = module.get_config(argument) if argument else module.get_config()
    except (AttributeError, KeyError, TypeError, NameError, SyntaxError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        raise UserError(f"--config={file}, line {[*lines, '?'][-1]}: {' '.join(str(error).split())}") from error
    if not settings.name:
        settings.name = Path(file).stem
    return settings


# The knobs that `fidelity` sets where a config leaves them None: by default, and as published.
_KNOBS: dict[str, tuple[typing.Any, typing.Any]] = {
    "text.max_words": (None, 50),
    "text.double_bos": (False, True),
    "text.training_blank": (False, True),
    "data.mixing": ("per_example", "per_batch"),
    "data.packing": (True, False),
    "loss.reduction": ("example", "token"),
    "model.moe.eval_noise": (False, True),
    "model.moe.route_padding": (False, True),
    "optimizer.skip_unused": (False, True),
    "evaluate.scoring": ("corrected", "published"),
}
FIDELITY = {name: {key: pair[i] for key, pair in _KNOBS.items()} for i, name in enumerate(("default", "paper"))}


def from_config_dict(settings) -> Config:
    """ConfigDict (or the dict of a run's config.json) -> Config, with `fidelity` expanded and checked.

    Raises UserError for an unknown key, a wrong type or settings that do not go together.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    config = _build(Config, settings, "config")
    if config.fidelity not in FIDELITY:
        raise UserError(f"config.fidelity: {config.fidelity!r} is unknown; choose from {sorted(FIDELITY)}.")
    for key, value in FIDELITY[config.fidelity].items():
        config = _filled(config, key.split("."), value)
    _check(config)
    return config


def _filled(part: typing.Any, path: list[str], value: typing.Any) -> typing.Any:
    """The settings with `value` at the path, where there is None."""
    name, *rest = path
    old = getattr(part, name)
    new = _filled(old, rest, value) if rest else value if old is None else old
    return dataclasses.replace(part, **{name: new})


def _build(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """Recursively turns plain data into the annotated type `kind`."""
    if isinstance(kind, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _build(next(o for o in options if o is not type(None)), value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a group of settings, not {value!r}.")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise UserError(f"{where}.{key} is not a setting{nearest(key, hints)}")
        return kind(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise UserError(f"{where} must be a tuple, not {value!r}.")
        args = typing.get_args(kind)
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise UserError(f"{where} must have {len(kinds)} entries, not {len(value)}: {value!r}.")
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {kind.__name__}, not {value!r}.")
    return value


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------

_CHOICES = {
    "config.model.vision.activation": ("gelu", "gelu_tanh", "quick_gelu", "silu"),
    "config.model.vision.qkv_bias": ("qv", "qkv", "none"),
    "config.model.vision.position_init": ("normal", "sincos"),
    "config.model.connector.aggregation": ("projection", "block", "avgpool", "maxpool"),
    "config.model.connector.router": ("soft", "sparse", "hard", "constant"),
    "config.model.connector.router_input": ("task_token", "token", "task"),
    "config.model.connector.activation": ("gelu", "gelu_tanh", "silu"),
    "config.model.connector.form": ("fast", "literal"),
    "config.model.decoder.norm": ("rms", "rms_zero", "layer"),
    "config.model.decoder.rope_scaling.kind": ("llama3", "linear"),
    "config.model.decoder.activation": ("silu", "gelu", "gelu_tanh"),
    "config.model.decoder.attention_bias": ("q", "k", "v", "o"),
    "config.model.moe.placement": ("sparse", "first_half", "second_half", "dense"),
    "config.model.moe.gate_noise": ("none", "jitter", "rsample"),
    "config.model.moe.path": ("dense", "grouped", "capacity"),
    "config.model.lora.targets": LoraConfig.targets,
    "config.model.compute_dtype": ("float32", "bfloat16"),
    "config.model.frozen_dtype": ("float32", "bfloat16"),
    "config.model.attention": ("auto", "xla", "cudnn", "splash"),
    "config.model.remat": ("none", "dots", "full"),
    "config.text.form": ("unimed", "stablelm", "phi", "plain"),
    "config.data.fit": ("stretch", "crop", "pad"),
    "config.data.mixing": ("per_example", "per_batch"),
    "config.loss.reduction": ("token", "example"),
    "config.evaluate.scoring": ("corrected", "published"),
}


# Whole numbers count something and are at least 1, but for these.
_LEAST = {
    **{"seed": 0, "task_tokens": 0, "top_k": 0, "rank": 0, "row_images": 0, "threads": 0, "warmup_steps": 0},
    **{"limit": 0, "feature_layer": -math.inf, "min_capacity": 0, "config.model.moe.experts": 0},
}


def _check_fields(settings, where: str) -> None:
    for field in dataclasses.fields(settings):
        key, value = f"{where}.{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            _check_fields(value, key)
        elif key in _CHOICES:
            for entry in value if isinstance(value, tuple) else (value,):
                if entry not in _CHOICES[key]:
                    raise UserError(f"{key}: {entry!r} is unknown; choose from {', '.join(_CHOICES[key])}.")
        elif type(value) is int and value < (least := _LEAST.get(key, _LEAST.get(field.name, 1))):
            raise UserError(f"{key}={value}: set at least {least}.")


def _check(config: Config) -> None:
    _check_fields(config, "config")
    check_model(config.model)
    data, train, connector = config.data, config.train, config.model.connector
    visual = {task for s in data.sources for task in s.tasks or VISUAL_TASKS if task in VISUAL_TASKS}
    for index, task in enumerate(VISUAL_TASKS):
        if connector.is_moe and connector.router == "hard" and task in visual and index >= connector.experts:
            raise UserError(
                f"config.model.connector: the hard router sends task {task!r} to expert {index}, "
                f"but there are {connector.experts}; set experts={len(VISUAL_TASKS)}."
            )
    if data.mixing == "per_batch" and data.packing:
        raise UserError("config.data: mixing='per_batch' takes one example a row; set data.packing=False.")
    if data.rows % train.accumulation:
        raise UserError(
            f"config.train.accumulation={train.accumulation} does not divide data.rows={data.rows}; choose a divisor."
        )
    labels = config.router.labels
    if list(labels) != sorted(set(labels)) or any(count < 1 for count in labels):
        raise UserError(f"config.router.labels={labels}: name numbers of images in rising order, from 1, or none.")
    for pattern, action, *_ in train.rules:
        if action not in ("train", "freeze"):
            raise UserError(f"config.train.rules: {pattern!r} says {action!r}; write 'train' or 'freeze'.")
    for source in (*data.sources, *config.evaluate.sources):
        if source.weight <= 0 or source.questions < 1:
            raise UserError(
                f"config.data.sources: {source.name!r} has weight={source.weight} and questions={source.questions}; "
                "a weight above 0 and at least 1 question are needed."
            )
        for task in source.tasks:
            if task not in TASKS:
                raise UserError(f"config.data.sources: {task!r} is no task{nearest(task, TASKS)}")


def check_model(model: ModelConfig) -> None:
    """Refuses what cannot be built, and what the original accepts but cannot run (its `broken` cases)."""
    _check_fields(model, "config.model")
    vision, connector, decoder = model.vision, model.connector, model.decoder
    if vision.image_size % vision.patch_size:
        raise UserError(
            f"config.model.vision: image_size={vision.image_size} is no multiple of patch_size={vision.patch_size}."
        )
    if vision.width % vision.heads:
        raise UserError(f"config.model.vision: heads={vision.heads} does not divide width={vision.width}.")
    if not -vision.depth <= vision.feature_layer <= -1:
        raise UserError(
            f"config.model.vision: feature_layer={vision.feature_layer} of depth={vision.depth}; count from the end, "
            f"-1 (the last block) to -{vision.depth}."
        )
    if vision.position_init == "sincos" and vision.width % 4:
        raise UserError(f"config.model.vision: position_init='sincos' needs 4 to divide width={vision.width}.")
    kind = connector.kind
    if not re.fullmatch(r"linear|mlp[1-9]\d*x_gelu|moe_linear|moe_mlp", kind):
        raise UserError(
            f"config.model.connector.kind: {kind!r} is unknown; choose linear, mlpNx_gelu (N layers), moe_linear "
            "or moe_mlp."
        )
    if connector.task_tokens not in (0, 1):
        raise UserError(
            f"config.model.connector.task_tokens={connector.task_tokens}: a task token is repeated over all visual "
            "tokens, so there is one or none; set 0 or 1."
        )
    if connector.aggregation in ("avgpool", "maxpool") and (connector.rate != 4 or vision.grid % 2):
        raise UserError(
            f"config.model.connector: {connector.aggregation} pools 2x2 patches: it needs rate=4 and an even grid, not "
            f"rate={connector.rate} and a grid of {vision.grid}."
        )
    if connector.aggregation == "block":
        side = math.isqrt(connector.rate)
        if side * side != connector.rate or vision.grid % side:
            raise UserError(
                f"config.model.connector: block aggregation needs a square rate whose side divides the grid of "
                f"{vision.grid}, not rate={connector.rate}."
            )
    if vision.patches % connector.rate:
        raise UserError(
            f"config.model.connector: rate={connector.rate} does not divide the {vision.patches} patches of an image."
        )
    if connector.is_moe:
        if connector.task_tokens == 0 and connector.router in ("soft", "sparse") and connector.router_input != "token":
            raise UserError(
                f"config.model.connector: router_input={connector.router_input!r} reads a task token, but "
                "task_tokens=0; set task_tokens=1 or router_input='token'."
            )
        if connector.router == "sparse" and not 1 <= connector.top_k <= connector.experts:
            raise UserError(
                f"config.model.connector: top_k={connector.top_k} of {connector.experts} experts; set 1 to "
                f"{connector.experts}."
            )
    if decoder.heads % decoder.kv_heads:
        raise UserError(f"config.model.decoder: kv_heads={decoder.kv_heads} does not divide heads={decoder.heads}.")
    if model.lora.rank and "gate" in model.lora.targets and not decoder.gated_mlp:
        raise UserError(
            "config.model.lora.targets: 'gate' is no linear of a decoder whose gated_mlp=False; leave it out."
        )
    if model.moe.experts:
        _check_moe(model)


def _check_moe(model: ModelConfig) -> None:
    moe, depth, where = model.moe, model.decoder.depth, "config.model.moe"
    numbers = moe.numbers(depth)
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[-1] >= depth:
        raise UserError(
            f"{where}.layers={moe.layers}: name layers of the decoder's {depth} in rising order, 0 to {depth - 1}, or "
            "leave it empty."
        )
    if moe.top_k not in (1, 2) or moe.top_k > moe.experts:
        raise UserError(f"{where}.top_k={moe.top_k} of {moe.experts} experts; set 1, or 2 with at least 2 experts.")
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        if factor is not None and factor <= 0:
            raise UserError(f"{where}.{name}={factor}: set a number above 0, or None for no limit.")
    if moe.path == "capacity" and moe.capacity_factor is None:
        raise UserError(f"{where}: path='capacity' needs buffers of a known size; set capacity_factor.")
    if moe.gate_noise == "rsample" and moe.top_k == 2:
        raise UserError(f"{where}: gate_noise='rsample' draws the choice of top-1; with top_k=2 choose none or jitter.")
    if model.lora.rank and {"gate", "up", "down"} & set(model.lora.targets):
        raise UserError(
            "config.model.lora.targets: experts take no adapters; leave 'gate', 'up' and 'down' out, or set "
            "config.model.moe.experts=0."
        )
