"""What the four stages of Med-MoE (arXiv 2404.10237) share: the model, the form of its text, the optimiser.

align -> instruct -> router -> moe, each with :stablelm, :phi2 (the published sizes) or :tiny (on CPU, from the vision
encoder and decoder of a finished run of configs/brain_tiny.py). A stage starts from the run that its `init` names.
"""

from unimed_jax.config import default_config
from unimed_jax.errors import UserError

SIZES = ("stablelm", "phi2", "tiny")


def get_config(size=""):
    if size not in SIZES:
        known = ", ".join(f":{name}" for name in SIZES)
        raise UserError(f"Med-MoE's configs come in sizes, not {size!r}; add one of {known} behind the file's name.")
    config = default_config()
    {"stablelm": stablelm, "phi2": phi2, "tiny": tiny}[size](config)

    # The projector: a two-layer MLP on each visual token.
    config.model.connector.kind, config.model.connector.task_tokens = "mlp2x_gelu", 0
    config.model.lora.rank = 0

    # The mean over all answer tokens of a batch, in which data sets are mixed. With fidelity="paper" padding is routed
    # too, and published scores lead; but nothing is ever cut to Uni-Med's 50 words.
    config.loss.reduction, config.data.mixing = "token", "per_example"
    config.text.form, config.text.max_words = {"phi2": "phi"}.get(size, "stablelm"), 4096

    # AdamW, cosine, no decay; gradients are clipped to norm 1. Warm-up is 3 % of each stage's steps.
    optimizer = config.optimizer
    optimizer.min_lr, optimizer.warmup_lr, optimizer.betas, optimizer.eps = 0.0, 0.0, (0.9, 0.999), 1e-8
    optimizer.weight_decay, optimizer.clip = 0.0, 1.0
    return config


# ---- sizes -----------------------------------------------------------------------------------------
def published(config):
    """CLIP ViT-L/14 at 336 pixels, features of layer -2, 576 visual tokens; an example a row of 2048."""
    vision = config.model.vision
    vision.image_size, vision.patch_size = 336, 14
    vision.width, vision.depth, vision.heads, vision.mlp_width = 1024, 24, 16, 4096
    vision.activation, vision.qkv_bias, vision.patch_bias, vision.pre_norm = "quick_gelu", "qkv", False, True
    vision.norm_eps, vision.feature_layer, vision.output_norm = 1e-5, -2, False
    config.model.connector.rate = 1
    config.model.compute_dtype, config.model.frozen_dtype, config.model.remat = "bfloat16", "bfloat16", "full"
    config.text.max_answer, config.text.max_prompt, config.text.coordinate_tokens = 2048, 2048, False
    data = config.data
    data.packing, data.rows = False, 64
    data.row_tokens, data.row_images, data.row_answers = 2048, 1, 1024
    config.train.accumulation = 8  # 8 rows at a time: logits of 1024 answers over 100,352 words are large
    # Every stage is scored on what stage 3 learns from: Med-MoE's own files, mixed by their numbers of questions.
    config.evaluate.sources = tuple(
        dict(name="llava", path=name, weight=float(questions))
        for name, questions in [("vqa_rad", 1797), ("slake", 4919), ("path_vqa", 19654)]
    )
    config.evaluate.splits, config.evaluate.batch, config.evaluate.max_new_tokens = ("test",), 16, 256


def stablelm(config):
    """StableLM-2-1.6B."""
    published(config)
    decoder = config.model.decoder
    decoder.vocab, decoder.width, decoder.depth = 100352, 2048, 24
    decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.mlp_width = 32, 32, 64, 5632
    decoder.norm, decoder.norm_eps, decoder.rotary_fraction = "layer", 1e-5, 0.25
    decoder.attention_bias = ("q", "k", "v")


def phi2(config):
    """Phi-2, without the bias of its head, which Med-MoE leaves out."""
    published(config)
    decoder = config.model.decoder
    decoder.vocab, decoder.width, decoder.depth = 51200, 2560, 32
    decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.mlp_width = 32, 32, 80, 10240
    decoder.norm, decoder.norm_eps, decoder.rotary_fraction = "layer", 1e-5, 0.4
    decoder.attention_bias, decoder.mlp_bias = ("q", "k", "v", "o"), True
    decoder.parallel_block, decoder.gated_mlp, decoder.activation = True, False, "gelu_tanh"


def tiny(config):
    """The shapes of configs/brain_tiny.py, and its words; 2x2 patches -> 16 visual tokens an image."""
    vision = config.model.vision
    vision.image_size, vision.patch_size = 64, 8
    vision.width, vision.depth, vision.heads, vision.mlp_width = 128, 2, 4, 512
    vision.activation, vision.position_init, vision.cls_token = "silu", "sincos", False
    vision.mean, vision.std = (0.25, 0.25, 0.25), (0.25, 0.25, 0.25)
    config.model.connector.aggregation, config.model.connector.rate = "block", 4
    decoder = config.model.decoder
    decoder.vocab = config.text.vocab = 1024
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads, decoder.head_dim = 128, 4, 4, 4, 32
    decoder.mlp_width = 344
    config.text.max_answer, config.text.max_prompt = 96, 192
    # A row for one image with some of its questions (align: two images with their captions).
    data = config.data
    data.rows, data.row_tokens, data.row_images, data.row_answers = 16, 208, 1, 32
    config.evaluate.splits, config.evaluate.batch, config.evaluate.max_new_tokens = ("test",), 128, 16
