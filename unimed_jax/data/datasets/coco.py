"""Reads labelled boxes in the form of COCO, for the tasks refer (where) and identify (what).

A split's JSON, {"images", "annotations", "categories"}, is one of:
annotations/instances_<split>*.json, instances_<split>*.json, <split>.json,
<split>/_annotations.coco.json. Its images lie in the folder that `images` has for them: next to the
JSON, or in <split>, images/<split>, images, or the folder itself.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data import grounding
from unimed_jax.data.example import Example
from unimed_jax.data.grounding import Labelled
from unimed_jax.data.image_shards import no_image
from unimed_jax.data.info import Info
from unimed_jax.data.records import (
    LARGEST,
    Record,
    chosen_options,
    inside,
    optional,
    other_size,
    short,
    word,
)
from unimed_jax.errors import UserError
from unimed_jax.parsing import parse_json, read_text

FORMS = (
    "annotations/instances_{}*.json",
    "instances_{}*.json",
    "{}.json",
    "{}/_annotations.coco.json",
)
SPELT = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}

INFO = Info(
    name="coco",
    tasks=("refer", "identify"),
    cluster_word="image",
    files=tuple(form.format(name) for names in SPELT.values() for name in names for form in FORMS),
)


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the questions about each image of a split, by the options of data/grounding.py.

    A crowd (iscrowd, whose mask is run-length coded) is no single thing and is skipped; so are a
    box that is empty or leaves its image, and an image that is missing or of another size than the
    file says. Corners are rounded to whole pixels.
    """
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, grounding.OPTIONS, "coco")
    grounding.check_options(chosen, "coco")
    file = _file(folder, split)
    if file is None:
        return
    content = parse_json(read_text(file, "restore it", LARGEST), str(file))
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is not COCO's object of images, annotations and categories; give such a file."
        )
    labels = {
        _id(category, file): word(category, "name", f"{file}, categories", required=True)
        for category in _list(content, "categories", file)
    }
    of_image = _annotations(content, labels, file, skipped)
    files = {other: _file(folder, other) for other in SPELT if other != split}
    others = {other: at for other, at in files.items() if at is not None}
    for image in _list(content, "images", file):
        where = f"{file}, image {short(image.get('id'))}"
        name = word(image, "file_name", where, required=True)
        size = _side(image, "width", where), _side(image, "height", where)
        path = _path(folder, file, split, name, where)
        own = of_image.pop(_id(image, file), [])
        reason = no_image(path) or other_size(path, size)
        if reason:
            skipped.append(f"{name}: {reason}")
            continue
        found = ((f"{name}: annotation {number}", thing) for number, thing in own)
        things = grounding.usable(found, size, skipped)
        places = [_path(folder, at, other, name, where) for other, at in others.items()]
        # other splits may have other pictures of this name
        key = f"{split}/{name}" if any(p.exists() and not p.samefile(path) for p in places) else name
        for example in grounding.questions(key, things, size, chosen, cluster=key, meta={}):
            yield example, (path,)
    for image_id, lost in of_image.items():
        skipped += [f"annotation {number}: there is no image {image_id}" for number, _ in lost]


def _file(folder: Path, split: str) -> Path | None:
    """Finds the JSON of a split."""
    found = [
        path
        for name in SPELT[split]
        for form in FORMS
        for path in sorted(folder.glob(form.format(name)))
    ]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise UserError(f"{folder} has several files for {split} ({names}); leave one of them.")
    return found[0] if found else None


def _annotations(
    content: Record, labels: Mapping[int, str], file: Path, skipped: list[str]
) -> dict[int, list[tuple[Any, Labelled]]]:
    """Reads the boxes by the id of their image, each with its own id."""
    of_image = defaultdict(list)
    for entry in _list(content, "annotations", file):
        where = f"{file}, annotation {short(entry.get('id'))}"
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
            raise UserError(f"{where}: 'bbox' is {short(box)}; give [x, y, width, height].")
        label, image = entry.get("category_id"), entry.get("image_id")
        if type(label) is not int or label not in labels or type(image) is not int:
            raise UserError(f"{where}: its category_id or image_id is none of the file's; mend it.")
        if optional(entry, "iscrowd", where) not in (0, 1, None):
            raise UserError(f"{where}: 'iscrowd' is {short(entry['iscrowd'])}; give 0 or 1.")
        if entry.get("iscrowd"):
            skipped.append(f"annotation {entry.get('id')}: it is a crowd (iscrowd), not one thing")
            continue
        x, y, width, height = box
        corners = round(x), round(y), round(x + width), round(y + height)
        of_image[image].append((entry.get("id"), Labelled(labels[label], corners)))
    return of_image


def _list(content: Record, key: str, file: Path) -> list[Record]:
    found = content.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{file}: {key!r} is not a list of objects; give COCO's annotations.")
    ids = [_id(entry, file) for entry in found if key != "annotations" or entry.get("id") is not None]
    if len(set(ids)) < len(ids):
        twice, _ = Counter(ids).most_common(1)[0]
        raise UserError(f"{file}: the id {twice} stands twice among {key!r}; give each its own.")
    return found


def _id(entry: Record, file: Path) -> int:
    if type(entry.get("id")) is not int:
        raise UserError(f"{file}: the id {short(entry.get('id'))} is no whole number; mend it.")
    return entry["id"]


def _side(image: Record, key: str, where: str) -> int:
    if type(image.get(key)) is not int or image[key] < 1:
        raise UserError(f"{where}: {key!r} is {short(image.get(key))}; give the image's size in pixels.")
    return image[key]


def _path(folder: Path, file: Path, split: str, name: str, where: str) -> Path:
    """Returns the path where the image lies or, if it is missing, where it should lie."""
    places = [
        file.parent,
        *(folder / part for part in (*SPELT[split], *(f"images/{s}" for s in SPELT[split]))),
    ]
    paths = [inside(folder, place, name, where) for place in (*places, folder / "images", folder)]
    return next((path for path in paths if path.exists()), paths[0])
