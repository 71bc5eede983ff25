"""Declares the settings of a run: each field with its choices or bounds, default and meaning.

They are frozen dataclasses. A config file returns a ConfigDict that starts from `default_config()`;
`settings.from_config_dict` turns it into a checked `Config`. Choices are written as `Literal`, bounds in
`Annotated`; docs/settings.md is generated from this file.
"None; paper: X" marks a setting that `fidelity` fills in: what it becomes is in `settings.FIDELITY`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

if TYPE_CHECKING:
    import ml_collections

from unimed_jax.bounds import (
    INT32,
    Above,
    AtLeast,
    AtMost,
    Between,
    Characters,
    Count,
    Decay,
    Distinct,
    Epsilon,
    Filled,
    FolderName,
    FrozenDict,
    Length,
    Matches,
    Name,
    Names,
    Paragraph,
    Part,
    Place,
    Rate,
    Share,
    Size,
    Text,
    Weight,
    WeightDecay,
    WeightOrZero,
    Whole,
    ZeroOr,
    Zoom,
)
from unimed_jax.config_model import (  # noqa: F401  (all settings are imported from here)
    AttentionLinear,
    ConnectorConfig,
    DecoderConfig,
    Float,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    RopeScaling,
    VisionConfig,
)

# In the published task order (Uni-Med, its five visual tasks) and, last, text-only question answering.
VisualTask = Literal["vqa", "refer", "identify", "caption", "cls"]
# what becomes of data or a tokenizer that a run was not trained with
Changed = Literal["refuse", "accept"]
Task = Literal[VisualTask, "qa"]
VISUAL_TASKS: tuple[str, ...] = get_args(VisualTask)
TASKS: tuple[str, ...] = get_args(Task)

Level = Annotated[int, Between(0, 255)]  # of red, green or blue
# usual windows of CT (data/dicom_display.py)
Window = Literal[
    "abdomen", "bone", "brain", "liver", "lung", "mediastinum", "spine", "stroke", "subdural"
]

Module = Annotated[
    str, Filled(), Characters(200), Matches(r"[\w-]+(\.[\w-]+)*", "a name, or names joined by dots")
]
PartOrEmpty = Annotated[str, Characters(200), FolderName()]


# ---------------------------------------------------------------------------------------------
# Text and data
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Says which tokenizer is used and how prompts and answers are written."""

    # a Hugging Face folder or a GGUF file; empty: train a BPE on the training split
    tokenizer: Place = ""
    vocab: Size = 1024  # size of that BPE, special tokens included
    coordinate_tokens: bool = True  # one token per box coordinate 0..100 (only in a BPE trained here)
    # Form of prompts and answers (data/forms.py). unimed: task tags; stablelm, phi: Med-MoE's chat;
    # plain: an image and its caption; simple: LLaVA-Med's chat, only for prompts.
    form: Literal["unimed", "stablelm", "phi", "plain", "simple"] = "unimed"
    chat_template: bool = True  # wrap prompts in [INST] ... [/INST] (form unimed)
    max_answer: Size = 1024  # tokens, end of text included
    max_prompt: Size = 512  # tokens, visual ones included; a longer prompt is an error
    # Questions and reports are cut to so many words. None: uncut; paper: 50
    max_words: Size | None = None
    # Two BOS tokens in evaluation prompts (form unimed). None; paper: True
    double_bos: bool | None = None
    # A blank after the instruction, only in training (form unimed). None; paper: True. A model trained
    # from scratch on it alone ends boxes after three coordinates at evaluation, where it is missing.
    training_blank: bool | None = None
    # If the tokenizer is another one than the run was trained with. refuse: an error; accept: every
    # result says so.
    changed: Changed = "refuse"


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Varies the pictures of a source in training, and their boxes with them (data/augment.py).

    Everything is off by default, and nothing is ever varied in evaluation.
    """

    # One of the eight turns by right angles and mirror images. Questions whose words name a side (left,
    # upper ...) are never turned.
    turns: bool = False
    # Degrees, to either side. At most 15 where a question has a box: it becomes the upright box around
    # the rotated one, which fits small angles and things that are about round. The same where words name
    # a side, and none where there is a box too.
    rotate: Annotated[float, AtLeast(0), AtMost(180)] = 0.0
    # Smallest and largest factor of the picture's size; less where a box would leave it
    scale: tuple[Zoom, Zoom] = (1.0, 1.0)
    shift: Share = 0.0  # part of each side by which it moves at most; less where a box would leave it
    contrast: Share = 0.0  # its factor lies within 1 - contrast .. 1 + contrast
    brightness: Share = 0.0  # at most so much of white is added or taken away


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Says how the pictures of a source are read where their files leave a choice."""

    # Of a TIFF with pages, an animated GIF, WebP or PNG, or a DICOM film: its number, from 0, or first,
    # middle, last. None: the first; preparing the set says how many pictures have several.
    frame: Annotated[int, AtLeast(0), AtMost(INT32)] | Literal["first", "middle", "last"] | None = None
    # Of grey DICOM. A name: a usual one of CT, only for pictures in Hounsfield units; or (centre, width)
    # in the file's own units. None: that of the file
    window: (
        Window
        | tuple[Annotated[float, Between(-1e6, 1e6)], Annotated[float, AtLeast(1e-6), AtMost(1e6)]]
        | None
    ) = None
    # The colour behind transparent pixels; (red, green, blue) from 0 to 255 for others
    background: Literal["white", "black"] | tuple[Level, Level, Level] = "white"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Describes one data set of the mixture, and what is taken from it."""

    name: Module = "brain"  # a file or package of data/datasets, or a dotted module: my_lab.my_data
    # name of the set in scores and reports; empty: the last part of `name`, made unique
    id: PartOrEmpty = ""
    path: Place = ""  # folder of its files, relative to data.root; empty: <data.root>/<name>
    tasks: Annotated[tuple[Task, ...], Distinct()] = ()  # (): all that it has
    weight: Weight = 1.0  # share of the draws, relative to the other sources
    # At most so many questions share one image's tokens (and task) in a row. 1: a draw is an example;
    # more: a draw is an image with some of its questions, so images are drawn alike
    questions: Size = 1
    # Keep only examples with one of these values, by template or by a key of Example.meta: {"template":
    # ("where",)}.
    only: Mapping[Name, Annotated[tuple[Text, ...], Filled(), Distinct()]] = FrozenDict()
    # Relative draw weight of examples by the same keys: {"template": {"where": 2.0}}; unnamed values
    # weigh 1.
    weights: Mapping[Name, Mapping[Text, WeightOrZero]] = FrozenDict()
    augment: AugmentConfig = AugmentConfig()  # how its pictures vary in training
    splits: Mapping[Part, Name] = FrozenDict()  # made splits: {"val": "train[90%:] by cluster"}
    # Licence, citation, note and word for a cluster, for a generic source without info.json.
    info: Mapping[Literal["licence", "citation", "note", "cluster_word"], Paragraph] = FrozenDict()
    options: Mapping[Name, Any] = FrozenDict()  # given to the set's reader; JSON values
    image: ImageConfig = ImageConfig()  # how its pictures are read where their files leave a choice


@dataclasses.dataclass(frozen=True)
class ReencodeConfig:
    """Says which images are encoded again when a set is prepared; by default all stay as found."""

    # pixels of the longer side at most; larger images are made smaller (bicubic). 0: no limit
    size: Annotated[int, AtLeast(0), AtMost(8192)] = 0
    # of every image; empty: images that are made smaller stay JPEG or become PNG, others are untouched
    format: Literal["", "png", "jpeg", "webp"] = ""
    quality: Annotated[int, Between(1, 100)] = 90  # of JPEG and WebP

    @property
    def asked(self) -> bool:
        """Says whether any image is to be encoded again."""
        return bool(self.size or self.format)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Lists the data sets of the mixture, and says how batches are made of them."""

    sources: tuple[SourceConfig, ...] = ()  # data sets to train on
    root: Place = ""  # folder that holds the data sets, one folder each
    # per_example: a batch mixes sources; per_batch: each batch comes from one. None: per_example; paper:
    # per_batch
    mixing: Literal["per_example", "per_batch"] | None = None
    packing: bool | None = None  # several examples in a row. None: True; paper: False
    rows: Length = 16  # rows of a batch, over all hosts
    row_tokens: Size = 256  # tokens of a row, visual ones included
    row_images: Annotated[int, AtLeast(0), AtMost(4096)] = 2  # image slots of a row
    row_answers: Size = 128  # answer tokens of a row
    # How an image becomes square (data/fitting.py). Boxes stay in hundredths of the original's sides, so
    # that only "stretch" shows them where they say; "crop" can cut away what they name.
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    window: Length = 512  # draws that are packed together
    threads: Annotated[int, Between(0, 1024)] = 2  # that read and decode ahead; 0: none
    cache: Place = ""  # folder of prepared data sets; empty: ~/.cache/unimed_jax
    reencode: ReencodeConfig = ReencodeConfig()
    # whether a record that cannot be used is an error; if not, it is left out and counted
    strict: bool = False
    # decoded images (or their features) kept in memory, in MiB; 0: none
    image_cache_mib: Annotated[int, AtLeast(0), AtMost(2**20)] = 256
    # If a data set is another one than the run was trained with. refuse: an error; accept: every
    # result says so.
    changed: Changed = "refuse"

    @property
    def cache_folder(self) -> Path:
        """Returns the folder of prepared data sets."""
        return Path(self.cache).expanduser() if self.cache else Path.home() / ".cache" / "unimed_jax"

    @property
    def common_image(self) -> ImageConfig | None:
        """Returns how pictures of all sources are read, or None if sources differ in it."""
        found = {source.image for source in self.sources}
        return found.pop() if len(found) == 1 else None if found else ImageConfig()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Shapes the cross-entropy of answer tokens."""

    # token: mean over all answer tokens; example: mean per example, then over examples. None: example;
    # paper: token
    reduction: Literal["token", "example"] | None = None
    # Spread of soft targets over neighbouring box coordinates, in 1/100; 0: off
    coordinate_sd: Annotated[float, ZeroOr(0.01, 100)] = 0.0
    coordinate_weight: Weight = 1.0  # weight of box coordinate tokens


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Sets AdamW, with linear warm-up and cosine decay over all steps (as published)."""

    lr: Rate = 1e-5  # learning rate after warm-up
    min_lr: Rate = 1e-7  # learning rate at the end
    warmup_lr: Rate = 1e-6  # learning rate of the first step
    warmup_steps: Whole = 5000  # steps of the linear warm-up
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of Adam's first and second moments
    eps: Epsilon = 1e-8  # Adam's epsilon
    # Of all parameters except biases and norm scales, unless a rule sets its own
    weight_decay: WeightDecay = 0.05
    clip: Annotated[float, ZeroOr(1e-6, 1e6)] = 0.0  # upper limit of the global gradient norm; 0: none
    # In which Adam's moments are stored; bfloat16 takes half the memory, by stochastic rounding
    moments_dtype: Float = "float32"
    # Parameters that did not contribute to the loss are left untouched (value, Adam moments and step
    # count). None; paper: True
    skip_unused: bool | None = None


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Says whether and how the parameters whose path matches a pattern train."""

    match: Name  # shell-style pattern of parameter paths: "connector/*"
    train: bool  # False: frozen
    lr_scale: Annotated[float, AtLeast(0), AtMost(1000)] = 1.0  # factor of the learning rate
    # None: optimizer.weight_decay, and 0 for biases and norm scales (published)
    weight_decay: WeightDecay | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Sets the training loop: what trains, for how long, and what is kept."""

    steps: Count = 50000  # optimizer steps
    accumulation: Count = 1  # micro-batches per step; the batch is divided, its loss unchanged
    rules: Annotated[tuple[RuleConfig, ...], Filled()] = (
        RuleConfig("*", True),
    )  # first match wins; a parameter without one is an error
    # Optimizer state at step 0. zeros: as AdamW starts; init: that of the last original checkpoint
    # (kind "unimed") of config.init, so that its training goes on.
    moments: Literal["zeros", "init"] = "zeros"
    # How gradients of several tasks are combined (train/gradients.py). sum: as published; the others
    # ease conflicts between tasks, and take a backward pass and a gradient's memory for each task.
    gradients: Literal["sum", "pcgrad", "gradvac", "equal-norm"] = "sum"
    # Run a frozen encoder once on each image and train on its features, which are kept in bfloat16 in
    # the folder `features` of config.data.cache (features.py). Evaluation encodes images, as answering
    # does.
    cache_features: bool = False
    save_every: Count = 500  # steps between checkpoints
    log_every: Count = 10  # steps between log lines
    keep: Count = 2  # newest checkpoints that are kept
    # Metric whose best checkpoint is kept too: "loss/<set>/<split>/<task>" or
    # "<metric>/<set>/<split>/<task>" of an evaluation entry that runs during training; empty: none.
    best: Text = ""
    best_mode: Literal["max", "min"] = "max"  # whether a high or a low value of `best` is good
    patience: Whole = 0  # stop after so many measurements of `best` without improvement; 0: never
    # If a run goes on with more steps. refuse: an error; restart: warm-up and decay start again over the
    # added steps; stretch: the schedule is that of the new number of steps.
    longer: Literal["refuse", "restart", "stretch"] = "refuse"
    wandb: bool = False  # log to Weights & Biases too


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Numbers the devices along each axis of the mesh (model/sharding.py)."""

    auto: bool = True  # choose for the devices found; the numbers below are then ignored
    data: Size = 1  # copies of the model, each with its share of the batch
    fsdp: Size = 1  # shares of the batch whose parameters are sharded too
    tensor: Size = 1  # shares of each layer's width
    expert: Size = 1  # shares of the experts


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EntryConfig:
    """Describes one evaluation: a task of a data set on a split."""

    source: Part  # id of a data set
    task: Task  # one of its tasks
    split: Part  # one of its splits
    metrics: Names = ()  # (): those registered for the task
    limit: Whole | None = None  # examples; 0: all; None: evaluate.limit
    every: Whole = 0  # also run during training, each so many steps; 0: only after training
    max_new_tokens: Length | None = None  # tokens of an answer; None: evaluate.max_new_tokens
    batch: Length | None = None  # prompts answered at once; None: evaluate.batch


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Says what is scored after training and by the verb `evaluate`, and how answers are generated."""

    sources: tuple[SourceConfig, ...] = ()  # data sets that are scored; (): data.sources
    entries: tuple[EntryConfig, ...] = ()  # (): every task of every source on `splits`
    splits: Annotated[tuple[Part, ...], Distinct()] = ("val", "test")  # (): no evaluation
    batch: Length = 64  # prompts answered at once
    max_new_tokens: Length = 100  # tokens of an answer
    limit: Whole = 0  # examples per task and split; 0: all
    # of sampling; 0: the most probable token (greedy)
    temperature: Annotated[float, ZeroOr(0.01, 100)] = 0.0
    # Sample from the tokens that hold this probability
    top_p: Annotated[float, Above(0), Between(0, 1)] = 1.0
    # Also score classes, closed questions and multiple choice by the likelihood of each possible answer
    # (evaluate/labels.py): one more pass, which costs less than generating their answers as a rule.
    likelihood: bool = True
    # resamples for each confidence interval
    bootstrap: Annotated[int, AtLeast(2), AtMost(100_000)] = 2000
    # Which scores lead in reports. None: corrected; paper: published
    scoring: Literal["corrected", "published"] | None = None


