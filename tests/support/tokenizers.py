"""Makes small tokenizers of the usual kinds, which treat blanks and words differently."""

import functools

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "USER: What is seen? ASSISTANT: a lesion in the liver",
    "A chat between a curious user and an assistant. USER: x ASSISTANT: yes",
    "no yes maybe lesion left lung </s> is text <e> is text ends with a blank Is a lesion seen?",
) * 20
SPECIAL = ["<s>", "</s>", "<unk>"]
KINDS = (
    *("prepend", "prepend, words", "metaspace first", "metaspace always", "metaspace never"),
    *(
        "metaspace first, words",
        "metaspace always, words",
        "byte level",
        "byte level, blank before",
        "words",
    ),
)


@functools.cache
def _trained(kind: str) -> str:
    cuts = "words" in kind
    if kind == "words":
        words = sorted({word for text in TEXTS for word in text.split()})
        made = tokenizers.Tokenizer(
            models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *words))}, "<unk>")
        )
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.add_special_tokens(SPECIAL)
        return made.to_str()
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if kind.startswith("byte level"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="before" in kind)
        made.decoder = decoders.ByteLevel()
    else:
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    if kind.startswith("prepend"):
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind == "prepend, words":  # merges as LLaMA-2's: only their first letter may be "▁"
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"▁?[\w<>/]+|:|[^\w▁:]"), "isolated")
    if kind.startswith("metaspace"):
        made.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=kind.split()[1].strip(","), split=cuts
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.startswith("byte") else []
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=[*alphabet, "▁", "e", "é"],
    )
    made.train_from_iterator(TEXTS, trainer)
    if kind == "prepend, words":
        made.pre_tokenizer = None
    return made.to_str()


def made(kind: str) -> tokenizers.Tokenizer:
    """Makes a tokenizer of the kind."""
    return tokenizers.Tokenizer.from_str(_trained(kind))


def saved(kind: str, folder):
    """Saves the kind's tokenizer as a Hugging Face folder; returns the folder."""
    special = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made(kind), **special).save_pretrained(folder)
    return folder
