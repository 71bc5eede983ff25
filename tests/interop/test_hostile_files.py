"""Settings and files with absurd numbers: one sentence that names the key, soon, and before
anything is built.
"""

import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save
from support.weight_files import refused

from unimed_jax.config import DecoderConfig, LoraConfig, ModelConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families.hf_config import FAMILIES, decoder_from_hf, read_hf_config
from unimed_jax.interop.families.med_moe import model_from_med_moe, read_med_moe_config
from unimed_jax.interop.families.peft import load_peft
from unimed_jax.interop.families.towers import tower_from_hf
from unimed_jax.interop.tensors import files
from unimed_jax.interop.tensors.load import Destination

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
ABSURD = (10**6, 10**9, 10**12, 1 << 64, 10**400, -1, 0, 1.5, None, "4", True, [4], {})


def soon(call, match: str):
    """The call is refused in one sentence, within two seconds and 50 MB."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UserError, match=match) as error:
            call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 2100
    assert time.process_time() - start < 2 and peak < 50 << 20


def settings_of(kind: str) -> dict:
    from transformers import CONFIG_MAPPING

    if kind in ("clip", "siglip"):
        tower = {**SIZES, "image_size": 16, "patch_size": 4}
        return CONFIG_MAPPING[kind](vision_config=tower).to_dict()
    return CONFIG_MAPPING[kind](**SIZES, vocab_size=64, num_key_value_heads=2).to_dict()


@pytest.mark.parametrize("kind", [*FAMILIES, "clip", "siglip"])
def test_layers_and_sizes_that_no_model_has(tmp_path, kind):
    base = settings_of(kind)
    file = tmp_path / "config.json"
    translate = tower_from_hf if kind in ("clip", "siglip") else decoder_from_hf
    file.write_text(json.dumps(base))
    translate(read_hf_config(tmp_path))
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        for value in ABSURD:
            if value == 10**6 and key == "hidden_size":
                continue
            group = base["vision_config"] if translate is tower_from_hf else base
            changed = {**group, key: value}
            changed = {**base, "vision_config": changed} if translate is tower_from_hf else changed
            if value == 10**400:
                file.write_text(
                    json.dumps({**changed, key: 0}).replace(f'"{key}": 0', f'"{key}": 1{"0" * 400}')
                )
            else:
                file.write_text(json.dumps(changed))
            soon(
                lambda: translate(read_hf_config(tmp_path)),
                f"config.json: {key} is .*whole number from 1 to",
            )


@pytest.mark.parametrize(
    "change, match",
    [
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"head_dim": 10**12}, "head_dim is"),
        ({"head_dim": -4}, "head_dim is -4"),
        ({"num_key_value_heads": 3}, "kv_heads=3 does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"intermediate_size": "24"}, "intermediate_size is '24'"),
        ({"rms_norm_eps": None}, "config.json"),
        ({"rms_norm_eps": -1.0}, "norm_eps=-1.0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}}, "config.json"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": -1.0, "factor": 2.0}},
            "rope_theta=-1.0",
        ),
        ({"rope_parameters": [1]}, "config.json"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "config.json"),
        ({"hidden_act": ["silu"]}, "config.json"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "gpt2", "n_layer": 10**12}, "model_type 'gpt2' is not supported"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_llama_that_cannot_be(tmp_path, change, match):
    (tmp_path / "config.json").write_text(json.dumps({**settings_of("llama"), **change}))
    soon(lambda: decoder_from_hf(read_hf_config(tmp_path), f"{tmp_path}/config.json"), match)


def test_large_and_deep_files(tmp_path):
    file = tmp_path / "config.json"
    for text, match in (
        ('{"a": ' + "[" * 100_000, "nested too deep|not JSON"),
        ('{"a": "' + "x" * (2 << 20) + '"}', "more than the 1048576 that are read"),
        ("[]", "no object of settings"),
    ):
        file.write_text(text)
        soon(lambda: read_hf_config(tmp_path), match)
        soon(lambda: read_med_moe_config(tmp_path), match)


MED_MOE = {
    **{
        "model_type": "moe_llava_stablelm",
        "vocab_size": 64,
        **SIZES,
        "num_key_value_heads": 4,
        "rope_theta": 10000,
    },
    **{"hidden_act": "silu", "rope_pct": 0.5, "norm_eps": 1e-5, "image_projector_type": "mlp2x_gelu"},
    "moe": {
        **{"moe_enable": True, "moe_layers_idx": [1, 3], "num_experts": [4, 4], "top_k_experts": 2},
        **{"use_residual": False, "router_aux_loss_coef": 0.01},
    },
}


def test_med_moe_that_cannot_be(tmp_path):
    file = tmp_path / "config.json"

    def read():
        return model_from_med_moe(read_med_moe_config(tmp_path), where=str(file))

    file.write_text(json.dumps(MED_MOE))
    read()
    for change in (
        *({"num_hidden_layers": value} for value in ABSURD),
        *({"mm_vision_select_layer": value} for value in ("x", None, 10**12, -(10**12))),
        *({"rope_theta": value} for value in ("x", None, [], 10**400)),
        *({"hidden_act": value} for value in ([], {}, 1)),
        *(
            {"moe": value}
            for value in ([], "x", {"moe_enable": True}, {**MED_MOE["moe"], "num_experts": 4})
        ),
        {"moe": {**MED_MOE["moe"], "num_experts": [[4], [4]]}},
        {"moe": {**MED_MOE["moe"], "moe_layers_idx": [10**12]}},
        {"image_projector_type": {"a": 1}},
    ):
        file.write_text(json.dumps({**MED_MOE, **change}))
        if change == {"moe": []}:  # no experts: a dense model
            read()
            continue
        soon(read, "config.json|config.model")


@pytest.mark.parametrize("key, values", [
    ("r", (10**9, 10**400, 0, -1, 2.0, True, None, "8", [])),
    ("lora_alpha", (10**400, float("nan"), float("inf"), None, "16", True, [], -1e300)),
])  # fmt: skip
def test_adapters_that_cannot_be(tmp_path, key, values):
    decoder = DecoderConfig(vocab=16, width=8, depth=2, heads=2, kv_heads=2, head_dim=4, mlp_width=8)
    config = ModelConfig(decoder=decoder, lora=LoraConfig(rank=2, targets=("q",)))
    (tmp_path / "adapter_model.safetensors").write_bytes(save({"a": np.zeros(2, np.float32)}))
    for value in values:
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "bias": "none", key: value}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        soon(lambda: load_peft(tmp_path, config, Destination({})), "adapter_config.json")


GOOD = save({"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.int64)})


@pytest.mark.parametrize("length", [0, 1, 1 << 25, (1 << 25) + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_list_of_tensors_longer_than_its_file(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + GOOD[8:])
    soon(lambda: files.open_weights(path), "damaged")


@pytest.mark.parametrize("change", [
    {"shape": [1 << 62, 1 << 62]}, {"shape": [0, 1 << 62]}, {"shape": [-3, 4]}, {"shape": [[3], 4]},
    {"shape": None},
    {"shape": [1] * 100_000}, {"data_offsets": [0, 1 << 62]}, {"data_offsets": [48, 0]},
    {"data_offsets": [0]},
    {"dtype": "F999"}, {"dtype": None}, {"extra": 1}, {"data_offsets": [1, 49]}, {"data_offsets": [-1,
    48]},
])  # fmt: skip
def test_tensors_that_are_not_in_the_file(tmp_path, change):
    length = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8 : 8 + length])
    if change.keys() == {"extra"}:
        header |= {"c": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    else:
        header["b"] |= change
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + GOOD[8 + length :])
    refused(path, "damaged")


def test_headers_and_indexes_without_a_bottom(tmp_path):
    path = tmp_path / "model.safetensors"
    for text in (b'{"a":' * 100_000, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff" * 100):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        soon(lambda: files.open_weights(path), "damaged")
    index = tmp_path / "model.safetensors.index.json"
    for text, match in (
        ('{"weight_map": ' + "[" * 100_000, "nested too deep|not JSON"),
        (json.dumps({"weight_map": {"a": "b" * 100_000 + ".bin"}}), "not next to it"),
        (json.dumps({"weight_map": {str(i): f"{i}.bin" for i in range(20_000)}}), "not next to it"),
        (
            json.dumps({"weight_map": {f"t{i}": "model.safetensors" for i in range(20_000)}}),
            "and 19988 more",
        ),
    ):
        path.write_bytes(GOOD)
        index.write_text(text)
        soon(lambda: files.open_weights(index), match)


def test_names_that_no_line_can_hold(tmp_path):
    """In a sentence they are escaped, and of thousands of wrong ones the first are named."""
    from unimed_jax.interop.tensors.table import Entry, Table, check

    path = tmp_path / "model.safetensors"
    names = {f"bad\n\x1b[31m{'x' * 3000}{i}": np.ones(1, np.float32) for i in range(500)}
    path.write_bytes(save(names | {f"t.{'9' * 6000}": np.ones(1, np.float32)}))
    tensors = files.open_weights(path)
    soon(
        lambda: check(Table((Entry("a", "a"),)), tensors, {"a": np.ones(1, np.float32)}),
        "a is missing; .*more",
    )


# --------------------------------------------------------------------------------------------------
# GGUF
# --------------------------------------------------------------------------------------------------


def gguf_file(
    pairs: list[tuple[bytes, bytes]], tensors: int = 0, version: int = 3, count: int | None = None
) -> bytes:
    """A file of these (key, type and value)."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(pairs) if count is None else count)
    return head + b"".join(struct.pack("<Q", len(key)) + key + value for key, value in pairs)


