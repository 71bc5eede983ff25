"""Uni-Med as published (NeurIPS 2024), at full size: EVA-CLIP-g -> CMoE -> LLaMA-2-7B-chat with LoRA.

Needs the weights and data named in `init`, `text.tokenizer` and `data.root`; without them the run says so.
"""

from unimed_jax.config import default_config


def get_config():
    config = default_config()
    config.fidelity = "paper"

    # Vision encoder: EVA-CLIP ViT-g/14 at 224 pixels, frozen; ln_vision behind it, frozen at 1 and 0.
    vision = config.model.vision
    vision.image_size, vision.patch_size = 224, 14
    vision.width, vision.depth, vision.heads, vision.mlp_width = 1408, 39, 16, 6144
    vision.activation, vision.qkv_bias, vision.cls_token = "gelu", "qv", True
    vision.norm_eps, vision.output_norm, vision.output_norm_eps = 1e-6, True, 1e-5

    # Connector: strips of 4 patches -> 64 visual tokens of 5632; 5 experts 5632 -> 4096 -> 4096;
    # router 11264 -> 45056 -> 5 on concat(task token, visual token), soft.
    connector = config.model.connector
    connector.aggregation, connector.rate = "projection", 4
    connector.kind, connector.experts = "moe_mlp", 5
    connector.router, connector.router_input, connector.task_tokens = "soft", "task_token", 1

    # Decoder: LLaMA-2-7B-chat, frozen, LoRA on all seven linears.
    decoder = config.model.decoder
    decoder.vocab, decoder.width, decoder.depth = 32000, 4096, 32
    decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.mlp_width = 32, 32, 128, 11008
    decoder.norm_eps, decoder.rope_theta = 1e-5, 10000.0
    lora = config.model.lora
    lora.rank, lora.alpha, lora.dropout = 8, 16.0, 0.05
    lora.targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.model.compute_dtype, config.model.frozen_dtype = "bfloat16", "bfloat16"

    # Weights: later ones overlay earlier ones.
    config.init = (("seed", ""), ("hf", ""), ("eva", ""))

    # Twelve data sets (MedMNIST's two share a source), one per batch, drawn by these weights.
    config.data.sources = tuple(
        dict(name=name, tasks=(task,), weight=float(weight))
        for name, task, weight in [
            ("medqa", "qa", 2),
            ("pubmedqa", "qa", 2),
            ("slake", "vqa", 5),
            ("path_vqa", "vqa", 5),
            ("slake", "refer", 4),
            ("slake", "identify", 4),
            ("samed", "refer", 4),
            ("samed", "identify", 4),
            ("medpix", "caption", 8),
            ("mimic_cxr", "caption", 8),
            ("medmnist", "cls", 4),
        ]
    )
    config.data.rows, config.data.row_tokens, config.data.row_images, config.data.row_answers = 4, 2048, 1, 1024
    config.text.max_answer, config.text.max_prompt, config.text.coordinate_tokens = 1024, 1024, False

    # AdamW, linear warm-up, cosine over all steps (the repository's values).
    optimizer = config.optimizer
    optimizer.lr, optimizer.min_lr, optimizer.warmup_lr, optimizer.warmup_steps = 1e-5, 1e-7, 1e-6, 5000
    optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip = (0.9, 0.999), 1e-8, 0.05, 0.0
    config.train.steps = 50000
    config.train.rules = (
        dict(match="decoder/*/lora_?", train=True),
        dict(match="connector/*", train=True),
        dict(match="*", train=False),
    )
    return config
