"""Reads text and JSON that somebody else wrote, so that whatever is wrong with it is one sentence."""

import collections
import gzip
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed_jax.errors import UserError

LARGEST = 256 << 20  # bytes of a file of settings, scores or an index; files of data may be larger
DEEPEST = 100  # lists and objects inside each other; code after the parser recurses, too
_LONE = re.compile(r"[\ud800-\udfff]")  # half of a surrogate pair, which no encoding can write
_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that was not fetched
_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?(\s|<\?xml[^>]*>|<!--((?!-->).)*-->)*<(!doctype\s+html|html|head|body|error)\b",
    re.I | re.S,
)
_ZIP_END = (1 << 16) + 22  # bytes from the end of a zip archive in which its last record lies
_SPELT = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells such a half


def read_text(path: str | Path, advice: str = "mend it or get it again", largest: int = LARGEST) -> str:
    """Reads a text file as UTF-8; a byte order mark at its start is dropped.

    A file whose name ends with .gz is unpacked.

    advice: ends the sentence of an error. Raises UserError if there is no such file, if it cannot
    be read, has more than `largest` bytes, or is not UTF-8 (then with the line).
    """
    path = Path(path)
    reason = no_file(path)
    if reason:
        raise UserError(f"{path} {reason}; {advice}.")
    try:
        size = path.stat().st_size
        if size > largest:
            raise UserError(f"{path} has {size} bytes, more than the {largest} that are read; {advice}.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}.") from error
    if found := stand_in(data[:1000]):
        raise UserError(f"{path} {found}.")
    if path.suffix == ".gz":
        data = _unpacked(path, data, advice, largest)
    return _decoded(data, str(path), advice)


def _unpacked(path: Path, data: bytes, advice: str, largest: int) -> bytes:
    """Unpacks a file of gzip, whose content may be as long as that of any other."""
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(largest + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be unpacked ({error or 'it is cut short'}); {advice}."
        ) from error
    if len(content) > largest:
        raise UserError(f"{path} unpacks to more than the {largest} bytes that are read; {advice}.")
    return content


def stand_in(head: bytes) -> str:
    """Says what stands in a file in place of data, by its first bytes; empty if nothing does.

    That is a pointer of Git-LFS or a web page, as downloads leave them. The words follow the name of
    the file, and say what to do.
    """
    if head.lstrip(b"\xef\xbb\xbf").startswith(_POINTER):
        return "is a pointer of Git-LFS, not the data itself; fetch it with `git lfs pull`"
    return "is a web page, not the data itself; download the file again" if _PAGE.match(head) else ""


def refuse_stand_in(file: str | Path) -> None:
    """Raises UserError if a pointer of Git-LFS or a web page stands in place of a file of data.

    A file that cannot be read is left to whoever reads it, and so is a pipe, which could be waited
    for without end.
    """
    if no_file(file):
        return
    try:
        with open(file, "rb") as stream:
            found = stand_in(stream.read(1000))
    except OSError:
        return
    if found:
        raise UserError(f"{file} {found}.")


def zip_fault(file: str | Path) -> str:
    """Says what is wrong with the form of a zip archive, .npz included; empty if nothing seems to be."""
    if no_file(file):
        return ""
    try:
        with open(file, "rb") as stream:
            first = stream.read(4)
            stream.seek(max(0, os.path.getsize(file) - _ZIP_END))
            tail = stream.read()
    except OSError:
        return ""
    end = tail.rfind(b"PK\5\6")
    disk = int.from_bytes(tail[end + 4 : end + 6], "little") if end >= 0 else 0
    if first == b"PK\7\x08" or disk:
        return (
            "it is one part of an archive over several files; join them by "
            "`zip -s 0 FILE.zip --out WHOLE.zip`"
        )
    if not first.startswith(b"PK"):
        return "it is no zip archive"
    return "it is cut short" if end < 0 else ""


