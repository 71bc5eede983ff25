"""Writes what an audit found: check.json for programs, check.md and pairs.png for the eye."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from unimed_jax.audit.check import Pair
from unimed_jax.data.example import Dataset
from unimed_jax.evaluate.report.markdown import markdown_table
from unimed_jax.files import write_text, written_together

TILE, LINE, COLUMNS = 160, 13, 3
PAIRS = 24  # in the picture at most, the kinds in turn
BLIND = ("exact_match", "open_exact_match", "closed_exact_match", "open_recall", "bleu1")

MEANING = {
    "image": "images with the very same pixels",
    "near": "images that are nearly the same",
    "mirror": "images that are nearly the mirror image",
    "name": "images of the same name",
    "question": "the same question about the same image (or the same text-only question)",
    "question_answer": "and the same answer",
    "similar_question": "a nearly equal question about the same image with the same answer",
    "rewording": "a question about the same image that is another wording of it",
    "report": "reports that are the same word for word",
    "cluster": "examples of the same {cluster}",
    "patient": "examples of the same patient",
    "case": "examples of the same case",
    "study": "examples of the same study",
    "question_text": "questions that are asked there about other images (gives nothing away)",
    "repeating": "examples of the EARLIER split that ask a question of the later one",
    "reworded": "examples of the EARLIER split that ask one in other words",
}


def write_audit(
    folder: Path, content: Mapping[str, Any], pairs: Sequence[Pair], sets: Mapping[str, Dataset]
) -> None:
    """Writes check.json, check.md and, if there are pairs, pairs.png into the folder."""
    chosen = _chosen(pairs)
    with written_together(folder, ("pairs.png", "check.md", "check.json")) as place:
        if chosen:
            _picture(chosen, sets).save(place / "pairs.png")
        write_text(place / "check.md", _markdown(content, bool(chosen)))
        write_text(
            place / "check.json",
            json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )


# ---- text ------------------------------------------------------------------------------------------


def _markdown(content: Mapping[str, Any], picture: bool) -> str:
    look = [f"- {line}" for line in content["look"]] or ["Nothing was found that must be looked at."]
    lines = [f"# Audit of the data of {content['name']}", "", *look, ""]
    for name, found in content["sets"].items():
        lines += [f"## {name}", "", f"Licence: {found['licence']}. {found['note']}".strip(), ""]
        for part in (_counts, _values, _faults, _leaks, _blind, _named):
            lines += part(found)
    lines += _between(content["between"]) + _tokens(content["answer_tokens"])
    limits = content["thresholds"]
    lines += [
        f"Images count as nearly the same if the cosine of their shapes is {limits['likeness']} or "
        "more (unimed_jax/audit/fingerprints.py), and questions if more than "
        f"{limits['similar_question']} of their letters match.",
        "",
    ]
    if picture:
        lines += ["![pairs of images, the most alike of each kind first](pairs.png)", ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [markdown_table(head, rows), ""] if rows else []


def _counts(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for split, facts in found["splits"].items():
        for task, count in facts["task"].items():
            words, cut = facts["answer_words"][task], facts["over_50_words"].get(task, 0)
            share = f"{cut} ({cut / count:.1%})"
            rows.append((split, task, count, words["median"], words["most"], words["one"], share))
    head = ("split", "task", "examples", "answer words (median)", "(most)", "of one", "over 50 words")
    sums = [
        (split, facts["examples"], facts["images"], facts["clusters"], _listed(facts["repeated"]))
        for split, facts in found["splits"].items()
    ]
    same = ("split", "examples", "images", f"{found['cluster']}s", "repeated within the split")
    published = found["published"]
    compared = [
        (what, n["here"], n["published"], "" if n["here"] == n["published"] else "differs")
        for what, n in published.get("counts", {}).items()
    ]
    title = f"published ({published['name']})" if published else ""
    return [*_table(same, sums), *_table(head, rows), *_table(("of", "here", title, ""), compared)]


def _values(found: Mapping[str, Any]) -> list[str]:
    keys = ("language", "answer_type", "modality", "template")
    rows = [
        (key, split, _listed(facts[key]))
        for key in keys
        for split, facts in found["splits"].items()
        if key in facts
    ]
    return _table(("field", "split", "examples"), rows)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def _faults(found: Mapping[str, Any]) -> list[str]:
    rows = [("left out", n, reason) for reason, n in found["left_out"]["reasons"].items()]
    for words, key in (("unreadable images", "unreadable"), ("wrong boxes", "wrong_boxes")):
        if found[key]["n"]:
            rows.append((words, found[key]["n"], _first(list(found[key]["first"]))))
    rows += [(what, some["n"], _first(some["first"])) for what, some in found["personal"].items()]
    return _table(("fault", "number", "why or where"), rows)


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def _leaks(found: Mapping[str, Any]) -> list[str]:
    betweens = sorted({between for counts in found["leaks"].values() for between in counts})
    rows = []
    for kind, counts in found["leaks"].items():
        if not any(counts.values()) and kind in ("patient", "case", "study"):
            continue
        reason = found["by_design"].get(kind, "")
        meaning = MEANING[kind].format(cluster=found["cluster"])
        rows.append(
            [meaning + (f" (by design: {reason})" if reason else "")]
            + [counts.get(between, 0) for between in betweens]
        )
    head = ("of the later split, given away by the earlier", *(_arrow(b) for b in betweens))
    return _table(head, rows) if betweens else []


def _arrow(between: str) -> str:
    return between.replace("_", " → ", 1)


def _blind(found: Mapping[str, Any]) -> list[str]:
    """Lists what the image is not needed for: majorities, and copying the most similar question."""
    rows = []
    for split, tasks in found["blind"].items():
        for task, baselines in tasks.items():
            for name, scores in baselines.items():
                if name != "n":
                    cells = [f"{scores[m]:.3f}" if m in scores else "" for m in BLIND]
                    templates = ", ".join(f"{t} {v:.3f}" for t, v in scores["templates"].items() if t)
                    rows.append([f"{split} {task}", baselines["n"], name, *cells, templates])
    for between, copier in found["copier"].items():
        parts = ", ".join(f"{t} {part['value']:.3f}" for t, part in copier["templates"].items() if t)
        who = f"copies from {between.partition('_')[0]}"
        later = between.partition("_")[2]
        cells = [f"{copier['value']:.3f}", *[""] * (len(BLIND) - 1)]
        rows.append([f"{later} vqa", copier["n"], who, *cells, parts])
    if not rows:
        return []
    lines = _table(("of", "n", "answers without the image", *BLIND, "exact match by template"), rows)
    if found["copier"]:
        lines += [
            'One that "copies" gives the answer of the most similar question about the same image in '
            "the earlier split. What it scores above the majorities, a model gets for remembering.",
            "",
        ]
    return lines


def _named(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (_arrow(between), kind, _first([f"{one} → {other}" for one, other in pairs], 3))
        for between, kinds in found["leak_examples"].items()
        for kind, pairs in kinds.items()
        if kind != "cluster"
    ]
    return _table(("", "leak", "such as"), rows)


def _between(between: Mapping[str, Mapping[str, int]]) -> list[str]:
    kinds = [kind for kind in MEANING if any(kind in counts for counts in between.values())]
    rows = [
        (places.replace("~", " → "), *(counts.get(kind, 0) for kind in kinds))
        for places, counts in between.items()
    ]
    if not rows:
        return []
    meanings = [f"{kind}: {MEANING[kind]}" for kind in kinds]
    head = ("of the second, given away by the first", *kinds)
    return ["## Between sets", "", *_table(head, rows), "; ".join(meanings) + ".", ""]


def _tokens(found: Mapping[str, Any]) -> list[str]:
    if "not measured" in found:
        return ["## Tokens", "", f"Not measured: {found['not measured']}", ""]
    rows = list(_token_rows(found))
    head = ("training records of", "n", "answer tokens (median)", "(most)", "cut answers", "refused")
    return ["## Tokens", "", *_table(head, rows)] if rows else []


def _token_rows(found: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    for name, facts in found.items():
        over = "; ".join(
            f"{some['n']} need more than {setting}={some['limit']} ({_first(some['first'])})"
            for setting, some in facts["over"].items()
        )
        yield name, facts["n"], facts["answer"]["median"], facts["answer"]["most"], facts["cut"], over


# ---- picture ---------------------------------------------------------------------------------------


def _chosen(pairs: Sequence[Pair]) -> list[Pair]:
    """Takes the most alike pairs of each kind in turn, the later image of each only once.

    A file that two splits of a set share shows nothing new, and neither do two of one name that
    are alike.
    """
    kinds: dict[str, list[Pair]] = {}
    seen: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: (pair.kind == "name", -pair.likeness)):
        # The same pictures may be in a config under several ids.
        later = pair.other.partition("/")[2]
        if pair.one != pair.other and later not in seen:
            seen.add(later)
            kinds.setdefault(pair.kind, []).append(pair)
    turns = [some[n] for n in range(PAIRS) for some in kinds.values() if n < len(some)]
    return turns[:PAIRS]


def _picture(pairs: Sequence[Pair], sets: Mapping[str, Dataset]) -> Image.Image:
    """Draws each pair side by side with its kind and the names of its images."""
    width, height = 2 * TILE + 8, TILE + 3 * LINE + 6
    sheet = Image.new("RGB", (COLUMNS * width, height * -(-len(pairs) // COLUMNS)))
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        x, y = number % COLUMNS * width, number // COLUMNS * height
        likeness = f"  {pair.likeness:.3f}" if pair.likeness else ""
        draw.text((x + 2, y), f"{pair.kind}{likeness}", fill=(255, 220, 60))
        for side, name in enumerate((pair.one, pair.other)):
            set_name, _, key = name.partition("/")
            part = Image.fromarray(sets[set_name].image(key))
            part.thumbnail((TILE, TILE))
            sheet.paste(part, (x + side * (TILE + 2), y + LINE))
            draw.text(
                (x + 2, y + TILE + LINE * (1 + side)),
                name[-52:].encode("latin-1", "replace").decode("latin-1"),
            )
    return sheet
