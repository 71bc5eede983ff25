"""Med-MoE's checkpoints and routers in both directions; experts that start from a dense decoder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hf_peers, tiny
from support.exported_model import TEXTS
from support.med_moe_published import PHI, STABLELM

from unimed_jax.config import Config, ConnectorConfig, LoraConfig, ModelConfig, MoeConfig, TextConfig
from unimed_jax.data.tokenizer import train_tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families import hf, hf_config, med_moe
from unimed_jax.interop.sources import SOURCES
from unimed_jax.interop.targets import TARGETS, Content
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.model.cache import Span
from unimed_jax.model.parameters import abstract, parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

IDS = {"bos": 1, "eos": 2, "pad": 0}
CLIP = dataclasses.replace(
    med_moe.CLIP_LARGE, image_size=16, patch_size=4, width=12, depth=3, heads=2, mlp_width=20
)


def settings(family: str, **moe) -> ModelConfig:
    """A tiny model that a Med-MoE checkpoint can hold."""
    biases = {"stablelm": ("q", "k", "v"), "phi": ("q", "k", "v", "o")}[family]
    decoder = dataclasses.replace(hf_peers.OURS, **hf_peers.PEERS[family][2])
    decoder = dataclasses.replace(decoder, attention_bias=biases, head_bias=False, depth=4)
    moe = MoeConfig(experts=3, layers=(0, 2), **moe)
    projector = ConnectorConfig(kind="mlp2x_gelu", rate=1, task_tokens=0)
    return ModelConfig(
        vision=CLIP, connector=projector, decoder=decoder, moe=moe, lora=LoraConfig(rank=0)
    )


@pytest.mark.parametrize(
    "family, moe",
    [("stablelm", {}), ("phi", {"top_k": 2, "capacity_factor": 4.0, "eval_capacity_factor": 4.0})],
)
def test_there_and_back(family, moe, tmp_path):
    """Settings and every leaf come back to the bit, also through the kind of config.init."""
    config = settings(family, aux_coef=0.01, **moe)
    leaves = parameters(tiny.model(config))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    med_moe.export_med_moe(tmp_path / "out", config, leaves, tmp_path / "words", IDS)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    read = med_moe.read_med_moe_config(tmp_path / "out")
    assert med_moe.model_from_med_moe(read, CLIP) == config and read["eos_token_id"] == 2
    shapes = parameters(abstract(config))
    loaded = SOURCES["med_moe"].load(str(tmp_path / "out"), config, Destination(shapes))
    assert loaded.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)
    with pytest.raises(UserError, match="exists already"):
        med_moe.export_med_moe(tmp_path / "out", config, leaves, tmp_path / "words", IDS)


@pytest.mark.parametrize(
    "published, dense, whole, projector",
    [
        (STABLELM, 1_644_515_328, 3_305_558_064, 6_295_552),
        (PHI, 2_779_632_640, 6_136_058_944, 9_180_160),
    ],
    ids=["stablelm", "phi"],
)
def test_published_sizes(published, dense, whole, projector):
    """Parameters as counted in the original: decoder alone and with four experts, projector, tower."""
    depth = published["num_hidden_layers"]
    moe = {
        "moe_layers_idx": list(range(0, depth, 2)),
        "num_experts": [4] * (depth // 2),
        "top_k_experts": 1,
    }
    moe |= {"use_residual": False, "router_aux_loss_coef": 0.0, "moe_enable": True}
    for settings_, expected in ((published, dense), ({**published, "moe": moe}, whole)):
        config = med_moe.model_from_med_moe(settings_)
        assert config.tokens_per_image == 576
        sizes: dict[str, int] = {}
        for path, leaf in parameters(abstract(config)).items():
            part = path.split("/")[0]
            sizes[part] = sizes.get(part, 0) + leaf.size
        assert sizes["connector"] == projector
        assert sizes["decoder"] == expected
        six = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=6))
        if config.moe.experts:
            more = sum(
                leaf.size
                for path, leaf in parameters(abstract(six)).items()
                if path.startswith("decoder/")
            )
            mlp = {2048: 34_603_008, 2560: 52_441_600}[config.decoder.width]
            assert more - expected == depth // 2 * 2 * (mlp + config.decoder.width + 1)


def test_refusals(tmp_path):
    config = settings("stablelm")
    words = med_moe.model_to_med_moe(config)
    for change, match in (
        ({"model_type": "llava_qwen"}, "model_type 'llava_qwen'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"moe": {**words["moe"], "num_experts": [4, 2]}}, r"num_experts \[4, 2\]"),
        ({"moe": {**words["moe"], "moe_layers_idx": [0, 9]}}, "layers"),
    ):
        with pytest.raises(UserError, match=match):
            med_moe.model_from_med_moe({**words, **change}, CLIP)
    with pytest.raises(UserError, match="lacks 'rope_pct'"):
        med_moe.model_from_med_moe({k: v for k, v in words.items() if k != "rope_pct"}, CLIP)
    assert med_moe.model_from_med_moe({**words, "moe": {"moe_enable": False}}, CLIP).moe == MoeConfig()
    for part, fields, match in (
        ("decoder", {"norm": "rms"}, "norm is always 'layer' there and 'rms' here"),
        ("connector", {"rate": 4}, "rate=4"),
        ("connector", {"hidden": 10}, "connector.hidden is always 32 there and 10 here"),
        ("moe", {"meta": False}, "moe.meta"),
        ("vision", {"qkv_bias": "qv"}, "vision.qkv_bias is always 'qkv' there and 'qv' here"),
        ("vision", {"normalise": "picture"}, "vision.normalise is always 'fixed' there"),
        ("vision", {"mean": (0.5, 0.5, 0.5)}, "vision.mean is always"),
        ("connector", {"activation": "silu"}, "connector.activation is always 'gelu' there"),
        (
            "moe",
            {"top_k": 2, "experts": 12},
            "moe.eval_capacity_factor is always 4.0 there and None here",
        ),
    ):
        other = dataclasses.replace(
            config, **{part: dataclasses.replace(getattr(config, part), **fields)}
        )
        with pytest.raises(UserError, match=match):
            med_moe.model_to_med_moe(other)
    with pytest.raises(
        UserError, match="config.json does not exist; give the folder of a Med-MoE checkpoint"
    ):
        med_moe.read_med_moe_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(words))
    for part, fields, match in (
        ("moe", {"experts": 5}, "moe.experts is 3 there and 5 here"),
        ("connector", {"activation": "silu"}, "connector.activation is 'gelu' there and 'silu' here"),
        ("vision", {"feature_layer": -1}, "vision.feature_layer is -2 there and -1 here"),
    ):
        other = dataclasses.replace(
            config, **{part: dataclasses.replace(getattr(config, part), **fields)}
        )
        with pytest.raises(UserError, match=match):
            med_moe.load_med_moe(tmp_path, other, Destination(parameters(abstract(other))))


def test_adapters_are_merged(tmp_path):
    config = dataclasses.replace(
        settings("stablelm"), lora=LoraConfig(rank=2, alpha=16.0, targets=("q", "v"))
    )
    decoder = dataclasses.replace(config.decoder, vocab=480)
    config = dataclasses.replace(config, decoder=decoder)
    leaves = parameters(tiny.model(config))
    train_tokenizer(TEXTS, TextConfig(vocab=480), tmp_path / "tokenizer")
    content = Content(Config(model=config), leaves, tmp_path / "tokenizer")
    TARGETS["med_moe"].write(tmp_path / "out", content)
    plain = dataclasses.replace(config, lora=LoraConfig(rank=0))
    loaded = med_moe.load_med_moe(tmp_path / "out", plain, Destination(parameters(abstract(plain))))
    for name in "qkv":
        path = f"decoder/layers/attention/{name}"
        kernel = leaves[f"{path}/kernel"]
        if name != "k":
            kernel = kernel + 8.0 * leaves[f"{path}/lora_a"] @ leaves[f"{path}/lora_b"]
        np.testing.assert_allclose(loaded[f"{path}/kernel"], kernel, rtol=1e-5, atol=1e-6)


def test_router_files(tmp_path):
    """One file for the routers of all layers; written from the first; torch's files too.

    Another width is refused.
    """
    torch = pytest.importorskip("torch", reason=hf_peers.NEEDS)
    config = settings("stablelm")
    shapes, rng = parameters(abstract(config)), np.random.default_rng(0)
    weight, bias = (
        rng.standard_normal((3, 32)).astype(np.float32),
        rng.standard_normal(3).astype(np.float32),
    )
    torch.save(
        {"fc1.weight": torch.tensor(weight), "fc1.bias": torch.tensor(bias)}, tmp_path / "router.pth"
    )
    loaded = SOURCES["router"].load(str(tmp_path / "router.pth"), config, Destination(shapes))
    assert set(loaded) == {p for p in shapes if SOURCES["router"].among([p])}
    for layer in range(2):
        np.testing.assert_array_equal(loaded["decoder/layers/moe/router/kernel"][layer], weight.T)
        np.testing.assert_array_equal(loaded["decoder/layers/moe/router/bias"][layer], bias)
    med_moe.export_router(tmp_path / "out", config, loaded)
    again = med_moe.load_router(tmp_path / "out", config, Destination(shapes))
    assert all((again[p] == loaded[p]).all() for p in loaded)
    wide = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=4))
    with pytest.raises(UserError, match=r"fc1.weight is of shape \[3, 32\] in place of \[4, 32\]"):
        med_moe.load_router(tmp_path / "router.pth", wide, Destination(parameters(abstract(wide))))


@pytest.mark.parametrize("family", ["stablelm", "phi"])
def test_experts_start_as_copies(family, tmp_path):
    """From a dense decoder's folder: with top-2 and no meta expert the sum is the dense decoder."""
    peer, folder = hf_peers.peer(family, tmp_path)
    decoder = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    dense = ModelConfig(decoder=decoder, lora=LoraConfig(rank=0))
    mixed = dataclasses.replace(dense, moe=MoeConfig(experts=3, layers=(1,), top_k=2, meta=False))
    tokens, mask, positions = hf_peers.padded("right", (9, 4))
    hidden = []
    for config in (dense, mixed):
        model = tiny.model(config)
        shapes = parameters(model)
        loaded = SOURCES["hf"].load(str(folder), config, Destination(shapes))
        left = {p for p in shapes if p.startswith("decoder/") and p not in loaded}
        assert left == {p for p in shapes if "/moe/router/" in p}
        decoder = with_parameters(model, loaded).decoder
        run = jax.jit(lambda d: d(d.embed(tokens, jnp.float32), Span(positions, mask, mask)).hidden)
        hidden.append(np.asarray(run(decoder))[mask == 1])
    np.testing.assert_allclose(hidden[1], hidden[0], atol=1e-5)
    with_meta = dataclasses.replace(mixed, moe=dataclasses.replace(mixed.moe, meta=True, residual=True))
    loaded = hf.load_decoder(folder, with_meta, Destination(parameters(abstract(with_meta))))
    for part in ("meta", "residual"):
        up = loaded[f"decoder/layers/moe/{part}/up/kernel"]
        np.testing.assert_array_equal(up[0], loaded["decoder/layers/moe/experts/up/kernel"][0, 2])
