"""Uni-Med's recipe (configs/cmoe.py) around Gemma-7B-it: only the decoder differs.

Needs the weights and data named in `init`, `text.tokenizer` and `data.root`; without them the run
says so.
"""

import cmoe


def get_config():
    config = cmoe.get_config()

    # Decoder: Gemma-7B-it, frozen, LoRA on all seven linear layers. Experts end in its width: 5632 ->
    # 3072 -> 3072.
    decoder = config.model.decoder
    decoder.vocab = 256000
    decoder.width = 3072
    decoder.depth = 28
    decoder.heads = 16
    decoder.kv_heads = 16
    decoder.head_dim = 256
    decoder.mlp_width = 24576
    decoder.norm = "rms_zero"
    decoder.norm_eps = 1e-6
    decoder.activation = "gelu_tanh"
    decoder.scaled_embedding = True
    decoder.tied_head = True
    decoder.rope_theta = 10000.0
    return config
