"""Lists the formats that `export` can write, with what each refuses and its writer.

This module is the mirror of sources.py. A new format is a writer in families/ and one entry of
`TARGETS`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimed_jax.config import Config
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.interop.families.hf import export_decoder
from unimed_jax.interop.families.med_moe import export_med_moe
from unimed_jax.interop.families.peft import export_peft
from unimed_jax.interop.families.unimed_hf import export_unimed_hf, merged_leaves
from unimed_jax.interop.families.unimed_pth import export_unimed, trainable_table


@dataclasses.dataclass(frozen=True)
class Content:
    """Holds what there is to write of a trained model."""

    config: Config
    leaves: Mapping[str, Any]  # every leaf by path, adapters not merged
    tokenizer: Path  # a Hugging Face tokenizer folder
    trained: frozenset[str] = frozenset()  # paths of the leaves that trained
    # Adam's state of each of them (fields count, mean, square); only for a target that wants it
    moments: Any = None
    base: str = ""  # name or folder of the decoder that the adapters belong to, for peft
    metrics: Mapping[str, Any] | None = None  # the run's metrics.json, for the model card
    reliance: Mapping[str, Any] | None = None  # the run's reliance.json, for the card
    notes: Sequence[str] = ()  # sentences about changed data or a changed tokenizer, for the card
    # states of both, for the card (runs/inputs.py)
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ids(self) -> dict[str, int]:
        tokenizer = Tokenizer.load(self.tokenizer)
        tokenizer.check_fits(self.config.model.decoder.vocab)
        return {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}


class Target(NamedTuple):
    """Describes one format that a trained model can be written in."""

    what: str  # for --help
    write: Callable[[str | Path, Content], None]  # raises UserError for what the format cannot hold
    # why this config's model cannot be written, or None
    refuse: Callable[[Config], str | None] = lambda config: None
    moments: bool = False  # whether it holds the optimizer's state
    kernels: bool = False  # whether it holds the kernels of the decoder, not only adapters
    base: bool = False  # whether it names the decoder that its adapters belong to


def _dense_only(config: Config) -> str | None:
    if config.model.moe.experts:
        return "this format has no place for the decoder's experts; choose med_moe."
    return None


def _model_refuses(config: Config) -> str | None:
    if (config.text.form, config.data.fit) != ("unimed", "stretch"):
        return (
            "this format asks in Uni-Med's form only, and this run has "
            f"config.text.form={config.text.form!r} and config.data.fit={config.data.fit!r}; choose "
            "another format."
        )
    return _dense_only(config)


def _write_model(out: str | Path, content: Content) -> None:
    about = content.metrics, content.notes, content.inputs, content.reliance
    export_unimed_hf(out, content.config, content.leaves, content.tokenizer, *about)


def _write_decoder(out: str | Path, content: Content) -> None:
    model = content.config.model
    export_decoder(
        out, model.decoder, merged_leaves(model, content.leaves), content.tokenizer, content.ids()
    )


def _write_peft(out: str | Path, content: Content) -> None:
    export_peft(out, content.config.model, content.leaves, content.base)


def _write_unimed(out: str | Path, content: Content) -> None:
    """Writes the content of an original checkpoint plus all that trained.

    So nothing is left out silently.
    """
    original = next((path for kind, path in reversed(content.config.init) if kind == "unimed"), None)
    paths = content.trained | set(trainable_table(content.config.model).paths())
    held = {path: leaf for path, leaf in content.leaves.items() if path in paths}
    export_unimed(out, content.config, held, content.moments, like=original)


def _write_med_moe(out: str | Path, content: Content) -> None:
    model = content.config.model
    export_med_moe(out, model, merged_leaves(model, content.leaves), content.tokenizer, content.ids())


TARGETS: dict[str, Target] = {
    "model": Target("all of it, for transformers", _write_model, _model_refuses, kernels=True),
    "decoder": Target("the language model, adapters merged", _write_decoder, _dense_only, kernels=True),
    "peft": Target("only the adapters", _write_peft, base=True),
    "unimed": Target(
        "a checkpoint file of the original Uni-Med", _write_unimed, _dense_only, moments=True
    ),
    "med_moe": Target(
        "the folder of a Med-MoE checkpoint, adapters merged", _write_med_moe, kernels=True
    ),
}
