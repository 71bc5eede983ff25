"""Settings of a run as typed, frozen dataclasses: each field with its choices or bounds, default and meaning.

A config file returns a ConfigDict that starts from `default_config()`; `settings.from_config_dict` turns it into a
checked `Config`. Choices are `Literal`, bounds stand in `Annotated`; docs/settings.md is generated from this file.
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

from unimed_jax.bounds import Above, AtLeast, Below, Between, Distinct, Filled, FrozenDict, Matches

# In the published task order (Uni-Med, its five visual tasks) and, last, text-only question answering.
VisualTask = Literal["vqa", "refer", "identify", "caption", "cls"]
Task = Literal[VisualTask, "qa"]
VISUAL_TASKS: tuple[str, ...] = get_args(VisualTask)
TASKS: tuple[str, ...] = get_args(Task)

Count = Annotated[int, AtLeast(1)]
Whole = Annotated[int, AtLeast(0)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, Between(0, 1)]
Decay = Annotated[float, AtLeast(0), Below(1)]
Name = Annotated[str, Filled()]
Names = Annotated[tuple[Name, ...], Distinct()]
Float = Literal["float32", "bfloat16"]
AttentionLinear = Literal["q", "k", "v", "o"]
Linear = Literal[AttentionLinear, "gate", "up", "down"]


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision transformer (ViT). The values of EVA-CLIP-g are in `configs/cmoe.py`."""

    image_size: Count = 64  # pixels per side; images are square
    patch_size: Count = 8  # pixels per side
    width: Count = 128  # of a patch's features
    depth: Count = 4  # blocks
    heads: Count = 4  # of the attention
    mlp_width: Count = 512  # hidden units of each block's MLP
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"  # of the MLP; gelu is the exact one (erf)
    qkv_bias: Literal["qv", "qkv", "none"] = "qv"  # which projections of the attention have a bias; EVA has none on k
    patch_bias: bool = True  # a bias in the patch embedding
    pre_norm: bool = False  # a LayerNorm before the first block (CLIP)
    cls_token: bool = True  # a class token before the patches
    norm_eps: Positive = 1e-6  # epsilon of the blocks' LayerNorms
    feature_layer: int = -1  # the block whose output is used, counted from the end; -2 skips the last block
    output_norm: bool = True  # a LayerNorm after the last block (ln_vision: published frozen, scale 1 and bias 0)
    output_norm_eps: Positive = 1e-5  # epsilon of that LayerNorm
    position_init: Literal["normal", "sincos"] = "normal"  # sincos: 2-D sines, for training from scratch
    mean: tuple[Share, Share, Share] = (0.48145466, 0.4578275, 0.40821073)  # subtracted from red, green, blue (0..1)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)  # and what they are divided by

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

    # How patches become one visual token. projection: `rate` patches in raster order are concatenated (published);
    # block: a square of patches is concatenated; avgpool, maxpool: 2x2 patches are pooled.
    aggregation: Literal["projection", "block", "avgpool", "maxpool"] = "projection"
    rate: Count = 4  # patches per visual token
    # The projection to the decoder's width: a linear layer, an MLP of N layers, or a mixture of experts of either.
    kind: Annotated[
        str,
        Matches(r"linear|mlp[1-9]\d*x_gelu|moe_linear|moe_mlp", "linear, mlpNx_gelu (N layers), moe_linear or moe_mlp"),
    ] = "moe_mlp"
    experts: Count = 5  # of a mixture
    hidden: Count | None = None  # hidden units of a moe_mlp expert; None: the decoder's width
    # soft: all experts, by sigmoids divided by their sum; sparse: the `top_k` best, by a softmax over these; hard: one
    # expert per task; constant: all alike.
    router: Literal["soft", "sparse", "hard", "constant"] = "soft"
    # What the router reads: task token and visual token, the visual token, or the task token.
    router_input: Literal["task_token", "token", "task"] = "task_token"
    router_hidden: Count | None = None  # hidden units of the router; None: four times the width of its input
    top_k: Whole = 2  # experts that the sparse router keeps
    task_tokens: Literal[0, 1] = 1  # learned tokens per visual task
    task_token_width: Count | None = None  # None: as wide as an aggregated visual token
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"  # of experts and router
    form: Literal["fast", "literal"] = "fast"  # how it is computed; literal is the reference that tests compare with

    @property
    def is_moe(self) -> bool:
        return self.kind.startswith("moe_")

    @property
    def layers(self) -> int:
        """Linear layers of a connector without experts: 1 for linear, N for mlpNx_gelu, 0 for a mixture."""
        if self.is_moe:
            return 0
        return 1 if self.kind == "linear" else int(self.kind.removeprefix("mlp").partition("x")[0])


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotary embeddings, for rows longer than the decoder was pretrained on."""

    # linear: all frequencies are divided by `factor`, and the fields below it are ignored; llama3: low frequencies
    # are, high ones stay, those in between are interpolated.
    kind: Literal["llama3", "linear"] = "llama3"
    factor: Positive = 8.0  # how much slower
    low_freq_factor: Positive = 1.0  # wavelengths above original_positions / low_freq_factor are low frequencies
    high_freq_factor: Positive = 4.0  # wavelengths below original_positions / high_freq_factor are high frequencies
    original_positions: Count = 8192  # row length of pretraining


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder. The defaults are LLaMA's; `interop/families/hf.py` has those of other published families."""

    vocab: Count = 1024  # rows of the embedding table; at least as many as the tokenizer has tokens
    width: Count = 128  # of the hidden states
    depth: Count = 4  # layers
    heads: Count = 4  # query heads
    kv_heads: Count = 4  # key and value heads (fewer than `heads`: grouped-query attention)
    head_dim: Annotated[int, AtLeast(2)] = 32  # width of a head
    mlp_width: Count = 352  # hidden units of the MLP
    norm: Literal["rms", "rms_zero", "layer"] = "rms"  # rms_zero multiplies by 1 + scale (Gemma)
    norm_eps: Positive = 1e-5  # epsilon of all norms
    post_norms: bool = False  # extra norms on the attention and MLP outputs, before the residual add
    parallel_block: bool = False  # attention and MLP read the same norm and are added together (Phi)
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)); else down(act(up(x)))
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # of the MLP
    attention_bias: Annotated[tuple[AttentionLinear, ...], Distinct()] = ()  # which linears have a bias
    mlp_bias: bool = False  # biases in the MLP
    qk_norm: bool = False  # a norm on each head's queries and keys, before they are rotated
    query_scale: Positive | None = None  # factor of the attention scores; None: head_dim ** -0.5
    rope_theta: Positive = 10000.0  # base of the rotary embedding
    rope_scaling: RopeScaling | None = None  # slower rotary embedding; None: unscaled
    local_rope_theta: Positive | None = None  # base in layers with a window, unscaled; None: as in the other layers
    rotary_fraction: Annotated[float, Above(0), Between(0, 1)] = 1.0  # part of each head that is rotated
    scaled_embedding: bool = False  # text embeddings (not visual tokens) times the square root of the width
    tied_head: bool = False  # the output head is the embedding table
    head_bias: bool = False  # a bias in the output head
    # Sliding window of each layer in tokens, repeated over the depth; 0: full attention. (): full everywhere.
    windows: tuple[Whole, ...] = ()
    attention_softcap: Positive | None = None  # attention scores become cap * tanh(score / cap)
    logit_softcap: Positive | None = None  # the same for output logits


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts in place of some decoder layers' MLPs (Med-MoE): the weighted sum of their outputs, and a meta expert."""

    experts: Whole = 0  # per layer; 0: no layer has experts
    # Which layers have experts: sparse is every second one from layer 0, dense is every one.
    placement: Literal["sparse", "first_half", "second_half", "dense"] = "sparse"
    layers: Annotated[tuple[Whole, ...], Distinct()] = ()  # layer numbers, which replace `placement`
    # Experts per token. 1: its output is weighted by its probability; 2: by the two probabilities, scaled to sum to 1.
    top_k: Whole = 1
    meta: bool = True  # an extra MLP, which every token passes with weight 1
    residual: bool = False  # a dense MLP next to the experts, mixed by learned coefficients (arXiv 2201.05596)
    # Capacity of an expert in training, as a multiple of tokens * top_k / experts; tokens beyond it skip the expert.
    # None: unlimited.
    capacity_factor: Positive | None = None
    eval_capacity_factor: Positive | None = None  # the same at evaluation
    min_capacity: Whole = 0  # lower limit of that capacity, in tokens
    # Random selection in training. top-1: if an expert is full, the tokens that fit are random instead of the first;
    # top-2: the second expert is sampled instead of the runner-up.
    random: bool = True
    # Noise in training. jitter: on the router's input; rsample (top-1): the expert is drawn by its probability.
    gate_noise: Literal["none", "jitter", "rsample"] = "none"
    eval_noise: bool | None = None  # `random` at evaluation too. None; paper: True
    # Padding tokens are routed, use capacity and count in the balancing loss. None; paper: True
    route_padding: bool | None = None
    aux_coef: NotNegative = 0.0  # weight of the balancing loss, which is summed over layers
    # How experts run. dense: all experts on all tokens (the reference); grouped: tokens sorted by expert;
    # capacity: fixed buffers per expert; if `eval_capacity_factor` is None, evaluation has no limit and runs grouped.
    path: Literal["dense", "grouped", "capacity"] = "grouped"

    @property
    def trains_otherwise(self) -> bool:
        """Whether routing in training differs from routing at evaluation."""
        drawn = self.gate_noise != "none" or self.top_k == 2 and self.random
        return self.experts > 0 and (drawn or (self.capacity_factor, self.eval_capacity_factor) != (None, None))

    def numbers(self, depth: int) -> tuple[int, ...]:
        """The numbers of the layers with experts, in a decoder of `depth` layers."""
        if not self.experts:
            return ()
        every, half = range(depth), depth // 2
        placed = {"sparse": every[::2], "first_half": every[:half], "second_half": every[half:], "dense": every}
        return self.layers or tuple(placed[self.placement])


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the decoder's linear layers."""

    rank: Whole = 0  # 0: no adapters
    alpha: Positive = 16.0  # their output is scaled by alpha / rank
    dropout: Decay = 0.05  # of their input, in training
    targets: Annotated[tuple[Linear, ...], Distinct()] = get_args(Linear)  # linear layers with an adapter


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model: vision encoder, connector, decoder, and how they are computed."""

    vision: VisionConfig = VisionConfig()
    connector: ConnectorConfig = ConnectorConfig()
    decoder: DecoderConfig = DecoderConfig()
    moe: MoeConfig = MoeConfig()
    lora: LoraConfig = LoraConfig()
    compute_dtype: Float = "float32"  # of matrix products
    frozen_dtype: Float = "float32"  # in which frozen parameters are stored
    # Attention kernel of the decoder, and of the vision encoder where it applies; auto: the fastest one that fits.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # What the backward pass recomputes to save memory. dots: everything except matrix products; full: whole layers.
    remat: Literal["none", "dots", "full"] = "none"

    @property
    def tokens_per_image(self) -> int:
        return self.vision.patches // self.connector.rate


# ---------------------------------------------------------------------------------------------
# Text and data
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Tokenizer and prompt form."""

    tokenizer: str = ""  # a Hugging Face folder or a GGUF file; empty: train a BPE on the training split
    vocab: Count = 1024  # size of that BPE, special tokens included
    coordinate_tokens: bool = True  # one token per box coordinate 0..100 (only in a BPE trained here)
    # Form of prompts and answers (data/forms.py). unimed: task tags; stablelm, phi: Med-MoE's chat; plain: an image and
    # its caption; simple: LLaVA-Med's chat, only for prompts.
    form: Literal["unimed", "stablelm", "phi", "plain", "simple"] = "unimed"
    chat_template: bool = True  # wrap prompts in [INST] ... [/INST] (form unimed)
    max_answer: Count = 1024  # tokens, end of text included
    max_prompt: Count = 512  # tokens, visual ones included; a longer prompt is an error
    max_words: Count | None = None  # questions and reports are cut to so many words. None: uncut; paper: 50
    double_bos: bool | None = None  # two BOS tokens in evaluation prompts (form unimed). None; paper: True
    # A blank after the instruction, only in training (form unimed). None; paper: True. A model trained from scratch
    # on it alone ends boxes after three coordinates at evaluation, where it is missing.
    training_blank: bool | None = None


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set of the mixture."""

    name: Name = "brain"  # a file or package of data/datasets, or a dotted module: my_lab.my_data
    id: str = ""  # name of the set in scores and reports; empty: the last part of `name`, made unique
    path: str = ""  # folder of its files, relative to data.root; empty: <data.root>/<name>
    tasks: Annotated[tuple[Task, ...], Distinct()] = ()  # (): all that it has
    weight: Positive = 1.0  # share of the draws, relative to the other sources
    questions: Count = 1  # at most so many questions share one image's tokens (and task) in a row
    # Keep only examples with one of these values, by template or by a key of Example.meta: {"template": ("where",)}.
    only: Mapping[Name, Annotated[tuple[str, ...], Filled(), Distinct()]] = FrozenDict()
    # Relative draw weight of examples by the same keys: {"template": {"where": 2.0}}; unnamed values weigh 1.
    weights: Mapping[Name, Mapping[str, NotNegative]] = FrozenDict()
    splits: Mapping[Name, Name] = FrozenDict()  # made splits: {"val": "train[90%:] by cluster"}
    # Licence, citation, note and word for a cluster, for a generic source without info.json.
    info: Mapping[Literal["licence", "citation", "note", "cluster_word"], str] = FrozenDict()
    options: Mapping[Name, Any] = FrozenDict()  # given to the set's reader; JSON values


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture of data sets, and how batches are made of it."""

    sources: tuple[SourceConfig, ...] = ()  # data sets to train on
    root: str = ""  # folder that holds the data sets, one folder each
    # per_example: a batch mixes sources; per_batch: each batch comes from one. None: per_example; paper: per_batch
    mixing: Literal["per_example", "per_batch"] | None = None
    packing: bool | None = None  # several examples in a row. None: True; paper: False
    rows: Count = 16  # rows of a batch, over all hosts
    row_tokens: Count = 256  # tokens of a row, visual ones included
    row_images: Whole = 2  # image slots of a row
    row_answers: Count = 128  # answer tokens of a row
    fit: Literal["stretch", "crop", "pad"] = "stretch"  # how an image becomes square (data/images.py)
    window: Count = 512  # draws that are packed together
    threads: Whole = 2  # that read and decode ahead; 0: none
    cache: str = ""  # folder of prepared data sets; empty: ~/.cache/unimed_jax
    image_cache_mib: Whole = 256  # decoded images kept in memory, in MiB; 0: none

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache).expanduser() if self.cache else Path.home() / ".cache" / "unimed_jax"


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy of answer tokens."""

    # token: mean over all answer tokens; example: mean per example, then over examples. None: example; paper: token
    reduction: Literal["token", "example"] | None = None
    coordinate_sd: NotNegative = 0.0  # spread of soft targets over neighbouring box coordinates, in 1/100; 0: off
    coordinate_weight: Positive = 1.0  # weight of box coordinate tokens


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay over all steps (as published)."""

    lr: NotNegative = 1e-5  # learning rate after warm-up
    min_lr: NotNegative = 1e-7  # learning rate at the end
    warmup_lr: NotNegative = 1e-6  # learning rate of the first step
    warmup_steps: Whole = 5000  # steps of the linear warm-up
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of Adam's first and second moments
    eps: Positive = 1e-8  # Adam's epsilon
    weight_decay: NotNegative = 0.05  # of all parameters except biases and norm scales, unless a rule sets its own
    clip: NotNegative = 0.0  # upper limit of the global gradient norm; 0: none
    # Parameters that did not contribute to the loss are left untouched (value, Adam moments and step count).
    # None; paper: True
    skip_unused: bool | None = None


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """Whether and how the parameters whose path matches a pattern train."""

    match: Name  # shell-style pattern of parameter paths: "connector/*"
    train: bool  # False: frozen
    lr_scale: NotNegative = 1.0  # factor of the learning rate
    # None: optimizer.weight_decay, and 0 for biases and norm scales (published)
    weight_decay: NotNegative | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop: what trains, for how long, and what is kept."""

    steps: Count = 50000  # optimizer steps
    accumulation: Count = 1  # micro-batches per step; the batch is divided, its loss unchanged
    rules: tuple[RuleConfig, ...] = (RuleConfig("*", True),)  # first match wins; a parameter without one is an error
    gradients: Literal["sum"] = "sum"  # how gradients of several tasks are combined (train/gradients.py)
    save_every: Count = 500  # steps between checkpoints
    log_every: Count = 10  # steps between log lines
    keep: Count = 2  # newest checkpoints that are kept
    # Metric whose best checkpoint is kept too: "loss/<set>/<split>/<task>" or "<metric>/<set>/<split>/<task>" of an
    # evaluation entry that runs during training; empty: none.
    best: str = ""
    best_mode: Literal["max", "min"] = "max"  # whether a high or a low value of `best` is good
    patience: Whole = 0  # stop after so many measurements of `best` without improvement; 0: never
    # If a run goes on with more steps. refuse: an error; restart: warm-up and decay start again over the added steps;
    # stretch: the schedule is that of the new number of steps.
    longer: Literal["refuse", "restart", "stretch"] = "refuse"
    wandb: bool = False  # log to Weights & Biases too


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (model/sharding.py)."""

    auto: bool = True  # choose for the devices found; the numbers below are then ignored
    data: Count = 1  # copies of the model, each with its share of the batch
    fsdp: Count = 1  # shares of the batch whose parameters are sharded too
    tensor: Count = 1  # shares of each layer's width
    expert: Count = 1  # shares of the experts


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EntryConfig:
    """One evaluation: a task of a data set on a split."""

    source: Name  # id of a data set
    task: Task  # one of its tasks
    split: Name  # one of its splits
    metrics: Names = ()  # (): those registered for the task
    limit: Whole | None = None  # examples; 0: all; None: evaluate.limit
    every: Whole = 0  # also run during training, each so many steps; 0: only after training
    max_new_tokens: Count | None = None  # tokens of an answer; None: evaluate.max_new_tokens
    batch: Count | None = None  # prompts answered at once; None: evaluate.batch


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is scored after training and by the verb `evaluate`, and how answers are generated."""

    sources: tuple[SourceConfig, ...] = ()  # data sets that are scored; (): data.sources
    entries: tuple[EntryConfig, ...] = ()  # (): every task of every source on `splits`
    splits: Names = ("val", "test")  # (): no evaluation
    batch: Count = 64  # prompts answered at once
    max_new_tokens: Count = 100  # tokens of an answer
    limit: Whole = 0  # examples per task and split; 0: all
    temperature: NotNegative = 0.0  # of sampling; 0: the most probable token (greedy)
    top_p: Annotated[float, Above(0), Between(0, 1)] = 1.0  # sample from the tokens that hold this probability
    bootstrap: Count = 2000  # resamples behind each confidence interval
    # Which scores lead in reports. None: corrected; paper: published
    scoring: Literal["corrected", "published"] | None = None


@dataclasses.dataclass(frozen=True)
class RouterFitConfig:
    """Fitting Med-MoE's router as a linear classifier of hidden states (`job="router"`, train/router.py)."""

    key: str = ""  # key of Example.meta whose values are the classes
    classes: Names = ()  # in the order of the experts; (): all values that occur, sorted
    # Numbers of labelled images to fit on, rising; the last one gives the router. (): all images.
    labels: tuple[Count, ...] = ()
    epochs: Count = 10  # passes over the labelled images
    batch: Count = 32  # images per step
    lr: Positive = 1e-3  # Adam's learning rate


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    name: str = ""  # of the run, and of its folder in runs/; empty: the config file's name
    job: Literal["model", "router"] = "model"  # what is trained: the model, or Med-MoE's router by itself (router_fit)
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0  # of everything random
    fidelity: Literal["default", "paper"] = "default"  # paper: published behaviour wherever a setting is None
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    # Where weights come from, as (kind, path): seed, run, hf, eva ...; later sources overlay earlier ones.
    init: tuple[tuple[Name, str], ...] = (("seed", ""),)
    evaluate: EvaluateConfig = EvaluateConfig()
    router_fit: RouterFitConfig = RouterFitConfig()

    @property
    def held_out(self) -> DataConfig:
        """The data that is scored."""
        return dataclasses.replace(self.data, sources=self.evaluate.sources or self.data.sources)


def default_config() -> "ml_collections.ConfigDict":
    """Every setting at its default, as the mutable form that config files fill in."""
    # Here, because the model and the training program are used on machines without it.
    import ml_collections

    # Types are checked once, by from_config_dict and in a sentence.
    return ml_collections.ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config) -> dict:
    """Turns a config dataclass into plain dicts, tuples and scalars (JSON-ready)."""
    return dataclasses.asdict(config)


def config_hash(config: Config) -> str:
    """Returns the first 16 hex digits of the settings' sha256."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
