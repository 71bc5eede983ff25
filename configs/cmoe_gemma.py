"""Uni-Med's recipe (configs/cmoe.py) around Gemma-7B-it: the decoder alone differs.

Needs the weights and data named in `init`, `text.tokenizer` and `data.root`; without them the run says so.
"""

from pathlib import Path

from unimed_jax.settings import load_config_file


def get_config():
    config = load_config_file(str(Path(__file__).with_name("cmoe.py")))
    config.name = "cmoe_gemma"

    # Decoder: Gemma-7B-it, frozen, LoRA on all seven linears. Experts end in its width: 5632 -> 3072 -> 3072.
    decoder = config.model.decoder
    decoder.vocab, decoder.width, decoder.depth = 256000, 3072, 28
    decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.mlp_width = 16, 16, 256, 24576
    decoder.norm, decoder.norm_eps, decoder.activation = "rms_zero", 1e-6, "gelu_tanh"
    decoder.scaled_embedding, decoder.tied_head, decoder.rope_theta = True, True, 10000.0
    return config
