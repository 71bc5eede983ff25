"""Tries a tokenizer.json from elsewhere in a process of its own, with little time and memory.

A tokenizer is a small program: a regular expression may never end, and replacements may double a
text forty times. Run as a script (`python tokenizer_probe.py FILE`) it encodes texts that bring
such a program to its worst, and imports nothing but the package `tokenizers`.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 5  # of a processor, for the texts
LOADING = 60  # seconds of a processor, for reading the file
MEMORY = 1 << 30  # bytes of address space, besides 24 for each byte of the file
SMALL = 4 << 20  # bytes of a file that is judged by reading it, without a process
# Steps that take time in proportion to the text.
STEPS = {
    "BertNormalizer",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "Prepend",
    "Strip",
    "Nmt",
}
STEPS |= {
    "ByteLevel",
    "Whitespace",
    "WhitespaceSplit",
    "Metaspace",
    "BertPreTokenizer",
    "Digits",
    "Punctuation",
}
STEPS |= {
    "ByteFallback",
    "Fuse",
    "WordPiece",
    "BPEDecoder",
    "CTC",
    "UnicodeScripts",
    "CharDelimiterSplit",
}
MOST_STEPS = 16
MOST_GROWTH = 100  # of a text, by replacements
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns that are known to end: StarCoder's, Llama 3's, Qwen's.
ENDING = frozenset(
    {
        r"\p{N}",
        r"\p{N}{1,3}",
        " ",
        _WORDS.replace("DIGITS", r"\p{N}{1,3}"),
        _WORDS.replace("DIGITS", r"\p{N}"),
    }
)


def is_plain(spec: Any, patterns: frozenset[str]) -> bool:
    """Says whether a tokenizer.json surely ends soon.

    It then has few steps, all of them known, and only patterns that are listed.

    spec: the file's content. patterns: regular expressions that are known to end.
    """
    left = (
        [spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        if isinstance(spec, dict)
        else [0]
    )
    steps = 0
    while left:
        step = left.pop()
        steps += 1
        if step is None:
            continue
        if not isinstance(step, dict) or steps > MOST_STEPS:
            return False
        kind = step.get("type")
        if kind == "Sequence":
            inner = [step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step]
            if len(inner) != 1 or not isinstance(inner[0], list):
                return False
            left += inner[0]
        elif kind in ("Split", "Replace"):
            pattern, new = step.get("pattern"), step.get("content", "")
            if (
                not isinstance(pattern, dict)
                or len(pattern) != 1
                or not isinstance(new, str)
                or len(new) > 1
            ):
                return False
            text = pattern.get("String")
            # An empty text stands between any two characters.
            if not (isinstance(text, str) and text) and pattern.get("Regex") not in patterns:
                return False
        elif kind not in STEPS or len(str(step.get("prepend", ""))) > 1:
            return False
    return True


def repeats_within_repeats(pattern: str) -> bool:
    """Says whether a regular expression repeats a group that can match a text in several ways.

    Examples are (a+)+ and (a|aa)*. Finding that such a pattern does not match takes time
    exponential in the length of the text.
    """
    inside = [False]  # of each open group: whether it varies
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 2
            continue
        if character == "[":
            at = _end_of_class(pattern, at)
            continue
        if character == "(":
            inside.append(False)
        elif character == "|":
            inside[-1] = True
        elif character == ")" and len(inside) > 1:
            varies = inside.pop()
            least, most, _ = _repeat(pattern, at + 1)
            if varies and most > max(least, 9):
                return True
            inside[-1] |= varies or most != least
        elif character in "*+?{":
            least, most, length = _repeat(pattern, at)
            # A sign after a group was counted there; after "(" it belongs to the group's kind.
            if length and pattern[at - 1 : at] not in ("(", ")"):
                inside[-1] |= most != least
            at += max(length, 1)
            continue
        at += 1
    return False


def _end_of_class(pattern: str, at: int) -> int:
    """Finds the place after a class like [^ab], which may hold others."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at


