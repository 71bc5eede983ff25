"""Declares the settings of the model; config.py has all others, and imports these."""

import dataclasses
from typing import Annotated, Literal, get_args

from unimed_jax.bounds import (
    Above,
    AtLeast,
    AtMost,
    Between,
    Count,
    Depth,
    Distinct,
    Dropout,
    Epsilon,
    Experts,
    Factor,
    Matches,
    Pixels,
    Share,
    Size,
    Whole,
)

Float = Literal["float32", "bfloat16"]
AttentionLinear = Literal["q", "k", "v", "o"]
Linear = Literal[AttentionLinear, "gate", "up", "down"]
Spread = Annotated[float, Above(0), AtLeast(1e-3), AtMost(100)]
Base = Annotated[float, Above(0), AtLeast(1), AtMost(1e12)]  # of rotary embeddings
Capacity = Annotated[float, Above(0), AtLeast(1e-3), AtMost(1000)]
LayerNumber = Annotated[int, AtLeast(0), AtMost(1023)]
ExpertCount = Annotated[int, AtLeast(0), AtMost(1024)]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Describes the vision transformer (ViT). The values of EVA-CLIP-g are in `configs/cmoe.py`."""

    image_size: Pixels = 64  # pixels per side; images are square
    patch_size: Pixels = 8  # pixels per side
    width: Size = 128  # of a patch's features
    depth: Depth = 4  # blocks
    heads: Size = 4  # of the attention
    mlp_width: Size = 512  # hidden units of each block's MLP
    # Of the MLP; gelu is the exact one (erf)
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    # Which projections of the attention have a bias; EVA has none on k
    qkv_bias: Literal["qv", "qkv", "none"] = "qv"
    patch_bias: bool = True  # a bias in the patch embedding
    pre_norm: bool = False  # a LayerNorm before the first block (CLIP)
    cls_token: bool = True  # a class token before the patches
    norm_eps: Epsilon = 1e-6  # epsilon of the blocks' LayerNorms
    # The block whose output is used, counted from the end; -2 skips the last block
    feature_layer: Annotated[int, Between(-1024, -1)] = -1
    # A LayerNorm after the last block (ln_vision: published frozen, scale 1 and bias 0)
    output_norm: bool = True
    output_norm_eps: Epsilon = 1e-5  # epsilon of that LayerNorm
    position_init: Literal["normal", "sincos"] = "normal"  # sincos: 2-D sines, for training from scratch
    # What is subtracted from red, green and blue, and what they are divided by. fixed: `mean` and `std`;
    # picture: the picture's own mean and standard deviation, for mixtures of dark and bright pictures.
    normalise: Literal["fixed", "picture"] = "fixed"
    # Subtracted from red, green, blue (0..1)
    mean: tuple[Share, Share, Share] = (0.48145466, 0.4578275, 0.40821073)
    # Then they are divided by these
    std: tuple[Spread, Spread, Spread] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def blocks(self) -> int:
        """Counts the blocks that are run; those after the feature layer are not."""
        return self.depth + 1 + self.feature_layer

    @property
    def grid(self) -> int:
        """Counts the patches per side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Counts the patches of an image."""
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Describes how patches are joined and projected, by experts and a router (Uni-Med section 3.2)."""

    # How patches become one visual token. projection: `rate` patches in raster order are concatenated
    # (published); block: a square of patches is concatenated; avgpool, maxpool: 2x2 patches are pooled.
    aggregation: Literal["projection", "block", "avgpool", "maxpool"] = "projection"
    rate: Size = 4  # patches per visual token
    # The projection to the decoder's width: a linear layer, an MLP of N layers, or a mixture of experts
    # of either.
    kind: Annotated[
        str,
        Matches(
            r"linear|mlp[1-9]\d?x_gelu|moe_linear|moe_mlp",
            "linear, mlpNx_gelu (N = 1 to 99 layers), moe_linear or moe_mlp",
        ),
    ] = "moe_mlp"
    experts: Experts = 5  # of a mixture
    # Hidden units of a moe_mlp expert, or of each inner layer of mlpNx_gelu; None: the decoder's width
    hidden: Size | None = None
    # soft: all experts, by sigmoids divided by their sum; sparse: the `top_k` best, by a softmax over
    # these; hard: one expert per task; constant: all alike.
    router: Literal["soft", "sparse", "hard", "constant"] = "soft"
    # What the router reads: task token and visual token, the visual token, or the task token.
    router_input: Literal["task_token", "token", "task"] = "task_token"
    # Hidden units of the router; None: four times the width of its input
    router_hidden: Size | None = None
    top_k: ExpertCount = 2  # experts that the sparse router keeps
    task_tokens: Literal[0, 1] = 1  # learned tokens per visual task
    task_token_width: Size | None = None  # None: as wide as an aggregated visual token
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"  # of experts and router
    # How it is computed; literal is the reference that tests compare with
    form: Literal["fast", "literal"] = "fast"

    @property
    def is_moe(self) -> bool:
        """Says whether the connector is a mixture of experts."""
        return self.kind.startswith("moe_")

    @property
    def layers(self) -> int:
        """Counts the linear layers: 1 for linear, N for mlpNx_gelu, 0 for a mixture of experts."""
        if self.is_moe:
            return 0
        return 1 if self.kind == "linear" else int(self.kind.removeprefix("mlp").partition("x")[0])

    @property
    def has_hidden(self) -> bool:
        """Says whether its experts or its layers have hidden units."""
        return self.kind == "moe_mlp" or self.layers > 1


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slows rotary embeddings down, for rows longer than the decoder was pretrained on."""

    # linear: all frequencies are divided by `factor`, and the fields below it are ignored; llama3: low
    # frequencies are, high ones stay, those in between are interpolated.
    kind: Literal["llama3", "linear"] = "llama3"
    factor: Annotated[float, AtLeast(1), AtMost(1e4)] = 8.0  # how much slower
    # Wavelengths above original_positions / low_freq_factor are low frequencies
    low_freq_factor: Factor = 1.0
    # Wavelengths below original_positions / high_freq_factor are high frequencies
    high_freq_factor: Factor = 4.0
    original_positions: Count = 8192  # row length of pretraining


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Describes a pre-norm decoder, by default one of LLaMA's family.

    `interop/families/hf_config.py` has the values of other families.
    """

    vocab: Size = 1024  # rows of the embedding table; at least as many as the tokenizer has tokens
    width: Size = 128  # of the hidden states
    depth: Depth = 4  # layers
    heads: Size = 4  # query heads
    kv_heads: Size = 4  # key and value heads (fewer than `heads`: grouped-query attention)
    head_dim: Annotated[int, AtLeast(2), AtMost(65536)] = 32  # width of a head
    mlp_width: Size = 352  # hidden units of the MLP
    norm: Literal["rms", "rms_zero", "layer"] = "rms"  # rms_zero multiplies by 1 + scale (Gemma)
    norm_eps: Epsilon = 1e-5  # epsilon of all norms
    post_norms: bool = False  # extra norms on the attention and MLP outputs, before the residual add
    parallel_block: bool = False  # attention and MLP read the same norm and are added together (Phi)
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)); else down(act(up(x)))
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"  # of the MLP
    attention_bias: Annotated[tuple[AttentionLinear, ...], Distinct()] = ()  # which linears have a bias
    mlp_bias: bool = False  # biases in the MLP
    qk_norm: bool = False  # a norm on each head's queries and keys, before they are rotated
    query_scale: Factor | None = None  # factor of the attention scores; None: head_dim ** -0.5
    rope_theta: Base = 10000.0  # base of the rotary embedding
    rope_scaling: RopeScaling | None = None  # slower rotary embedding; None: unscaled
    # Base in layers with a window, unscaled; None: as in the other layers
    local_rope_theta: Base | None = None
    rotary_fraction: Annotated[float, Above(0), Between(0, 1)] = 1.0  # part of each head that is rotated
    # Text embeddings (not visual tokens) times the square root of the width
    scaled_embedding: bool = False
    tied_head: bool = False  # the output head is the embedding table
    head_bias: bool = False  # a bias in the output head
    # Sliding window of each layer in tokens, repeated over the depth; 0: full attention. (): full
    # everywhere.
    windows: tuple[Whole, ...] = ()
    attention_softcap: Factor | None = None  # attention scores become cap * tanh(score / cap)
    logit_softcap: Factor | None = None  # the same for output logits


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Puts experts in place of the MLPs of some decoder layers (Med-MoE).

    The output is the weighted sum of the chosen experts' outputs, plus that of a meta expert.
    """

    experts: ExpertCount = 0  # per layer; 0: no layer has experts
    # Which layers have experts: sparse is every second one from layer 0, dense is every one.
    placement: Literal["sparse", "first_half", "second_half", "dense"] = "sparse"
    # layer numbers, which replace `placement`
    layers: Annotated[tuple[LayerNumber, ...], Distinct()] = ()
    # Experts per token. 1: its output is weighted by its probability; 2: by the two probabilities,
    # scaled to sum to 1.
    top_k: ExpertCount = 1
    meta: bool = True  # an extra MLP, which every token passes with weight 1
    # A dense MLP next to the experts, mixed by learned coefficients (arXiv 2201.05596)
    residual: bool = False
    # Capacity of an expert in training, as a multiple of tokens * top_k / experts; tokens beyond it skip
    # the expert. None: unlimited.
    capacity_factor: Capacity | None = None
    eval_capacity_factor: Capacity | None = None  # the same at evaluation
    # lower limit of that capacity, in tokens
    min_capacity: Annotated[int, AtLeast(0), AtMost(2**20)] = 0
    # Random selection in training. top-1: if an expert is full, the tokens that fit are random instead
    # of the first; top-2: the second expert is sampled instead of the runner-up.
    random: bool = True
    # Noise in training. jitter: on the router's input; rsample (top-1): the expert is drawn by its
    # probability.
    gate_noise: Literal["none", "jitter", "rsample"] = "none"
    eval_noise: bool | None = None  # `random` at evaluation too. None; paper: True
    # Padding tokens are routed, use capacity and count in the balancing loss. None; paper: True
    route_padding: bool | None = None
    # Weight of the balancing loss, which is summed over layers
    aux_coef: Annotated[float, AtLeast(0), AtMost(1000)] = 0.0
    # How experts run. dense: all experts on all tokens (the reference); grouped: tokens sorted by
    # expert; capacity: fixed buffers per expert; if `eval_capacity_factor` is None, evaluation has no
    # limit and runs grouped.
    path: Literal["dense", "grouped", "capacity"] = "grouped"

    @property
    def trains_otherwise(self) -> bool:
        """Says whether routing in training differs from routing at evaluation."""
        drawn = self.gate_noise != "none" or self.top_k == 2 and self.random
        return self.experts > 0 and (
            drawn or (self.capacity_factor, self.eval_capacity_factor) != (None, None)
        )

    def numbers(self, depth: int) -> tuple[int, ...]:
        """Lists the numbers of the layers with experts, in a decoder of `depth` layers."""
        if not self.experts:
            return ()
        every, half = range(depth), depth // 2
        placed = {
            "sparse": every[::2],
            "first_half": every[:half],
            "second_half": every[half:],
            "dense": every,
        }
        return self.layers or tuple(placed[self.placement])


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adds low-rank adapters (LoRA) to the decoder's linear layers."""

    rank: Annotated[int, AtLeast(0), AtMost(65536)] = 0  # 0: no adapters
    alpha: Factor = 16.0  # their output is scaled by alpha / rank
    dropout: Dropout = 0.05  # of their input, in training
    # Linear layers with an adapter
    targets: Annotated[tuple[Linear, ...], Distinct()] = get_args(Linear)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Describes the model: vision encoder, connector, decoder, and how they are computed."""

    vision: VisionConfig = VisionConfig()
    connector: ConnectorConfig = ConnectorConfig()
    decoder: DecoderConfig = DecoderConfig()
    moe: MoeConfig = MoeConfig()
    lora: LoraConfig = LoraConfig()
    compute_dtype: Float = "float32"  # of matrix products
    frozen_dtype: Float = "float32"  # in which frozen parameters are stored
    # How the kernels of frozen layers (decoder, vision encoder) are stored. plain: in frozen_dtype;
    # int8, nf4: in blocks of 64 numbers with a scale each, 8.25 and 4.25 bits a number (QLoRA).
    frozen_kernels: Literal["plain", "int8", "nf4"] = "plain"
    # Attention kernel of the decoder, and of the vision encoder where it applies; auto: the fastest one
    # that fits.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # What the backward pass recomputes to save memory. dots: everything except matrix products; full:
    # whole layers.
    remat: Literal["none", "dots", "full"] = "none"

    @property
    def answers_depend_on_batch(self) -> bool:
        """Says whether an answer depends on what else is answered beside it.

        Experts of limited capacity take tokens from each other, and routing padding or drawing experts
        by the place in a batch does the same.
        """
        moe = self.moe
        limited = moe.eval_capacity_factor is not None
        return moe.experts > 0 and bool(limited or moe.eval_noise or moe.route_padding)

    @property
    def tokens_per_image(self) -> int:
        """Counts the visual tokens that an image becomes."""
        return self.vision.patches // self.connector.rate
