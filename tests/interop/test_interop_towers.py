"""Vision encoders from outside: the same features after import, the same bits back, positions of
another size.
"""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import VisionConfig
from unimed_jax.errors import UserError
from unimed_jax.interop.families import hf_config, towers
from unimed_jax.interop.sources import SOURCES
from unimed_jax.interop.tensors.files import open_weights
from unimed_jax.interop.tensors.load import Destination
from unimed_jax.interop.tensors.table import Stored, Tensors, check, to_published
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.vision import resize_positions

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
TOWER = {
    **{"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 4},
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 20,
}
OURS = VisionConfig(
    image_size=16, patch_size=4, width=12, depth=3, heads=2, mlp_width=20, qkv_bias="qkv"
)
CLIP = {
    **{
        "activation": "quick_gelu",
        "patch_bias": False,
        "pre_norm": True,
        "feature_layer": -2,
        "output_norm": False,
    },
    **{"norm_eps": 1e-5, "output_norm_eps": 1e-5},
}
SIGLIP = {
    **{"activation": "gelu_tanh", "cls_token": False, "norm_eps": 1e-6, "output_norm_eps": 1e-6},
    **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
# Class, tower settings, ours. 18 pixels: the last two meet no patch, as in SigLIP so400m (384
# pixels, patches of 14).
PEERS = {
    "clip": ("CLIPVisionModel", {}, CLIP),
    "clip and its text half": ("CLIPModel", {}, CLIP),
    "siglip": ("SiglipVisionModel", {}, SIGLIP),
    "siglip and its text half": ("SiglipModel", {"image_size": 18}, SIGLIP),
}

encode = jax.jit(lambda vision, images: vision(images))


def pictures(size):
    return np.random.default_rng(5).standard_normal((2, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """name -> (torch tower with random weights, folder it, or its whole model, was saved in), made
    once.
    """
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    made = {}

    def peer(name):
        if name not in made:
            kind, theirs, _ = PEERS[name]
            settings = getattr(transformers, kind.replace("Model", "Config"))
            if "Vision" in kind:
                settings = settings(**TOWER, **theirs)
            else:
                settings = settings(text_config=TEXT, vision_config=TOWER | theirs)
            torch.manual_seed(0)
            model = (
                getattr(transformers, kind)._from_config(settings, attn_implementation="eager").eval()
            )
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    scale = "norm" in key and key.endswith("weight")
                    weight.copy_(torch.randn_like(weight) * 0.3 + (1 if scale else 0))
            folder = tmp_path_factory.mktemp("tower")
            model.save_pretrained(folder)
            made[name] = getattr(model, "vision_model", model), folder
        return made[name]

    return peer


def imported(kind, path, config: VisionConfig):
    settings = dataclasses.replace(tiny.CONFIG, vision=config)
    model = abstract(settings)
    leaves = {p: leaf for p, leaf in parameters(model).items() if p.startswith("vision/")}
    loaded = SOURCES[kind].load(path, settings, Destination(leaves))
    assert loaded.keys() == leaves.keys()
    return with_parameters(model, loaded).vision


@pytest.mark.parametrize("name", PEERS)
def test_same_features(name, peers):
    peer, folder = peers(name)
    torch = pytest.importorskip("torch", reason=NEEDS)
    config = towers.tower_from_hf(hf_config.read_hf_config(folder))
    assert config == dataclasses.replace(OURS, **PEERS[name][2])
    vision = imported(name.split()[0], folder, config)
    pixels = pictures(peer.config.image_size)
    with torch.no_grad():
        out = peer(torch.tensor(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    expected = out.hidden_states[-2][:, 1:] if name.startswith("clip") else out.last_hidden_state
    actual = np.asarray(encode(vision, pixels[:, : config.image_size, : config.image_size]))
    assert np.abs(expected.numpy()).max() > 0.5
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_back_to_the_bit(name, peers):
    peer, folder = peers(name)
    vision = imported(name, folder, towers.tower_from_hf(hf_config.read_hf_config(folder)))
    prefix = (
        "vision_model."
        if any(key.startswith("vision_model.") for key in open_weights(folder).stored)
        else ""
    )
    leaves = {f"vision/{path}": leaf for path, leaf in parameters(vision).items()}
    there, theirs = (
        to_published(towers.hf_tower_table(vision.config, prefix), leaves),
        open_weights(folder),
    )
    assert len(there) >= 37
    for key, value in there.items():
        np.testing.assert_array_equal(value, theirs.read(key), err_msg=key)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_another_image_size(name, peers):
    """24 pixels in place of 16: the table of positions is resized as transformers does."""
    peer, folder = peers(name)
    torch = pytest.importorskip("torch", reason=NEEDS)
    config = dataclasses.replace(towers.tower_from_hf(hf_config.read_hf_config(folder)), image_size=24)
    vision = imported(name, folder, config)
    pixels = pictures(24)
    with torch.no_grad():
        inputs = torch.tensor(pixels.transpose(0, 3, 1, 2).copy())
        out = peer(inputs, output_hidden_states=True, interpolate_pos_encoding=True)
    expected = out.hidden_states[-2][:, 1:] if name == "clip" else out.last_hidden_state
    np.testing.assert_allclose(encode(vision, pixels), expected.numpy(), rtol=0, atol=1e-4)


def test_what_does_not_fit(peers, tmp_path):
    _, folder = peers("clip")
    config = towers.tower_from_hf(hf_config.read_hf_config(folder))
    for changed, match in (
        ({"activation": "gelu"}, "activation is 'quick_gelu' there and 'gelu' here"),
        ({"depth": 2, "mean": (0.5, 0.5, 0.5)}, "depth is 3 there and 2 here, mean is"),
    ):
        with pytest.raises(UserError, match=match):
            imported("clip", folder, dataclasses.replace(config, **changed))
    _, other = peers("siglip")
    with pytest.raises(UserError, match="is not the tower"):
        imported("siglip", other, config)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama' is not a vision tower"):
        towers.tower_from_hf(hf_config.read_hf_config(tmp_path))


# ---------------------------------------------------------------------------------------------
# EVA
# ---------------------------------------------------------------------------------------------


def eva_tensors(rng, depth):
    """The names and shapes of a file of the whole encoder: a block more than is used, and a head."""
    model = abstract(tiny.config(vision={"depth": depth})).vision
    leaves = {
        f"vision/{p}": rng.standard_normal(x.shape).astype(np.float16)
        for p, x in parameters(model).items()
    }
    return to_published(towers.eva_table(model.config), leaves) | {
        "norm.weight": np.ones(12, np.float16),
        "head.weight": np.ones((5, 12), np.float16),
    }


@pytest.mark.parametrize("size", [16, 24])
def test_eva_file(tmp_path, size):
    """A float16 .pth: the blocks in use, the table of positions for our image size, ln_vision left
    alone.
    """
    torch = pytest.importorskip("torch", reason=NEEDS)
    tensors = eva_tensors(np.random.default_rng(0), depth=3)
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, tmp_path / "eva.pth")
    config = tiny.config(vision={"depth": 2, "image_size": size})
    model = abstract(config)
    loaded = towers.load_eva(tmp_path / "eva.pth", config, Destination(parameters(model)))
    assert {p for p in parameters(model) if p.startswith("vision/")} - loaded.keys() == {
        "vision/output_norm/scale",
        "vision/output_norm/bias",
    }
    np.testing.assert_array_equal(
        loaded["vision/blocks/up/kernel"][1], tensors["blocks.1.mlp.fc1.weight"].T
    )
    positions = resize_positions(tensors["pos_embed"][0].astype(np.float32), size // 4, 1)
    np.testing.assert_array_equal(loaded["vision/positions"], positions)
    assert (size == 16) == (positions.shape[0] == 17)


def test_eva_file_of_another_model(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    tensors = eva_tensors(np.random.default_rng(0), depth=4)
    tensors["pos_embed"] = tensors["pos_embed"][:, :13]  # 12 patches do not make a square
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, tmp_path / "eva.pth")
    config = tiny.config(vision={"depth": 2})
    with pytest.raises(UserError) as error:
        towers.load_eva(tmp_path / "eva.pth", config, Destination(parameters(abstract(tiny.CONFIG))))
    assert "blocks.3.norm1.weight" in str(error.value) and "blocks.2." not in str(error.value)
    assert "pos_embed is of shape [1, 13, 12] in place of [1, 17, 12]" in str(error.value)


# ---------------------------------------------------------------------------------------------
# Published sizes
# ---------------------------------------------------------------------------------------------


class Shapes(Tensors):
    def __init__(self, state):
        self.origin = "transformers"
        self.stored = {
            name: Stored(tuple(x.shape), np.dtype(ml_dtypes.bfloat16)) for name, x in state.items()
        }


SIZES = {
    "CLIP ViT-L/14-336": (
        "CLIPVision",
        {
            **{
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
            },
            **{"image_size": 336, "patch_size": 14},
        },
        24 * 24,
    ),
    "SigLIP so400m-patch14-384": (
        "SiglipVision",
        {
            **{
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
            },
            **{"image_size": 384, "patch_size": 14},
        },
        27 * 27,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_size(name):
    """Every tensor of the full-size torch model has its place in ours; neither allocates anything."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    kind, settings, patches = SIZES[name]
    settings = getattr(transformers, f"{kind}Config")(**settings)
    with torch.device("meta"):
        peer = getattr(transformers, f"{kind}Model")(settings)
    config = towers.tower_from_hf(settings)
    assert config.patches == patches
    names = {f"vision_model.{n.removeprefix('vision_model.')}": x for n, x in peer.state_dict().items()}
    connector = dataclasses.replace(tiny.CONFIG.connector, rate=1)
    leaves = parameters(abstract(dataclasses.replace(tiny.CONFIG, vision=config, connector=connector)))
    table = towers.hf_tower_table(config)
    check(table, Shapes(names), leaves)
    assert set(table.paths()) == {path for path in leaves if path.startswith("vision/")}
