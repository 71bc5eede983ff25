"""PEFT's adapter folders: the same logits after import and after export, the same bits, every
refusal a sentence.
"""

import dataclasses
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny
from support.weight_files import NEEDS, Touch, archive

from unimed_jax.config import LoraConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families import hf, hf_config, peft
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.cache import Span
from unimed_jax.model.parameters import abstract, parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

ALL = ("q", "k", "v", "o", "gate", "up", "down")
LORA = LoraConfig(3, 12.0, 0.0, ALL)
# What PEFT is given, and what our settings say of the same adapter.
ADAPTERS = {
    "all linears": (dict(r=3, lora_alpha=12, target_modules="all-linear"), LORA),
    "two, by a pattern": (
        dict(r=2, lora_alpha=5, target_modules=r".*self_attn\.(q|v)_proj", lora_dropout=0.1),
        LoraConfig(2, 5.0, 0.0, ("v", "q")),
    ),
    "scaled by the rank's root": (
        dict(r=4, lora_alpha=6, target_modules=["o_proj", "down_proj"], use_rslora=True),
        LoraConfig(4, 12.0, 0.0, ("o", "down")),
    ),
}


@jax.jit
def logits_of(decoder, tokens, span):
    hidden, *_ = decoder(decoder.embed(tokens, jnp.float32), span)
    return decoder.logits(hidden)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a random LLaMA."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(
                torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.2)
            )
            weight.add_("norm" in name)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def torch_base(base):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """name -> (folder that PEFT wrote, its model), made once."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    library = pytest.importorskip("peft", reason=NEEDS)
    made = {}

    def adapter(name):
        if name not in made:
            torch.manual_seed(1)
            model = library.get_peft_model(
                torch_base(base), library.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name][0])
            ).eval()
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if ".lora_" in key:
                        weight.copy_(torch.randn_like(weight) * 0.15)
            folder = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return adapter


def settings_of(base, lora: LoraConfig):
    return dataclasses.replace(
        tiny.CONFIG, decoder=hf_config.decoder_from_hf(hf_config.read_hf_config(base)), lora=lora
    )


def ours(base, lora: LoraConfig, folder=None):
    """(settings, decoder with adapters of the folder, leaves of the adapters)."""
    config = settings_of(base, lora)
    model = abstract(config)
    leaves = {path: leaf for path, leaf in parameters(model).items() if path.startswith("decoder/")}
    loaded = hf.load_decoder(base, config, Destination(leaves))
    adapted = peft.load_peft(folder, config, Destination(leaves)) if folder else {}
    assert (loaded | adapted).keys() == leaves.keys()
    return config, with_parameters(model, loaded | adapted).decoder, adapted


TOKENS = np.random.default_rng(0).integers(0, 90, (2, 40)).astype(np.int32)


def our_logits(decoder):
    places = np.tile(np.arange(40, dtype=np.int32), (2, 1))
    return np.asarray(
        logits_of(decoder, TOKENS, Span(places, np.ones_like(places), np.ones_like(places)))
    )


def their_logits(model):
    torch = pytest.importorskip("torch", reason=NEEDS)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", ADAPTERS)
def test_import_and_export(name, base, adapters, tmp_path):
    folder, model = adapters(name)
    library = pytest.importorskip("peft", reason=NEEDS)
    lora = ADAPTERS[name][1]
    config, decoder, leaves = ours(base, lora, folder)
    expected = their_logits(model)
    np.testing.assert_allclose(our_logits(decoder), expected, rtol=0, atol=1e-4)
    _, bare, _ = ours(base, LoraConfig(rank=0))
    assert np.abs(our_logits(bare) - expected).max() > 0.1  # a thousand times as much

    out = tmp_path / "out"
    peft.export_peft(out, config, leaves, str(base))
    again = library.PeftModel.from_pretrained(torch_base(base), out).eval()
    np.testing.assert_allclose(their_logits(again), our_logits(decoder), rtol=0, atol=1e-4)
    with again.disable_adapter():
        assert np.abs(their_logits(again) - expected).max() > 0.1
    before, after = (
        load_file(folder / "adapter_model.safetensors"),
        load_file(out / "adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key])
    back = peft.load_peft(out, config, Destination(leaves))
    assert all((np.asarray(back[path]) == np.asarray(leaf)).all() for path, leaf in leaves.items())


def test_bin_and_bfloat16(base, adapters, tmp_path):
    """A folder of PEFT's older format; numbers stay what they are in a narrower type."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    folder, model = adapters("all linears")
    lora = ADAPTERS["all linears"][1]
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old/adapter_model.bin").is_file()
    config, _, old = ours(base, lora, tmp_path / "old")
    _, _, new = ours(base, lora, folder)
    assert all((np.asarray(old[path]) == np.asarray(new[path])).all() for path in new)

    narrow = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in new.items()}
    peft.export_peft(tmp_path / "narrow", config, narrow, str(base))
    library = pytest.importorskip("peft", reason=NEEDS)
    again = library.PeftModel.from_pretrained(torch_base(base).bfloat16(), tmp_path / "narrow")
    weights = {k.replace(".default", ""): v for k, v in again.named_parameters() if ".lora_" in k}
    table = peft.peft_table(config)
    for entry in table:
        there = weights[entry.name].detach().to(torch.float32).numpy()
        np.testing.assert_array_equal(
            there, np.asarray(narrow[entry.path].astype(jnp.float32))[entry.index].T
        )


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(base, tmp_path):
    """A folder of ours, made without PEFT."""
    config = settings_of(base, LORA)
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in parameters(abstract(config)).items()
        if "/lora_" in path
    }
    peft.export_peft(tmp_path / "adapter", config, leaves, "base")
    return tmp_path / "adapter"


