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
)
_ENGLISH_NEGATIONS = {"no", "not", "without", "never", "neither", "nor", "cannot", "instead", "than"}
_NEGATIONS = _ENGLISH_NEGATIONS | {"不", "没", "沒", "無", "无", "未", "非"}
# Words that may stand between a negation and what it denies: "not on the left", "no evidence of a mass".
_ARTICLES = {"a", "an", "the", "any"}
_SMALL = _ARTICLES | {"on", "in", "at", "of", "to", "is", "evidence", "sign", "signs"}
_JOINS = {"or", "and", "maybe", "perhaps", "possibly"}
_SLASH = regex.compile(r"(?<=[^\W\d_])\s*/\s*(?=[^\W\d_])")
_CLAUSE_END = regex.compile(r"[,.;:!?。、](?!\d)| - ")


def closed_accuracy(prediction: str, reference: str) -> bool:
    """Says whether an answer chooses the reference and nothing else, which an empty one does not.

    * Reference "yes" or "no": the first yes or no in the answer decides. "Yes, no fracture is seen"
      is yes, "no evidence of a mass, yes" is no. An answer that offers both ("yes or no", "yes/no")
      is neither.
    * Any other reference: its words stand together in the answer as whole words, are not denied
      ("not on the left") and not one of several ("left or right", "CT/MRI"). Words that exclude
      each other (left and right, axial and coronal) count as several wherever the second one
      stands, unless it is denied ("left, not right").
    """
    wanted = tokens(_spelled(reference))
    if wanted in (["yes"], ["no"]):
        return _polarity(tokens(_spelled(prediction))) == wanted[0]
    clauses = [tokens(clause) for clause in _CLAUSE_END.split(_spelled(prediction))]
    # A reference may hold punctuation itself, so its words are sought in the whole answer.
    said = [word for clause in clauses for word in clause]
    ends = {0}  # where clauses begin
    for clause in clauses:
        ends.add(max(ends) + len(clause))
    starts = [i for i in range(len(said) - len(wanted) + 1) if said[i : i + len(wanted)] == wanted]
    stated = [i for i in starts if not _denied(said, i, ends)]
    if not wanted or not stated or _names_rival(said, wanted, ends):
        return False
    return "or" in wanted or not any(_among_several(said, i, len(wanted)) for i in stated)


def _spelled(text: str) -> str:
    """Folds the text and writes a slash between words as "or"."""
    return _SLASH.sub(" or ", folded(text))


def _polarity(said: list[str]) -> str | None:
    """Returns the first yes or no, or None if neither is said or both are offered."""
    places = [i for i, word in enumerate(said) if word in ("yes", "no")]
    if not places:
        return None
    first = places[0]
    for i in places[1:]:
        between = said[first + 1 : i]
        if said[i] != said[first] and {"or", "and"} & set(between) and set(between) <= _JOINS:
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


def _names_rival(said: list[str], wanted: list[str], clause_starts: set[int]) -> bool:
    rivals = {word for group in _RIVALS if group & set(wanted) for word in group} - set(wanted)
    return any(word in rivals and not _denied(said, i, clause_starts) for i, word in enumerate(said))


def _among_several(said: list[str], start: int, length: int) -> bool:
    """Says whether "or" comes next to the words from `start`, or one word away from them."""
    return "or" in said[max(start - 2, 0) : start] + said[start + length : start + length + 2]
