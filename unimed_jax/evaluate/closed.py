"""Decides whether an answer to a closed question chooses what the reference says."""

import regex

from unimed_jax.evaluate.words import folded, tokens

# Words of which one excludes the others: an answer that names two of them has chosen neither.
_RIVALS = (
    {"left", "right"},
    {"normal", "abnormal"},
    {"present", "absent"},
    {"positive", "negative"},
    {"male", "female"},
    {"upper", "lower"},
    {"superior", "inferior"},
    {"anterior", "posterior"},
    {"medial", "lateral"},
    {"benign", "malignant"},
    {"increased", "decreased"},
    {"hyperintense", "hypointense", "isointense"},
    {"hyperdense", "hypodense", "isodense"},
    {"axial", "coronal", "sagittal"},
    {"ct", "mri"},
    {"左", "右"},
    {"上", "下"},
    {"前", "后"},
    {"是", "否"},
    {"男", "女"},
)
# What questions let choose from: groups of choices, each with all its names. Only where an answer is a
# bare list do these count as several; a sentence may name another one for the place or the contrast.
_LISTED = tuple(
    tuple(frozenset(tuple(tokens(name)) for name in choice.split(", ")) for choice in group)
    for group in (
        (
            "ct, computed tomography",
            "mr, mri, magnetic resonance",
            "x-ray, x-rays, xray, chest x-ray, radiograph, chest radiograph, plain film, x线, x光",
            "ultrasound, us, sonography, ultrasonography, 超声",
            "pet, positron emission tomography",
        ),
        ("t1, t1w, t1wi", "t2, t2w, t2wi", "flair, t2 flair", "dwi, diffusion"),
        (
            "brain, 脑, 大脑",
            "heart, 心, 心脏",
            "lung, lungs, 肺, 肺部",
            "liver, 肝, 肝脏",
            "spleen, 脾, 脾脏",
            "kidney, kidneys, 肾, 肾脏",
            "stomach, 胃",
            "pancreas, 胰, 胰腺",
            "gallbladder, gall bladder, 胆囊",
            "bladder, urinary bladder, 膀胱",
        ),
    )
)
# Words of an item that do not change what it names.
_BESIDE = {"a", "an", "the", "both", "left", "right", "scan", "scans", "image", "images", "imaging"}
_BESIDE |= {"weighted", "左", "右"}
_ITEM_WORDS = 2  # besides those, that any other item of a bare list may have
_ENGLISH_NEGATIONS = {
    *("no", "non", "not", "none", "without", "never", "neither", "nor", "cannot", "instead", "than"),
    *("absence", "hardly", "lack", "lacks", "negative", "unlikely"),
}
_CHINESE_NEGATIONS = {"不", "没", "沒", "無", "无", "未", "非"}
_NEGATIONS = _ENGLISH_NEGATIONS | _CHINESE_NEGATIONS
# Words that may stand between a negation and what it denies: "not on the left", "no evidence of a mass".
_ARTICLES = {"a", "an", "the", "any"}
_SMALL = _ARTICLES | {
    *("on", "in", "at", "of", "to", "for", "is", "be", "been", "seen", "found", "located"),
    *("evidence", "sign", "signs", "them", "是", "在", "有", "见", "見", "明", "显", "顯"),
}
_JOINS = {"or", "and", "maybe", "perhaps", "possibly"}
# What offers a choice: "CT/MRI", "liver|spleen", 左或右, 是还是不是; not "L4/5" nor 还是 for "still".
_OR = regex.compile(
    r"(?<=\w)\s*[/|\\]\s*(?=[^\W\d_])|(?<=[^\W\d_])\s*[/|\\]\s*(?=\w)"
    r"|或者|或是|或|(?<=\p{Han})(?:还是|還是)"
)
_CLAUSE_END = regex.compile(r"[,.;:!?。、](?!\d)| - ")
_ITEM_END = regex.compile(_CLAUSE_END.pattern + r"|\b(?:and|or)\b|&|(?<=\p{Han})[和与及](?=\p{Han})")