@dataclasses.dataclass(frozen=True)
class RouterFitConfig:
    """Sets how Med-MoE's router is fitted as a linear classifier of hidden states (`job="router"`)."""

    key: Text = ""  # key of Example.meta whose values are the classes
    classes: Names = ()  # in the order of the experts; (): all values that occur, sorted
    # Numbers of labelled images to fit on, rising; the last one gives the router. (): all images.
    labels: tuple[Count, ...] = ()
    epochs: Annotated[int, AtLeast(1), AtMost(1_000_000)] = 10  # passes over the labelled images
    batch: Length = 32  # images per step
    lr: Annotated[float, Above(0), AtMost(10)] = 1e-3  # Adam's learning rate


@dataclasses.dataclass(frozen=True)
class Config:
    """Holds all settings of a run."""

    # Of the run, and of its folder in runs/; a / makes folders inside it; empty: the config file's name
    name: Annotated[str, Characters(1000), FolderName(nested=True)] = ""
    # What is trained: the model, or Med-MoE's router by itself (router_fit)
    job: Literal["model", "router"] = "model"
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0  # of everything random
    # paper: published behaviour wherever a setting is None
    fidelity: Literal["default", "paper"] = "default"
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    # Where weights come from, as (kind, path): seed, run, hf, eva ...; later sources overlay earlier
    # ones. seed takes a pattern of parameters, for new ones in place of those read before:
    # ("seed", "connector/*").
    init: Annotated[tuple[tuple[Name, Place], ...], Filled(), Distinct()] = (("seed", ""),)
    evaluate: EvaluateConfig = EvaluateConfig()
    router_fit: RouterFitConfig = RouterFitConfig()

    @property
    def held_out(self) -> DataConfig:
        """Returns the data settings with the sources that are scored in place of the trained ones."""
        return dataclasses.replace(self.data, sources=self.evaluate.sources or self.data.sources)

    @property
    def evaluates(self) -> bool:
        """Says whether anything is scored after training."""
        return bool(self.evaluate.entries or self.evaluate.splits)


def default_config() -> "ml_collections.ConfigDict":
    """Returns every setting at its default, in the mutable form that config files fill in."""
    # Here, because the model and the training program are used on machines without it.
    import ml_collections

    # Types are checked once, by from_config_dict and in a sentence.
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config) -> dict:
    """Turns a config dataclass into plain dicts, tuples and scalars (JSON-ready)."""
    return dataclasses.asdict(config)


def config_hash(config: Config) -> str:
    """Returns the first 16 hex digits of the sha256 of the settings, all but those named `changed`."""
    settings = to_dict(config)
    for group in ("data", "text"):
        del settings[group]["changed"]
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
