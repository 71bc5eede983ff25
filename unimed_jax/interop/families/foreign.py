"""Checks the translated settings of a model that another program described."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from unimed_jax.config import DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from unimed_jax.errors import UserError
from unimed_jax.settings import check_model


@contextlib.contextmanager
def understood(where: str | Path) -> Iterator[None]:
    """Turns what goes wrong while settings are translated into a UserError that names their file."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{where} does not describe a model that can be built ({reason}); get it again."
        ) from error


def checked_decoder(decoder: DecoderConfig, where: str | Path) -> DecoderConfig:
    """Returns the settings of a decoder found at `where`.

    Raises UserError if no such decoder can be built.
    """
    _check(ModelConfig(decoder=decoder, lora=LoraConfig(rank=0)), where)
    return decoder


def checked_tower(vision: VisionConfig, where: str | Path) -> VisionConfig:
    """Returns the settings of a vision tower found at `where`.

    Raises UserError if no such tower can be built.
    """
    for name in ("image_size", "patch_size", "width", "depth", "heads"):
        if getattr(vision, name) < 1:
            raise UserError(f"{where}: its {name} is {getattr(vision, name)}; get it again.")
    if (
        vision.width % vision.heads
        or not 0 < vision.norm_eps < 1
        or vision.depth < -vision.feature_layer
    ):
        raise UserError(
            f"{where} describes no vision tower that can be built: width {vision.width}, "
            f"{vision.heads} heads, {vision.depth} blocks, an epsilon of {vision.norm_eps}; get it "
            "again."
        )
    return vision


def _check(model: ModelConfig, where: str | Path) -> None:
    try:
        check_model(model)
    except UserError as error:
        raise UserError(
            f"{where} describes no model that can be built, in our words: {error}"
        ) from error
