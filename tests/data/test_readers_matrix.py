"""Every reader in every layout against every kind of damage: nothing is lost silently, and whatever
stops is one sentence that names the file or the record.

The kinds of damage apply by themselves to the files that a twin has, so that a new layout is covered
as soon as it has a twin. Only some of them run by default; marked `slow`, all of them.
"""

import csv
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.reading import everything, left_out, opened, options_of
from test_readers import LAYOUTS

from unimed_jax.data.datasets import reader_of
from unimed_jax.data.store import pack
from unimed_jax.data.twins import write_twin
from unimed_jax.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
PAGE = b"\n<!-- saved -->\n<html><head><title>403</title></head></html>"
PICTURES = (".png", ".jpg", ".jpeg", ".dcm")
LISTS = (".json", ".jsonl", ".csv", ".tsv")  # of records
TEXTS = (*LISTS, ".xml", ".txt")
FOREIGN = ("dataset_info.json", "features.json")  # read by another library, which takes no BOM
# Layouts whose pictures are those that are there, named by no record.
SOUGHT = [("classes", "folders"), ("samed", "release"), ("series", "flat"), ("series", "nested")]
OUT = ("../../../x.png", "/etc/hostname", "a/../../../../x", "../damaged-not/x")
TEMPLATES = ("Type", "Plane", "Location Category")  # each asks one question more where it is given
BY_KEYS = ("label", "domain", "meta", "options")  # whose keys are data, not names of fields


class Found(NamedTuple):
    """Holds what a reader made of a folder, or the sentence with which it stopped."""

    sentence: str
    examples: dict[str, bytes]
    lines: list[str]  # that name what was left out


class Damage(NamedTuple):
    """Describes one damage: what it does to the folder, and what must come of it."""

    name: str
    file: str  # that is damaged, relative to the folder
    apply: Callable[[Path], Any]  # is given the file
    right: str  # noticed, same, or either: noticed or without any effect
    words: str = ""  # of the sentence or line


def read(place: Path, name: str, layout: str) -> Found:
    """Reads all examples and decodes all of their images."""
    options = options_of(name, layout)
    try:
        data = opened(place, name, options=options)
        examples = {example.id: example for _, example in everything(data)}
        for key in {key for example in examples.values() for key in example.images}:
            data.image(key)
    except UserError as error:
        return Found(str(error), {}, [])
    return Found("", {key: pack(example) for key, example in examples.items()}, left_out(data))


# ---- damage of whole files -------------------------------------------------------------------------
def cut(part: float) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])


