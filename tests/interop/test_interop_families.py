"""Every family of decoders: the same logits after import, cached as at once, the same bits after
export.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import hf_peers, tiny
from support.hf_peers import HF, LLAMA3, NEEDS, OURS, PEERS, padded

from unimed_jax import processes
from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling
from unimed_jax.errors import UserError
from unimed_jax.interop.families import hf, hf_config
from unimed_jax.model.cache import Span
from unimed_jax.model.decoder import Decoder
from unimed_jax.model.layers import Norm, rope_frequencies
from unimed_jax.model.parameters import abstract, parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

IDS = {"bos": 1, "eos": 2, "pad": 0}


@jax.jit
def logits_of(decoder, tokens, span, cache=None, start=0):
    hidden, cache, *_ = decoder(decoder.embed(tokens, jnp.float32), span, cache, start)
    return decoder.logits(hidden), cache


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    return lambda name: hf_peers.peer(name, folder)


def imported(folder, config: DecoderConfig) -> Decoder:
    settings = dataclasses.replace(tiny.CONFIG, decoder=config, lora=LoraConfig(rank=0))
    return with_parameters(abstract(settings), hf_peers.load_leaves(folder, config)).decoder


@pytest.mark.parametrize("name", PEERS)
def test_same_logits(name, peers):
    """Rows of 160, 97 and 5 tokens, padded on either side, from position 0 or 3000 on.

    Windows are crossed.
    """
    peer, folder = peers(name)
    torch = pytest.importorskip("torch", reason=NEEDS)
    config = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    assert config == dataclasses.replace(OURS, **PEERS[name][2])
    decoder = imported(folder, config)
    for side, first in (("right", 0), ("left", 3000)):
        tokens, mask, positions = padded(side, first=first)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            expected = peer(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
        actual = np.asarray(logits_of(decoder, tokens, Span(positions, mask, mask))[0])
        assert np.abs(expected[mask == 1]).max() > 0.5  # of a size at which the tolerance says something
        np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama3", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "phi"]
)
def test_step_by_step_as_at_once(name):
    """A prefill of left-padded rows, then one token at a time beyond the windows."""
    config = dataclasses.replace(OURS, **PEERS[name][2])
    model = tiny.model(dataclasses.replace(tiny.CONFIG, decoder=config, lora=LoraConfig(rank=0)))
    tokens, mask, positions = padded("left", (14, 9))
    span = Span(*map(jnp.asarray, (positions, mask, mask)))
    expected, _ = logits_of(model.decoder, tokens, span)
    cache, out, places = (
        model.decoder.empty_cache(span, jnp.float32),
        [],
        [(0, 7), *((i, i + 1) for i in range(7, 14))],
    )
    for start, stop in places:
        here = Span(*(x[:, start:stop] for x in span))
        part, cache = logits_of(model.decoder, tokens[:, start:stop], here, cache, start)
        out.append(part)
    actual = np.concatenate(out, axis=1)
    np.testing.assert_allclose(actual[mask == 1], np.asarray(expected)[mask == 1], rtol=0, atol=1e-5)


def test_rope_scaling_matters():
    """The llama3 case above differs from llama2: all three ranges of wavelengths are there."""
    scaling = RopeScaling(**LLAMA3, original_positions=128)
    ratio = np.asarray(rope_frequencies(8, 1e4, scaling) / rope_frequencies(8, 1e4, None))
    assert ratio[0] == 1 and 0.2 < ratio[1] < 0.9 and ratio[3] == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", PEERS)
def test_export_reloads_to_the_bit(name, peers, tmp_path):
    """Imported, exported, loaded by transformers: the same settings, the same bits, the same logits."""
    peer, folder = peers(name)
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    config = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    leaves = {f"decoder/{path}": leaf for path, leaf in parameters(imported(folder, config)).items()}
    hf.export_decoder(tmp_path / "out", config, leaves, folder, IDS)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    before, after = peer.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    # transformers 4 reads these names alone
    older, rope = json.loads((tmp_path / "out/config.json").read_text()), peer.config.rope_parameters
    if "full_attention" in rope:
        assert older["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert older["rope_theta"] == rope["rope_theta"]
    assert older.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if "factor" in key or "original" in key}
    scaling.pop("partial_rotary_factor", None)
    assert scaling.items() <= older.get("rope_scaling", {}).items()
    assert again.config.rope_parameters == peer.config.rope_parameters
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert again.config.eos_token_id == 2 and again.dtype == torch.float32
    tokens, mask, _ = padded("right")
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        assert torch.equal(peer(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("name", ["llama2", "gemma3_text"])
def test_bfloat16_is_exported_as_such(name, peers, tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    peer, folder = peers(name)
    config = hf_config.decoder_from_hf(hf_config.read_hf_config(folder))
    leaves = {
        f"decoder/{p}": x.astype(jnp.bfloat16) for p, x in parameters(imported(folder, config)).items()
    }
    hf.export_decoder(tmp_path / "out", config, leaves, folder, IDS)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for key, value in peer.state_dict().items():
        assert torch.equal(value.bfloat16(), again.state_dict()[key]), key


def test_norms_around_one_lose_nothing_in_bfloat16():
    """Gemma's scales of 0.001 stored in bfloat16, whose 1 + 0.001 is 1: torch adds them in float32,
    and so do we.
    """
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    peer = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(32).to(torch.bfloat16)
    with torch.no_grad():
        peer.weight.copy_(torch.linspace(-0.003, 0.003, 32))
    norm = Norm(32, "rms_zero", 1e-6)
    norm.scale = nnx.Param(jnp.asarray(peer.weight.detach().float().numpy(), jnp.bfloat16))
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(x)).numpy()
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=0, atol=1e-6)


STABLELM_2 = {
    **{"vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "use_qkv_bias": True},
}
PHI_2 = {
    **{"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "partial_rotary_factor": 0.4},
}


@pytest.mark.parametrize(
    "kind, theirs, ours, count",
    [
        ("StableLm", STABLELM_2, {}, 1_644_515_328),
        ("Phi", PHI_2, {}, 2_779_683_840),
        ("Phi", PHI_2, {"head_bias": False}, 2_779_632_640),  # as Med-MoE counts and publishes it
    ],
)
def test_published_sizes(kind, theirs, ours, count):
    transformers = pytest.importorskip("transformers")
    decoder = hf_config.decoder_from_hf(getattr(transformers, f"{kind}Config")(**theirs))
    config = dataclasses.replace(
        tiny.CONFIG, decoder=dataclasses.replace(decoder, **ours), lora=LoraConfig(rank=0)
    )
    leaves = {
        path: leaf for path, leaf in parameters(abstract(config)).items() if path.startswith("decoder/")
    }
    assert sum(leaf.size for leaf in leaves.values()) == count


def test_the_bias_of_a_head_may_be_left_out_and_is_reported(peers, capsys, monkeypatch):
    """As in Med-MoE's Phi-2: logits are the peer's less its bias."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    peer, folder = peers("phi")
    config = dataclasses.replace(OURS, **{**PEERS["phi"][2], "head_bias": False})
    ours = imported(folder, config)
    assert (
        ours.head_bias is None
        and f"{folder}: the bias of its head is left out" in capsys.readouterr().out
    )
    hidden = np.random.default_rng(0).standard_normal((5, config.width)).astype(np.float32)
    with torch.no_grad():
        theirs = peer.lm_head(torch.tensor(hidden)) - peer.lm_head.bias
    assert float(peer.lm_head.bias.detach().abs().max()) > 0.1
    np.testing.assert_allclose(ours.logits(hidden), theirs.numpy(), atol=1e-5)
    monkeypatch.setattr(processes, "leads", lambda: False)
    imported(folder, config)
    assert capsys.readouterr().out == ""  # once for all processes


