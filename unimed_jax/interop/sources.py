"""Names what weights can be read from: the kinds of `config.init`, and which leaves each can give."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from unimed_jax.config import ModelConfig
from unimed_jax.interop.families.gguf import load_gguf
from unimed_jax.interop.families.hf import load_decoder
from unimed_jax.interop.families.med_moe import load_med_moe, load_router
from unimed_jax.interop.families.peft import load_peft
from unimed_jax.interop.families.towers import load_eva, load_tower
from unimed_jax.interop.families.unimed_pth import load_unimed
from unimed_jax.interop.tensors.load import Destination

# (path, config.model, destination) -> leaves by path
Loader = Callable[[str, ModelConfig, Destination], dict[str, Any]]


class Source(NamedTuple):
    """Describes one kind of weights."""

    what: str  # what its path names, for messages
    gives: tuple[str, ...]  # patterns of the leaves that it may give
    load: Loader

    def among(self, paths: Iterable[str]) -> bool:
        """Says whether this kind of weights may give one of these leaves."""
        return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in self.gives)


ADAPTERS = "decoder/*/lora_?"
ROUTERS = "decoder/layers/moe/router/*"

SOURCES: dict[str, Source] = {
    "hf": Source("the folder of a Hugging Face decoder", ("decoder/*",), load_decoder),
    "gguf": Source("the GGUF file of a decoder", ("decoder/*",), load_gguf),
    "eva": Source("the EVA-CLIP-g file", ("vision/*",), load_eva),
    "clip": Source("the folder of a Hugging Face CLIP", ("vision/*",), load_tower),
    "siglip": Source("the folder of a Hugging Face SigLIP", ("vision/*",), load_tower),
    "med_moe": Source("the folder of a Med-MoE checkpoint", ("*",), load_med_moe),
    "router": Source("Med-MoE's router file", (ROUTERS,), load_router),
    "unimed": Source(
        "a checkpoint of the original Uni-Med (.pth)", ("connector/*", ADAPTERS), load_unimed
    ),
    "peft": Source("the folder of a PEFT adapter", (ADAPTERS,), load_peft),
}
