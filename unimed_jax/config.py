"""Settings of a run: typed frozen dataclasses, made once from an `ml_collections.ConfigDict`.

A config file returns a ConfigDict that starts from `default_config()`; `from_config_dict` turns it
into a `Config`, expands `fidelity` into named knobs and checks what one field alone cannot know.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import re
import traceback
import types
import typing
from pathlib import Path

import ml_collections

# The published task order (Uni-Med, its five visual tasks) and, last, text-only question answering.
VISUAL_TASKS = ("vqa", "refer", "identify", "caption", "cls")
TASKS = (*VISUAL_TASKS, "qa")


class UserError(Exception):
    """A mistake that a person can mend: one sentence of what, where and what to do."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer (ViT). EVA-CLIP-g: the values of `configs/cmoe.py`."""

    image_size: int = 64  # pixels, square
    patch_size: int = 8  # pixels
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_width: int = 512
    activation: str = "gelu"  # gelu (erf) | gelu_tanh | quick_gelu | silu
    qkv_bias: str = "qv"  # qv (EVA: no bias on k) | qkv | none
    patch_bias: bool = True
    pre_norm: bool = False  # a LayerNorm before the first block (CLIP)
    cls_token: bool = True
    norm_eps: float = 1e-6
    feature_layer: int = -1  # which block's output is used; -2 skips the last block
    output_norm: bool = True  # a LayerNorm behind the last block (ln_vision: published frozen at 1 and 0)
    output_norm_eps: float = 1e-5
    position_init: str = "normal"  # normal | sincos (2-D, for training from scratch)
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Aggregation of patches, projection experts and their router (Uni-Med section 3.2)."""

    # strip: `rate` consecutive raster patches (published); block: a square of them.
    aggregation: str = "projection"  # projection (strip) | block | avgpool | maxpool
    rate: int = 4  # patches joined into one visual token
    kind: str = "moe_mlp"  # linear | mlpNx_gelu | moe_linear | moe_mlp
    experts: int = 5
    hidden: int | None = None  # expert hidden width; None: the decoder's width
    router: str = "soft"  # soft | sparse | hard | constant
    router_input: str = "task_token"  # task_token | token | task
    router_hidden: int | None = None  # None: four times the router's input
    top_k: int = 2  # experts kept by the sparse router
    task_tokens: int = 1  # learned tokens per visual task: 0 or 1
    task_token_width: int | None = None  # None: as wide as an aggregated visual token
    activation: str = "gelu"
    form: str = "fast"  # fast | literal (the reference)

    @property
    def is_moe(self) -> bool:
        return self.kind.startswith("moe_")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency-dependent scaling of the rotary embedding."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder of the LLaMA family."""

    vocab: int = 1024
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    mlp_width: int = 352
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-5
    activation: str = "silu"  # of the gated MLP
    attention_bias: tuple[str, ...] = ()  # which of q, k, v, o carry a bias
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0  # part of each head that is rotated
    tied_head: bool = False
    windows: tuple[int, ...] = ()  # sliding window per layer in turn, 0 = full; () = all full
    attention_softcap: float | None = None
    logit_softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 0  # 0: no adapters
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    connector: ConnectorConfig = ConnectorConfig()
    decoder: DecoderConfig = DecoderConfig()
    lora: LoraConfig = LoraConfig()
    compute_dtype: str = "float32"  # float32 | bfloat16
    frozen_dtype: str = "float32"  # storage of leaves that do not train
    attention: str = "auto"  # auto | xla | cudnn | splash, of the decoder's rows; the vision encoder's where it can
    remat: str = "none"  # none | dots | full: what of each layer the backward pass computes again

    @property
    def tokens_per_image(self) -> int:
        return self.vision.patches // self.connector.rate