def test_every_setting_is_exported_or_refused():
    """What a family says of our settings, read back, are our settings; what none can say is refused."""
    for name, (kind, _, ours) in PEERS.items():
        config = dataclasses.replace(OURS, **ours)
        settings = hf_config.decoder_to_hf(config)
        assert hf_config.decoder_differences(hf_config.decoder_from_hf(settings), config) == []
        # A Mistral without windows is a LLaMA.
        assert (
            type(settings).__name__ == ("Llama" if name == "mistral without window" else kind) + "Config"
        )
    for ours in (
        {"attention_bias": ("q",)},
        {"logit_softcap": 3.0, "windows": (3, 0, 2)},
        {"rotary_fraction": 0.3},
        {"scaled_embedding": True},
        {"head_bias": True},
        {**PEERS["phi"][2], "head_bias": False},
        {**PEERS["gemma3_text"][2], "attention_softcap": 2.0},
        {**PEERS["gemma2"][2], "query_scale": 0.3},
        {**PEERS["gemma2"][2], "local_rope_theta": 100.0},
    ):
        with pytest.raises(UserError, match="no Hugging Face decoder"):
            hf_config.decoder_to_hf(dataclasses.replace(OURS, **ours))


def test_a_defect_in_a_family_is_not_taken_for_a_refusal(monkeypatch):
    def broken(settings):
        raise AttributeError("a setting that transformers has renamed")

    monkeypatch.setitem(hf_config.FAMILIES, "llama", hf_config.Family(broken))
    with pytest.raises(AttributeError, match="renamed"):
        hf_config.decoder_to_hf(OURS)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "qwen3", "stablelm", "phi"])
def test_linear_names_are_those_of_the_modules(name, peers):
    torch = pytest.importorskip("torch", reason=NEEDS)
    peer, _ = peers(name)
    linears = {
        n for n, module in peer.model.layers[0].named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert set(hf.linear_names(dataclasses.replace(OURS, **PEERS[name][2])).values()) == linears
    assert HF["num_hidden_layers"] == len(peer.model.layers)
