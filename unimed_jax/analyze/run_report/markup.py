"""Builds HTML so that text from data never becomes markup."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

_EMPTY = ("meta", "img", "input", "br")  # elements without content or end
# Characters that no page may hold, and halves of surrogate pairs, which no encoding can write.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Holds text that is markup already; all other text is escaped."""


def escaped(value: Any) -> Markup:
    """Makes markup of any value, with what is markup already left as it is; None gives nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("")
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Makes an element; `class_` stands for class, `aria_label` for aria-label.

    Attributes that are None or False are left out, True gives one without a value.
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        given.append(f" {word}" if value is True else f' {word}="{escaped(value)}"')
    start = f"<{name}{''.join(given)}>"
    return Markup(start if name in _EMPTY else f"{start}{joined(children)}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    """Joins parts in their order, each escaped unless it is markup."""
    return Markup("".join(map(escaped, parts)))


def prose(text: str) -> Markup:
    """Makes a paragraph of our own sentences, with `code` and *stress* marked as in Markdown."""
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(text))
    found = re.sub(r"[*]([^*]+)[*]", r"<em>\1</em>", found)
    return Markup(f"<p>{found}</p>")


def cell(value: Any) -> Markup:
    """Makes the content of a cell: what stands in backticks as code, a verdict as a sign."""
    if not isinstance(value, Markup) and isinstance(value, str):
        if len(value) > 2 and value[0] == value[-1] == "`":
            return tag("code", value[1:-1])
        if value in VERDICTS:
            return tag("span", value, class_=f"chip {VERDICTS[value]}")
    return escaped(value)


# The verdicts of unimed_jax/verdicts.py, and how they look.
VERDICTS = {
    "above blind": "good",
    "relies on the image": "good",
    "below blind": "bad",
    "misled by the image": "bad",
    "undecided": "open",
    "no verdict": "open",
}


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> Markup:
    """Makes a table that scrolls sideways where it is too wide; numbers stand to the right."""
    body = [
        tag(
            "tr",
            *(
                tag(
                    "th" if not place else "td",
                    cell(value),
                    scope="row" if not place else None,
                    class_="number" if _is_number(value) else None,
                )
                for place, value in enumerate(row)
            ),
        )
        for row in rows
    ]
    if not body:
        return Markup("")
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else "",
            tag("thead", tag("tr", *(tag("th", cell(name), scope="col") for name in head))),
            tag("tbody", *body),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        not isinstance(value, Markup) and isinstance(value, str) and bool(_NUMBER.match(value))
    )


_NUMBER = re.compile(r"[-+]?\d[\d,.]*( \[.*\])?$|-$")


def details(title: Any, *children: Any, opened: bool = False) -> Markup:
    """Makes a part that opens at a click or a key; nothing if it has no content."""
    inside = joined(children)
    if not inside:
        return Markup("")
    return tag("details", tag("summary", title), tag("div", inside), open=opened)


def named(pairs: Iterable[tuple[Any, Any]]) -> Markup:
    """Makes a list of names with what is known of each; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value not in (None, "", ())]
    return tag("dl", *(joined((tag("dt", name), tag("dd", cell(value)))) for name, value in shown))
