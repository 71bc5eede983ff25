"""Says whether a run's weights mean the same in another model, and which decoder its adapters need."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from unimed_jax.config import ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families.hf_config import decoder_differences, differences_text
from unimed_jax.interop.families.unimed_hf import is_exported
from unimed_jax.runs.checkpoint import newest_note

# Settings in which a model may differ from the run whose encoder it takes: shapes say the rest.
FREE_OF_VISION = ("image_size", "position_init")
ADAPTERS = ("/lora_a", "/lora_b")


def refuse_other_model(
    folder: Path, theirs: ModelConfig, ours: ModelConfig, taken: Collection[str], lost: Collection[str]
) -> None:
    """Raises UserError if the leaves of a run would compute something else in this model.

    taken: paths of the leaves that this model takes from the run in `folder`. lost: those of the run
    that have no place here. What a later source of `config.init` replaces is in neither.
    """
    adapters = sorted({path.split("/")[-2] for path in lost if path.endswith(ADAPTERS)})
    if adapters and any(path.startswith("decoder/layers/") for path in taken):
        raise UserError(
            f"config.init: run {folder} has adapters of rank {theirs.lora.rank} on "
            f"{', '.join(adapters)}, and config.model has no place for them, so that its decoder would "
            "lose what they learned; set config.model.lora as there, or write its decoder with export "
            "--format=decoder and start from that as ('hf', FOLDER)."
        )
    text = differences_text(_differences(theirs, ours, taken))
    if text:
        raise UserError(
            f"config.init: the weights of run {folder} would compute something else here: {text}; set "
            "what is said there, or put ('seed', 'connector/*') or the like after it for random numbers."
        )


def _differences(
    theirs: ModelConfig, ours: ModelConfig, taken: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (setting, value there, value here) of each part whose leaves are taken, equal or not."""

    def takes(*parts: str) -> bool:
        return any(path.startswith(parts) for path in taken)

    if takes("vision/blocks/"):
        for field in dataclasses.fields(theirs.vision):
            if field.name not in FREE_OF_VISION:
                name = field.name
                yield f"vision.{name}", getattr(theirs.vision, name), getattr(ours.vision, name)
    if takes("connector/experts/", "connector/layers/"):
        there, here = theirs.connector, ours.connector
        for name in ("kind", "aggregation", "rate", "activation"):
            yield f"connector.{name}", getattr(there, name), getattr(here, name)
        if here.is_moe:
            yield "connector.experts", there.experts, here.experts
        if here.has_hidden:
            widths = there.hidden or theirs.decoder.width, here.hidden or ours.decoder.width
            yield "connector.hidden", *widths
    if takes("decoder/layers/"):
        for name, left, right in decoder_differences(theirs.decoder, ours.decoder):
            if name != "vocab":  # other rows of the table are another leaf, which is not taken
                yield f"decoder.{name}", left, right
    if takes("decoder/layers/moe/") and theirs.moe.experts:
        depth = ours.decoder.depth
        yield "the layers with experts", theirs.moe.numbers(depth), ours.moe.numbers(depth)
        for name in ("experts", "top_k", "meta", "residual"):
            yield f"moe.{name}", getattr(theirs.moe, name), getattr(ours.moe, name)
    if any(path.endswith(ADAPTERS) for path in taken):
        scales = theirs.lora.alpha / theirs.lora.rank, ours.lora.alpha / ours.lora.rank
        yield "lora.alpha / lora.rank", *scales


def base_of_adapters(folder: Path, config: ModelConfig, paths: Iterable[str]) -> tuple[str, str]:
    """Names the decoder that a run's adapters belong to, as its newest checkpoint says.

    paths: of all leaves. Returns ("", what else to do) where no one folder or file holds that decoder:
    PEFT would put the adapters on other weights without a word.
    """
    if is_exported(folder):  # its adapters are merged
        return "", ""
    base = newest_note(folder / "checkpoints")[1].get("base", {})
    decoder = [p for p in paths if p.startswith("decoder/") and not p.endswith(ADAPTERS)]
    own = [path for path in decoder if path not in base]
    if config.moe.experts or own:
        part = "its experts" if config.moe.experts else own[0]
        return "", f"only this run holds {part}; take --format=decoder or model, which merge them"
    sources = {base[path]["source"] for path in decoder}
    kind, _, path = sources.pop().partition(" ")
    if sources:
        return "", "it is of several sources; take --format=decoder or model, which merge them"
    if kind == "run":
        return "", f"export --run={path} --format=decoder writes it"
    return (path, "") if kind in ("hf", "gguf") else ("", f"it is that of {kind} {path}")
