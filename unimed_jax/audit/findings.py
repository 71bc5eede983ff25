"""Says in sentences what of an audit somebody must look at before training."""

from collections.abc import Iterator, Mapping
from typing import Any

# Leaks that must be looked at, unless the set is published with them; the others are shown only.
SERIOUS = (
    "image",
    "near",
    "mirror",
    "question",
    "question_answer",
    "similar_question",
    "rewording",
    "report",
    "cluster",
    "patient",
    "case",
    "study",
)
COUNTED = ("repeating", "reworded")  # examples of the earlier split, which say the same once more


def to_look_at(content: Mapping[str, Any]) -> list[str]:
    """Lists the findings of check.json that need a decision, each in one sentence."""
    out = []
    for name, found in content["sets"].items():
        out += [f"{name}: {sentence}" for sentence in _of_set(found)]
    for between, counts in content["between"].items():
        one, _, other = between.partition("~")
        if all(place.endswith("/train") for place in (one, other)):
            continue  # nothing that is scored
        shared = ", ".join(f"{kind} {n}" for kind, n in counts.items() if kind not in COUNTED)
        out.append(f"{one} and {other} share images or questions ({shared})")
    for name, found in content["answer_tokens"].items():
        for setting, over in found["over"].items() if isinstance(found, Mapping) else ():
            out.append(
                f"{name}: {over['n']} of {found['n']} training records need more than "
                f"{setting}={over['limit']} (up to {over['most']}), so that training refuses them"
            )
    return out


def _of_set(found: Mapping[str, Any]) -> Iterator[str]:
    for kind, counts in found["leaks"].items():
        if kind in SERIOUS and kind not in found["by_design"]:
            for between, count in counts.items():
                earlier, _, later = between.partition("_")
                if count:
                    yield f"{count} of {later} are given away by {earlier} ({kind})"
    published = found["published"]
    for what, numbers in published.get("counts", {}).items():
        if numbers["here"] != numbers["published"]:
            yield (
                f"{what}: {numbers['here']} here, {numbers['published']} as published "
                f"({published['name']})"
            )
    if n := found["unreadable"]["n"]:
        yield f"{n} images cannot be read"
    if n := found["wrong_boxes"]["n"]:
        yield f"{n} boxes are empty or leave their image"
    for what, some in found["personal"].items():
        yield f"{some['n']} places hold {what}"
    if n := found["left_out"]["n"]:
        reasons = found["left_out"]["reasons"]
        most = "; ".join(f"{reason} ({n})" for reason, n in list(reasons.items())[:3])
        yield f"{n} records were left out (skipped.txt): {most}"