def fill(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


def linked(away: bool, steps: int = 0) -> Callable[[Path], Any]:
    """Puts a link in place of a file, or of a folder above it, to a copy outside or inside the set."""

    def apply(file: Path) -> None:
        place = [file, *file.parents][steps]
        root = next(parent for parent in file.parents if parent.name == "damaged")
        if not away and root / "SAMed2Dv1" in place.parents:
            root /= "SAMed2Dv1"  # which the reader takes for the set's folder
        target = (root.parent if away else root) / ".kept/out/of/the/way" / place.name
        target.parent.mkdir(parents=True)
        place.rename(target)
        place.symlink_to(target)

    return apply


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def of_picture(file: str, sought: bool) -> Iterator[Damage]:
    """Yields damage of a picture; `sought`: no record names it, so that nobody can miss it."""
    for name, apply, words in (
        ("cut in its middle", cut(0.5), ""),
        ("cut in its header", cut(0.02), ""),
        ("empty", fill(b""), "empty"),
        ("missing", Path.unlink, "image"),
        ("a pointer", fill(POINTER), "pointer of Git-LFS"),
        ("a page", fill(PAGE), "web page"),
        ("a folder", as_folder, "folder"),
        ("a link out", linked(away=True), "is a link to"),
    ):
        right = (
            "unseen" if sought and name in ("missing", "a folder", "cut in its middle") else "noticed"
        )
        words = "link" if sought and "link" in words else "" if sought else words
        yield Damage(f"{file} is {name}", file, apply, right, words if right == "noticed" else "")
    inside = "unseen" if sought else "same"
    if "/" in file:
        deepest = file.count("/")
        words = "link" if sought else "is a link to"
        yield Damage(f"{file} in a link out", file, linked(True, deepest), "noticed", words)
        yield Damage(f"{file} in a link inside", file, linked(False, deepest), inside)
    yield Damage(f"{file} is a link inside", file, linked(away=False), inside)


def of_table(file: str, name: str) -> Iterator[Damage]:
    for what, apply, words in (
        ("a pointer", fill(POINTER), "pointer of Git-LFS"),
        ("a page", fill(PAGE), "web page"),
        ("noise", fill(bytes(range(256)) * 3), ""),
        ("a folder", as_folder, ""),
        ("a link out", linked(away=True), "is a link to"),
    ):
        yield Damage(f"{file} is {what}", file, apply, "noticed", words)
    inside = "unseen" if name == "series" else "same"  # which looks at every file that it finds
    yield Damage(f"{file} is a link inside", file, linked(away=False), inside)
    suffix = Path(file).suffix
    if suffix not in (".csv", ".tsv", ".txt"):  # a table may end after any line
        yield Damage(f"{file} is cut", file, cut(0.6), "noticed")
    if suffix == ".npz":
        disks = fill(b"PK\7\x08" + b"\0" * 99)
        yield Damage(f"{file} is one of several", file, disks, "noticed", "zip -s 0")
    if suffix in TEXTS:
        for name, old, new in (
            ("BOM", rb"\A(\xef\xbb\xbf)?", b"\xef\xbb\xbf"),
            ("CRLF", rb"\r?\n", b"\r\n"),
        ):
            yield Damage(
                f"{file} with {name}",
                file,
                lambda path, old=old, new=new: path.write_bytes(re.sub(old, new, path.read_bytes())),
                "any" if file in FOREIGN else "same",
            )
    if suffix in (".json", ".jsonl"):
        yield Damage(f"{file} has a comma too many", file, grown(b",}"), "noticed")


def grown(end: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes() + end)


# ---- damage of records -----------------------------------------------------------------------------
def load(file: Path) -> Any:
    """Reads a file of records as JSON has them."""
    if file.suffix == ".pkl":
        return pickle.loads(file.read_bytes())
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix in (".csv", ".tsv"):
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=comma(file))
        return list(rows)
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def save(file: Path, content: Any) -> None:
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content))
    elif file.suffix in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        rows = csv.DictWriter(out, list(content[-1]), delimiter=comma(file))
        rows.writeheader()
        rows.writerows(dict(zip(content[-1], row.values(), strict=True)) for row in content)
        file.write_text(out.getvalue(), newline="")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in content))
    else:
        file.write_text(json.dumps(content))