def no_file(path: str | Path) -> str:
    """Says why a path cannot be read as a file, in words that end a sentence; empty if it can."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError:  # a NUL, or half of a surrogate pair
        return "cannot be read (no file can have this name)"
    if stat.S_ISDIR(mode):
        return "is a folder, where a file belongs"
    if not stat.S_ISREG(mode):
        return "is a pipe or a device, where a file belongs"
    return "" if os.access(path, os.R_OK) else "cannot be read (no permission)"


def read_json(path: str | Path, advice: str = "mend it or get it again", largest: int = LARGEST) -> Any:
    """Reads a JSON file with `read_text` and `parse_json`; raises UserError as they do."""
    return parse_json(read_text(path, advice, largest), str(path), advice)


def parse_json(
    text: str | bytes,
    where: str,
    advice: str = "mend it or get it again",
    finite: bool = True,
    characters: bool = True,
) -> Any:
    """Makes of JSON its objects, lists, texts, numbers, booleans and None.

    where: the file, or the file and line, which starts the sentence of an error. finite: whether
    NaN and infinite numbers are refused. characters: whether halves of surrogate pairs are; else
    the caller checks the texts, by `is_text`. Raises UserError if the text is not JSON or not
    UTF-8, is nested more than `DEEPEST` deep, or gives a key of an object twice.
    """
    text = _decoded(text, where, advice) if isinstance(text, bytes) else text
    constant, number = (_refused_number, _finite_number) if finite else (None, None)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=constant, parse_float=number)
        _check_depth(value)
    except RecursionError:
        raise UserError(
            f"{where} is nested too deep (more than {DEEPEST} lists and objects); {advice}."
        ) from None
    except (ValueError, MemoryError) as error:
        raise UserError(
            f"{where} is not JSON ({error or 'no memory is left for it'}); {advice}."
        ) from error
    if characters and _SPELT.search(text):
        _check_characters(value, where, advice)
    return value


def json_lines(
    text: str, where: str, advice: str = "mend the line", characters: bool = True
) -> Iterator[tuple[int, Any]]:
    """Yields each line's number, from 1, with what `parse_json` makes of it.

    Blank lines are passed over.
    """
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield number, parse_json(line, f"{where}, line {number},", advice, characters=characters)


def is_text(text: str) -> bool:
    """Says whether a text can be encoded, which half of a surrogate pair would prevent."""
    return not _LONE.search(text)


def _decoded(data: bytes, where: str, advice: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8; save the file "
            f"as UTF-8, or {advice}."
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        again, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {again!r} twice")
    return made


def _refused_number(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def _finite_number(word: str) -> float:
    number = float(word)
    if math.isinf(number):
        raise ValueError(f"the number {word[:20]} is too large")
    return number


def _check_depth(value: Any) -> None:
    """Raises RecursionError if lists and objects lie more than `DEEPEST` deep.

    It walks level by level, which is fast.
    """
    level, depth = [value], 0
    while level := [v for v in level if type(v) is dict or type(v) is list]:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
        level = [inner for v in level for inner in (v.values() if type(v) is dict else v)]


def _check_characters(value: Any, where: str, advice: str) -> None:
    """Raises UserError for the first text that is not valid Unicode, and names its place.

    The place is given as keys and as numbers from 0.
    """
    still: list[tuple[str, Any]] = [("", value)]
    while still:
        place, found = still.pop()
        inner = (
            found.items()
            if isinstance(found, dict)
            else enumerate(found)
            if isinstance(found, list)
            else ()
        )
        still += reversed([(f"{place}[{key!r}]", part) for key, part in inner])
        texts = [found] if isinstance(found, str) else list(found) if isinstance(found, dict) else []
        if not all(map(is_text, texts)):
            raise UserError(
                f"{where}: {ascii(place)[1:-1] or 'the text'} holds half of a surrogate pair, which "
                f"is no character; {advice}."
            )
