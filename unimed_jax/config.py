"""Settings of a run as typed frozen dataclasses: every field with its default and meaning.

A config file returns a ConfigDict that starts from `default_config()`; `settings.from_config_dict` turns it into a
checked `Config`.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ml_collections

# The published task order (Uni-Med, its five visual tasks) and, last, text-only question answering.
VISUAL_TASKS = ("vqa", "refer", "identify", "caption", "cls")
TASKS = (*VISUAL_TASKS, "qa")


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
    """Slower rotary embedding for longer rows: all frequencies, or Llama-3's low ones and a part of those between."""

    kind: str = "llama3"  # llama3 | linear (all frequencies; the fields behind `factor` have no part in it)
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder; the defaults are LLaMA's. `interop/hf.py` says which fields make which published family."""

    vocab: int = 1024
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    mlp_width: int = 352
    norm: str = "rms"  # rms | rms_zero (times 1 + scale: Gemma) | layer
    norm_eps: float = 1e-5
    post_norms: bool = False  # norms behind attention and MLP too, before their sums with what went in
    parallel_block: bool = False  # attention and MLP read one norm and are added together
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    activation: str = "silu"  # of the MLP
    attention_bias: tuple[str, ...] = ()  # which of q, k, v, o carry a bias
    mlp_bias: bool = False
    qk_norm: bool = False  # a norm over each head's q and k, before they are rotated
    query_scale: float | None = None  # of the attention scores; None: head_dim ** -0.5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of layers with a window, never scaled; None: rotated as the others
    rotary_fraction: float = 1.0  # part of each head that is rotated
    scaled_embedding: bool = False  # embeddings of text (not of visual tokens) times the root of the width
    tied_head: bool = False
    head_bias: bool = False
    windows: tuple[int, ...] = ()  # sliding window per layer in turn, 0 = full; () = all full
    attention_softcap: float | None = None
    logit_softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts in place of the MLP of some decoder layers (Med-MoE): sum of weight * expert(h), and the meta expert."""

    experts: int = 0  # of a layer; 0: all layers keep their one MLP
    placement: str = "sparse"  # sparse (layers 0, 2, 4 ...) | first_half | second_half | dense (all)
    layers: tuple[int, ...] = ()  # numbers of the layers with experts, in place of `placement`
    top_k: int = 1  # 1: weighted by its probability | 2: their probabilities, which then sum to 1
    meta: bool = True  # one more MLP, which every token passes with weight 1
    residual: bool = False  # a plain MLP besides, mixed with the experts by learned coefficients (arXiv 2201.05596)
    # Room of an expert, as a multiple of tokens * top_k / experts; tokens beyond it are dropped. None: no limit.
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 0  # tokens
    # In training: chance decides who finds room (top-1), and the second choice is drawn (top-2); else order and size.
    random: bool = True
    gate_noise: str = "none"  # none | jitter (of the router's input) | rsample (top-1: the choice is drawn)
    eval_noise: bool | None = None  # `random` at evaluation too; paper: True
    route_padding: bool | None = None  # padding is routed, takes room and counts in the loss; paper: True
    aux_coef: float = 0.0  # of the balancing loss, summed over layers
    path: str = "grouped"  # dense (the reference) | grouped | capacity: how experts are run

    @property
    def trains_otherwise(self) -> bool:
        """Whether routing in training is another than at evaluation."""
        drawn = self.gate_noise != "none" or self.top_k == 2 and self.random
        return self.experts > 0 and (drawn or (self.capacity_factor, self.eval_capacity_factor) != (None, None))

    def numbers(self, depth: int) -> tuple[int, ...]:
        """The layers of a decoder of that depth which hold experts."""
        if not self.experts:
            return ()
        every, half = range(depth), depth // 2
        placed = {"sparse": every[::2], "first_half": every[:half], "second_half": every[half:], "dense": every}
        return self.layers or tuple(placed[self.placement])


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
    moe: MoeConfig = MoeConfig()
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
    form: str = "unimed"  # unimed | stablelm | phi | plain: of prompts and answers; the last three are data/chat.py's
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
    path: str = ""  # where its files are, from data.root on; empty: <data.root>/<name>
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
    fit: str = "stretch"  # stretch | crop | pad: how an image becomes a square (data/images.py)
    window: int = 512  # draws that the packer looks at together
    threads: int = 2
    cache: str = ""  # folder of built data sets; empty: ~/.cache/unimed_jax

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache).expanduser() if self.cache else Path.home() / ".cache" / "unimed_jax"


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
    sources: tuple[SourceConfig, ...] = ()  # what is scored; (): data.sources
    splits: tuple[str, ...] = ("val", "test")
    batch: int = 64
    max_new_tokens: int = 100
    limit: int = 0  # examples per task and split; 0: all
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    bootstrap: int = 2000  # resamples
    scoring: str | None = None  # which scores lead: corrected | published; paper: published


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Training of Med-MoE's router by itself, in place of the model's (train/router.py)."""

    key: str = ""  # of Example.meta, whose values are the classes; empty: the model trains
    classes: tuple[str, ...] = ()  # in the order of the experts; (): all values that occur, sorted
    labels: tuple[int, ...] = ()  # numbers of labelled images to train on, the last one for the router; (): all
    epochs: int = 10
    batch: int = 32  # images
    lr: float = 1e-3  # Adam's


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
    router: RouterConfig = RouterConfig()

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
    """A config dataclass as plain dicts, tuples and scalars (JSON-ready)."""
    return dataclasses.asdict(config)


def config_hash(config: Config) -> str:
    """First 16 hex digits of the sha256 over the settings."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
