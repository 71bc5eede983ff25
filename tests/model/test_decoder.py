"""The decoder equals a plain loop in float64; padding, caches and merged adapters change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import DecoderConfig, LoraConfig, RopeScaling
from unimed_jax.interop.families import hf, hf_config
from unimed_jax.interop.families.peft import peft_table
from unimed_jax.interop.tensors.table import to_leaves
from unimed_jax.model.cache import Span, visible
from unimed_jax.model.decoder import Decoder, merge_lora
from unimed_jax.model.parameters import abstract, parameters, with_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEEDS = "a peer of the extra `parity`: pip install -e '.[parity]'"
HF = {
    "vocab_size": 120,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
OURS = DecoderConfig(vocab=120, width=16, depth=2, heads=4, kv_heads=4, head_dim=8, mlp_width=24)
PLAIN = LoraConfig(rank=0)


@jax.jit
def logits_of(decoder, tokens, span):
    hidden, *_ = decoder(decoder.embed(tokens, jnp.float32), span)
    return decoder.logits(hidden)


def right_padded(mask) -> Span:
    rows, length = mask.shape
    return Span(np.tile(np.arange(length), (rows, 1)), mask, mask)


def hf_model(kind: str, **settings):
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**HF, **settings})
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    randomise(torch, peer)
    return peer


def randomise(torch, peer) -> None:
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            fan_in = weight.shape[-1] if weight.ndim == 2 and "embed" not in name else 4
            weight.copy_(torch.randn_like(weight) * fan_in**-0.5 + (1 if "norm" in name else 0))


def import_decoder(peer, config: DecoderConfig, lora: LoraConfig = PLAIN, prefix="", base="") -> Decoder:
    """The peer's weights through the table that imports published ones."""
    settings = dataclasses.replace(tiny.CONFIG, decoder=config, lora=lora)
    table = hf.hf_decoder_table(config, prefix, lora.targets if base else ())
    if lora.rank:
        table += peft_table(settings, f"{prefix}model.layers", ".default")
    model = abstract(settings)
    empty = {
        p: np.full(v.shape, np.nan, np.float32)
        for p, v in parameters(model).items()
        if p.startswith("decoder/")
    }
    tensors = {name: tensor.detach().numpy() for name, tensor in peer.state_dict().items()}
    return with_parameters(model, empty | to_leaves(table, tensors, empty)).decoder


def ragged_tokens(rows=3, length=40):
    """-> tokens [B, S] and a mask of rows that end early."""
    tokens = np.random.default_rng(1).integers(0, OURS.vocab, (rows, length)).astype(np.int32)
    mask = (np.arange(length)[None] < np.array([length, length - 7, 5])[:rows, None]).astype(np.int32)
    return tokens, mask


