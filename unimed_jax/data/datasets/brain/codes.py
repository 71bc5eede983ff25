"""Makes text-only questions from ICD-10-CM about the block or chapter of a code or a medical term.

Codes are spelt character by character ("G 3 0 . 1"), so that any tokenizer shows the model their
characters. A three-character category, with all its codes and terms, belongs to exactly one split.
"""

import functools
import hashlib
import importlib.util
import re
from collections import defaultdict

import numpy as np

from unimed_jax.data.datasets.brain.questions import take_turns
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

TEMPLATES = ("chapter", "block", "term")
TOTAL = {"val": 120, "test": 402}
_SPLIT = {"test": 12, "val": 5}  # per cent of the categories; the rest is train
_PER_CATEGORY = 3  # codes, and terms, of one category at most
_LONGEST_TERM = 80  # characters


def spell(code: str) -> str:
    return " ".join(code)


def split_of(category: str, seed: int) -> str:
    """Gives the split of a three-character category by a hash of the category and the seed.

    It depends on nothing else.
    """
    share = int.from_bytes(hashlib.sha256(f"{seed}/{category}".encode()).digest()[:4]) % 100
    return "test" if share < _SPLIT["test"] else "val" if share < sum(_SPLIT.values()) else "train"


@functools.cache
def ask(seed: int) -> dict[str, dict[str, list[Example]]]:
    """Returns split -> category -> its questions.

    Ids are `icd/<category>/<number>`, `cluster` is the category.
    """
    if importlib.util.find_spec("simple_icd_10_cm") is None:
        raise UserError(
            "the brain set's text questions need simple_icd_10_cm; run pip install -e '.[demo]'."
        )
    import simple_icd_10_cm as icd

    categories = sorted({code for code in icd.get_all_codes(True) if re.fullmatch(r"[A-Z]\d\w", code)})
    rows: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
    owners: dict[str, set[str]] = defaultdict(set)  # term -> categories that have it
    for category in categories:
        # A block of one category has the category's name; the flag tells them apart.
        above = icd.get_ancestors(category, prioritize_blocks=False)
        if len(icd.get_children(above[-1])) < 2:
            continue  # the chapter for special purposes: six codes, too few to be in every split
        chapter = re.sub(r" \([^()]*\)$", "", icd.get_description(above[-1]))
        block = next(a for a in above if icd.is_block(a))  # the smallest
        rng = np.random.default_rng([seed, *category.encode()])
        codes = [c for c in (category, *icd.get_descendants(category)) if len(c) <= 6]
        for code in rng.permutation(codes)[:_PER_CATEGORY].tolist():
            rows[category].append(("chapter", f"Which chapter holds {spell(code)}?", chapter, code))
        for code in rng.permutation(codes)[:_PER_CATEGORY].tolist():
            rows[category].append(("block", f"Which block holds {spell(code)}?", spell(block), code))
        terms = {
            t for c in (category, *icd.get_descendants(category)) for t in icd.get_inclusion_term(c)
        }
        terms.add(icd.get_description(category))
        # A term that cites a code would give itself away.
        fit = sorted(
            t
            for t in terms
            if len(t) <= _LONGEST_TERM and t.isascii() and not re.search(r"[A-Z]\d\d", t)
        )
        for term in rng.permutation(fit)[:_PER_CATEGORY].tolist():
            owners[term.lower()].add(category)
            rows[category].append(("term", f"Which chapter holds {term}?", chapter, term))

    asked: dict[str, dict[str, list[Example]]] = {"train": {}, "val": {}, "test": {}}
    for category, items in rows.items():
        # a shared term would leak
        kept = [r for r in items if r[0] != "term" or len(owners[r[3].lower()]) == 1]
        asked[split_of(category, seed)][category] = [
            Example(
                f"icd/{category}/{number}",
                "qa",
                question,
                answer,
                (),
                None,
                category,
                {"template": template},
            )
            for number, (template, question, answer, _) in enumerate(kept)
        ]
    for split, total in TOTAL.items():
        asked[split] = _thin(asked[split], total // len(TEMPLATES), np.random.default_rng([seed, total]))
    return asked


def _thin(
    asked: dict[str, list[Example]], each: int, rng: np.random.Generator
) -> dict[str, list[Example]]:
    """Draws `each` questions of every template.

    Within a template the answers take turns, so that none prevails.
    """
    keep = set()
    for template in TEMPLATES:
        rows = [e for examples in asked.values() for e in examples if e.meta["template"] == template]
        keep |= {rows[i].id for i in take_turns([e.answer for e in rows], each, rng)}
    thinned = {category: [e for e in examples if e.id in keep] for category, examples in asked.items()}
    return {category: examples for category, examples in thinned.items() if examples}
