"""Uni-Med as published (NeurIPS 2024), at full size: EVA-CLIP-g -> CMoE -> LLaMA-2-7B-chat with LoRA.

Needs the weights and data named in `init`, `text.tokenizer` and `data.root`; without them the run
says so.
"""

import common

from unimed_jax.config import default_config


def get_config():
    config = default_config()
    config.fidelity = "paper"

    # Vision encoder: EVA-CLIP ViT-g/14 at 224 pixels, frozen; after it ln_vision, frozen at 1 and 0.
    vision = config.model.vision
    vision.image_size = 224
    vision.patch_size = 14
    vision.width = 1408
    vision.depth = 39
    vision.heads = 16
    vision.mlp_width = 6144
    vision.activation = "gelu"
    vision.qkv_bias = "qv"
    vision.cls_token = True
    vision.norm_eps = 1e-6
    vision.output_norm = True
    vision.output_norm_eps = 1e-5

    # Connector: strips of 4 patches -> 64 visual tokens of 5632; 5 experts 5632 -> 4096 -> 4096;
    # router 11264 -> 45056 -> 5 on concat(task token, visual token), soft.
    connector = config.model.connector
    connector.aggregation = "projection"
    connector.rate = 4
    connector.kind = "moe_mlp"
    connector.experts = 5
    connector.router = "soft"
    connector.router_input = "task_token"
    connector.task_tokens = 1

    # Decoder: LLaMA-2-7B-chat, frozen, LoRA on all seven linear layers.
    decoder = config.model.decoder
    decoder.vocab = 32000
    decoder.width = 4096
    decoder.depth = 32
    decoder.heads = 32
    decoder.kv_heads = 32
    decoder.head_dim = 128
    decoder.mlp_width = 11008
    decoder.norm_eps = 1e-5
    decoder.rope_theta = 10000.0
    common.adapters(config, dropout=0.05)
    config.model.compute_dtype = "bfloat16"
    config.model.frozen_dtype = "bfloat16"

    # Weights: later ones overlay earlier ones.
    config.init = (("seed", ""), ("hf", ""), ("eva", ""))

    # Twelve data sets, one per batch, drawn by these weights; each in data.root under its name
    # (docs/real_data.md).
    data = config.data
    # the published one is not given
    by_case = {"train": "train[:90%] by cluster", "test": "train[90%:] by cluster"}
    data.sources = (
        dict(name="medqa", tasks=("qa",), weight=2.0),
        dict(name="pubmedqa", tasks=("qa",), weight=2.0),
        dict(name="slake", tasks=("vqa",), weight=5.0),
        dict(name="path_vqa", tasks=("vqa",), weight=5.0),
        dict(name="slake", tasks=("refer",), weight=4.0),
        dict(name="slake", tasks=("identify",), weight=4.0),
        dict(name="samed", tasks=("refer",), weight=4.0, splits=by_case),
        dict(name="samed", tasks=("identify",), weight=4.0, splits=by_case),
        dict(name="medpix", tasks=("caption",), weight=8.0),
        dict(name="mimic_cxr", tasks=("caption",), weight=8.0),
        dict(
            name="medmnist", id="dermamnist", tasks=("cls",), weight=2.0, options={"name": "dermamnist"}
        ),
        dict(
            name="medmnist",
            id="organsmnist",
            tasks=("cls",),
            weight=2.0,
            options={"name": "organsmnist"},
        ),
    )
    data.rows = 4
    data.row_tokens = 2048
    data.row_images = 1
    data.row_answers = 1024
    config.text.max_answer = 1024
    config.text.max_prompt = 1024
    config.text.coordinate_tokens = False

    # AdamW, linear warm-up, cosine over all steps (the repository's values).
    optimizer = config.optimizer
    optimizer.lr = 1e-5
    optimizer.min_lr = 1e-7
    optimizer.warmup_lr = 1e-6
    optimizer.warmup_steps = 5000
    optimizer.betas = (0.9, 0.999)
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.05
    optimizer.clip = 0.0
    config.train.rules = common.ADAPTERS_AND_CONNECTOR
    config.train.steps = 50000
    return config
