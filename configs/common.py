"""Parts that several config files share; each function fills in a part of `config`."""

import sys
from pathlib import Path

from unimed_jax.config import TASKS, VISUAL_TASKS, default_config
from unimed_jax.errors import UserError

# What trains when the decoder has adapters and all else but the connector is frozen.
ADAPTERS_AND_CONNECTOR = (
    dict(match="decoder/*/lora_?", train=True),
    dict(match="connector/*", train=True),
    dict(match="*", train=False),
)


# ---- Uni-Med -----------------------------------------------------------------------------------


def brain_mixture():
    """Lists the six tasks of the brain set: share of the draws, questions that share an image."""
    return (
        dict(name="brain", tasks=("refer",), weight=9.0, questions=6),
        dict(name="brain", tasks=("identify",), weight=5.0, questions=6),
        dict(name="brain", tasks=("vqa",), weight=6.0, questions=3),
        dict(name="brain", tasks=("caption",), weight=4.0, questions=1),
        dict(name="brain", tasks=("cls",), weight=4.0, questions=2),
        dict(name="brain", tasks=("qa",), weight=9.0, questions=1),
    )


MRICRON = "/usr/share/mricron/templates"  # where Debian's package mricron-data puts its files


def another_head(config, folder=MRICRON):
    """Scores a run of the brain set on a head that nothing trains on too, as two more data sets.

    These are `colin`, the brain alone, and `colin_skull`, the whole head. Without the files in
    `folder` nothing changes, and that is said.
    """
    if not Path(folder, "ch2bet.nii.gz").is_file():
        print(
            f"colin is not scored, because {folder} holds no ch2bet.nii.gz; install Debian's package "
            "mricron-data, or name the folder of its files as colin=FOLDER.",
            file=sys.stderr,
        )
        return
    heads = {"colin": {}, "colin_skull": {"skull": True}}
    evaluate = config.evaluate
    evaluate.entries = (
        *(dict(source="brain", task=t, split=s) for s in evaluate.splits for t in TASKS),
        *(dict(source=h, task=t, split="test") for h in heads for t in VISUAL_TASKS),
    )
    evaluate.sources = (
        dict(name="brain"),
        *(dict(name="colin", id=h, path=folder, options=options) for h, options in heads.items()),
    )


def tiny_vision(config):
    """Sets a ViT for 64 pixels in 64 patches, trained from random weights."""
    vision = config.model.vision
    vision.image_size = 64
    vision.patch_size = 8
    vision.width = 128
    vision.depth = 2
    vision.heads = 4
    vision.mlp_width = 512
    vision.activation = "silu"
    vision.position_init = "sincos"
    vision.cls_token = False
    vision.mean = (0.25, 0.25, 0.25)
    vision.std = (0.25, 0.25, 0.25)


def tiny_connector(config):
    """Sets 4 visual tokens of 4x4 patches, five experts, a soft router on task and visual token.

    Wide tokens: the experts see where each patch lies, and the encoder learns in a third of the
    steps that 16 take.
    """
    connector = config.model.connector
    connector.aggregation = "block"
    connector.rate = 16
    connector.kind = "moe_mlp"
    connector.experts = 5
    connector.router = "soft"
    connector.router_hidden = 64
    connector.activation = "silu"


def tiny_decoder(config):
    """Sets a small LLaMA with a vocabulary of 1024, trained on the data."""
    decoder = config.model.decoder
    decoder.vocab = 1024
    decoder.width = 128
    decoder.depth = 4
    decoder.heads = 4
    decoder.kv_heads = 4
    decoder.head_dim = 32
    decoder.mlp_width = 344
    config.text.vocab = 1024


def adapters(config, dropout):
    """Sets LoRA of rank 8 on all seven linear layers of the decoder."""
    lora = config.model.lora
    lora.rank = 8
    lora.alpha = 16.0
    lora.dropout = dropout
    lora.targets = ("q", "k", "v", "o", "gate", "up", "down")