@dataclasses.dataclass(frozen=True)
class TextConfig:
    tokenizer: str = ""  # a Hugging Face folder, or a GGUF file; empty: train a BPE on the training split
    vocab: int = 1024  # size of the trained BPE, everything counted
    coordinate_tokens: bool = True  # one token per box coordinate 0..100 (trained BPE only)
    chat_template: bool = True  # wrap prompts in [INST] ... [/INST]
    max_answer: int = 1024  # tokens, end of text included
    max_prompt: int = 512  # tokens, visual ones included; longer is an error
    max_words: int | None = None  # cut of questions and reports; paper: 50
    double_bos: bool | None = None  # two BOS in evaluation prompts; paper: True
    # A blank behind the instruction in training rows alone; paper: True. A model trained from scratch, which never
    # met the form without it, ends boxes after three coordinates at evaluation.
    training_blank: bool | None = None


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set in the mixture."""

    name: str = "brain"  # a file of data/datasets
    path: str = ""  # where its files are; empty: <data.root>/<name>
    tasks: tuple[str, ...] = ()  # () = all that it has
    weight: float = 1.0  # share of the draws
    questions: int = 1  # questions that share one image's tokens (and its task), at most


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    root: str = ""  # folder of the data sets, one folder each by name
    mixing: str | None = None  # per_example | per_batch; paper: per_batch
    packing: bool | None = None  # several examples a row; paper: one
    rows: int = 16  # rows of a batch, over all hosts
    row_tokens: int = 256  # tokens of a row, visual ones included
    row_images: int = 2  # image slots of a row
    row_answers: int = 128  # answer tokens of a row
    window: int = 512  # draws that the packer looks at together
    threads: int = 2
    cache: str = ""  # folder of built data sets; empty: ~/.cache/unimed_jax


@dataclasses.dataclass(frozen=True)
class LossConfig:
    reduction: str | None = None  # token | example; paper: token
    coordinate_sd: float = 0.0  # soft targets over neighbouring coordinates, in steps of 1/100; 0: off
    coordinate_weight: float = 1.0  # weight of coordinate tokens


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay over all steps (as published)."""

    lr: float = 1e-5
    min_lr: float = 1e-7
    warmup_lr: float = 1e-6
    warmup_steps: int = 5000
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 0.0  # global gradient norm; 0: none
    skip_unused: bool | None = None  # parameters out of the graph keep value, state, count; paper: True


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 50000
    accumulation: int = 1  # micro-batches per step; the batch is split, its loss unchanged
    # (path pattern, "train" | "freeze", learning-rate scale, weight decay or None = published grouping);
    # the first match wins, no match is an error.
    rules: tuple[tuple[str, str, float, float | None], ...] = (("*", "train", 1.0, None),)
    save_every: int = 500  # steps
    log_every: int = 10  # steps
    keep: int = 2  # checkpoints
    wandb: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis (model/sharding.py); with `auto` chosen for the devices found."""

    auto: bool = True
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    splits: tuple[str, ...] = ("val", "test")
    batch: int = 64
    max_new_tokens: int = 100
    limit: int = 0  # examples per task and split; 0: all
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    bootstrap: int = 2000  # resamples
    scoring: str | None = None  # which scores lead: corrected | published; paper: published


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = ""
    seed: int = 0
    fidelity: str = "default"  # default | paper
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    # (kind, path): seed | run | gguf ...; later ones overlay earlier ones.
    init: tuple[tuple[str, str], ...] = (("seed", ""),)
    evaluate: EvaluateConfig = EvaluateConfig()


# The knobs that `fidelity` sets where a config leaves them None (DESIGN decision 8): by default, and as published.
_KNOBS: dict[str, tuple[typing.Any, typing.Any]] = {
    "text.max_words": (None, 50),
    "text.double_bos": (False, True),
    "text.training_blank": (False, True),
    "data.mixing": ("per_example", "per_batch"),
    "data.packing": (True, False),
    "loss.reduction": ("example", "token"),
    "optimizer.skip_unused": (False, True),
    "evaluate.scoring": ("corrected", "published"),
}
FIDELITY = {name: {key: pair[i] for key, pair in _KNOBS.items()} for i, name in enumerate(("default", "paper"))}


def default_config() -> ml_collections.ConfigDict:
    """Every setting at its default, as the mutable form that config files fill in."""
    # Types are checked once, by from_config_dict and in a sentence.
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config) -> dict:
    """A config dataclass as plain dicts, tuples and scalars (JSON-ready)."""
    return dataclasses.asdict(config)


def config_hash(config: Config) -> str:
    """First 16 hex digits of the sha256 over the settings."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def nearest(word: str, choices) -> str:
    """The end of a sentence: `; did you mean 'X'?` when something close is among `choices`, else a full stop."""
    match = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."


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
        section, field = key.split(".")
        part = getattr(config, section)
        if getattr(part, field) is None:
            config = dataclasses.replace(config, **{section: dataclasses.replace(part, **{field: value})})
    _check(config)
    return config


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


_CHOICES = {
    "config.model.vision.activation": ("gelu", "gelu_tanh", "quick_gelu", "silu"),
    "config.model.vision.qkv_bias": ("qv", "qkv", "none"),
    "config.model.vision.position_init": ("normal", "sincos"),
    "config.model.connector.aggregation": ("projection", "block", "avgpool", "maxpool"),
    "config.model.connector.router": ("soft", "sparse", "hard", "constant"),
    "config.model.connector.router_input": ("task_token", "token", "task"),
    "config.model.connector.activation": ("gelu", "gelu_tanh", "silu"),
    "config.model.connector.form": ("fast", "literal"),
    "config.model.decoder.norm": ("rms", "layer"),
    "config.model.decoder.activation": ("silu", "gelu", "gelu_tanh"),
    "config.model.decoder.attention_bias": ("q", "k", "v", "o"),
    "config.model.lora.targets": LoraConfig.targets,
    "config.model.compute_dtype": ("float32", "bfloat16"),
    "config.model.frozen_dtype": ("float32", "bfloat16"),
    "config.model.attention": ("auto", "xla", "cudnn", "splash"),
    "config.model.remat": ("none", "dots", "full"),
    "config.data.mixing": ("per_example", "per_batch"),
    "config.loss.reduction": ("token", "example"),
    "config.evaluate.scoring": ("corrected", "published"),
}


# Whole numbers count something and are at least 1, but for these.
_LEAST = {
    **{"seed": 0, "task_tokens": 0, "top_k": 0, "rank": 0, "row_images": 0, "threads": 0, "warmup_steps": 0},
    **{"limit": 0, "feature_layer": -math.inf},
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
        elif type(value) is int and value < _LEAST.get(field.name, 1):
            raise UserError(f"{key}={value}: set at least {_LEAST.get(field.name, 1)}.")


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
    for pattern, action, *_ in train.rules:
        if action not in ("train", "freeze"):
            raise UserError(f"config.train.rules: {pattern!r} says {action!r}; write 'train' or 'freeze'.")
    for source in data.sources:
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
