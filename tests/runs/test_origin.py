"""What one run gives another: weights that mean the same there, and a decoder for its adapters."""

import dataclasses

import pytest
from support import tiny
from support.fake_brain import tiny_config

from unimed_jax.errors import UserError
from unimed_jax.model import sharding
from unimed_jax.model.parameters import abstract, parameters
from unimed_jax.runs import origin
from unimed_jax.runs.open import initial_leaves, open_run
from unimed_jax.settings import from_config_dict
from unimed_jax.train import loop

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def adapted(quick_compiles, built_once):
    """A finished run whose decoder has adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *settings: None)
        config = tiny_config(steps=2)
        config.model.lora.rank = 2
        return open_run(built_once("adapted", lambda at: loop.train(from_config_dict(config), at)))


@pytest.mark.parametrize(
    "later, changes, match",
    [
        ((), {}, None),
        ((), {"lora.rank": 0}, "has adapters of rank 2 on .*q.*, and config.model has no place"),
        ((), {"lora.rank": 3}, "has adapters of rank 2"),
        ((), {"lora.targets": ("q",)}, r"has adapters of rank 2 on [^q]*, and"),
        ((), {"lora.alpha": 64.0}, "lora.alpha / lora.rank is 8.0 there and 32.0 here"),
        ((("seed", "*/lora_?"),), {"lora.alpha": 64.0}, None),  # new random adapters take their place
        ((), {"lora.dropout": 0.3}, None),
        ((), {"decoder.rope_theta": 1e6}, "decoder.rope_theta is 10000.0 there and 1000000.0 here"),
        ((("seed", "decoder/*"),), {"decoder.rope_theta": 1e6}, None),
        ((), {"vision.normalise": "picture"}, "vision.normalise is 'fixed' there and 'picture' here"),
        ((), {"connector.activation": "silu"}, "connector.activation is 'gelu' there and 'silu' here"),
        ((), {"connector.router": "hard"}, None),
    ],
)
def test_weights_are_taken_where_they_mean_the_same(adapted, later, changes, match):
    config = tiny_config()
    config.model.lora.rank = 2
    config.init = (("seed", ""), ("run", str(adapted.folder)), *later)
    config.update_from_flattened_dict({f"model.{name}": value for name, value in changes.items()})
    config = from_config_dict(config)
    if match:
        with pytest.raises(UserError, match=match):
            initial_leaves(config, adapted.tokenizer)
    else:
        initial_leaves(config, adapted.tokenizer)


@pytest.mark.parametrize(
    "part, theirs, ours, lost, named",
    [
        # of the same shape: experts x hidden units, heads x width of a head
        ("connector", {"experts": 2, "hidden": 15}, {"experts": 3, "hidden": 10}, (), "r.experts is 2"),
        ("decoder", {}, {"heads": 8, "head_dim": 4, "kv_heads": 4}, (), "decoder.heads is 4"),
        ("decoder", {"vocab": 120}, {"vocab": 130}, (), None),
        ("vision", {"image_size": 16}, {"image_size": 24}, (), None),
        ("vision", {"feature_layer": -1, "depth": 2}, {"feature_layer": -2, "depth": 3}, (), "feature"),
        ("moe", {"experts": 3}, {"experts": 3, "top_k": 2}, (), "moe.top_k"),
        ("moe", {}, {"experts": 3}, (), None),  # experts start as copies of MLPs
        ("lora", {"rank": 2}, {"rank": 0}, ("decoder/layers/attention/q/lora_a",), "on q,"),
        ("lora", {"rank": 2}, {"rank": 0}, (), None),
    ],
)
def test_shapes_do_not_say_all(part, theirs, ours, lost, named):
    plain = {} if part == "lora" else {"lora": {"rank": 0}}
    one, other = tiny.config(**{part: theirs}, **plain), tiny.config(**{part: ours}, **plain)
    shapes = parameters(abstract(other))
    here = parameters(abstract(one))
    taken = {path for path, leaf in here.items() if path in shapes and shapes[path].shape == leaf.shape}
    if named is None:
        origin.refuse_other_model("there", one, other, taken, lost)
    else:
        with pytest.raises(UserError, match=named):
            origin.refuse_other_model("there", one, other, taken, lost)


PATHS = ("decoder/embedding", "decoder/layers/q/kernel", "decoder/layers/q/lora_a", "vision/cls")


@pytest.mark.parametrize(
    "sources, experts, name, remark",
    [
        ({PATHS[0]: "hf base", PATHS[1]: "hf base"}, 0, "base", ""),
        ({PATHS[0]: "gguf b.gguf", PATHS[1]: "gguf b.gguf", PATHS[3]: "eva e"}, 0, "b.gguf", ""),
        ({PATHS[0]: "hf base"}, 0, "", "only this run holds decoder/layers/q/kernel"),
        ({PATHS[0]: "hf base", PATHS[1]: "hf base"}, 3, "", "only this run holds its experts"),
        ({PATHS[0]: "hf base", PATHS[1]: "run runs/full"}, 0, "", "several sources"),
        ({PATHS[0]: "run a", PATHS[1]: "run a"}, 0, "", "export --run=a --format=decoder writes it"),
    ],
)
def test_adapters_name_the_decoder_that_they_were_trained_on(
    sources, experts, name, remark, monkeypatch, tmp_path
):
    base = {path: {"source": source, "fingerprint": 1} for path, source in sources.items()}
    monkeypatch.setattr(origin, "newest_note", lambda folder: (3, {"base": base}))
    config = dataclasses.replace(tiny.CONFIG, moe=dataclasses.replace(tiny.CONFIG.moe, experts=experts))
    found, said = origin.base_of_adapters(tmp_path, config, PATHS)
    assert found == name and remark in said and bool(said) == bool(remark)
