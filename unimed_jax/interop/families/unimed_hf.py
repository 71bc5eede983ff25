"""Writes the complete model as a folder for torch's `AutoModelForCausalLM`, and reads it back.

The folder holds:

- config.json: the decoder's own settings (`text_config`), all of ours (`unimed`), prompts and special
  ids.
- model*.safetensors: the decoder as its family names it, the vision encoder as CLIP's tower, and the
  connector as the original names it.
- modeling_unimed.py: the same model in plain torch (torch_model/modeling_unimed.py).
- the tokenizer's files, preprocessor_config.json, generation_config.json and README.md (model_card.py).
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimed_jax.bounds import FrozenDict
from unimed_jax.config import (
    TASKS,
    VISUAL_TASKS,
    Config,
    LoraConfig,
    ModelConfig,
    SourceConfig,
    VisionConfig,
    to_dict,
)
from unimed_jax.data.example import Example
from unimed_jax.data.forms import INSTRUCTIONS, TAGS, form_of
from unimed_jax.data.layout import VISUAL
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.files import new_folder
from unimed_jax.interop.families.hf import copy_tokenizer, hf_decoder_table, widest_dtype
from unimed_jax.interop.families.hf_config import POSITIONS, decoder_to_hf, with_older_names
from unimed_jax.interop.families.towers import hf_tower_table
from unimed_jax.interop.families.unimed_names import connector_table
from unimed_jax.interop.model_card import model_card, passports_of
from unimed_jax.interop.tensors.files import open_weights, write_safetensors
from unimed_jax.interop.tensors.load import Destination, load_leaves
from unimed_jax.interop.tensors.table import Stored, Table, each_published, published_shapes
from unimed_jax.parsing import read_json
from unimed_jax.settings import from_config_dict

MODEL_TYPE = "unimed"
CODE = Path(__file__).parents[1] / "torch_model" / "modeling_unimed.py"
BICUBIC = 3  # PIL's number


def exported_table(config: ModelConfig) -> Table:
    """Lists every tensor of the torch model, whose decoder has no adapters."""
    return (
        hf_decoder_table(config.decoder, "language_model.")
        + hf_tower_table(config.vision, "vision_model.")
        + connector_table(config).prefixed("connector.")
    )


def export_unimed_hf(
    out: str | Path,
    config: Config,
    leaves: Mapping[str, Any],
    tokenizer: str | Path,
    metrics: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
    reliance: Mapping[str, Any] | None = None,
) -> None:
    """Writes the folder; adapters are merged into the decoder, and every leaf keeps its dtype.

    leaves: all by path, adapters not merged. tokenizer: its folder. metrics: the content of the
    run's metrics.json, for the model card, as `notes`, `inputs` and `reliance` are. Raises UserError
    if no Hugging Face decoder has these settings, or if `out` exists already.
    """
    leaves = merged_leaves(config.model, leaves)
    settings = portable(config)
    table = exported_table(settings.model)
    stored = published_shapes(table, leaves)
    words = Tokenizer.load(tokenizer)
    words.check_fits(config.model.decoder.vocab)
    parts = {
        "config.json": hub_config(settings, words, stored) | {"tokenizer_state": words.state(tokenizer)},
        "generation_config.json": {
            **_special_ids(words),
            "do_sample": False,
            "max_new_tokens": config.evaluate.max_new_tokens,
        },
        "preprocessor_config.json": _preprocessor_config(config.model.vision),
    }
    with new_folder(out) as folder:
        for name, content in parts.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        size = sum(int(np.prod(s.shape, dtype=np.int64)) for s in stored.values())
        card = model_card(settings, size, metrics, notes, inputs, passports_of(config), reliance)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(CODE, folder / CODE.name)
        copy_tokenizer(tokenizer, folder)
        write_safetensors(folder, stored, each_published(table, leaves))


def merged_leaves(config: ModelConfig, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the leaves by path without adapters; kernels that had some are `Merged`."""
    merged = {path: leaf for path, leaf in leaves.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path in leaves:
        if path.endswith("/lora_a"):
            linear = path.removesuffix("/lora_a")
            kernel, a, b = (leaves[f"{linear}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
            merged[f"{linear}/kernel"] = Merged(kernel, a, b, config.lora.alpha / config.lora.rank)
    return merged


class Merged:
    """Holds a stack of kernels and folds their adapters into each layer when it is read.

    The stack is [layers, in, out]; a layer is W + scale A B. So the devices never hold a second copy
    of the decoder.
    """

    def __init__(self, kernel: Any, a: Any, b: Any, scale: float):
        self.shape, self.dtype = kernel.shape, kernel.dtype
        self._kernel, self._a, self._b, self._scale = kernel, a, b, scale

    def __getitem__(self, layer: int) -> jax.Array:
        update = jnp.einsum("ir,ro->io", self._a[layer], self._b[layer]) * self._scale
        # a quantised kernel becomes numbers here
        kernel = self._kernel[layer].astype(jnp.promote_types(self.dtype, update.dtype))
        return (kernel + update).astype(self.dtype)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.stack([np.asarray(self[layer], dtype) for layer in range(self.shape[0])])


def portable(config: Config) -> Config:
    """Removes adapters and this machine's folders from the settings.

    Of a path only the last part is kept.
    """

    def without_folders(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(
            dataclasses.replace(
                source,
                path=Path(source.path).name,
                options=_last_parts(source.options),
            )
            for source in sources
        )

    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora=LoraConfig(), frozen_kernels="plain"),
        text=dataclasses.replace(config.text, tokenizer=""),
        data=dataclasses.replace(
            config.data, root="", cache="", sources=without_folders(config.data.sources)
        ),
        evaluate=dataclasses.replace(config.evaluate, sources=without_folders(config.evaluate.sources)),
        init=tuple((kind, Path(path).name) for kind, path in config.init),
    )


def _last_parts(option: Any) -> Any:
    """Cuts each absolute path in an option of a reader, a JSON value, to its last part."""
    if isinstance(option, Mapping):
        return FrozenDict({key: _last_parts(value) for key, value in option.items()})
    if isinstance(option, tuple):
        return tuple(map(_last_parts, option))
    is_place = isinstance(option, str) and option.startswith(("/", "~"))
    return Path(option).name if is_place else option


def hub_config(config: Config, tokenizer: Tokenizer, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Makes the content of config.json."""
    ids, dtype = _special_ids(tokenizer), widest_dtype(stored)
    longest = config.text.max_prompt + config.evaluate.max_new_tokens
    decoder = decoder_to_hf(config.model.decoder, max(POSITIONS, longest))
    for key, value in {**ids, "dtype": dtype}.items():
        setattr(decoder, key, value)
    model_class = "UniMedForCausalLM"
    return {
        "model_type": MODEL_TYPE,
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.UniMedConfig",
            "AutoModelForCausalLM": f"{CODE.stem}.{model_class}",
        },
        "dtype": dtype,
        **ids,
        "image_token_id": VISUAL,
        "dropped_token_ids": sorted(tokenizer.dropped),
        "visual_tasks": VISUAL_TASKS,
        "prompts": {task: prompt_parts(task, config) for task in TASKS},
        "text_config": with_older_names(decoder.to_dict()),
        "unimed": to_dict(config),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def _preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """Makes the content of preprocessor_config.json: how an image becomes pixels."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vision.mean,
        "image_std": vision.std,
    }


def prompt_parts(task: str, config: Config) -> dict[str, str | None]:
    """Cuts the evaluation prompt of a task into its constant parts.

    image: the text before the first image (None if the task has no image); between: the text
    between two images; body: the instruction with "{question}"; before, after: the text around the
    body.
    """
    body = f"{TAGS[task]} {INSTRUCTIONS[task][0]}"
    example = Example("", task, "{question}", "", images=("", "") if task in VISUAL_TASKS else ())
    *shown, asked = form_of(dataclasses.replace(config.text, max_words=None)).prompt(example)
    image, between = (piece.text for piece in shown if not piece.image) if shown else (None, None)
    before, found, after = asked.text.partition(body)
    assert found, f"the prompt of {task!r} does not hold its body as it stands"
    return {"image": image, "between": between, "before": before, "body": body, "after": after}


# --------------------------------------------------------------------------------------------------
# Reading it back
# --------------------------------------------------------------------------------------------------


def is_exported(folder: str | Path) -> bool:
    """Says whether `export_unimed_hf` wrote the folder (a run's own config.json has no model_type)."""
    try:
        return read_json(Path(folder) / "config.json")["model_type"] == MODEL_TYPE
    except (UserError, KeyError, TypeError):
        return False


def exported_tokenizer(folder: str | Path) -> str:
    """Reads the state (`Tokenizer.state`) of the tokenizer that was exported.

    It is empty in a folder of an earlier version.
    """
    return str(
        read_json(Path(folder) / "config.json", "export the model again").get("tokenizer_state", "")
    )


def exported_config(folder: str | Path) -> Config:
    """Reads the settings of a folder that `export_unimed_hf` wrote.

    They name the folder as their tokenizer.

    Raises UserError if the folder's config.json is missing, damaged or that of another kind of model.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder} holds no config.json; give a folder that `export --format=model` wrote."
        )
    try:
        settings = read_json(file, "export the model again")["unimed"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is of another kind of model; give what `export --format=model` wrote."
        ) from error
    config = from_config_dict(settings, effects=False)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tokenizer=str(folder)))


def load_exported(folder: str | Path, config: ModelConfig, to: Destination) -> dict[str, jax.Array]:
    """Reads all leaves of such a folder; nothing of its code is run.

    `to` as in `load_leaves`; a leaf that it gives no dtype keeps the file's. Raises UserError if a file
    is missing, damaged or does not fit the others.
    """
    table, tensors = exported_table(config), open_weights(folder)
    as_stored = {e.path: tensors.stored[e.name].dtype for e in table if e.name in tensors.stored}
    return load_leaves(table, tensors, dataclasses.replace(to, dtypes={**as_stored, **to.dtypes}))
