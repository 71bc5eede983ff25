"""A small Uni-Med, trained from scratch on one average brain: the ten-minute run of the README.

Six tasks on slices of the ICBM152 template (see unimed_jax/data/datasets/brain.py); every parameter trains.
"""

from unimed_jax.config import default_config


def get_config():
    config = default_config()

    # Vision encoder: ViT, 64 pixels in patches of 8 -> 64 patches, no weights from outside.
    vision = config.model.vision
    vision.image_size, vision.patch_size = 64, 8
    vision.width, vision.depth, vision.heads, vision.mlp_width = 128, 2, 4, 512
    vision.activation, vision.position_init, vision.cls_token = "silu", "sincos", False
    vision.mean, vision.std = (0.25, 0.25, 0.25), (0.25, 0.25, 0.25)

    # Connector: 4x4 patches -> 4 visual tokens, five experts, soft router on task token + visual token.
    # Wide tokens: the experts see where each patch lies, and the encoder learns in a third of the steps that 16 take.
    connector = config.model.connector
    connector.aggregation, connector.rate = "block", 16
    connector.kind, connector.experts, connector.router = "moe_mlp", 5, "soft"
    connector.router_hidden, connector.activation = 64, "silu"

    # Decoder: LLaMA-shaped, trained whole.
    decoder = config.model.decoder
    decoder.vocab = config.text.vocab = 1024
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads, decoder.head_dim = 128, 4, 4, 4, 32
    decoder.mlp_width = 344

    # Mixture: share of the draws; a draw is one image and task with several of its questions.
    config.data.sources = tuple(
        dict(name="brain", tasks=(task,), weight=float(weight), questions=questions)
        for task, weight, questions in [
            ("refer", 9, 6),
            ("identify", 5, 6),
            ("vqa", 6, 3),
            ("caption", 4, 1),
            ("cls", 4, 2),
            ("qa", 9, 1),
        ]
    )
    config.data.rows, config.data.row_tokens, config.data.row_images, config.data.row_answers = 16, 152, 2, 96
    config.text.max_answer, config.text.max_prompt = 96, 128

    # Box coordinates: Gaussian soft targets over neighbouring hundredths.
    config.loss.coordinate_sd, config.loss.coordinate_weight = 1.5, 1.5

    optimizer = config.optimizer
    optimizer.lr, optimizer.min_lr, optimizer.warmup_lr, optimizer.warmup_steps = 2e-3, 0.0, 0.0, 40
    optimizer.betas, optimizer.weight_decay, optimizer.clip = (0.9, 0.98), 0.05, 1.0

    # At the common rate the task tokens hardly leave their small start within so short a run.
    config.train.rules = (dict(match="connector/task_tokens", train=True, lr_scale=10.0), dict(match="*", train=True))
    config.train.steps, config.train.save_every = 1200, 600
    config.evaluate.batch, config.evaluate.max_new_tokens = 128, 96
    return config
