"""Refuses settings that do not go together: each allowed by itself, no run when combined."""

import math

from unimed_jax.config import (
    VISUAL_TASKS,
    AugmentConfig,
    Config,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
)
from unimed_jax.errors import UserError


def check(config: Config) -> None:
    """Raises UserError for the first contradiction found in the settings of a run."""
    check_parts(config.model)
    _check_experts_of_tasks(config)
    _check_data(config)
    _check_augment(config)
    _check_init(config)
    _check_rules(config)
    _check_best(config)
    _check_router_fit(config)
    _check_evaluation(config)


def _check_experts_of_tasks(config: Config) -> None:
    connector, evaluate = config.model.connector, config.evaluate
    sources = config.data.sources
    if evaluate.splits and not evaluate.entries:  # entries name the only tasks that are scored
        sources += evaluate.sources
    tasks = {task for source in sources for task in source.tasks or VISUAL_TASKS}
    tasks |= {entry.task for entry in evaluate.entries}
    for index, task in enumerate(VISUAL_TASKS):
        if task in tasks and lacks_expert(connector, task):
            raise UserError(
                f"config.model.connector: the hard router sends task {task!r} to expert {index}, "
                f"but there are {connector.experts}; set experts={len(VISUAL_TASKS)}."
            )


def lacks_expert(connector: ConnectorConfig, task: str) -> bool:
    """Says whether the hard router has no expert for a visual task, whose images would become zeros."""
    hard = connector.is_moe and connector.router == "hard"
    return hard and VISUAL_TASKS.index(task) >= connector.experts


def _check_data(config: Config) -> None:
    data, micro = config.data, config.train.accumulation
    if data.mixing == "per_batch" and data.packing:
        raise UserError(
            "config.data: mixing='per_batch' takes one example a row; set data.packing=False."
        )
    if data.rows % micro:
        raise UserError(
            f"config.train.accumulation={micro} does not divide config.data.rows={data.rows}; "
            "choose a divisor."
        )
    # With a tokenizer from outside this shows when it is opened (train/checks.py).
    loss, own = config.loss, not config.text.tokenizer
    if own and not config.text.coordinate_tokens and (loss.coordinate_sd or loss.coordinate_weight != 1):
        name = "coordinate_sd" if loss.coordinate_sd else "coordinate_weight"
        raise UserError(
            f"config.loss.{name}={getattr(loss, name)} is for box coordinate tokens, which "
            "config.text.coordinate_tokens=False leaves out; set it to its default, or have the tokens."
        )


def _check_augment(config: Config) -> None:
    for group in ("data", "evaluate"):
        for i, source in enumerate(getattr(config, group).sources):
            where = f"config.{group}.sources[{i}].augment"
            low, high = source.augment.scale
            if low > high:
                raise UserError(f"{where}.scale={low, high}: give the smaller factor first.")
            if group == "data" and config.train.cache_features and source.augment != AugmentConfig():
                raise UserError(
                    f"{where}: config.train.cache_features=True computes each picture's features once, "
                    "as it is; leave augment out, or cache_features."
                )
            if config.fidelity == "paper" and source.augment != AugmentConfig():
                raise UserError(
                    f"{where}: published training varies no pictures; leave it out, or set "
                    "config.fidelity='default'."
                )


def _check_init(config: Config) -> None:
    for kind, path in config.init:
        if kind == "seed" and path.strip().isdecimal():
            raise UserError(
                f"config.init: 'seed' takes its number from config.seed, not from {path!r}; write "
                "('seed', ''), or name the parameters that are random: ('seed', 'connector/*')."
            )
        if kind == "run" and not path.strip():
            raise UserError(
                "config.init: 'run' needs the folder of a run; write ('run', 'runs/<name>')."
            )


def _check_rules(config: Config) -> None:
    rules = config.train.rules
    if config.job == "model" and not any(rule.train for rule in rules):
        raise UserError(
            "config.train.rules freezes every parameter, since each says train=False; let one "
            "train, or set config.job='router'."
        )
    for i, rule in enumerate(rules):
        if not rule.train and (rule.lr_scale != 1 or rule.weight_decay is not None):
            name = "lr_scale" if rule.lr_scale != 1 else "weight_decay"
            raise UserError(
                f"config.train.rules[{i}].{name} has no effect, because train=False freezes "
                f"{rule.match!r}; leave it out, or set train=True."
            )
        if any(earlier.match in (rule.match, "*") for earlier in rules[:i]):
            raise UserError(
                f"config.train.rules[{i}].match={rule.match!r} never applies, because an earlier "
                "rule matches the same parameters; put it first, or leave it out."
            )


def _check_best(config: Config) -> None:
    train = config.train
    if train.patience and not train.best:
        raise UserError(
            f"config.train.patience={train.patience} watches a metric; name it in config.train.best."
        )
    measured = [f"{e.source}/{e.split}/{e.task}" for e in config.evaluate.entries if e.every]
    if train.best and train.best.partition("/")[2] not in measured:
        have = f"it has {', '.join(measured)}" if measured else "it has none"
        raise UserError(
            f"config.train.best={train.best!r} needs its <set>/<split>/<task> among "
            f"config.evaluate.entries, with `every`; {have}."
        )
    if train.best.startswith("loss/") and train.best_mode == "max":
        raise UserError(
            f"config.train.best={train.best!r}: a loss is best when it is low; set best_mode='min'."
        )


