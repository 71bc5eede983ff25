"""A new connector between the encoder and the decoder of a finished run of configs/brain_tiny.py.

Both are frozen, the decoder with LoRA, as published: all that a picture tells must pass the
connector. With :narrow less gets through: one visual token a picture, experts of 16 hidden units.
"""

import brain_tiny
import common

from unimed_jax.errors import UserError


def get_config(form=""):
    if form not in ("", "narrow"):
        raise UserError(f"brain_frozen.py takes no {form!r}; write :narrow or nothing.")
    config = brain_tiny.get_config()
    common.adapters(config, dropout=0.05)
    config.init = (("seed", ""), ("run", "runs/brain_tiny"), ("seed", "connector/*"))
    train = config.train
    train.rules = (
        dict(match="connector/task_tokens", train=True, lr_scale=10.0),
        *common.ADAPTERS_AND_CONNECTOR,
    )
    train.steps = 600
    train.save_every = 300
    config.evaluate.splits = ("test",)

    if form == "narrow":
        connector = config.model.connector
        connector.rate = 64
        connector.hidden = 16
        connector.router_hidden = 16
        connector.task_token_width = 128
    return config
