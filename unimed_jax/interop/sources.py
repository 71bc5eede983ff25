"""Where weights come from outside: the kinds of `config.init`, and what each can give."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from unimed_jax.config import ModelConfig
from unimed_jax.interop.families.gguf import load_gguf
from unimed_jax.interop.families.hf import load_decoder
from unimed_jax.interop.families.med_moe import load_med_moe, load_router
from unimed_jax.interop.families.peft import load_peft
from unimed_jax.interop.families.towers import load_tower
from unimed_jax.interop.families.unimed_pth import load_unimed
from unimed_jax.interop.tensors.load import Destination

Loader = Callable[[str, ModelConfig, Destination], dict[str, Any]]


class Source(NamedTuple):
    what: str  # what its path names, for messages
    gives: tuple[str, ...]  # patterns of the leaves that it may give
    load: Loader  # (path, config.model, destination) -> leaves by path

    def among(self, paths: Iterable[str]) -> bool:
        """Whether it may give one of these leaves."""
        return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in self.gives)


def _tower(kind: str) -> Loader:
    return lambda path, model, to: load_tower(kind, path, model.vision, to)


def _decoder(load: Callable) -> Loader:
    return lambda path, model, to: load(path, model.decoder, to, model.moe)


SOURCES: dict[str, Source] = {
    "hf": Source("the folder of a Hugging Face decoder", ("decoder/*",), _decoder(load_decoder)),
    "gguf": Source("the GGUF file of a decoder", ("decoder/*",), _decoder(load_gguf)),
    "eva": Source("the EVA-CLIP-g file", ("vision/*",), _tower("eva")),
    "clip": Source("the folder of a Hugging Face CLIP", ("vision/*",), _tower("clip")),
    "med_moe": Source("the folder of a Med-MoE checkpoint", ("*",), load_med_moe),
    "router": Source("Med-MoE's router file", ("decoder/layers/moe/router/*",), load_router),
    "unimed": Source("a checkpoint of the original Uni-Med (.pth)", ("connector/*", "decoder/*/lora_?"), load_unimed),
    "peft": Source("the folder of a PEFT adapter", ("decoder/*/lora_?",), load_peft),
    "siglip": Source("the folder of a Hugging Face SigLIP", ("vision/*",), _tower("siglip")),
}
