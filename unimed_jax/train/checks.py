"""Checks, before the first step, what settings, tokenizer and model mean together."""

from collections.abc import Iterable

from unimed_jax import processes
from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.effects import SAID, without_effect
from unimed_jax.errors import UserError
from unimed_jax.rules import refuse_idle_rules
from unimed_jax.settings import FIDELITY


def check_start(config: Config, tokenizer: Tokenizer, paths: Iterable[str]) -> None:
    """Raises UserError for settings without effect on a model whose leaves lie at `paths`.

    Minor ones are only printed.
    """
    refuse_idle_rules(list(paths), config.train)
    loss = config.loss
    if tokenizer.coordinate_start is None and (loss.coordinate_sd or loss.coordinate_weight != 1):
        name = "coordinate_sd" if loss.coordinate_sd else "coordinate_weight"
        raise UserError(
            f"config.loss.{name}={getattr(loss, name)} has no effect, because the tokenizer has no "
            "tokens <0> to <100> for box coordinates; leave it at its default, or choose another "
            "tokenizer."
        )
    for _, sentence in without_effect(config, FIDELITY[config.fidelity], SAID):
        processes.say(sentence)