def _repeat(pattern: str, at: int) -> tuple[int, float, int]:
    """Reads the repetition that begins at a place, as (least, most, characters).

    Returns (1, 1, 0) if there is none.
    """
    simple = {"*": (0, float("inf"), 1), "+": (1, float("inf"), 1), "?": (0, 1.0, 1)}
    if pattern[at : at + 1] in simple:
        return simple[pattern[at]]
    match = re.match(r"\{([0-9]{0,9})(,?)([0-9]{0,9})\}", pattern[at:])
    if not match or match.group() in ("{}", "{,}"):
        return 1, 1.0, 0
    least = int(match[1] or 0)
    most = float(match[3]) if match[3] else float("inf") if match[2] else float(least)
    return least, most, len(match.group())


def trouble(file: Path) -> str | None:
    """Says what is wrong with a tokenizer.json that was tried in a process of its own.

    Returns None if it works.
    """
    command = [sys.executable, __file__, str(file)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=10 * (LOADING + SECONDS), stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "reading it does not end"
    said = " ".join(done.stdout.decode(errors="replace").split())
    if done.returncode == 0:
        return None
    return said[-200:] or f"a line of text takes it more than {SECONDS} seconds or 1 GB"


# --------------------------------------------------------------------------------------------------
# In the process of its own
# --------------------------------------------------------------------------------------------------


def patterns_in(spec: Any) -> list[str]:
    """Lists the regular expressions of a tokenizer.json."""
    found, left = [], [spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            found += [step["Regex"]] if isinstance(step.get("Regex"), str) else []
            left += step.values()
        elif isinstance(step, list):
            left += step
    return found


def growth(spec: Any) -> float:
    """Returns the greatest factor by which a tokenizer.json's replacements can lengthen a text."""
    times, left = 1.0, [spec.get("normalizer"), spec.get("decoder")]
    while left:
        step = left.pop()
        if isinstance(step, list):
            left += step
        elif isinstance(step, dict):
            left += [value for value in step.values() if isinstance(value, (dict, list))]
            new, pattern = step.get("content"), step.get("pattern")
            if step.get("type") == "Replace" and isinstance(new, str):
                old = pattern.get("String") if isinstance(pattern, dict) else None
                times *= max(1.0, (len(new.encode()) + (not old)) / max(1, len(str(old or "").encode())))
                times = min(times, 1e9)
    return times


def texts_against(patterns: list[str]) -> list[str]:
    """Makes texts that repeat what the patterns look for, and then do not match."""
    words = {*" \n\ta0é!.-_日", "aA1 ", "Is the left lung clear? "}
    for pattern in patterns:
        words |= {
            *re.findall(r"[^\\\[\](){}|*+?^$]", pattern)[:40],
            *re.findall(r"[\w ]{2,12}", pattern)[:20],
        }
    texts = ["The left thalamus lies at {<12><34><56><100>}; J45.901, naïve, it's, 日本語, 🧠.\n\n  x"]
    return texts + [
        word * (1500 // len(word)) + end for word in sorted(words) for end in ("", "!", "\x01", "b")
    ]


def main(file: str) -> int:
    memory = MEMORY + 24 * Path(file).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (LOADING, LOADING))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import tokenizers

    try:
        with open(file, encoding="utf-8") as opened:
            spec = json.load(opened)
        patterns = patterns_in(spec)
        bad = next((pattern for pattern in patterns if repeats_within_repeats(pattern)), None)
        if bad is not None:
            print(f"its pattern {ascii(bad)[:100]} may take forever")
            return 1
        if growth(spec) > MOST_GROWTH:
            print("its replacements make a text hundreds of times as long")
            return 1
        tokenizer = tokenizers.Tokenizer.from_file(file)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        until = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (until, LOADING))
        for text in texts_against(patterns):
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    except BaseException as error:  # also a panic of the package
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
