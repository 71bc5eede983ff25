"""Folders of Hugging Face's decoders: settings, code and weights that are refused, files that go
along.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import hf_peers
from support.hf_peers import OURS, PEERS

from unimed_jax.errors import UserError
from unimed_jax.interop.families import hf, hf_config

IDS = {"bos": 1, "eos": 2, "pad": 0}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    return lambda name: hf_peers.peer(name, folder)


def change(folder, tmp_path, **fields):
    """A copy of the folder with other settings."""
    out = tmp_path / "changed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | fields))
    return out


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "name, fields, match",
    [
        ("llama2", {"model_type": "bert"}, "model_type 'bert' is not supported; choose from llama"),
        ("llama2", {"model_type": "nonsense"}, "config.json cannot be read"),
        ("llama2", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        (
            "llama2",
            {"rope_parameters": LINEAR | {"rope_type": "dynamic"}},
            "rope_type 'dynamic' is not supported",
        ),
        (
            "llama2",
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not",
        ),
        ("qwen3", {"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters is not supported"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": LINEAR}},
            "rope_type 'linear' of rope_parameters.sliding_attention is not supported",
        ),
        (
            "gemma",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported for gemma",
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported",
        ),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported",
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0 is not supported for gemma3",
        ),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True is not supported for stablelm"),
        ("llama2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_settings_that_are_not_supported(name, fields, match, tmp_path):
    (tmp_path / "plain").mkdir()
    hf_peers.settings(name).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=match) as error:
        hf_config.decoder_from_hf(
            hf_config.read_hf_config(change(tmp_path / "plain", tmp_path, **fields))
        )
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_no_settings(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        hf_config.read_hf_config(tmp_path)


def test_code_in_a_folder_is_not_run(peers, tmp_path):
    _, folder = peers("llama2")
    out = change(folder, tmp_path, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (out / "configuration_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be read"):
        hf_config.read_hf_config(out)
    assert not (tmp_path / "ran").exists()


def test_old_spelling_of_settings(peers, tmp_path):
    """rope_theta and rope_scaling beside each other, as in folders from before transformers 5.

    Defaults left out.
    """
    _, folder = peers("llama3")
    out = change(folder, tmp_path)
    settings = json.loads((out / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope
    (out / "config.json").write_text(json.dumps(settings))
    assert hf_config.decoder_from_hf(hf_config.read_hf_config(out)) == dataclasses.replace(
        OURS, **PEERS["llama3"][2]
    )
    del (
        settings["rope_theta"],
        settings["rope_scaling"],
        settings["num_key_value_heads"],
        settings["head_dim"],
    )
    (out / "config.json").write_text(json.dumps(settings))
    assert hf_config.decoder_from_hf(hf_config.read_hf_config(out)) == dataclasses.replace(
        OURS, kv_heads=4
    )


def test_old_spelling_of_gemma3(tmp_path):
    """rope_theta, rope_local_base_freq and rope_scaling, and the pattern of windows as a number."""
    hf_peers.settings("gemma3_text").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["rope_parameters"], settings["layer_types"]
    old = {"rope_theta": 1e6, "rope_local_base_freq": 100.0, "sliding_window_pattern": 3}
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(settings | old | scaling))
    expected = dataclasses.replace(OURS, **PEERS["gemma3_text"][2])
    assert (
        hf_config.decoder_differences(
            hf_config.decoder_from_hf(hf_config.read_hf_config(tmp_path)), expected
        )
        == []
    )


def test_other_settings_than_the_folder(peers):
    """Weights that would fit, under settings that would make other numbers of them."""
    _, folder = peers("mistral")
    config = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    wrong = dataclasses.replace(config, windows=(), rope_theta=1e4)
    with pytest.raises(
        UserError, match=r"rope_theta is 1000000.0 there and 10000.0 here, windows is \(5, 5, 5\) there"
    ):
        hf_peers.load_leaves(folder, wrong)


def test_weights_that_do_not_fit(peers, tmp_path):
    _, folder = peers("llama2")
    config = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    out = change(folder, tmp_path)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {
        name: value for file in set(index.values()) for name, value in load_file(out / file).items()
    }
    for file in [*set(index.values()), "model.safetensors.index.json"]:
        (out / file).unlink()

    def refused(match, **changes):
        values = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, out / "model.safetensors")
        with pytest.raises(UserError, match=match) as error:
            hf_peers.load_leaves(out, config)
        assert "\n" not in str(error.value)

    name = "model.layers.1.mlp.up_proj.weight"
    refused(f"{name} is missing; renamed is not known", **{name: None, "renamed": tensors[name]})
    refused(rf"{name} is of shape \[32, 24\] in place of \[24, 32\]", **{name: tensors[name].T})
    bad = tensors[name].copy()
    bad[3, 4] = np.nan
    refused(f"{name} holds NaN", **{name: bad})
    refused("stored as int8", **{name: tensors[name].astype(np.int8)})


def test_tokenizer_files_go_along(peers, tmp_path):
    _, folder = peers("llama2")
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "secret.txt"):
        (source / name).write_text(name)
    config = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    leaves = hf_peers.load_leaves(folder, config)
    hf.export_decoder(tmp_path / "out", config, leaves, source, IDS)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    with pytest.raises(UserError, match="exists already"):
        hf.export_decoder(tmp_path / "out", config, leaves, source, IDS)