def _check_router_fit(config: Config) -> None:
    fit = config.router_fit
    if config.job == "router" and not fit.key.strip():
        raise UserError(
            "config.job='router' needs classes; set config.router_fit.key to a key of the "
            "examples' meta."
        )
    if list(fit.labels) != sorted(set(fit.labels)):
        raise UserError(
            f"config.router_fit.labels={fit.labels}: name numbers of images in rising order, or none."
        )
    if len(fit.classes) == 1:
        raise UserError(
            f"config.router_fit.classes={fit.classes}: name at least two, or none for all that occur."
        )


def _check_evaluation(config: Config) -> None:
    seen = set()
    for entry in config.evaluate.entries:
        name = f"{entry.source}/{entry.split}/{entry.task}"
        if name in seen:
            raise UserError(
                f"config.evaluate.entries names {name} twice; list all its metrics in one entry."
            )
        seen.add(name)


def check_parts(model: ModelConfig) -> None:
    """Raises UserError for the first contradiction found in the settings of a model."""
    _check_vision(model)
    _check_aggregation(model)
    _check_router(model)
    _check_decoder(model.decoder)
    if model.lora.rank and not model.lora.targets:
        raise UserError(
            f"config.model.lora.targets is empty, but rank={model.lora.rank}; name at least one, or "
            "rank=0."
        )
    if model.lora.rank and "gate" in model.lora.targets and not model.decoder.gated_mlp:
        raise UserError(
            "config.model.lora.targets: a decoder with gated_mlp=False has no linear layer 'gate'; "
            "leave it out."
        )
    if model.moe.experts:
        _check_moe(model)


def _check_vision(model: ModelConfig) -> None:
    vision, where = model.vision, "config.model.vision"
    if vision.image_size % vision.patch_size:
        raise UserError(
            f"{where}: patch_size={vision.patch_size} does not divide image_size={vision.image_size}."
        )
    if vision.width % vision.heads:
        raise UserError(f"{where}: heads={vision.heads} does not divide width={vision.width}.")
    if not -vision.depth <= vision.feature_layer <= -1:
        raise UserError(
            f"{where}: feature_layer={vision.feature_layer} of depth={vision.depth}; count from the "
            f"end, -1 (the last block) to -{vision.depth}."
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
            f"{where}: block aggregation needs a square rate whose side divides the grid of "
            f"{vision.grid}, not rate={connector.rate}."
        )
    if vision.patches % connector.rate:
        raise UserError(
            f"{where}: rate={connector.rate} does not divide the {vision.patches} patches of an image."
        )


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
            f"{where}: top_k={connector.top_k} of {connector.experts} experts; set 1 to "
            f"{connector.experts}."
        )


def _check_decoder(decoder: DecoderConfig) -> None:
    where, scaling = "config.model.decoder", decoder.rope_scaling
    if decoder.heads % decoder.kv_heads:
        raise UserError(f"{where}: kv_heads={decoder.kv_heads} does not divide heads={decoder.heads}.")
    if decoder.head_dim * decoder.rotary_fraction < 2:
        raise UserError(
            f"{where}: rotary_fraction={decoder.rotary_fraction} of head_dim={decoder.head_dim} "
            "leaves no pair of numbers to rotate; set a larger one."
        )
    if len(decoder.windows) > decoder.depth:
        raise UserError(
            f"{where}.windows names {len(decoder.windows)} layers of depth={decoder.depth}; name at "
            "most as many, because they are repeated over the layers."
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
            f"{where}.layers={moe.layers}: name layers of the decoder's {depth} in rising order, 0 "
            f"to {depth - 1}, or leave it empty."
        )
    if moe.min_capacity and (moe.capacity_factor, moe.eval_capacity_factor) == (None, None):
        raise UserError(
            f"{where}.min_capacity={moe.min_capacity} limits a capacity, and there is none; set "
            "capacity_factor or eval_capacity_factor."
        )
    if moe.top_k not in (1, 2) or moe.top_k > moe.experts:
        raise UserError(
            f"{where}.top_k={moe.top_k} of {moe.experts} experts; set 1, or 2 with at least 2 experts."
        )
    if moe.path == "capacity" and moe.capacity_factor is None:
        raise UserError(f"{where}: path='capacity' needs buffers of a known size; set capacity_factor.")
    if moe.gate_noise == "rsample" and moe.top_k == 2:
        raise UserError(
            f"{where}: gate_noise='rsample' draws the choice of top-1; with top_k=2 choose none or "
            "jitter."
        )
    if model.lora.rank and {"gate", "up", "down"} & set(model.lora.targets):
        raise UserError(
            "config.model.lora.targets: experts take no adapters; leave 'gate', 'up' and 'down' "
            "out, or set config.model.moe.experts=0."
        )
