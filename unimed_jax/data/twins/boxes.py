"""Writes twins of data sets with boxes.

They show bright rectangles on dark, so that a model can learn where they are.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unimed_jax.data.twins.random import count, pick, words, write_json, write_lines

CLASSES = {"disc": (230, 60, 60), "bar": (60, 230, 60), "spot": (80, 80, 240)}
WIDTH, HEIGHT = 64, 48
_UNKNOWN = "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"


class Scene(NamedTuple):
    """Holds a picture and the boxes in it: class, x1, y1, x2, y2 in pixels, the ends outside."""

    name: str
    things: list[tuple[str, int, int, int, int]]


def _scenes(folder: Path, split: str, records: int, rng: np.random.Generator) -> list[Scene]:
    """Draws the pictures of a split and writes them into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(count(split, records)):
        pixels = rng.integers(0, 30, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        things = []
        for _ in range(int(rng.integers(1, 5))):
            x, y = int(rng.integers(0, WIDTH - 16)), int(rng.integers(0, HEIGHT - 16))
            w, h = int(rng.integers(6, 16)), int(rng.integers(6, 16))
            label = pick(rng, list(CLASSES))
            pixels[y : y + h, x : x + w] = CLASSES[label]
            things.append((label, x, y, x + w, y + h))
        name = f"{split}_{i:05d}"
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=95)
        found.append(Scene(name, things))
    return found


def voc(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes Pascal VOC, whose corners count from 1 and both lie inside the box.

    One box is empty, as some are in such sets.
    """
    sets, annotations = folder / "ImageSets" / "Main", folder / "Annotations"
    for place in (sets, annotations):
        place.mkdir(parents=True)
    for split in ("train", "val", "test"):
        scenes = _scenes(folder / "JPEGImages", split, records, rng)
        (sets / f"{split}.txt").write_text("".join(f"{scene.name}\n" for scene in scenes))
        for number, scene in enumerate(scenes):
            objects = [(label, x1 + 1, y1 + 1, x2, y2) for label, x1, y1, x2, y2 in scene.things]
            if split == "train" and number == 0:
                objects.append(("disc", 5, 5, 5, 5))
            lines = [
                f"<object><name>{label}</name>{_UNKNOWN}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for label, x1, y1, x2, y2 in objects
            ]
            (annotations / f"{scene.name}.xml").write_text(
                "<annotation><folder>JPEGImages</folder>"
                f"<filename>{scene.name}.jpg</filename><path></path>"
                f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
                f"<segmented>0</segmented>{''.join(lines)}</annotation>\n"
            )


def coco(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes COCO: annotations/instances_<split>2017.json next to folders of images."""
    for split in ("train", "val", "test"):
        scenes = _scenes(folder / split, split, records, rng)
        write_json(folder / f"annotations/instances_{split}2017.json", _coco_of(scenes))


def coco_roboflow(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes COCO as Roboflow exports it: <split>/_annotations.coco.json among the images.

    The split val is called `valid`.
    """
    for split in ("train", "val", "test"):
        place = folder / ("valid" if split == "val" else split)
        write_json(place / "_annotations.coco.json", _coco_of(_scenes(place, split, records, rng)))


def _coco_of(scenes: list[Scene]) -> dict[str, Any]:
    """Makes COCO's object; ids have gaps, and one annotation is a crowd."""
    ids = {label: 3 * i + 1 for i, label in enumerate(CLASSES)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        images.append(
            {"id": 17 * number + 5, "file_name": f"{scene.name}.jpg", "width": WIDTH, "height": HEIGHT}
        )
        for label, x1, y1, x2, y2 in scene.things:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {"id": 11 * len(annotations) + 2, "image_id": 17 * number + 5, "bbox": box}
            )
            annotations[-1] |= {
                "category_id": ids[label],
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [],
            }
    crowd = annotations[0] | {"id": 1, "bbox": [0, 0, WIDTH, HEIGHT], "iscrowd": 1}
    categories = [{"id": found, "name": label, "supercategory": "none"} for label, found in ids.items()]
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": [crowd, *annotations],
        "categories": categories,
    }


def jsonl(folder: Path, records: int, rng: np.random.Generator) -> None:
    """Writes our own form with all six tasks, labelled boxes and a study of two images."""
    lines: list[dict[str, Any]] = []
    for split in ("train", "val", "test"):
        scenes = _scenes(folder / "images", split, records, rng)
        for number, scene in enumerate(scenes):
            label, *box = scene.things[-1]
            about = {
                "images": [f"images/{scene.name}.jpg"],
                "split": split,
                "cluster": f"p{number // 2}",
            }
            meta = {"meta": {"modality": pick(rng, ("CT", "MR"))}}
            for task, more in (
                ("vqa", {"question": "What is in front?", "answer": label} | meta),
                ("caption", {"answer": f"{len(scene.things)} things, {words(rng)}."}),
                ("cls", {"answer": "several" if len(scene.things) > 1 else "one"}),
                ("refer", {"question": f"front {label}", "box": box}),
                ("identify", {"answer": label, "box": box}),
            ):
                lines.append({"id": f"{scene.name}/{task}", "task": task, **about, **more})
            things = [{"label": label, "box": box} for label, *box in scene.things]
            lines.append({"id": f"{scene.name}/boxes", "boxes": things, **about})
            lines.append(
                {"id": f"{scene.name}/qa", "task": "qa", "question": f"{number} and 1?", "split": split}
            )
            lines[-1]["answer"] = str(number + 1)
        two = [f"images/{scene.name}.jpg" for scene in scenes[:2]]
        lines.append({"id": f"{split}/study", "task": "vqa", "images": two, "split": split})
        lines[-1] |= {"question": "How many images?", "answer": str(len(two))}
    write_lines(folder / "data.jsonl", lines)
