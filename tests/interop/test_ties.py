"""Files whose settings tie the head to the embedding, and which hold a head: the same one is read,
another refused.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from unimed_jax.errors import UserError
from unimed_jax.interop.families import med_moe
from unimed_jax.interop.families.hf import hf_decoder_table, load_decoder
from unimed_jax.interop.families.hf_config import decoder_to_hf
from unimed_jax.interop.families.med_moe import load_med_moe, med_moe_table, model_to_med_moe
from unimed_jax.interop.families.unimed_hf import exported_table, load_exported
from unimed_jax.interop.tensors.files import write_safetensors
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import Stored, to_published
from unimed_jax.model.parameters import parameters

TIED = tiny.config(decoder={"tied_head": True}, lora={"rank": 0})
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def leaves():
    """The leaves of a tied model; halves of whole numbers, which bfloat16 holds."""
    shapes = parameters(tiny.model(TIED))
    rng = np.random.default_rng(0)
    return {
        path: (rng.integers(-8, 8, leaf.shape) / 2).astype(np.float32) for path, leaf in shapes.items()
    }


def folder_of(leaves, folder):
    """A Hugging Face folder of the tied decoder."""
    decoder = {path: leaf for path, leaf in leaves.items() if path.startswith("decoder/")}
    save_file(to_published(hf_decoder_table(TIED.decoder), decoder), folder / "model.safetensors")
    decoder_to_hf(TIED.decoder).save_pretrained(folder)
    return decoder


def heads(embedding):
    """head -> whether it is the embedding again."""
    other, nan = embedding.copy(), embedding.copy()
    other[-1, -1] += 0.5
    nan[0, 0] = np.nan
    return {
        "the same": (embedding, True),
        "the same in bfloat16": (embedding.astype(ml_dtypes.bfloat16), True),
        "the same in float64": (embedding.astype(np.float64), True),
        "one number differs": (other, False),
        "not a number": (nan, False),
        "longer": (np.concatenate([embedding, embedding[:1]]), False),
        "transposed": (np.ascontiguousarray(embedding.T), False),
        "flat": (embedding.reshape(-1), False),
        "whole numbers": ((embedding * 2).astype(np.int8), False),
    }


@pytest.mark.parametrize("name", heads(np.zeros((4, 2), np.float32)))
def test_a_head_beside_a_tied_embedding(leaves, tmp_path, name, monkeypatch):
    decoder = folder_of(leaves, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head, same = heads(tensors[EMBEDDING])[name]
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    monkeypatch.setattr("unimed_jax.interop.tensors.table.STRIP", 1000)  # several strips
    if same:
        found = load_decoder(tmp_path, TIED, Destination(decoder))
        np.testing.assert_array_equal(found["decoder/embedding"], decoder["decoder/embedding"])
        return
    with pytest.raises(
        UserError, match=f"lm_head.weight differs from {EMBEDDING}, .*tie_word_embeddings.*tied_head"
    ):
        load_decoder(tmp_path, TIED, Destination(decoder))


def test_in_shards(leaves, tmp_path):
    decoder = folder_of(leaves, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors[EMBEDDING] + 1
    stored = {name: Stored(value.shape, value.dtype) for name, value in tensors.items()}
    write_safetensors(tmp_path, stored, tensors.items(), limit=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load_decoder(tmp_path, TIED, Destination(decoder))


def test_untied_the_same_file_is_read(leaves, tmp_path):
    """What the sentence advises: the head is kept."""
    decoder = folder_of(leaves, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors[EMBEDDING] + 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    untied = tiny.config(decoder={"tied_head": False}, lora={"rank": 0})
    leaf = np.zeros(head.T.shape, np.float32)
    found = load_decoder(tmp_path, untied, Destination(decoder | {"decoder/head": leaf}))
    np.testing.assert_array_equal(found["decoder/head"], head.T)


def test_in_an_exported_model(leaves, tmp_path):
    tensors = to_published(exported_table(TIED), leaves)
    name = "language_model.lm_head.weight"
    for add, refused in ((0, False), (1, True)):
        head = tensors[f"language_model.{EMBEDDING}"] + np.float32(add)
        save_file({**tensors, name: head}, tmp_path / "model.safetensors")
        if refused:
            with pytest.raises(UserError, match=f"{name} differs from language_model.{EMBEDDING}"):
                load_exported(tmp_path, TIED, Destination(leaves))
        else:
            load_exported(tmp_path, TIED, Destination(leaves))


def test_in_a_med_moe_checkpoint(tmp_path, monkeypatch):
    vision = {
        "cls_token": True,
        "qkv_bias": "qkv",
        "pre_norm": True,
        "patch_bias": False,
        "activation": "quick_gelu",
    }
    config = tiny.config(
        vision={**vision, "feature_layer": -2, "output_norm": False},
        connector={"kind": "mlp2x_gelu", "rate": 1, "task_tokens": 0},
        decoder={
            "tied_head": True,
            "norm": "layer",
            "rotary_fraction": 0.5,
            "kv_heads": 4,
            "head_dim": 4,
        },
        lora={"rank": 0},
    )
    monkeypatch.setattr(med_moe, "_refuse_inexpressible", lambda *_: None)
    (tmp_path / "config.json").write_text(json.dumps(model_to_med_moe(config)))
    leaves = parameters(tiny.model(config))
    tensors = to_published(med_moe_table(config), leaves)
    head = tensors[EMBEDDING] + 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"lm_head.weight differs from {EMBEDDING}"):
        load_med_moe(tmp_path, config, Destination(leaves))
