"""Hugging Face's decoders: the same logits after import, the same bits after export, every refusal a sentence."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling, UserError
from unimed_jax.interop import hf
from unimed_jax.model.decoder import Decoder, Span
from unimed_jax.model.layers import rope_frequencies
from unimed_jax.model.unimed import abstract, parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
HF = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
OURS = DecoderConfig(vocab=120, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, mlp_width=24, norm_eps=1e-6)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Family, their settings, what differs from OURS.
PEERS = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, {"kv_heads": 4, "norm_eps": 1e-5}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 128},
                **LLAMA3,
            },
        },
        {"rope_scaling": RopeScaling(**LLAMA3, original_positions=128)},
    ),
    "llama, wide heads and biases, tied": (
        "Llama",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"head_dim": 12, "attention_bias": ("q", "k", "v", "o"), "mlp_bias": True, "tied_head": True},
    ),
    "mistral": (
        "Mistral",
        {"sliding_window": 5, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"windows": (5,), "kv_heads": 1, "rope_theta": 1e6},
    ),
    "mistral without window": ("Mistral", {"sliding_window": None}, {}),
    "qwen2": ("Qwen2", {}, {"attention_bias": ("q", "k", "v")}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"attention_bias": ("q", "k", "v"), "windows": (0, 7, 7)},
    ),
}
TOKENS, LENGTHS = 160, (160, 97, 5)
IDS = {"bos": 1, "eos": 2, "pad": 0}


@jax.jit
def logits_of(decoder, tokens, span):
    hidden, _ = decoder(decoder.embed(tokens, jnp.float32), span)
    return decoder.logits(hidden)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """name -> (torch model with random weights, folder it was saved in), made once."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    made = {}

    def peer(name):
        if name not in made:
            kind, theirs, _ = PEERS[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, f"{kind}Config")(**{**HF, **theirs}), attn_implementation="eager"
            ).eval()
            randomise(torch, model)
            folder = tmp_path_factory.mktemp("peer")
            model.save_pretrained(folder, max_shard_size="20KB")  # several files and an index
            made[name] = model, folder
        return made[name]

    return peer


