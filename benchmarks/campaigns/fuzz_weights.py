"""Makes hostile weights and settings for the readers of models; `fuzz_tokenizers` makes tokenizers.

Each reader has an endless series of cases; a case depends only on a seed and a number.
"""

import functools
import itertools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from campaigns import fuzz_pickles, fuzz_tokenizers
from campaigns.fuzz_changes import VALUES, changed_bytes, changed_json
from campaigns.fuzz_pickles import read_all
from safetensors.numpy import save

from unimed_jax.config import DecoderConfig, LoraConfig, ModelConfig, to_dict
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families.gguf import decoder_from_gguf, write_tokenizer
from unimed_jax.interop.families.hf_config import FAMILIES, decoder_from_hf, read_hf_config
from unimed_jax.interop.families.med_moe import model_from_med_moe, read_med_moe_config
from unimed_jax.interop.families.peft import load_peft, peft_table
from unimed_jax.interop.families.towers import tower_from_hf
from unimed_jax.interop.families.unimed_hf import exported_config, exported_table
from unimed_jax.interop.tensors.gguf import GgufFile
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import to_published
from unimed_jax.runs.folder import read_config
from unimed_jax.settings import from_config_dict

Case = tuple[str, Callable[[], None]]  # name and reading function, which raises UserError for a refusal
# writes and reads case number n in an empty folder
Make = Callable[[np.random.Generator, int, Path], None]


@functools.cache
def place() -> Path:
    """Gives a folder for the files of this process's cases."""
    return Path(tempfile.mkdtemp(prefix="fuzz_"))


def cases(reader: str, seed: int) -> Iterator[Case]:
    """Yields the cases of a reader; each writes its own files."""
    for number in itertools.count():
        yield f"{reader} {seed} {number}", functools.partial(_one, reader, seed, number)


def _one(reader: str, seed: int, number: int) -> None:
    folder = place() / reader
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    READERS[reader](np.random.default_rng([seed, number]), number, folder)


# --------------------------------------------------------------------------------------------------
# Files of tensors
# --------------------------------------------------------------------------------------------------


@functools.cache
def _safetensors_bytes() -> bytes:
    return save(
        {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.int64), "c": np.array(3, np.float16)}
    )


def _with_header(header: bytes, length: int | None = None) -> bytes:
    data = _safetensors_bytes()
    old = int.from_bytes(data[:8], "little")
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data[8 + old :]


def _safetensors(rng: np.random.Generator, number: int, folder: Path) -> None:
    data = _safetensors_bytes()
    if number % 2:
        data = changed_bytes(rng, data)
    else:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        values = [
            *VALUES,
            [1 << 62, 1 << 62],
            [0, 1 << 62],
            "F64",
            "BF16",
            "F8_E4M3",
            "F4",
            "BOOL",
            [0, 48],
            [0, 1 << 60],
        ]
        data = _with_header(changed_json(rng, header, values))
    (folder / "model.safetensors").write_bytes(data)
    read_all(folder / "model.safetensors")


