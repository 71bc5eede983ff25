"""Makes hostile weights, settings and tokenizers for the readers of models.

Each reader has an endless series of cases; a case depends only on a seed and a number.
"""

import collections
import functools
import io
import itertools
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from campaigns.fuzz_changes import VALUES, changed_bytes, changed_json, changed_tree
from safetensors.numpy import save

from unimed_jax.config import DecoderConfig, LoraConfig, ModelConfig, TextConfig, to_dict
from unimed_jax.data.tokenizer import Tokenizer, train_tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families.gguf import decoder_from_gguf, write_tokenizer
from unimed_jax.interop.families.hf_config import FAMILIES, decoder_from_hf, read_hf_config
from unimed_jax.interop.families.med_moe import model_from_med_moe, read_med_moe_config
from unimed_jax.interop.families.peft import load_peft, peft_table
from unimed_jax.interop.families.towers import tower_from_hf
from unimed_jax.interop.families.unimed_hf import exported_config, exported_table
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.gguf import GgufFile
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import to_published
from unimed_jax.interop.tensors.torch_file import TorchFile, write_torch
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


def read_all(path: Path) -> None:
    """Reads all tensors of a file or folder."""
    tensors = open_weights(path)
    for name in tensors.stored:
        tensors.read(name)


# --------------------------------------------------------------------------------------------------
# Files of tensors
# --------------------------------------------------------------------------------------------------


@functools.cache
def _torch_bytes() -> bytes:
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
    moments = {"step": np.array(3, np.float32), "exp_avg": np.ones((3, 4), np.float32)}
    tree = {
        "model": collections.OrderedDict(values),
        "optimizer": {
            "state": {0: moments},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        },
        "config": {"model": {"lora_r": 8, "name": "é"}, "run": {"flags": [True, None]}},
        "epoch": 3,
    }
    path = place() / "good.pth"
    write_torch(path, tree)
    return path.read_bytes()


def _archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return out.getvalue()


def good_pickle() -> bytes:
    """Gives the pickle of an ordinary checkpoint."""
    with zipfile.ZipFile(io.BytesIO(_torch_bytes())) as archive:
        return archive.read("archive/data.pkl")


def _program(rng: np.random.Generator) -> bytes:
    """Makes a pickle of random opcodes, most of them with sensible arguments."""
    word = b"X\x01\x00\x00\x00a"
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x03K\x04\x86K\x04K\x01\x86\x89}tR"
    )
    parts = [
        *(
            b"(",
            b"0",
            b"1",
            b"2",
            b")",
            b"]",
            b"}",
            b"t",
            b"l",
            b"d",
            b"a",
            b"e",
            b"s",
            b"u",
            b"N",
            b"\x88",
            b"b",
        ),
        *(
            b"\x85",
            b"\x86",
            b"\x87",
            b"R",
            b"\x81",
            b"Q",
            b"\x94",
            b"\x93",
            b".",
            word,
            word,
            tensor,
            tensor,
            storage,
        ),
        *(
            b"q\x00",
            b"h\x00",
            b"r" + struct.pack("<I", int(rng.integers(1 << 32))),
            b"j\x00\x00\x00\x00",
        ),
        *(
            b"K\x03",
            b"J" + rng.bytes(4),
            b"\x8a\x08" + rng.bytes(8),
            b"G" + rng.bytes(8),
            b"I5\n",
            b"Vab\n",
            b"g0\n",
        ),
        *(
            b"X" + struct.pack("<I", int(rng.integers(1 << 32))),
            b"\x8b" + rng.bytes(4),
            b"\x95" + rng.bytes(8),
        ),
        *(
            b"ccollections\nOrderedDict\n",
            b"ctorch\nSize\n",
            b"cos\nsystem\n",
            b"\x8e" + rng.bytes(8),
            b"\x8f",
        ),
    ]
    chosen = [parts[i] for i in rng.integers(0, len(parts), rng.integers(1, 60))]
    return (
        b"\x80\x02" + b"".join(chosen) + (b"}" + word + tensor + b"s." if rng.random() < 0.7 else b".")
    )


def _pth(rng: np.random.Generator, number: int, folder: Path) -> None:
    path = folder / "file.pth"
    with zipfile.ZipFile(io.BytesIO(_torch_bytes())) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    kind = number % 4
    if kind == 0:
        path.write_bytes(changed_bytes(rng, _torch_bytes()))
    elif kind == 1:
        records["archive/data.pkl"] = changed_bytes(rng, records["archive/data.pkl"])
        path.write_bytes(_archive(records, int(rng.choice([0, 0, 8, 12, 14]))))
    elif kind == 2:
        records["archive/data.pkl"] = _program(rng)
        path.write_bytes(_archive(records))
    else:
        name = list(records)[rng.integers(len(records))]
        if rng.random() < 0.5:
            records[name] = bytes(int(rng.choice([0, 1, 100, 3 << 20]))) + records[name] * int(
                rng.integers(0, 3)
            )
        else:
            records[f"{name}{rng.integers(3)}"] = records.pop(name)
        path.write_bytes(_archive(records, int(rng.choice([0, 8]))))
    file = TorchFile(path)
    file.to_write(file.tree)
    read_all(path)


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


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------

WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab", "the", "▁lung"]


@functools.cache
def _tokenizers() -> list[dict]:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    train_tokenizer(["the left lung is clear", "a b c"] * 9, TextConfig(vocab=400), place() / "trained")
    trained = json.loads((place() / "trained/tokenizer.json").read_text())
    steps = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFC()]
    )
    llama = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(WORDS)}, [("a", "b")], unk_token="<unk>")
    )
    llama.normalizer, llama.decoder = (
        steps,
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
    )
    unigram = tokenizers.Tokenizer(
        models.Unigram([(w, -float(i)) for i, w in enumerate(WORDS)], unk_id=0)
    )
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+"), "isolated"),
            pre_tokenizers.Metaspace(),
        ]
    )
    words = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for made in (llama, unigram, words):
        made.add_special_tokens(["</s>"])
    return [trained, *(json.loads(made.to_str()) for made in (llama, unigram, words))]


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZER_VALUES = [
    *VALUES, {"type": "Prepend", "prepend": "x" * 1000}, 4294967295, 1 << 32,
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"}, {"type": "Digits",
    "individual_digits": True},
    {"type": "Split", "pattern": {"Regex": "\\w*\\w*\\w*\\w*(?!.|$)"}, "behavior": "Isolated",
    "invert": False},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aaaaaaaaaa"},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"},
    "content": "aa"}] * 50},
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 3000},
]  # fmt: skip


def _tokenizer(rng: np.random.Generator, number: int, folder: Path) -> None:
    spec = _tokenizers()[number % len(_tokenizers())]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **SPECIAL,
    }
    other = number % 5 == 0
    text = changed_json(rng, settings, TOKENIZER_VALUES)
    (folder / "tokenizer_config.json").write_bytes(text if other else json.dumps(settings).encode())
    spec = {**spec, "model": spec["model"]}
    parts = [
        part
        for part in ("normalizer", "pre_tokenizer", "decoder", "model", "added_tokens")
        if spec.get(part)
    ]
    part = parts[rng.integers(len(parts))]  # otherwise nearly all changes would fall into the vocabulary
    if not other:
        spec[part] = changed_tree(rng, spec[part], TOKENIZER_VALUES)
    text = json.dumps(spec).encode()
    (folder / "tokenizer.json").write_bytes(changed_bytes(rng, text) if number % 11 == 0 else text)
    _use(folder)


def _use(folder: Path) -> None:
    """Reads a tokenizer's folder and encodes and decodes a text."""
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode("the left lung a12 \n <s> é"))
    assert tokenizer.fingerprint and tokenizer.size >= 0
    if tokenizer.together:
        tokenizer.together(["a: ", " ab"], False)


def _piece(word: str, score: float, kind: int) -> bytes:
    """Makes a piece as SentencePiece's protocol buffer holds it: 1 text, 2 score, 3 kind."""
    text = word.encode()
    inner = (
        b"\x0a"
        + bytes([len(text)])
        + text
        + b"\x15"
        + struct.pack("<f", score)
        + b"\x18"
        + bytes([kind])
    )
    return b"\x0a" + bytes([len(inner)]) + inner


def sentencepiece_model() -> bytes:
    """Makes a model of SentencePiece, of the kind BPE, by hand."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = b"".join(_piece(word, -float(i), kinds.get(word, 1)) for i, word in enumerate(WORDS))
    trainer = b"\x18\x02" + b"\x20" + bytes([len(WORDS)])  # model_type BPE, vocab_size
    normalizer = b"\x0a\x08identity" + b"\x18\x01" + b"\x20\x00"
    return (
        pieces
        + b"\x12"
        + bytes([len(trainer)])
        + trainer
        + b"\x1a"
        + bytes([len(normalizer)])
        + normalizer
    )


def _sentencepiece(rng: np.random.Generator, number: int, folder: Path) -> None:
    name = ("LlamaTokenizer", "T5Tokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast")[number % 4]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "legacy": bool(number % 3), **SPECIAL})
    )
    (folder / "tokenizer.model").write_bytes(changed_bytes(rng, sentencepiece_model()))
    _use(folder)


READERS: dict[str, Make] = {
    "pth": _pth,
    "safetensors": _safetensors,
    "index": _index,
    "gguf": _gguf,
    "config": _config,
    "towers": _towers,
    "med_moe": _med_moe,
    "exported": _exported,
    "run": _run,
    "peft": _peft,
    "tokenizer": _tokenizer,
    "sentencepiece": _sentencepiece,
}