def assert_equals_peer(decoder, peer, tolerance=1e-4):
    torch = pytest.importorskip("torch", reason=NEEDS)
    tokens, mask = ragged_tokens()
    with torch.no_grad():
        expected = peer(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    actual = np.asarray(logits_of(decoder, tokens, right_padded(mask)))
    assert np.abs(expected).max() > 0.5  # of a size at which the tolerance says something
    np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "kind, theirs, targets",
    [
        ("Llama", {}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("Phi", {"layer_norm_eps": 1e-5}, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    ],
)
def test_equals_peft(kind, theirs, targets):
    """All linears wrapped, lora_B away from zero; merged, the same logits and no adapter left."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    peft = pytest.importorskip("peft", reason=NEEDS)
    settings = peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"
    )
    base = hf_model(kind, **theirs)
    config = hf_config.decoder_from_hf(base.config)
    peer = peft.get_peft_model(base, settings).eval()
    randomise(torch, peer)
    assert [name.split(".")[1] for name in hf.linear_names(config).values()] == targets
    lora = LoraConfig(rank=4, alpha=16.0, targets=tuple(hf.linear_names(config)))
    decoder = import_decoder(peer, config, lora, "base_model.model.", ".base_layer")
    assert_equals_peer(decoder, peer)
    assert_equals_peer(merge_lora(decoder), peer)


def test_merge_lora():
    decoder = tiny.model(tiny.config(lora={"rank": 3})).decoder
    merged = merge_lora(decoder)
    tokens, mask = ragged_tokens()
    wrapped, folded = (logits_of(d, tokens, right_padded(mask)) for d in (decoder, merged))
    np.testing.assert_allclose(folded, wrapped, rtol=0, atol=1e-5)
    bare = tiny.model(tiny.config(lora={"rank": 0})).decoder
    kernels = {path: leaf for path, leaf in parameters(decoder).items() if "lora" not in path}
    without = logits_of(with_parameters(bare, kernels), tokens, right_padded(mask))
    assert np.abs(np.asarray(without - wrapped)).max() > 0.05  # the adapters do something
    assert not [path for path in parameters(merged) if "lora" in path]
    assert [path for path in parameters(decoder) if "lora" in path]  # the one given stays as it was


def test_lora_targets():
    """Only the named linears carry adapters."""
    model = abstract(tiny.config(lora={"targets": ("q", "down")}))
    adapted = {path.split("/")[-2] for path in parameters(model) if path.endswith("lora_a")}
    assert adapted == {"q", "down"}


# ---------------------------------------------------------------------------------------------
# A plain loop in float64, one row, one position, one head at a time
# ---------------------------------------------------------------------------------------------


def reference_logits(decoder, config: DecoderConfig, tokens, positions, sees) -> np.ndarray:
    """`sees(i, j)` says whether position i may read position j. -> [S, vocab]"""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in parameters(decoder).items()}

    def norm(x, name, i=...):
        if config.norm == "layer":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
            return x * p[f"{name}/scale"][i] + p[f"{name}/bias"][i]
        scale = p[f"{name}/scale"][i] + (config.norm == "rms_zero")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def linear(x, name, i):
        bias = p.get(f"layers/{name}/bias")
        return x @ p[f"layers/{name}/kernel"][i] + (0 if bias is None else bias[i])

    def rotate(x, position, window):
        theta = config.local_rope_theta if window and config.local_rope_theta else config.rope_theta
        slower = (
            1
            if config.rope_scaling is None or theta == config.local_rope_theta
            else config.rope_scaling.factor
        )
        rotary = int(config.head_dim * config.rotary_fraction)
        out = x.copy()
        for pair in range(rotary // 2):
            angle = position * theta ** (-2 * pair / rotary) / slower
            a, b = x[pair], x[pair + rotary // 2]
            out[pair] = a * np.cos(angle) - b * np.sin(angle)
            out[pair + rotary // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def activate(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = p["embedding"][tokens] * (config.width**0.5 if config.scaled_embedding else 1)
    scale = config.query_scale or config.head_dim**-0.5
    length, heads, d = len(tokens), config.heads, config.head_dim
    for i in range(config.depth):
        window = config.windows[i % len(config.windows)] if config.windows else 0
        y = norm(x, "layers/norm1", i)
        q, k, v = (linear(y, f"attention/{n}", i).reshape(length, -1, d) for n in "qkv")
        if config.qk_norm:
            q, k = norm(q, "layers/attention/q_norm", i), norm(k, "layers/attention/k_norm", i)
        out = np.zeros((length, heads, d))
        for s in range(length):
            for h in range(heads):
                g = h * config.kv_heads // heads
                js = [
                    j
                    for j in range(length)
                    if sees(s, j) and (not window or positions[s] - positions[j] < window)
                ]
                query = rotate(q[s, h], positions[s], window)
                scores = np.array([query @ rotate(k[j, g], positions[j], window) for j in js]) * scale
                if config.attention_softcap:
                    scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
                weights = np.exp(scores - scores.max())
                out[s, h] = (weights / weights.sum()) @ v[js, g]
        out = linear(out.reshape(length, -1), "attention/o", i)
        x = x + (norm(out, "layers/post_norm1", i) if config.post_norms else out)
        if not config.parallel_block:
            y = norm(x, "layers/norm2", i)
        up = linear(y, "mlp/up", i)
        out = linear(
            activate(linear(y, "mlp/gate", i)) * up if config.gated_mlp else activate(up), "mlp/down", i
        )
        x = x + (norm(out, "layers/post_norm2", i) if config.post_norms else out)
    logits = norm(x, "norm") @ (p["embedding"].T if config.tied_head else p["head"]) + p.get(
        "head_bias", 0
    )
    cap = config.logit_softcap
    return cap * np.tanh(logits / cap) if cap else logits


FIELDS = {
    "window per layer": {"windows": (3, 0)},
    "attention softcap": {"attention_softcap": 0.7},
    "logit softcap": {"logit_softcap": 1.5},
    "partial rotary": {"rotary_fraction": 0.5},
    "layer norm, gelu": {"norm": "layer", "activation": "gelu_tanh"},
    "q and v bias, tied": {"attention_bias": ("q", "v"), "tied_head": True},
    "Gemma 3": {
        **{
            "norm": "rms_zero",
            "post_norms": True,
            "qk_norm": True,
            "query_scale": 0.6,
            "scaled_embedding": True,
        },
        **{
            "windows": (3, 0),
            "local_rope_theta": 30.0,
            "rope_scaling": RopeScaling(kind="linear", factor=5.0),
        },
    },
    "Phi": {
        **{
            "norm": "layer",
            "parallel_block": True,
            "gated_mlp": False,
            "mlp_bias": True,
            "head_bias": True,
        },
        **{"attention_bias": ("q", "k", "v", "o"), "rotary_fraction": 0.5},
    },
    "a rotation of the layers with a window": {"windows": (3, 0), "local_rope_theta": 30.0},
    "a scale of the scores": {"query_scale": 0.6},
    "a scaled embedding": {"scaled_embedding": True},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_against_a_plain_loop(name):
    """Two segments packed after a shared prefix: the loop's own reading of the attention rule."""
    config = tiny.config(decoder=FIELDS[name], lora={"rank": 0})
    decoder = tiny.model(config, seed=2).decoder
    segments = np.array([1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0], np.int32)
    prefixes = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], np.int32)
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 0, 0], np.int32)
    tokens = np.random.default_rng(3).integers(0, config.decoder.vocab, 12)

    def sees(i, j):
        return j <= i and segments[j] != 0 and segments[j] in (segments[i], prefixes[i])

    actual = logits_of(decoder, tokens[None], Span(positions[None], segments[None], prefixes[None]))
    expected = reference_logits(decoder, config.decoder, tokens[:10], positions[:10], sees)
    np.testing.assert_allclose(np.asarray(actual)[0, :10], expected, rtol=0, atol=1e-5)
    default = tiny.config(
        decoder={k: getattr(tiny.CONFIG.decoder, k) for k in FIELDS[name]}, lora={"rank": 0}
    )
    free = {"windows", "attention_softcap", "logit_softcap", "rotary_fraction"}
    if set(FIELDS[name]) <= free | {"local_rope_theta", "query_scale", "scaled_embedding"}:
        without = reference_logits(decoder, default.decoder, tokens[:10], positions[:10], sees)
        assert np.abs(without - expected).max() > 1e-3  # the field does something