def randomise(torch, model) -> None:
    """Kernels of gain 1, biases and norms away from 0 and 1."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight.shape[-1] if weight.ndim == 2 and "embed" not in name else 4
            weight.copy_(torch.randn_like(weight) * fan_in**-0.5 + (1 if "norm" in name and "bias" not in name else 0))


def imported(folder, config: DecoderConfig) -> Decoder:
    settings = dataclasses.replace(tiny.CONFIG, decoder=config, lora=LoraConfig(rank=0))
    model = abstract(settings)
    leaves = {path: leaf for path, leaf in parameters(model).items() if path.startswith("decoder/")}
    loaded = hf.load_decoder(folder, config, leaves)
    assert loaded.keys() == leaves.keys()
    return with_parameters(model, loaded).decoder


def padded(side: str):
    """-> tokens [B, S], mask [B, S], positions [B, S] of rows of several lengths."""
    rng = np.random.default_rng(1)
    tokens, mask = np.zeros((3, TOKENS), np.int32), np.zeros((3, TOKENS), np.int32)
    for b, n in enumerate(LENGTHS):
        here = slice(0, n) if side == "right" else slice(TOKENS - n, TOKENS)
        tokens[b, here], mask[b, here] = rng.integers(0, OURS.vocab, n), 1
    return tokens, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


@pytest.mark.parametrize("name", PEERS)
def test_same_logits(name, peers):
    """Rows of 160, 97 and 5 tokens, padded on either side: far positions, windows crossed, grouped heads."""
    peer, folder = peers(name)
    torch = pytest.importorskip("torch", reason=NEEDS)
    config = hf.decoder_config(hf.read_settings(folder))
    assert config == dataclasses.replace(OURS, **PEERS[name][2])
    decoder = imported(folder, config)
    for side in ("right", "left"):
        tokens, mask, positions = padded(side)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            expected = peer(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
        actual = np.asarray(logits_of(decoder, tokens, Span(positions, mask, mask)))
        assert np.abs(expected[mask == 1]).max() > 0.5  # of a size at which the tolerance says something
        np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


def test_rope_scaling_matters():
    """The llama3 case above is no llama2 in disguise: all three ranges of wavelengths are there."""
    scaling = RopeScaling(**LLAMA3, original_positions=128)
    ratio = np.asarray(rope_frequencies(8, 1e4, scaling) / rope_frequencies(8, 1e4, None))
    assert ratio[0] == 1 and 0.2 < ratio[1] < 0.9 and ratio[3] == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", PEERS)
def test_export_reloads_to_the_bit(name, peers, tmp_path):
    """Imported, exported, loaded by transformers: the same settings, the same bits, the same logits."""
    peer, folder = peers(name)
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    config = hf.decoder_config(hf.read_settings(folder))
    leaves = {f"decoder/{path}": leaf for path, leaf in parameters(imported(folder, config)).items()}
    hf.export_decoder(tmp_path / "out", config, leaves, folder, IDS)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    before, after = peer.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert again.config.eos_token_id == 2 and again.dtype == torch.float32
    tokens, mask, _ = padded("right")
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        assert torch.equal(peer(**inputs).logits, again(**inputs).logits)


def test_bfloat16_is_exported_as_such(peers, tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    peer, folder = peers("llama2")
    config = hf.decoder_config(hf.read_settings(folder))
    leaves = {f"decoder/{p}": x.astype(jnp.bfloat16) for p, x in parameters(imported(folder, config)).items()}
    hf.export_decoder(tmp_path / "out", config, leaves, folder, IDS)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for key, value in peer.state_dict().items():
        assert torch.equal(value.bfloat16(), again.state_dict()[key]), key


def test_every_setting_is_exported_or_refused():
    """What a family says of our settings, read back, are our settings; what none can say is refused."""
    for _, _, ours in PEERS.values():
        config = dataclasses.replace(OURS, **ours)
        assert hf.differences(hf.decoder_config(hf.hf_settings(config)), config) == []
    for ours in ({"attention_bias": ("q",)}, {"logit_softcap": 3.0, "windows": (3, 0, 2)}, {"rotary_fraction": 0.3}):
        with pytest.raises(UserError, match="no Hugging Face decoder"):
            hf.hf_settings(dataclasses.replace(OURS, **ours))


def change(folder, tmp_path, **fields):
    """A copy of the folder with other settings."""
    out = tmp_path / "changed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | fields))
    return out


def test_settings_that_are_not_supported(peers, tmp_path):
    _, folder = peers("llama2")
    for fields, match in (
        ({"model_type": "bert"}, "model_type 'bert' is not supported; choose from llama"),
        ({"model_type": "nonsense"}, "config.json cannot be read"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ):
        with pytest.raises(UserError, match=match):
            hf.decoder_config(hf.read_settings(change(folder, tmp_path, **fields)))
    with pytest.raises(UserError, match="no config.json"):
        hf.read_settings(tmp_path)


def test_code_in_a_folder_is_not_run(peers, tmp_path):
    _, folder = peers("llama2")
    out = change(folder, tmp_path, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    (out / "configuration_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be read"):
        hf.read_settings(out)
    assert not (tmp_path / "ran").exists()


def test_old_spelling_of_settings(peers, tmp_path):
    """rope_theta and rope_scaling beside each other, as in folders from before transformers 5; defaults left out."""
    _, folder = peers("llama3")
    out = change(folder, tmp_path)
    settings = json.loads((out / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope
    (out / "config.json").write_text(json.dumps(settings))
    assert hf.decoder_config(hf.read_settings(out)) == dataclasses.replace(OURS, **PEERS["llama3"][2])
    del settings["rope_theta"], settings["rope_scaling"], settings["num_key_value_heads"], settings["head_dim"]
    (out / "config.json").write_text(json.dumps(settings))
    assert hf.decoder_config(hf.read_settings(out)) == dataclasses.replace(OURS, kv_heads=4)


def test_other_settings_than_the_folder(peers):
    """Weights that would fit, under settings that would make other numbers of them."""
    _, folder = peers("mistral")
    config = hf.decoder_config(hf.read_settings(folder))
    wrong = dataclasses.replace(config, windows=(), rope_theta=1e4)
    with pytest.raises(
        UserError, match=r"rope_theta is 1000000.0 there and 10000.0 here, windows is \(5, 5, 5\) there"
    ):
        imported(folder, wrong)


def test_weights_that_do_not_fit(peers, tmp_path):
    _, folder = peers("llama2")
    config = hf.decoder_config(hf.read_settings(folder))
    out = change(folder, tmp_path)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: value for file in set(index.values()) for name, value in load_file(out / file).items()}
    for file in [*set(index.values()), "model.safetensors.index.json"]:
        (out / file).unlink()

    def refused(match, **changes):
        values = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, out / "model.safetensors")
        with pytest.raises(UserError, match=match) as error:
            imported(out, config)
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
    config = hf.decoder_config(hf.read_settings(folder))
    leaves = {f"decoder/{path}": leaf for path, leaf in parameters(imported(folder, config)).items()}
    hf.export_decoder(tmp_path / "out", config, leaves, source, IDS)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    with pytest.raises(UserError, match="exists already"):
        hf.export_decoder(tmp_path / "out", config, leaves, source, IDS)
