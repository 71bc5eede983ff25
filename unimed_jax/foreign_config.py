"""Reads a config.json that another program wrote, and bounds its numbers before they are used."""

from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError
from unimed_jax.parsing import read_json

CONFIG_BYTES = 1 << 20  # largest config.json that is read
# The largest numbers that are accepted, a hundred times those of the largest models.
LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 10_000, 1 << 16, 1 << 24, 1 << 28, 1 << 40
LARGEST = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "head_dim": WIDTH,
    "image_size": HEADS,
    "patch_size": HEADS,
    "projection_dim": WIDTH,
    "vocab_size": VOCABULARY,
    "sliding_window": POSITIONS,
    "max_window_layers": POSITIONS,
    "max_position_embeddings": POSITIONS,
    "original_max_position_embeddings": POSITIONS,
}
MAY_BE_NONE = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")
# 0 switches these off.
MAY_BE_ZERO = ("sliding_window", "max_window_layers")


def read_sizes(file: Path, advice: str) -> dict[str, Any]:
    """Reads a config.json whose counts and sizes are whole numbers that a model can have.

    advice: ends the sentence of an error. Raises UserError, naming the key, for any other.
    """
    settings = read_json(file, advice, CONFIG_BYTES)
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no object of settings; {advice}.")
    still = [settings]
    while still:
        group = still.pop()
        still += [value for value in group.values() if isinstance(value, dict)]
        for key in LARGEST.keys() & group.keys():
            _check_size(key, group[key], file)
    return settings


def _check_size(key: str, value: Any, file: Path) -> None:
    if value is None and key in MAY_BE_NONE:
        return
    least = 0 if key in MAY_BE_ZERO else 1
    if type(value) is not int or not least <= value <= LARGEST[key]:
        raise UserError(
            f"{file}: {key} is {repr(value)[:60]}; it must be a whole number from {least} to "
            f"{LARGEST[key]}."
        )