def comma(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","


def nodes(value: Any, shape: str = "", at: tuple = ()) -> Iterator[tuple[str, tuple, dict]]:
    """Yields the objects in a value as (shape, path, object); those of one list share their shape."""
    if isinstance(value, dict):
        if shape.rpartition("/")[2] not in BY_KEYS and set(map(type, value.values())) != {list}:
            yield shape, at, value
        for key, inner in value.items():
            yield from nodes(inner, f"{shape}/{'*' if key.isdigit() else key}", (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from nodes(inner, f"{shape}/*", (*at, number))


def at(content: Any, path: tuple) -> Any:
    for part in path:
        content = content[part]
    return content


def changed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def apply(file: Path) -> None:
        content = load(file)
        change(content)
        save(file, content)

    return apply


def misspelt(key: str) -> str:
    return f"{key[0]}{key[2]}{key[1]}{key[3:]}" if len(key) > 3 and key[1] != key[2] else f"{key}x"


def renamed(path: tuple, key: str) -> Callable[[Path], Any]:
    def change(content: Any) -> None:
        node = at(content, path)
        fields = {misspelt(k) if k == key else k: v for k, v in node.items()}
        node.clear()
        node.update(fields)

    return changed(change)


def given(path: tuple, key: Any, value: Any) -> Callable[[Path], Any]:
    return changed(lambda content: at(content, path).__setitem__(key, value))


def of_records(folder: Path, file: str, pictures: list[str]) -> Iterator[Damage]:
    """Yields damage of the last record of each shape in a file, of a table's first one."""
    content, last = load(folder / file), {}
    table = Path(file).suffix in (".csv", ".tsv")
    for shape, path, node in nodes(content):
        if not (table and shape in last):
            last[shape] = path, node
    for shape, (path, node) in last.items():
        for key, value in node.items():
            where = f"{file}{shape}: {key}"
            if len(key) > 3 and not key.isdigit():
                yield Damage(f"{where} is misspelt", file, renamed(path, key), "either")
            if not table and not isinstance(value, dict | list):
                yield Damage(f"{where} is a list", file, given(path, key, [value]), "either")
                for odd in (None, "", 5, True):
                    if key in TEMPLATES and not odd:
                        continue
                    yield Damage(f"{where} is {odd!r}", file, given(path, key, odd), "any")
            if isinstance(value, str) and value and any(names(value, picture) for picture in pictures):
                for out in OUT if key != "id" else ():
                    yield Damage(f"{where} leads out to {out}", file, given(path, key, out), "either")
    boxless = not isinstance(content, list) or len(content[0]) > 1  # [{label: box}] else
    yield from of_boxes(content, file)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        twice = changed(lambda found: found.append(found[0]))
        yield Damage(f"{file}: a record twice", file, twice, "more" if boxless else "any")
        if not table and Path(file).suffix != ".pkl":
            form = json.dumps if file.endswith(".jsonl") else lines
            other = fill(form(content).encode())
            yield Damage(f"{file} in its other form", file, other, "same")


def lines(content: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in content)


def names(value: str, picture: str) -> bool:
    return value in (picture, Path(picture).stem) or picture.endswith(f"/{value}")


def of_boxes(content: Any, file: str) -> Iterator[Damage]:
    """Yields damage of the last box in a file: a list of four numbers."""
    found: list[tuple] = []

    def search(value: Any, path: tuple) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in inner:
            if isinstance(part, list) and len(part) == 4 and all(type(v) is int for v in part):
                found.append((*path, key))
            elif isinstance(part, dict | list):
                search(part, (*path, key))

    if isinstance(content, dict | list):
        search(content, ())
    if found:
        *path, key = found[-1]
        for box in ([7, 7, 0, 0], [9, 9, 9, 9000], [-900, -900, 3, 3], [3, 3, 1e300, 4], [1, 2, 3],
                    ["1", 2, 3, 4], None, [9000, 9000, 9, 9], [None] * 4, [1, 2, True, 4]):  # fmt: skip
            yield Damage(f"{file}: box {box}", file, given(tuple(path), key, box), "noticed")


def of_xml(folder: Path, file: str) -> Iterator[Damage]:
    text = (folder / file).read_text()
    for tag in sorted(set(re.findall(r"<(\w+)>", text))):
        new = re.sub(rf"(</?){tag}>", rf"\1{misspelt(tag)}>", text)
        yield Damage(f"{file}: {tag} is misspelt", file, fill(new.encode()), "either")
    for name, old, new in (
        ("no area", r"<xmax>\d+", "<xmax>1"),
        ("outside", r"<xmax>", "<xmax>9"),
        ("no number", r"<ymin>", "<ymin>x"),
        ("infinite", r"<ymin>\d+", "<ymin>inf"),
        ("no name", r"<name>\w+", "<name> "),
        ("leads out", r"<filename>", "<filename>../../../"),
        ("absolute", r"<filename>", "<filename>/"),
    ):
        damaged = re.sub(old, new, text).encode()
        yield Damage(f"{file}: {name}", file, fill(damaged), "noticed")


def of_lines(folder: Path, file: str) -> Iterator[Damage]:
    text = (folder / file).read_text()
    for name in ("nothing", "../../../x", "/etc/hostname", text.split()[0]):
        yield Damage(f"{file}: also {name}", file, grown(f"{name}\n".encode()), "noticed")


# ---- the matrix ------------------------------------------------------------------------------------
def damages(folder: Path, name: str, layout: str, whole: Found) -> list[Damage]:
    """Lists every damage of a twin, of the first file of each kind."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    pictures = [file for file in files if file.endswith(PICTURES)]
    keys = {key for packed in whole.examples.values() for key in json.loads(packed).get("images", ())}
    used = [p for p in pictures if any(Path(k).stem == Path(p).stem for k in keys)] or pictures
    patterns = reader_of(name).INFO.files
    tables = [file for file in files if file not in pictures and _is_table(file, patterns)]
    kinds = {}
    for file in tables:
        kinds.setdefault(re.sub(r"\d+|train|val(id(ate|ation)?)?|dev|test(?!_)", "", file.lower()), file)
    found = [damage for file in used[:1] for damage in of_picture(file, (name, layout) in SOUGHT)]
    for file in kinds.values():
        if not is_read(folder, file, name, layout, whole):
            continue
        found += of_table(file, name)
        if name != "tfds" and Path(file).suffix in (*LISTS, ".pkl"):
            found += of_records(folder, file, pictures) if "mapping" not in file else []
        elif file.endswith(".xml"):
            found += of_xml(folder, file)
        elif file.endswith(".txt"):
            found += of_lines(folder, file)
    return found


def _is_table(file: str, patterns: tuple[str, ...]) -> bool:
    path = Path(file)
    beside = path.name in ("detection.json", "question.json") or "array_record" in file
    return beside or path.suffix in (".xml", ".txt") or any(map(path.match, patterns))


def is_read(folder: Path, file: str, name: str, layout: str, whole: Found) -> bool:
    """Says whether anything changes without a file."""
    (folder / file).rename(folder.parent / "away")
    without = read(folder, name, layout)
    (folder.parent / "away").rename(folder / file)
    return without != whole


def fault(damage: Damage, whole: Found, found: Found, place: Path) -> str:
    """Says what is wrong with what came of a damage, and returns an empty text if nothing is."""
    new = [line for line in found.lines if line not in whole.lines]
    noticed = bool(found.sentence or new)
    said = " ".join([found.sentence, *new])
    lost = len(whole.examples) - len(found.examples)
    changed = any(whole.examples.get(key) != packed for key, packed in found.examples.items())
    if found.sentence and ("\n" in found.sentence or found.sentence[-1] not in ".?"):
        return f"no sentence: {found.sentence}"
    if damage.right == "unseen":
        return ""
    if damage.right == "same":
        same = found.examples == whole.examples and found.lines == whole.lines
        return "" if same else f"not the same: {said or 'other examples'}"
    if not noticed and (lost > 0 or damage.right == "noticed" or changed and damage.right == "either"):
        return f"silent; lost {lost}, changed {changed}"
    if damage.right == "more" and not noticed and lost >= 0:
        return "the second one is silently gone"
    known = [Path(damage.file).name, Path(damage.file).stem, *whole.examples, str(place)]
    if found.sentence and not any(part in said for part in known):
        return f"does not name {damage.file}: {said}"
    return "" if not noticed or damage.words in said else f"{damage.words!r} is not in: {said}"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    """Waits for no disk: a thousand small sets are written."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def twin(request, tmp_path_factory):
    """A twin of a layout and what its reader makes of it."""
    name, layout = request.param
    place = tmp_path_factory.mktemp("twin")
    write_twin(name, place / "damaged", records=4, layout=layout, seed=3)
    whole = read(place / "damaged", name, layout)
    assert whole.examples and not whole.sentence
    return name, layout, place / "damaged", whole


def tried(twin, some: Callable[[list[Damage]], list[Damage]], tmp_path: Path) -> list[str]:
    name, layout, folder, whole = twin
    wrong = []
    for number, damage in enumerate(some(damages(folder, name, layout, whole))):
        place = tmp_path / str(number) / "damaged"
        shutil.copytree(folder, place)
        damage.apply(place / damage.file)
        lines = [line.replace(str(folder), str(place)) for line in whole.lines]
        reason = fault(damage, whole._replace(lines=lines), read(place, name, layout), place)
        if reason:
            wrong.append(f"{damage.name}: {reason}")
        shutil.rmtree(tmp_path / str(number))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("twin", LAYOUTS, indirect=True, ids="/".join)
def test_every_damage_is_noticed(twin, tmp_path):
    wrong = tried(twin, lambda found: found, tmp_path)
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong)


@pytest.mark.parametrize("twin", LAYOUTS, indirect=True, ids="/".join)
def test_some_damage_of_every_layout_is_noticed(twin, tmp_path):
    """Each layout has another part of its list, so that together they have every kind."""
    start, step = LAYOUTS.index((twin[0], twin[1])), 31
    wrong = tried(twin, lambda found: found[start % step % len(found) :: step], tmp_path)
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong)


def test_the_folder_of_a_set_may_be_a_link(tmp_path):
    write_twin("llava", tmp_path / "real", records=4)
    (tmp_path / "set").symlink_to(tmp_path / "real")
    found = [read(tmp_path / place, "llava", "json") for place in ("real", "set")]
    assert found[0].examples and found[0].examples == found[1].examples


def test_a_crowd_is_counted_and_an_annotation_has_an_id_of_its_own(tmp_path):
    write_twin("coco", tmp_path / "set", records=4)
    whole = read(tmp_path / "set", "coco", "instances")
    assert [line.split(": ")[1:] for line in whole.lines if line.startswith("train")] == [
        ["annotation 1", "it is a crowd (iscrowd), not one thing"]
    ]
    file = tmp_path / "set/annotations/instances_train2017.json"
    changed(lambda found: found["annotations"].append(found["annotations"][-1]))(file)
    sentence = read(tmp_path / "set", "coco", "instances").sentence
    assert re.search("the id [0-9]+ stands twice among 'annotations'", sentence)