def test_visible():
    """The attention rule by its definition, entry by entry, also from a place within a cache."""
    rng = np.random.default_rng(0)
    segments, prefixes = rng.integers(0, 4, (2, 9)), rng.integers(0, 4, (2, 9))
    positions = rng.integers(0, 9, (2, 9))
    key = Span(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, prefixes)))
    start, length = 4, 3
    query = Span(*(x[:, start : start + length] for x in key))
    for window in (0, 2):
        mask = np.asarray(visible(query, key, start, window))
        for b in range(2):
            for s in range(length):
                for j in range(9):
                    i = start + s
                    expected = segments[b, j] != 0 and j <= i
                    expected = expected and segments[b, j] in (segments[b, i], prefixes[b, i])
                    expected = expected and (not window or positions[b, i] - positions[b, j] < window)
                    assert mask[b, s, j] == expected, (window, b, s, j)


def test_padding_side_changes_nothing():
    decoder = tiny.model().decoder
    tokens, mask = ragged_tokens(rows=3, length=20)
    lengths = mask.sum(axis=1)
    left_tokens, left_mask = np.zeros_like(tokens), np.zeros_like(mask)
    for b, n in enumerate(lengths):
        left_tokens[b, 20 - n :], left_mask[b, 20 - n :] = tokens[b, :n], 1
    left = Span(np.maximum(np.cumsum(left_mask, axis=1) - 1, 0).astype(np.int32), left_mask, left_mask)
    at_right = np.asarray(logits_of(decoder, tokens, right_padded(mask)))
    at_left = np.asarray(logits_of(decoder, left_tokens, left))
    assert np.isfinite(at_left).all() and np.isfinite(at_right).all()
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(at_left[b, 20 - n :], at_right[b, :n], rtol=0, atol=1e-5)


def test_cache_in_pieces():
    """Prefill, then pieces of any length, equal one pass over the row."""
    config = tiny.config(decoder={"windows": (0, 4)})
    decoder = tiny.model(config).decoder
    tokens, _ = ragged_tokens(rows=2, length=12)
    mask = np.ones((2, 12), np.int32)
    span = right_padded(mask)
    expected = np.asarray(logits_of(decoder, tokens, span))

    @jax.jit
    def piece(decoder, tokens, span, cache, start):
        hidden, cache, *_ = decoder(decoder.embed(tokens, jnp.float32), span, cache, start)
        return decoder.logits(hidden), cache

    cache, start, out = decoder.empty_cache(Span(*map(jnp.asarray, span)), jnp.float32), 0, []
    for length in (6, 5, 1):
        here = slice(start, start + length)
        part, cache = piece(decoder, tokens[:, here], Span(*(x[:, here] for x in span)), cache, start)
        out.append(part)
        start += length
    np.testing.assert_allclose(np.concatenate(out, axis=1), expected, rtol=0, atol=1e-5)