def refused(folder, base, match, lora: LoraConfig = LORA) -> str:
    config = settings_of(base, lora)
    with pytest.raises(UserError, match=match) as error:
        peft.load_peft(folder, config, Destination(parameters(abstract(config))))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_other_settings_are_named_at_once(folder, base):
    text = refused(folder, base, "rank is 3, not 2", LoraConfig(2, 16.0, 0.0, ("q", "v")))
    for part in (
        "alpha is 12, not 16",
        "targets are q, k, v, o, gate, down, up, not q, v",
        "of shape",
        "not known",
    ):
        assert part in text
    refused(folder, base, "rank is 3, not 0", LoraConfig(rank=0))


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("layers_to_transform", [0]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
        ("a_setting_of_the_future", 3),
    ],
)
def test_what_is_no_plain_lora_is_refused(folder, base, key, value):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert f"{key}={value!r}" in refused(folder, base, "more than plain LoRA")


@pytest.mark.parametrize(
    "key, value",
    [
        *(
            ("exclude_modules", ["lm_head"]),
            ("exclude_modules", "lm_head"),
            ("layers_pattern", "layers"),
        ),
        *(
            ("runtime_config", {"ephemeral_gpu_offload": False}),
            ("corda_config", {}),
            ("loftq_config", {"loftq_bits": 4}),
        ),
        *(
            ("megatron_core", "megatron.core"),
            ("lora_dropout", 0.5),
            ("revision", "main"),
            ("ensure_weight_tying", True),
        ),
        *(
            ("init_lora_weights", "orthogonal"),
            ("eva_config", {"rho": 2.0}),
            ("layer_replication", None),
        ),
    ],
)
def test_settings_that_change_no_number(folder, base, key, value):
    """They load, and what is loaded is the same."""
    config = settings_of(base, LORA)
    to = Destination(parameters(abstract(config)))
    expected = peft.load_peft(folder, config, to)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    found = peft.load_peft(folder, config, to)
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path])


def test_broken_folders(folder, base, tmp_path):
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    good = load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    save_file({**{k: v for k, v in good.items() if k != name}, "x": good[name]}, weights)
    refused(folder, base, rf"{name} is missing; x is not known")
    save_file(good | {name: np.ascontiguousarray(good[name].T)}, weights)
    refused(folder, base, r"up_proj.lora_B.weight is of shape \[3, 24\] in place of \[24, 3\]")
    save_file(good | {name: good[name] * np.float32("nan")}, weights)
    refused(folder, base, "up_proj.lora_B.weight holds NaN")
    save_file(good, weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, base, "damaged")
    weights.unlink()
    refused(folder, base, "holds no adapter_model.safetensors")
    for text in (
        "{",
        "[]",
        "{}",
        '{"r": 0, "lora_alpha": 1}',
        '{"r": 2, "lora_alpha": "x"}',
        '{"r": 2, "lora_alpha": NaN}',
    ):
        settings.write_text(text)
        no_json = text == "{" or "NaN" in text
        refused(folder, base, "is not JSON" if no_json else "does not describe a LoRA adapter")
    settings.unlink()
    refused(folder, base, "adapter_config.json does not exist")


def test_code_in_an_old_adapter_is_not_run(folder, base, tmp_path):
    (folder / "adapter_model.safetensors").unlink()
    archive(folder / "adapter_model.bin", pickle.dumps({"a": Touch(os.mkdir, str(tmp_path / "made"))}))
    refused(folder, base, "holds code or objects besides tensors")
    assert not (tmp_path / "made").exists()


def test_export_is_there_whole_or_not_at_all(folder, base, tmp_path):
    config = settings_of(base, LORA)
    leaves = peft.load_peft(folder, config, Destination(parameters(abstract(config))))
    with pytest.raises(UserError, match="exists already"):
        peft.export_peft(folder, config, leaves, "base")
    with pytest.raises(UserError, match="no adapters to export"):
        peft.export_peft(tmp_path / "none", settings_of(base, LoraConfig(rank=0)), {}, "base")

    class Broken:
        shape, dtype = leaves["decoder/layers/mlp/up/lora_a"].shape, np.dtype(np.float32)

        def __getitem__(self, index):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="nothing of it was kept"):
        peft.export_peft(
            tmp_path / "half", config, leaves | {"decoder/layers/mlp/up/lora_a": Broken()}, "base"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