def tiny_optimizer(config):
    """Sets AdamW for the short runs on the brain set: linear warm-up, cosine to 0."""
    optimizer = config.optimizer
    optimizer.lr = 2e-3
    optimizer.min_lr = 0.0
    optimizer.warmup_lr = 0.0
    optimizer.betas = (0.9, 0.98)
    optimizer.clip = 1.0


# ---- Med-MoE (arXiv 2404.10237) ----------------------------------------------------------------
SIZES = ("stablelm", "phi2", "tiny", "real")


# Stage 3 and the router learn from these, mixed by their numbers of questions (docs/real_data.md).
MED_MOE_QUESTIONS = (
    dict(name="vqa_rad", weight=1797.0),
    dict(name="slake", tasks=("vqa",), weight=4919.0),
    dict(name="path_vqa", weight=19654.0),
)
MED_MOE_CLASSES = (
    dict(
        name="medmnist",
        id="pneumoniamnist",
        options={
            "name": "pneumoniamnist",
            "question": "Is this chest X-ray normal, or does it show pneumonia?",
        },
    ),
    dict(
        name="medmnist",
        id="organcmnist",
        options={"name": "organcmnist", "question": "Which organ is in the middle of this CT image?"},
    ),
)


def med_moe(size):
    """Makes what the four stages share: align -> instruct -> router -> moe.

    Sizes are :stablelm and :phi2 (published); :tiny, on CPU from the vision encoder and decoder of a
    finished run of configs/brain_tiny.py; and :real, on CPU from random weights, on real patients. A
    stage starts from the run that its `init` names.
    """
    if size not in SIZES:
        known = ", ".join(f":{name}" for name in SIZES)
        raise UserError(
            f"Med-MoE's configs come in sizes, not {size!r}; add one of {known} after the file's name."
        )
    config = default_config()
    {"stablelm": stablelm, "phi2": phi2, "tiny": tiny, "real": real}[size](config)

    # The projector: a two-layer MLP on each visual token.
    config.model.connector.kind = "mlp2x_gelu"
    config.model.connector.task_tokens = 0
    config.model.lora.rank = 0

    # The mean over all answer tokens of a batch, in which data sets are mixed. With fidelity="paper"
    # padding is routed too, and published scores lead; but nothing is ever cut to Uni-Med's 50 words.
    config.loss.reduction = "token"
    config.data.mixing = "per_example"
    config.text.form = "phi" if size == "phi2" else "stablelm"
    config.text.max_words = 4096

    # AdamW, cosine, no decay; gradients are clipped to norm 1. Warm-up is 3 % of each stage's steps.
    optimizer = config.optimizer
    optimizer.min_lr = 0.0
    optimizer.warmup_lr = 0.0
    optimizer.betas = (0.9, 0.999)
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0
    optimizer.clip = 1.0
    return config


def clip(config):
    """Sets CLIP ViT-L/14 at 336 pixels, features of layer -2, and rows of one example."""
    vision = config.model.vision
    vision.image_size = 336
    vision.patch_size = 14
    vision.width = 1024
    vision.depth = 24
    vision.heads = 16
    vision.mlp_width = 4096
    vision.activation = "quick_gelu"
    vision.qkv_bias = "qkv"
    vision.patch_bias = False
    vision.pre_norm = True
    vision.norm_eps = 1e-5
    vision.feature_layer = -2
    vision.output_norm = False
    config.model.connector.rate = 1
    config.model.compute_dtype = "bfloat16"
    config.model.frozen_dtype = "bfloat16"
    config.model.remat = "full"

    text = config.text
    text.max_answer = 2048
    text.max_prompt = 2048
    text.coordinate_tokens = False

    data = config.data
    data.packing = False
    data.rows = 64
    data.row_tokens = 2048
    data.row_images = 1
    data.row_answers = 1024
    # 8 rows at a time: logits of 1024 answers over 100,352 words are large
    config.train.accumulation = 8

    # Every stage is scored on what stage 3 learns from, and on two sets of classes that none learns
    # from.
    evaluate = config.evaluate
    evaluate.sources = (*MED_MOE_QUESTIONS, *MED_MOE_CLASSES)
    evaluate.splits = ("test",)
    evaluate.batch = 16
    evaluate.max_new_tokens = 256


