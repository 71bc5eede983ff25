"""Makes a model small enough to train on tests/support/squares.py in seconds."""

import getpass
import tempfile
from pathlib import Path

from support.squares import COLOURS, Squares

from unimed_jax.config import default_config
from unimed_jax.settings import from_config_dict

__all__ = ["COLOURS", "Squares", "finished", "tiny_config"]

# prepared once for all tests
CACHE = Path(tempfile.gettempdir()) / f"unimed_jax-squares-{getpass.getuser()}"


def tiny_config(**train):
    """Returns settings (a ConfigDict) of a model that trains on `Squares` in seconds."""
    config = default_config()
    config.name = "squares"
    vision, connector, decoder = config.model.vision, config.model.connector, config.model.decoder
    vision.image_size, vision.patch_size, vision.width, vision.depth = 32, 8, 16, 1
    vision.heads, vision.mlp_width, vision.position_init = 2, 32, "sincos"
    connector.aggregation, connector.rate, connector.router_hidden = "block", 4, 8
    decoder.vocab = config.text.vocab = 640
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads, decoder.head_dim = 32, 1, 2, 2, 16
    decoder.mlp_width = 48
    config.data.sources = (dict(name="support.squares", id="squares", questions=2),)
    config.data.cache = str(CACHE)
    config.data.rows, config.data.row_tokens, config.data.row_images, config.data.row_answers = (
        4,
        160,
        2,
        96,
    )
    config.data.window = 32
    config.optimizer.lr, config.optimizer.warmup_lr, config.optimizer.warmup_steps = 3e-3, 0.0, 2
    config.train.steps, config.train.save_every, config.train.log_every = 12, 4, 1
    config.evaluate.batch, config.evaluate.max_new_tokens, config.evaluate.bootstrap = 16, 24, 50
    for key, value in train.items():
        config.train[key] = value
    return config


def finished(folder) -> None:
    """Trains a tiny run of four steps into folder/run, for tests that only read it."""
    from unimed_jax.train import loop  # not above: config files import this one, before JAX may start

    config = tiny_config(steps=4, save_every=2)
    config.evaluate.splits, config.evaluate.limit, config.evaluate.max_new_tokens = ("test",), 2, 2
    loop.train(from_config_dict(config), folder / "run")