def listed(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + data


GGUF = {
    "2^60 settings": gguf_file([], count=1 << 60),
    "2^40 settings": gguf_file([], count=1 << 40),
    "2^60 tensors": gguf_file([], tensors=1 << 60),
    "a key of 2^60 bytes": gguf_file([]) [:16] + struct.pack("<QQ", 1, 1 << 60),
    "a text of 2^60 bytes": gguf_file([(b"a", struct.pack("<IQ", 8, 1 << 60))]),
    "a list of 2^60 texts": gguf_file([(b"a", listed(8, 1 << 60, b""))]),
    "a list of 2^22 + 1 numbers": gguf_file([(b"a", listed(0, (1 << 22) + 1, bytes((1 << 22) + 1)))]),
    "lists of 2^22 + 2 numbers": gguf_file([(bytes([97 + i]), listed(0, 1 << 21,
    bytes(1 << 21))) for i in range(3)]),
    "a list of lists": gguf_file([(b"a", listed(9, 1, listed(9, 1, b"")))]),
    "lists without a bottom": gguf_file([(b"a", listed(9, 1, b"") * 100_000)]),
    "a list of an unknown type": gguf_file([(b"a", listed(77, 1, bytes(8)))]),
    "an unknown type": gguf_file([(b"a", struct.pack("<I", 77))]),
    "an alignment of 0": gguf_file([(b"general.alignment", struct.pack("<II", 4, 0)), (b"b",
    struct.pack("<I", 4))]),
    "an alignment of 3": gguf_file([(b"general.alignment", struct.pack("<II", 4, 3))]),
    "an alignment that is a text": gguf_file([(b"general.alignment", struct.pack("<IQ", 8, 1) + b"x")]),
    "the same key twice": gguf_file([(b"a", struct.pack("<II", 4, 0))] * 2),
    "a key that is no text": gguf_file([(b"\xff\xfe", struct.pack("<II", 4, 0))]),
    "2^32 - 1 dimensions": gguf_file([], 1) + struct.pack("<Q1sI", 1, b"a", (1 << 32) - 1),
    "dimensions of 2^63": gguf_file([], 1) + struct.pack("<Q1sIQQIQ", 1, b"a", 2, 1 << 63, 1 << 63, 0,
    0) + bytes(64),
    "dimensions whose product is 0": gguf_file([], 1) + struct.pack("<Q1sIQQIQ", 1, b"a", 2, 1 << 32,
    1 << 32, 0, 0),
    "an offset of 2^63": gguf_file([], 1) + struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 0,
    1 << 63) + bytes(64),
    "a block cut in two": gguf_file([], 1) + struct.pack("<Q1sIQIQ", 1, b"a", 1, 33, 8, 0) + bytes(64),
    "version 0": gguf_file([], version=0),
    "version 2^31": gguf_file([], version=1 << 31),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF)
def test_gguf_that_claims_more_than_it_holds(tmp_path, name):
    pytest.importorskip(
        "gguf", reason="the format's own package, of the extra `gguf`: pip install -e '.[gguf]'"
    )
    from unimed_jax.interop.tensors.gguf import GgufFile

    GgufFile.__module__  # noqa: B018 (the package is imported before the time is taken)
    path = tmp_path / "it.gguf"
    path.write_bytes(gguf_file([]))
    GgufFile(path)
    path.write_bytes(GGUF[name])
    soon(lambda: GgufFile(path), "damaged|byte order")