def stablelm(config):
    """Sets StableLM-2-1.6B."""
    clip(config)
    decoder = config.model.decoder
    decoder.vocab = 100352
    decoder.width = 2048
    decoder.depth = 24
    decoder.heads = 32
    decoder.kv_heads = 32
    decoder.head_dim = 64
    decoder.mlp_width = 5632
    decoder.norm = "layer"
    decoder.norm_eps = 1e-5
    decoder.rotary_fraction = 0.25
    decoder.attention_bias = ("q", "k", "v")


def phi2(config):
    """Sets Phi-2, without the bias of its head, which Med-MoE leaves out."""
    clip(config)
    decoder = config.model.decoder
    decoder.vocab = 51200
    decoder.width = 2560
    decoder.depth = 32
    decoder.heads = 32
    decoder.kv_heads = 32
    decoder.head_dim = 80
    decoder.mlp_width = 10240
    decoder.norm = "layer"
    decoder.norm_eps = 1e-5
    decoder.rotary_fraction = 0.4
    decoder.attention_bias = ("q", "k", "v", "o")
    decoder.mlp_bias = True
    decoder.parallel_block = True
    decoder.gated_mlp = False
    decoder.activation = "gelu_tanh"


def tiny(config):
    """Sets shapes and vocabulary of configs/brain_tiny.py, and 16 visual tokens of 2x2 patches."""
    tiny_vision(config)
    tiny_decoder(config)
    config.model.connector.aggregation = "block"
    config.model.connector.rate = 4
    config.text.max_answer = 96
    config.text.max_prompt = 192

    # A row for one image with some of its questions (align: two images with their captions).
    data = config.data
    data.rows = 16
    data.row_tokens = 208
    data.row_images = 1
    data.row_answers = 32
    config.evaluate.splits = ("test",)
    config.evaluate.batch = 128
    config.evaluate.max_new_tokens = 16


def tiny_questions(config):
    """Sets what stages 2 and 3 learn from at the tiny size, and for how long."""
    config.data.sources = (dict(name="domains", tasks=("vqa", "cls"), questions=3),)
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 12
    config.train.steps = 400


# VQA-RAD's own split is by question, so its test asks about images of train: here an image is in one
# part. MedPix 2.0 is split by case, and what VQA-RAD has of it is left out.
def real_sets(medpix, **rad):
    """Lists VQA-RAD, and MedPix 2.0 for the tasks `medpix`; `rad` is set for VQA-RAD."""
    alone = {"without": "../vqa_rad/VQA_RAD Image Folder"}
    return (
        dict(name="vqa_rad", splits={"test": "train[80%:] by cluster"}, **rad),
        dict(name="medpix2", tasks=medpix, questions=3, options=alone),
    )


def real(config):
    """Sets a small model for VQA-RAD and MedPix 2.0, and what it is scored on."""
    tiny_vision(config)
    tiny_decoder(config)
    config.model.vision.image_size = 96
    config.model.vision.patch_size = 12
    config.model.connector.aggregation = "block"
    config.model.connector.rate = 4
    config.model.decoder.vocab = config.text.vocab = 3072
    config.text.coordinate_tokens = False
    config.text.max_answer = 128
    config.text.max_prompt = 192

    # A row for one image with some of its questions.
    data = config.data
    data.rows = 16
    data.row_tokens = 160
    data.row_images = 1
    data.row_answers = 64
    config.evaluate.sources = real_sets(("cls",))
    config.evaluate.splits = ("test",)
    config.evaluate.batch = 128
    config.evaluate.max_new_tokens = 16


def real_questions(config):
    """Sets what stages 2 and 3 learn from on real patients, and for how long."""
    config.data.sources = real_sets(("cls",), questions=4)
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 15
    config.train.steps = 500