def _index(rng: np.random.Generator, number: int, folder: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (folder / name).write_bytes(_safetensors_bytes())
    index = {
        "metadata": {"total_size": 100},
        "weight_map": {"a": names[0], "b": names[1], "c": names[0]},
    }
    (folder / "model.safetensors.index.json").write_bytes(
        changed_json(rng, index, [*VALUES, *names, "/etc/passwd"])
    )
    read_all(folder)


@functools.cache
def gguf_bytes() -> bytes:
    """Gives a small file in the format GGUF, tokenizer included."""
    import gguf

    path = place() / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "block_count": 1,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
    }
    for key, value in {**sizes, "context_length": 64, "attention.key_length": 16}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["</s>", "a", "b", "ab"])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.0, -3.0])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    rng = np.random.default_rng(0)
    for name, shape in {
        "token_embd.weight": (4, 32),
        "blk.0.attn_q.weight": (32, 32),
        "output_norm.weight": (32,),
    }.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    quantised = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _gguf(rng: np.random.Generator, number: int, folder: Path) -> None:
    data = gguf_bytes()
    head = data.index(b"blk.0.ffn_up.weight") + 60
    words = [b"llama.", b"tokenizer.ggml."]
    changed = changed_bytes(rng, data[:head]) + data[head:] if number % 3 else changed_bytes(rng, data)
    if number % 7 == 0:
        word = words[rng.integers(2)]
        at = data.index(word, int(rng.integers(head // 4)))
        end = at + int(rng.integers(40))
        changed = (
            data[:end] + struct.pack("<Q", int(rng.choice([0, 9, 1 << 31, 1 << 60]))) + data[end + 8 :]
        )
    path = folder / "it.gguf"
    path.write_bytes(changed)
    file = GgufFile(path)
    refusals = []
    for step in (
        *(functools.partial(file.value, key, object) for key in file.fields),
        *(
            functools.partial(file.read, name)
            for name, stored in file.stored.items()
            if not isinstance(stored.dtype, str)
        ),
        functools.partial(decoder_from_gguf, file),
        functools.partial(write_tokenizer, path, folder / "out"),
    ):
        try:
            step()
        except UserError as error:
            refusals.append(error)
    if (folder / "out").exists():
        Tokenizer.load(folder / "out").encode("ab a")
    if refusals:
        raise refusals[rng.integers(len(refusals))]


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


@functools.cache
def _family(kind: str) -> dict:
    """Gives a small config.json of a family."""
    from transformers import CONFIG_MAPPING

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    if kind in ("clip", "siglip"):
        tower = {**sizes, "image_size": 16, "patch_size": 4}
        return CONFIG_MAPPING[kind](
            vision_config=tower, text_config={**sizes, "vocab_size": 64}
        ).to_dict()
    return CONFIG_MAPPING[kind](**sizes, vocab_size=64, num_key_value_heads=2).to_dict()


def _config(rng: np.random.Generator, number: int, folder: Path) -> None:
    kind = list(FAMILIES)[number % len(FAMILIES)]
    (folder / "config.json").write_bytes(changed_json(rng, _family(kind)))
    decoder_from_hf(read_hf_config(folder), f"{folder}/config.json")


def _towers(rng: np.random.Generator, number: int, folder: Path) -> None:
    (folder / "config.json").write_bytes(changed_json(rng, _family(("clip", "siglip")[number % 2])))
    tower_from_hf(read_hf_config(folder), f"{folder}/config.json")


MED_MOE = {
    "model_type": "moe_llava_stablelm", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 24, "rope_theta": 10000,
    "tie_word_embeddings": False, "hidden_act": "silu", "rope_pct": 0.5, "norm_eps": 1e-5,
    "use_qkv_bias": True,
    "image_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024, "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "moe": {"moe_enable": True, "moe_layers_idx": [1, 3], "num_experts": [4, 4], "top_k_experts": 2,
            "use_residual": False, "router_aux_loss_coef": 0.01},
}  # fmt: skip
PHI = {
    "model_type": "moe_llava_phi",
    "hidden_act": "gelu_new",
    "partial_rotary_factor": 0.5,
    "layer_norm_eps": 1e-5,
}


def _med_moe(rng: np.random.Generator, number: int, folder: Path) -> None:
    base = MED_MOE | (PHI if number % 2 else {})
    (folder / "config.json").write_bytes(changed_json(rng, base))
    model_from_med_moe(read_med_moe_config(folder), where=f"{folder}/config.json")


@functools.cache
def _run_config() -> dict:
    return json.loads(json.dumps(to_dict(from_config_dict({}))))


def _exported(rng: np.random.Generator, number: int, folder: Path) -> None:
    base = {"model_type": "unimed", "text_config": {}, "unimed": _run_config()}
    (folder / "config.json").write_bytes(changed_json(rng, base))
    exported_table(exported_config(folder).model)


def _run(rng: np.random.Generator, number: int, folder: Path) -> None:
    (folder / "config.json").write_bytes(changed_json(rng, _run_config()))
    read_config(folder)


@functools.cache
def _adapter() -> tuple[ModelConfig, dict, bytes]:
    """Gives a small model with adapters, their leaves, and the file of their tensors."""
    decoder = DecoderConfig(vocab=16, width=8, depth=2, heads=2, kv_heads=2, head_dim=4, mlp_width=8)
    config = ModelConfig(decoder=decoder, lora=LoraConfig(rank=2, targets=("q", "v")))
    shapes = {"a": (2, 8, 2), "b": (2, 2, 8)}
    leaves = {
        f"decoder/layers/attention/{x}/lora_{y}": np.ones(shapes[y], np.float32)
        for x in "qv"
        for y in "ab"
    }
    return config, leaves, save(to_published(peft_table(config), leaves))


def _peft(rng: np.random.Generator, number: int, folder: Path) -> None:
    config, leaves, tensors = _adapter()
    settings = {
        **{
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": config.lora.alpha,
            "bias": "none",
        },
        **{
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": False,
            "init_lora_weights": True,
            "fan_in_fan_out": False,
        },
        **{
            "exclude_modules": None,
            "layers_pattern": None,
            "rank_pattern": {},
            "modules_to_save": None,
            "revision": None,
        },
    }
    weights = number % 3 == 0
    (folder / "adapter_config.json").write_bytes(
        json.dumps(settings).encode() if weights else changed_json(rng, settings)
    )
    (folder / "adapter_model.safetensors").write_bytes(
        changed_bytes(rng, tensors) if weights else tensors
    )
    load_peft(folder, config, Destination(leaves))


READERS: dict[str, Make] = {
    **fuzz_pickles.READERS,
    "safetensors": _safetensors,
    "index": _index,
    "gguf": _gguf,
    "config": _config,
    "towers": _towers,
    "med_moe": _med_moe,
    "exported": _exported,
    "run": _run,
    "peft": _peft,
    **fuzz_tokenizers.READERS,
}
