"""Text to token ids: any Hugging Face tokenizer folder, and a small byte-level BPE trained from a corpus."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from unimed_jax.config import TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import TAGS, form_of, runs_of
from unimed_jax.errors import UserError
from unimed_jax.files import read_json

# Their ids are 0..3. They alone are "special": dropped from decoded text, and never read out of a text.
CONTROL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
FILES = (  # that a tokenizer's folder may hold
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
MARKERS = ("[INST]", "[/INST]", "<Img>", "</Img>", *TAGS.values(), "{", "}")
COORDINATES = tuple(f"<{i}>" for i in range(101))

# Digits stand alone, and so does each capital of a code (J45.901, M1A.0, S00.00XA): what is rare as a word is
# common letter by letter.
_SINGLE = r"\p{N}|[A-Z](?=[A-Z.]*[0-9])|(?<=[0-9])[A-Z]|(?<=[0-9][A-Z])[A-Z]"


def train_tokenizer(texts: Iterable[str], text: TextConfig, folder: str | Path) -> None:
    """Trains a byte-level BPE of at most `text.vocab` tokens and saves it as a Hugging Face folder.

    The 256 bytes are always in it, so that no text holds an unknown token. Markers of the prompt are one token
    each, with `text.coordinate_tokens` also the box coordinates `<0>`..`<100>` (contiguous ids). The same texts
    give the same files. Raises UserError if `text.vocab` cannot hold all of these.
    """
    whole = (*MARKERS, *COORDINATES) if text.coordinate_tokens else MARKERS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = [word for word in whole if word not in alphabet]
    least = len(CONTROL) + len(alphabet) + len(added)
    if text.vocab < least:
        raise UserError(
            f"config.text.vocab={text.vocab} cannot hold bytes, markers and coordinates; set {least} or more."
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SINGLE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text.vocab - len(added),
        special_tokens=list(CONTROL.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # The trainer does not know the markers: without the cut it would spend merges on "[vqa]" and "<12>".
    marker = re.compile("|".join(map(re.escape, whole)))
    bpe.train_from_iterator(_parts(texts, marker), trainer)
    bpe.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in whole])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    # Written here because save_pretrained of transformers 5 names a class that transformers 4 does not have.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **CONTROL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _parts(texts: Iterable[str], marker: re.Pattern[str]) -> Iterator[str]:
    for text in texts:
        yield from filter(None, marker.split(text))


def corpus(examples: Iterable[Example], text: TextConfig) -> Iterator[str]:
    """The texts of examples as training shows them; their instructions in turn, so that each of the pool occurs."""
    form = form_of(text)
    for i, example in enumerate(examples):
        yield from (run.text for run in runs_of(form.training(example, i)) if run.text)


def _from_folder(folder: Path) -> Any:
    """Loads the folder's tokenizer with transformers, which is imported only here: it takes a second or more."""
    config = folder / "tokenizer_config.json"
    plain = config.is_file() and not (folder / "config.json").exists()
    if plain and read_json(config).get("tokenizer_class") == "PreTrainedTokenizerFast":
        # As `train_tokenizer` writes it. The automatic class would import torch, where that is installed.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer

    # Without trust, code in the folder is passed over rather than asked about.
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


class Tokenizer:
    """A Hugging Face tokenizer as the rest of the code sees it.

    `bos`, `eos`, `pad`: ids. Without a beginning of text `bos` is `eos`; without padding `pad` is the unknown
    token or, failing that, `eos`. `size`: number of ids, added tokens included. `coordinate_start`: the id of
    `<0>` where `<0>`..`<100>` are single tokens with contiguous ids, else None. `dropped`: ids left out of texts.
    """

    def __init__(self, tokenizer, name: str = "tokenizer"):
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name} has no end-of-text token (eos_token), so that answers cannot end; set one.")
        self._tokenizer = tokenizer
        # Four times as fast as through transformers, and safe from several threads.
        self._rust: tokenizers.Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if self._rust is not None:
            self._rust.no_truncation()
            self._rust.no_padding()
            self._rust.encode_special_tokens = True
        self.size = len(tokenizer)
        self.eos: int = tokenizer.eos_token_id
        self.bos: int = self.eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        spare = self.eos if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        self.pad: int = spare if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.coordinate_start = self._find_coordinates()
        coordinates = set() if self.coordinate_start is None else set(range(self.coordinate_start, self.size)[:101])
        self.dropped = {self.bos, self.eos, self.pad, *tokenizer.all_special_ids} - coordinates

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads a Hugging Face tokenizer folder; nothing is fetched. Raises UserError where there is none."""
        if not Path(folder).is_dir():
            raise UserError(f"tokenizer folder {folder} does not exist; check config.text.tokenizer.")
        try:
            return cls(_from_folder(Path(folder)), f"tokenizer folder {folder}")
        except UserError:
            raise
        except Exception as error:  # transformers raises many kinds here
            reason = " ".join(str(error).split())
            raise UserError(
                f"tokenizer folder {folder} cannot be read ({reason[:200]}); give a folder with a Hugging Face "
                "tokenizer (tokenizer.json or tokenizer.model, and tokenizer_config.json)."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. A control token spelt out in the text is plain characters here."""
        if self._rust is not None:
            return self._rust.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens are dropped, markers and coordinates kept."""
        kept = [int(i) for i in ids if int(i) not in self.dropped]
        return self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names what `encode` does: equal for equal tokenizers."""
        if self._rust is not None:
            facts = self._rust.to_str()
        else:  # a tokenizer in Python: its class and all its pieces
            facts = json.dumps([type(self._tokenizer).__name__, self._tokenizer.get_vocab()], sort_keys=True)
        return hashlib.sha256(f"{self.bos}/{self.eos}/{facts}".encode()).hexdigest()

    def state(self, folder: str | Path) -> str:
        """Names the tokenizer in two parts, by its files in `folder` and by its `fingerprint`.

        Two states that agree in one part are of one tokenizer: the second outlives a harmless edit of the files, the
        first another version of the libraries.
        """
        digest = hashlib.sha256()
        for name in FILES:
            if (Path(folder) / name).is_file():
                digest.update(f"{name}\0".encode() + hashlib.sha256((Path(folder) / name).read_bytes()).digest())
        return f"{digest.hexdigest()}/{self.fingerprint}"

    def _find_coordinates(self) -> int | None:
        unknown = self._tokenizer.unk_token_id
        ids = self._tokenizer.convert_tokens_to_ids(list(COORDINATES))
        if None in ids or unknown in ids or ids != list(range(ids[0], ids[0] + len(ids))):
            return None
        return ids[0]