def closed_accuracy(prediction: str, reference: str) -> bool:
    """Says whether an answer chooses the reference and nothing else, which an empty one does not.

    * Reference "yes" or "no": the first yes or no in the answer decides. "Yes, no fracture is seen"
      is yes, "no evidence of a mass, yes" is no. An answer that offers both ("yes or no", "yes/no",
      "yes, no" and nothing behind it) is neither, and so is one that denies it ("not yes").
    * Any other reference: its words stand together in the answer as whole words, are not denied
      ("not on the left") and not one of several ("left or right", "CT/MRI"). Words that exclude
      each other (left and right, axial and coronal) count as several wherever the second one
      stands, unless it is denied ("left, not right"); modalities, MR sequences and organs do only
      where the answer is a bare list ("CT, X-ray", "lung, liver and heart").
    """
    wanted = tokens(_spelled(reference))
    clauses = [tokens(clause) for clause in _CLAUSE_END.split(_spelled(prediction))]
    # A reference may hold punctuation itself, so its words are sought in the whole answer.
    said = [word for clause in clauses for word in clause]
    ends = {0}  # where clauses begin
    for clause in clauses:
        ends.add(max(ends) + len(clause))
    if wanted in (["yes"], ["no"]):
        return _polarity(said, ends) == wanted[0]
    starts = [i for i in range(len(said) - len(wanted) + 1) if said[i : i + len(wanted)] == wanted]
    stated = [i for i in starts if not (_denied(said, i, ends) or _asked(said, i, len(wanted), ends))]
    if not wanted or not stated or _names_rival(said, wanted, ends):
        return False
    if _lists_rival(prediction, reference):
        return False
    return "or" in wanted or not any(_among_several(said, i, len(wanted)) for i in stated)


def _spelled(text: str) -> str:
    """Folds the text and writes what offers a choice as "or"."""
    return _OR.sub(" or ", folded(text))


def _polarity(said: list[str], clause_starts: set[int]) -> str | None:
    """Returns the first yes or no, or None if neither is said, both are offered, or it is denied."""
    places = [i for i, word in enumerate(said) if word in ("yes", "no")]
    if not places:
        return None
    first = places[0]
    if first not in clause_starts and said[first - 1] == "not":
        return None
    for i in places[1:]:
        between = set(said[first + 1 : i])
        offered = {"or", "and"} & between or i + 1 == len(said)
        if said[i] != said[first] and offered and between <= _JOINS:
            return None
    return said[first]


def _denied(said: list[str], i: int, clause_starts: set[int]) -> bool:
    """Says whether a negation in the same clause comes before word `i`.

    Only small words may be between them.
    """
    while i not in clause_starts:
        i -= 1
        if said[i] in _NEGATIONS or said[i].endswith("n't"):
            return True
        if said[i] not in _SMALL:
            return False
    return False


def _asked(said: list[str], start: int, length: int, clause_starts: set[int]) -> bool:
    """Says whether the words from `start` and their denial are a question: 有没有, 是不是."""
    words, stop = said[start : start + length], start + length
    after = said[stop:] if stop not in clause_starts else []
    return bool(after) and after[0] in _CHINESE_NEGATIONS and after[1 : length + 1] == words


def _names_rival(said: list[str], wanted: list[str], clause_starts: set[int]) -> bool:
    rivals = {word for group in _RIVALS if group & set(wanted) for word in group} - set(wanted)
    return any(word in rivals and not _denied(said, i, clause_starts) for i, word in enumerate(said))


def _lists_rival(prediction: str, reference: str) -> bool:
    """Says whether an answer is a bare list that names another choice beside the reference.

    Items that are no known choice ("lung, right lower lobe") are taken for details of the reference.
    """
    wanted, items = _items(reference), _items(prediction)
    for group in _LISTED if len(wanted) == 1 else ():
        named = [choice for choice in group if choice.intersection(items)]
        if any(wanted[0] in choice for choice in named):
            rest = set(items).difference(*named)
            return len(named) > 1 and all(len(item) <= _ITEM_WORDS for item in rest)
    return False


def _items(text: str) -> list[tuple[str, ...]]:
    """Splits a text at commas and the like, "and" and "or" into its items without the words beside."""
    items = [tokens(item) for item in _ITEM_END.split(_spelled(text))]
    return [found for item in items if (found := tuple(word for word in item if word not in _BESIDE))]


def _among_several(said: list[str], start: int, length: int) -> bool:
    """Says whether "or" comes next to the words from `start`, or one word away from them."""
    return "or" in said[max(start - 2, 0) : start] + said[start + length : start + length + 2]
