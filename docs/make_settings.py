"""Writes docs/settings.md from unimed_jax/config.py: `python docs/make_settings.py >
docs/settings.md`.
"""

import ast
import dataclasses
import inspect
import types
import typing

from unimed_jax import config
from unimed_jax.settings import FIDELITY

HEAD = """# Settings

Generated from `unimed_jax/config.py` by `python docs/make_settings.py > docs/settings.md`; \
a test compares the two.

A config file sets them (`config.model.vision.width = 128`), and so does the command line
(`--config.model.vision.width=128`). An unknown name, a wrong type or a value out of bounds is \
refused in one sentence.
Where the default is None, `fidelity` may fill the value in; the last table says with what.
"""
WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "True or False",
    typing.Any: "JSON value",
}


def described(kind: type) -> str:
    """Returns a class's docstring on one line."""
    return " ".join((inspect.getdoc(kind) or "").split())


def comments(kind: type) -> dict[str, str]:
    """Reads the comments of a class's fields: the lines above each, and what stands beside it."""
    source = inspect.getsource(kind)
    lines, found = source.splitlines(), {}
    (definition,) = ast.parse(source).body
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first, last = node.lineno - 1, node.end_lineno - 1
        above = first
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        words = [line.strip().lstrip("# ") for line in lines[above:first]]
        beside = lines[last][node.end_col_offset :].partition("#")[2].strip()
        found[node.target.id] = " ".join([*words, *([beside] if beside else [])])
    return found


def meaning(hint: typing.Any) -> str:
    """Says a type with its choices and bounds in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return ", ".join([meaning(parts[0]), *(str(bound) for bound in parts[1:])])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" if choice != "" else "`''`" for choice in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            [
                *(meaning(part) for part in parts if part is not type(None)),
                *(["None"] if type(None) in parts else []),
            ]
        )
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"({', '.join(map(meaning, parts))})"
    if origin is tuple:
        return f"tuple of: {meaning(parts[0])}"
    if origin is not None:
        return f"dict of: {meaning(parts[0])} -> {meaning(parts[1])}"
    return WORDS.get(hint) or f"[{hint.__name__}](#{hint.__name__.lower()})"


def groups(kind: type, path: str) -> list[tuple[type, str]]:
    """Lists the group and those inside it, each with its path; entries of a tuple as `sources[0]`."""
    out = [(kind, path)]
    for name, hint in typing.get_type_hints(kind).items():
        there = f"{path}.{name}" if path else name
        if typing.get_origin(hint) is tuple:
            hint, there = typing.get_args(hint)[0], f"{there}[0]"
        for part in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(part):
                out += groups(part, there)
    return out


def default(field: dataclasses.Field) -> str:
    """Writes a field's default as code; a group of settings has none."""
    if field.default is dataclasses.MISSING:
        return "(needed)"
    if dataclasses.is_dataclass(field.default):
        return ""
    value = field.default
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        value = tuple(
            {f.name: v for f in dataclasses.fields(e) if (v := getattr(e, f.name)) != f.default}
            for e in value
        )
    return f"`{value!r}`"


def page() -> str:
    """Returns docs/settings.md."""
    where: dict[type, list[str]] = {}
    for kind, path in groups(config.Config, ""):
        where.setdefault(kind, []).append(path)
    out = [HEAD]
    for kind, paths in where.items():
        words, hints = comments(kind), typing.get_type_hints(kind, include_extras=True)
        named = ", ".join(f"`config.{path}`" if path else "`config`" for path in paths)
        out += [f"## {kind.__name__}", "", f"{named}: {described(kind)}", ""]
        out += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            what = words[field.name]
            if not what and dataclasses.is_dataclass(field.default):
                what = described(type(field.default))
            if not what:
                raise SystemExit(f"{kind.__name__}.{field.name} has no comment that says what it means")
            cells = (f"`{field.name}`", meaning(hints[field.name]), default(field), what)
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        out.append("")
    out += ["## What `fidelity` fills in", "", "| setting | default | paper |", "|---|---|---|"]
    for key, value in FIDELITY["default"].items():
        out.append(f"| `config.{key}` | `{value!r}` | `{FIDELITY['paper'][key]!r}` |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    print(page(), end="")
