"""Turns text into token ids, with any tokenizer in a Hugging Face folder or with a small one.

The small one is a byte-level BPE that is trained from a corpus.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from unimed_jax.config import TextConfig
from unimed_jax.data.example import Example
from unimed_jax.data.forms import TAGS, form_of, runs_of
from unimed_jax.data.tokenizer_probe import ENDING, SMALL, is_plain, trouble
from unimed_jax.errors import UserError
from unimed_jax.foreign_config import read_sizes
from unimed_jax.parsing import read_json

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

# Digits stand alone, and so does each capital of a code (J45.901, M1A.0, S00.00XA): what is rare as
# a word is common letter by letter.
_SINGLE = r"\p{N}|[A-Z](?=[A-Z.]*[0-9])|(?<=[0-9])[A-Z]|(?<=[0-9][A-Z])[A-Z]"


def train_tokenizer(texts: Iterable[str], text: TextConfig, folder: str | Path) -> None:
    """Trains a byte-level BPE of at most `text.vocab` tokens and saves it as a Hugging Face folder.

    The 256 bytes are always in it, so that no text holds an unknown token. Markers of the prompt
    are one token each, with `text.coordinate_tokens` also the box coordinates `<0>`..`<100>`
    (contiguous ids). The same texts give the same files. Raises UserError if `text.vocab` cannot
    hold all of these.
    """
    whole = (*MARKERS, *COORDINATES) if text.coordinate_tokens else MARKERS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = [word for word in whole if word not in alphabet]
    least = len(CONTROL) + len(alphabet) + len(added)
    if text.vocab < least:
        raise UserError(
            f"config.text.vocab={text.vocab} cannot hold bytes, markers and coordinates; set "
            f"{least} or more."
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
    # Written here because save_pretrained of transformers 5 names a class that transformers 4 does
    # not have.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **CONTROL,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def _parts(texts: Iterable[str], marker: re.Pattern[str]) -> Iterator[str]:
    for text in texts:
        yield from filter(None, marker.split(text))


def corpus(examples: Iterable[Example], text: TextConfig) -> Iterator[str]:
    """Yields the texts of examples as training shows them.

    Instructions take turns, so that each of the pool occurs.
    """
    form = form_of(text)
    for i, example in enumerate(examples):
        yield from (run.text for run in runs_of(form.training(example, i)) if run.text)


# Characters that no vocabulary has: a tokenizer without a token for them fails at once.
STRANGE = "a \u2603\U000f0000"
MOST_ROWS = 1 << 24  # that an embedding may need
LARGEST = 64 << 20  # bytes of a tokenizer.json, twice those of the largest published ones
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SETTINGS_BYTES = 16 << 20  # of each of them, at most


def _from_folder(folder: Path) -> Any:
    """Loads the folder's tokenizer with transformers.

    That package is imported only here, because it takes a second or more.
    """
    advice = "give a folder with a Hugging Face tokenizer"
    settings = {
        name: read_json(folder / name, advice, SETTINGS_BYTES)
        for name in SETTINGS
        if (folder / name).exists()
    }
    if (folder / "config.json").exists():
        read_sizes(folder / "config.json", advice)  # transformers reads it too
    if (folder / "tokenizer.json").exists():
        _check_program(folder / "tokenizer.json", advice)
    elif (folder / "tokenizer.model").exists():
        _check_whole(folder / "tokenizer.model")
    config = settings.get("tokenizer_config.json", {})
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'tokenizer_config.json'} holds no object of settings; {advice}.")
    if (
        config.get("tokenizer_class") == "PreTrainedTokenizerFast"
        and not (folder / "config.json").exists()
    ):
        # As `train_tokenizer` writes it. The automatic class would import torch, where that is
        # installed.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer

    # Without trust, code in the folder is passed over rather than asked about.
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _check_program(file: Path, advice: str) -> None:
    """Raises UserError for a tokenizer.json whose steps may take endless time or memory."""
    size = file.stat().st_size
    if size > LARGEST:
        raise UserError(f"{file} has {size} bytes, more than the {LARGEST} that are read; {advice}.")
    if size <= SMALL and is_plain(read_json(file, advice), ENDING | {_SINGLE}):
        return
    found = _tried(file, file.stat().st_mtime_ns)
    if found is not None:
        raise UserError(f"{file} cannot be used ({found}); {advice}.")


def _check_whole(file: Path) -> None:
    """Raises UserError for a SentencePiece model that is cut short.

    The file is a protocol buffer and is read field after field.
    """
    if file.stat().st_size > LARGEST:
        raise UserError(
            f"{file} has {file.stat().st_size} bytes, more than the {LARGEST} that are read; get "
            "another."
        )
    data = file.read_bytes()
    at = pieces = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value

    try:
        while at < len(data):
            tag = number()
            if tag & 7 != 2:  # everything at the top is a message of its own
                raise IndexError
            pieces += tag >> 3 == 1
            length = number()
            at += length
    except IndexError:
        at = -1
    if at != len(data) or not pieces:
        raise UserError(
            f"{file} is not a model of SentencePiece, or is cut short or damaged; get it again."
        )
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{file}: reading it needs the package sentencepiece; run pip install sentencepiece."
        )


@functools.lru_cache(maxsize=64)
def _tried(file: Path, changed: int) -> str | None:
    return trouble(file)


class Tokenizer:
    """Wraps a Hugging Face tokenizer as the rest of the code needs it.

    `bos`, `eos`, `pad`: ids. Without a beginning of text `bos` is `eos`; without padding `pad` is
    the unknown token or, failing that, `eos`. `size`: the rows that an embedding needs, which is
    the highest id + 1, as ids may have gaps. `coordinate_start`: the id of `<0>` where
    `<0>`..`<100>` are single tokens with contiguous ids, else None. `dropped`: ids left out of
    texts.
    """

    def __init__(self, tokenizer, name: str = "tokenizer"):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{name} has no end-of-text token (eos_token), so that answers cannot end; set one."
            )
        self._tokenizer = tokenizer
        # Four times as fast as through transformers, and safe from several threads.
        self._rust: tokenizers.Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if self._rust is not None:
            self._rust.no_truncation()
            self._rust.no_padding()
            self._rust.encode_special_tokens = True
        self.size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        if (
            self.size > MOST_ROWS
        ):  # the package would list every id that is left out, to write the tokenizer
            raise UserError(
                f"{name} has the id {self.size - 1}, but ids end at {MOST_ROWS - 1} here; get another."
            )
        self.eos: int = tokenizer.eos_token_id
        self.bos: int = self.eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        spare = self.eos if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        self.pad: int = spare if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.coordinate_start = self._find_coordinates()
        coordinates = (
            set()
            if self.coordinate_start is None
            else set(range(self.coordinate_start, self.size)[:101])
        )
        self.dropped = {self.bos, self.eos, self.pad, *tokenizer.all_special_ids} - coordinates

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads a Hugging Face tokenizer folder; nothing is fetched.

        Raises UserError where there is none.
        """
        if not Path(folder).is_dir():
            raise UserError(f"tokenizer folder {folder} does not exist; check config.text.tokenizer.")
        try:
            made = cls(_from_folder(Path(folder)), f"tokenizer folder {folder}")
            made.decode(made.encode(STRANGE))
            return made
        except UserError:
            raise
        except BaseException as error:  # transformers raises many kinds here
            # which is one of Rust
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())
            if "tiktoken" in reason:  # what transformers tries last, whatever failed before
                reason = "its tokenizer.model is damaged"
            raise UserError(
                f"tokenizer folder {folder} cannot be read ({reason[:200]}); give a folder with a "
                "Hugging Face tokenizer (tokenizer.json or tokenizer.model, and "
                "tokenizer_config.json)."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` and adds nothing to them."""
        if self._rust is not None:
            return self._rust.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @functools.cached_property
    def together(self) -> Callable[[Sequence[str], bool], list[list[int]]] | None:
        """Returns `encode_together`, or None if encoding the texts one by one gives the same ids.

        None says that the ids are the same either way. That is so if the tokenizer itself cuts
        before a blank, and puts nothing before a text.
        """
        if self._rust is None:
            return self.encode_together
        normalizer, words = self._rust.normalizer, self._rust.pre_tokenizer
        text = normalizer.normalize_str("is: y") if normalizer else "is: y"
        cut = text.find(":") + 1
        parts = words.pre_tokenize_str(text) if words else [(text, (0, len(text)))]
        cuts = (
            cut > 0
            and not any(start < cut < end for _, (start, end) in parts)
            and parts[0][0].startswith("is")
        )
        alone = self.encode("is:") + self.encode(" y")
        return None if cuts and alone == self.encode("is: y") else self.encode_together

    def encode_together(self, texts: Sequence[str], begins: bool) -> list[list[int]]:
        """Encodes the texts as one and gives each its ids.

        An id that two texts share goes to the later one, if it holds more of that text than the
        blanks before it. begins: whether a text begins here, or goes on after an end of text.
        """
        whole = "".join(texts)
        if self._rust is None:
            ends = [len(self._shared(whole, "".join(texts[:i]))) for i in range(1, len(texts))]
            ids = self.encode(whole)
            return [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]
        encoding = (self._rust if begins else self._going_on).encode(whole, add_special_tokens=False)
        found: list[list[int]] = [[] for _ in texts]
        borders = [sum(map(len, texts[:i])) for i in range(1, len(texts))]
        blanks = [len(text) - len(text.lstrip(" ")) for text in texts[1:]]
        place = 0
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            while place < len(borders) and (
                start >= borders[place] or end > borders[place] + blanks[place]
            ):
                place += 1
            found[place].append(number)
        return found

    def _shared(self, whole: str, part: str) -> list[int]:
        """Gives the ids with which both texts begin."""
        pairs = zip(self.encode(whole), self.encode(part), strict=False)
        return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]

    @functools.cached_property
    def _going_on(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer as it is after an end of text.

        It leaves out a sign that it puts before the first word only.
        """
        assert self._rust is not None
        facts = self._rust.to_str()
        if '"prepend_scheme":"first"' not in facts:
            return self._rust
        made = tokenizers.Tokenizer.from_str(
            facts.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        )
        made.encode_special_tokens = True
        return made

    def keep_no_words(self) -> None:
        """Lets the package forget the words that it has seen, and keep none from now on."""
        if self._rust is not None:
            for rust in {self._rust, self._going_on}:
                if hasattr(rust.model, "_resize_cache"):  # models of the kind that keeps some
                    rust.model._resize_cache(0)
                    rust.model._clear_cache()

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` without control tokens.

        Markers and coordinates are kept.
        """
        kept = [int(i) for i in ids if int(i) not in self.dropped]
        return self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a text that names what `encode` does and is equal for equal tokenizers."""
        if self._rust is not None:
            facts = self._rust.to_str()
        else:  # a tokenizer in Python: its class and all its pieces
            facts = json.dumps(
                [type(self._tokenizer).__name__, self._tokenizer.get_vocab()], sort_keys=True
            )
        return hashlib.sha256(f"{self.bos}/{self.eos}/{facts}".encode()).hexdigest()

    def check_fits(self, vocab: int) -> None:
        """Raises UserError if a decoder of `vocab` rows lacks a row for one of the ids."""
        if self.size > vocab:
            raise UserError(
                f"config.model.decoder.vocab={vocab} is less than the {self.size} rows that the "
                f"tokenizer needs (its highest id is {self.size - 1}); raise it."
            )

    def state(self, folder: str | Path) -> str:
        """Names the tokenizer in two parts, by its files in `folder` and by its `fingerprint`.

        Two states that agree in one part are of one tokenizer: the second outlives a harmless edit
        of the files, the first another version of the libraries.
        """
        digest = hashlib.sha256()
        for name in FILES:
            if (Path(folder) / name).is_file():
                digest.update(
                    f"{name}\0".encode() + hashlib.sha256((Path(folder) / name).read_bytes()).digest()
                )
        return f"{digest.hexdigest()}/{self.fingerprint}"

    def _find_coordinates(self) -> int | None:
        unknown = self._tokenizer.unk_token_id
        ids = self._tokenizer.convert_tokens_to_ids(list(COORDINATES))
        if None in ids or unknown in ids or ids != list(range(ids[0], ids[0] + len(ids))):
            return None
        return ids[0]
