"""Brings texts into the form in which answers are compared, and splits them into words and numbers.

One spelling is as good as another here: upper and lower case, curly and straight quotes, all
dashes, full-width letters, digits of any script, "1,000" and "1000". What changes the meaning
stays: signs, comparisons, decimals.
"""

import unicodedata

import regex

# Protocol ids name these rules. Change the name with the rule.
EXACT = "nfkc-lower-signs"  # of `canonical`
WORDS = "nfkc-lower-signs-words"  # of `tokens`

# NFKC leaves these as they are, or (the acute accent) makes a blank and a mark of them.
_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′´`ʼʹ", "'"),
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–—―−﹘", "-"),
        **{"×": "x", "⁄": "/", "∕": "/", "٫": ".", "٬": ",", "≦": "≤", "⩽": "≤", "≧": "≥", "⩾": "≥"},
    }
)
_THIN_BLANK = regex.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # separates thousands
# NFKC would make 102 of 10², 10-3 of 10⁻³ and 11/2 of 1½
_POWER = regex.compile(r"(?<=\p{Nd})(?=[⁺⁻]?\p{No})")
_INVISIBLE = regex.compile(r"\p{Cf}+")  # soft hyphens, joiners, marks of writing direction
_OTHER_DIGIT = regex.compile(r"[^\P{Nd}0-9]")

_LETTER = r"[\w\p{M}]"  # with combining marks, which belong to the letter before them
_BEFORE = rf"(?<!{_LETTER})(?<!\d[.,])"  # no number goes on here
_THOUSANDS = regex.compile(
    _BEFORE + r"[1-9](?:\d{0,2}(?:(?:,\d{3})+|(?:'\d{3})+)|\d?(?:,\d\d)+,\d{3})(?!\d|[,']\d)"
)
_REWRITES = (
    (regex.compile(r"<="), "≤"),
    (regex.compile(r">="), "≥"),
    (regex.compile(r"\+/-"), "±"),
    (regex.compile(r"([<>≤≥±])\s+(?=[-+.]*\d)"), r"\1"),  # "< 5" is "<5"
    (regex.compile(rf"(?<!{_LETTER}|[)\]+])\+(?=\.?\d)"), ""),  # "+5" is "5"
    (regex.compile(r"(?<![\w.)])\.(?=\d)"), "0."),  # ".5" is "0.5"
    (regex.compile(r"(?<=\d)\s*x\s*(?=\d)"), "x"),  # "3 x 4" is "3x4"
    (regex.compile(r"(?<=\d)\s+(?=[%‰])"), ""),  # "5 %" is "5%"
)
_CLOSING = regex.compile(r"[\s\p{Terminal_Punctuation}]+$")

# Scripts without blanks between words, and Korean, whose words change their ends: each character is
# a token.
_CHARACTER = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}ー]"
_NUMBER = r"(?:\d+(?:\.\d+)+|(?<!\d,)\d+,\d+(?!,?\d)|\d+)"
_COMPARED = r"(?:<(?!\w+>)|(?<!<\w+)>|[≤≥±])"  # not the brackets of a mark: "<unk>", a box's "<10>"
_MINUS = rf"(?:(?<!{_LETTER}|[)\]%.'\"])-)?"  # a dash between words or numbers is not a sign
# "HER2-", "(-)", "-ve"
_RESULT = rf"(?<={_LETTER}|[)])-(?!{_LETTER}|[(<])|(?<![^\s(])-(?=\s*(?:$|[,.;)/])|ve\b)"
_TOKEN = regex.compile(
    rf"(?V1){_COMPARED}?{_MINUS}{_NUMBER}"
    rf"|{_CHARACTER}\p{{M}}*"
    r"|(?<=\d)x(?=\d)"
    rf"|[[{_LETTER}]--[{_CHARACTER}]]+(?:'[[{_LETTER}]--[{_CHARACTER}]]+)*"
    rf"|\++|{_COMPARED}|[≠%‰↑↓♂♀]|{_RESULT}"
)


def folded(text: str) -> str:
    """Replaces spellings that mean the same by one of them.

    Signs, comparisons and punctuation stay.
    """
    if not text.isascii():
        text = _POWER.sub(" ", _THIN_BLANK.sub(",", text.translate(_TYPOGRAPHY)))
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHY))
        text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    text = " ".join(text.lower().split())
    if any(mark in text for mark in "0123456789<>+"):
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", "").replace("'", ""), text)
        for pattern, to in _REWRITES:
            text = pattern.sub(to, text)
    return text


def canonical(text: str) -> str:
    """Returns the `folded` text without punctuation at its end.

    "The Left Lung." becomes "the left lung".
    """
    return _CLOSING.sub("", folded(text))


def tokens(text: str) -> list[str]:
    """Splits a text into words, numbers with their signs and comparisons, and signs of their own.

    "3.5 cm, T1-weighted." -> ["3.5", "cm", "t1", "weighted"]; "< 5mm, HER2+" -> ["<5", "mm",
    "her2", "+"]. Chinese, Japanese and Korean are split into characters. Other punctuation is
    dropped.
    """
    return _TOKEN.findall(folded(text))
