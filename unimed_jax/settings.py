"""Turns plain settings into a checked `Config`: types, choices, bounds, `fidelity`, and what holds across fields."""

import collections.abc
import dataclasses
import math
import types
import typing

import ml_collections

from unimed_jax.bounds import FrozenDict
from unimed_jax.config import VISUAL_TASKS, Config, DecoderConfig, ModelConfig, to_dict
from unimed_jax.errors import UserError, nearest
from unimed_jax.files import is_text

# --------------------------------------------------------------------------------------------------
# Fidelity
# --------------------------------------------------------------------------------------------------

# What `fidelity` sets where a config has None: (default, paper).
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


def _filled(part: typing.Any, path: list[str], value: typing.Any) -> typing.Any:
    """Returns the settings with `value` at the path if there is None."""
    name, *rest = path
    old = getattr(part, name)
    new = _filled(old, rest, value) if rest else value if old is None else old
    return dataclasses.replace(part, **{name: new})


# --------------------------------------------------------------------------------------------------
# Types, choices and bounds
# --------------------------------------------------------------------------------------------------


def from_config_dict(settings) -> Config:
    """Turns a ConfigDict (or the dict of a run's config.json) into a Config, `fidelity` expanded and all checked.

    Raises UserError for an unknown key, a wrong type or value, or settings that do not go together.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    config = _build(Config, settings, "config")
    for key, value in FIDELITY[config.fidelity].items():
        config = _filled(config, key.split("."), value)
    _check(config)
    return config


def check_values(settings: dict) -> None:
    """Checks every key and value by itself, without what holds across fields; raises UserError."""
    _build(Config, settings, "config")


def _build(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """Turns plain data into the annotated type `kind`, recursively; the one place that checks a value by itself."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        built = _build(parts[0], value, where)
        for bound in parts[1:]:
            if refusal := bound.refusal(built):
                raise UserError(where + refusal)
        return built
    if origin in (typing.Union, types.UnionType):
        given = next(part for part in parts if part is not type(None))
        return None if value is None and type(None) in parts else _build(given, value, where)
    if origin is typing.Literal:
        return _choice(parts, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _group(kind, value, where)
    if origin is tuple:
        return _tuple(parts, value, where)
    if origin is collections.abc.Mapping:
        return _mapping(parts, value, where)
    return _json(value, where) if kind is typing.Any else _scalar(kind, value, where)


def _choice(choices: tuple, value: typing.Any, where: str) -> typing.Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    raise UserError(f"{where}: {value!r} is unknown; choose from {', '.join(map(str, choices))}.")


def _group(kind: typing.Any, value: typing.Any, where: str) -> typing.Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a group of settings, not {value!r}.")
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in hints:
            raise UserError(f"{where}.{key} is not a setting{nearest(key, hints)}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in value:
            raise UserError(f"{where} needs {field.name}; add it to {value!r}.")
    return kind(**{key: _build(hints[key], entry, f"{where}.{key}") for key, entry in value.items()})


def _tuple(kinds: tuple, value: typing.Any, where: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        raise UserError(f"{where} must be a tuple, not {value!r}.")
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(kinds) != len(value):
        raise UserError(f"{where} must have {len(kinds)} entries, not {len(value)}: {value!r}.")
    return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _mapping(kinds: tuple, value: typing.Any, where: str) -> FrozenDict:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a dict, not {value!r}.")
    keys = [_build(kinds[0], key, f"{where}, key {key!r}") for key in value]
    return FrozenDict({key: _build(kinds[1], value[key], f"{where}[{key!r}]") for key in keys})


def _json(value: typing.Any, where: str) -> typing.Any:
    """Returns a JSON value whose lists are tuples and whose dicts are frozen."""
    if isinstance(value, dict):
        return _mapping((str, typing.Any), value, where)
    if isinstance(value, (tuple, list)):
        return _tuple((typing.Any, ...), value, where)
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{where} must be text, a number, a list or a dict, not {value!r}.")
    return _scalar(type(value), value, where)


def _scalar(kind: type, value: typing.Any, where: str) -> typing.Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {kind.__name__}, not {value!r}.")
    if isinstance(value, str) and not is_text(value):
        raise UserError(f"{where}={value!r} holds half of a surrogate pair, which is no character; write another text.")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}={value!r} holds the character NUL, which no path may have; write another text.")
    if isinstance(value, float) and not (value == 0 or 1e-37 < abs(value) < 1e38):
        raise UserError(f"{where}={value}: set a number that float32 can hold.")
    if isinstance(value, int) and abs(value) >= 2**32:
        raise UserError(f"{where}={value}: set a number of at most 32 bits.")
    return value


# --------------------------------------------------------------------------------------------------
# Checks across fields
# --------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    _check_parts(config.model)
    _check_experts_of_tasks(config)
    _check_training(config)
    _check_evaluation(config)


def _check_experts_of_tasks(config: Config) -> None:
    connector = config.model.connector
    if not connector.is_moe or connector.router != "hard":
        return
    trained = {task for source in config.data.sources for task in source.tasks or VISUAL_TASKS}
    for index, task in enumerate(VISUAL_TASKS):
        if task in trained and index >= connector.experts:
            raise UserError(
                f"config.model.connector: the hard router sends task {task!r} to expert {index}, "
                f"but there are {connector.experts}; set experts={len(VISUAL_TASKS)}."
            )


def _check_training(config: Config) -> None:
    data, train, labels = config.data, config.train, config.router_fit.labels
    if data.mixing == "per_batch" and data.packing:
        raise UserError("config.data: mixing='per_batch' takes one example a row; set data.packing=False.")
    if data.rows % train.accumulation:
        raise UserError(
            f"config.train.accumulation={train.accumulation} does not divide data.rows={data.rows}; choose a divisor."
        )
    if config.job == "model" and not any(rule.train for rule in train.rules):
        raise UserError("config.train.rules freezes every parameter; let one train, or set config.job='router'.")
    if config.job == "router" and not config.router_fit.key:
        raise UserError("config.job='router' needs classes; set config.router_fit.key to a key of the examples' meta.")
    if list(labels) != sorted(set(labels)):
        raise UserError(f"config.router_fit.labels={labels}: name numbers of images in rising order, or none.")
    if train.patience and not train.best:
        raise UserError(f"config.train.patience={train.patience} watches a metric; name it in config.train.best.")
    measured = [f"{e.source}/{e.split}/{e.task}" for e in config.evaluate.entries if e.every]
    if train.best and train.best.partition("/")[2] not in measured:
        have = f"it has {', '.join(measured)}" if measured else "it has none"
        raise UserError(
            f"config.train.best={train.best!r} needs its <set>/<split>/<task> among config.evaluate.entries, "
            f"with `every`; {have}."
        )
    if train.best.startswith("loss/") and train.best_mode == "max":
        raise UserError(f"config.train.best={train.best!r}: a loss is best when it is low; set best_mode='min'.")


def _check_evaluation(config: Config) -> None:
    seen = set()
    for entry in config.evaluate.entries:
        name = f"{entry.source}/{entry.split}/{entry.task}"
        if name in seen:
            raise UserError(f"config.evaluate.entries names {name} twice; list all its metrics in one entry.")
        seen.add(name)


def check_model(model: ModelConfig) -> None:
    """Refuses a model that cannot be built, and what the original accepts but cannot run (its `broken` cases)."""
    _build(ModelConfig, to_dict(model), "config.model")
    _check_parts(model)


def _check_parts(model: ModelConfig) -> None:
    _check_vision(model)
    _check_aggregation(model)
    _check_router(model)
    _check_decoder(model.decoder)
    if model.lora.rank and not model.lora.targets:
        raise UserError(
            f"config.model.lora.targets is empty, but rank={model.lora.rank}; name at least one, or rank=0."
        )
    if model.lora.rank and "gate" in model.lora.targets and not model.decoder.gated_mlp:
        raise UserError(
            "config.model.lora.targets: a decoder with gated_mlp=False has no linear layer 'gate'; leave it out."
        )
    if model.moe.experts:
        _check_moe(model)


def _check_vision(model: ModelConfig) -> None:
    vision, where = model.vision, "config.model.vision"
    if vision.image_size % vision.patch_size:
        raise UserError(f"{where}: patch_size={vision.patch_size} does not divide image_size={vision.image_size}.")
    if vision.width % vision.heads:
        raise UserError(f"{where}: heads={vision.heads} does not divide width={vision.width}.")
    if not -vision.depth <= vision.feature_layer <= -1:
        raise UserError(
            f"{where}: feature_layer={vision.feature_layer} of depth={vision.depth}; count from the end, "
            f"-1 (the last block) to -{vision.depth}."
        )
    if vision.position_init == "sincos" and vision.width % 4:
        raise UserError(f"{where}: position_init='sincos' needs 4 to divide width={vision.width}.")


def _check_aggregation(model: ModelConfig) -> None:
    vision, connector, where = model.vision, model.connector, "config.model.connector"
    if connector.aggregation in ("avgpool", "maxpool") and (connector.rate != 4 or vision.grid % 2):
        raise UserError(
            f"{where}: {connector.aggregation} pools 2x2 patches: it needs rate=4 and an even grid, not "
            f"rate={connector.rate} and a grid of {vision.grid}."
        )
    side = math.isqrt(connector.rate)
    if connector.aggregation == "block" and (side * side != connector.rate or vision.grid % side):
        raise UserError(
            f"{where}: block aggregation needs a square rate whose side divides the grid of {vision.grid}, "
            f"not rate={connector.rate}."
        )
    if vision.patches % connector.rate:
        raise UserError(f"{where}: rate={connector.rate} does not divide the {vision.patches} patches of an image.")


def _check_router(model: ModelConfig) -> None:
    connector, where = model.connector, "config.model.connector"
    if not connector.is_moe or connector.router not in ("soft", "sparse"):
        return
    if connector.task_tokens == 0 and connector.router_input != "token":
        raise UserError(
            f"{where}: router_input={connector.router_input!r} reads a task token, but task_tokens=0; "
            "set task_tokens=1 or router_input='token'."
        )
    if connector.router == "sparse" and not 1 <= connector.top_k <= connector.experts:
        raise UserError(
            f"{where}: top_k={connector.top_k} of {connector.experts} experts; set 1 to {connector.experts}."
        )


def _check_decoder(decoder: DecoderConfig) -> None:
    where, scaling = "config.model.decoder", decoder.rope_scaling
    if decoder.heads % decoder.kv_heads:
        raise UserError(f"{where}: kv_heads={decoder.kv_heads} does not divide heads={decoder.heads}.")
    if decoder.head_dim * decoder.rotary_fraction < 2:
        raise UserError(
            f"{where}: rotary_fraction={decoder.rotary_fraction} of head_dim={decoder.head_dim} leaves no pair of "
            "numbers to rotate; set a larger one."
        )
    if scaling and scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(
            f"{where}.rope_scaling: high_freq_factor={scaling.high_freq_factor} must be greater than "
            f"low_freq_factor={scaling.low_freq_factor}."
        )


def _check_moe(model: ModelConfig) -> None:
    moe, depth, where = model.moe, model.decoder.depth, "config.model.moe"
    numbers = moe.numbers(depth)
    if not numbers or list(numbers) != sorted(numbers) or numbers[-1] >= depth:
        raise UserError(
            f"{where}.layers={moe.layers}: name layers of the decoder's {depth} in rising order, 0 to {depth - 1}, or "
            "leave it empty."
        )
    if moe.top_k not in (1, 2) or moe.top_k > moe.experts:
        raise UserError(f"{where}.top_k={moe.top_k} of {moe.experts} experts; set 1, or 2 with at least 2 experts.")
    if moe.path == "capacity" and moe.capacity_factor is None:
        raise UserError(f"{where}: path='capacity' needs buffers of a known size; set capacity_factor.")
    if moe.gate_noise == "rsample" and moe.top_k == 2:
        raise UserError(f"{where}: gate_noise='rsample' draws the choice of top-1; with top_k=2 choose none or jitter.")
    if model.lora.rank and {"gate", "up", "down"} & set(model.lora.targets):
        raise UserError(
            "config.model.lora.targets: experts take no adapters; leave 'gate', 'up' and 'down' out, or set "
            "config.model.moe.experts=0."
        )
