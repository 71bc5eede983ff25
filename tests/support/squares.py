"""Reads coloured squares with all six tasks: `name="support.squares"`.

Options: `images`, and `long` (the key of an image).
"""

import dataclasses

import numpy as np

from unimed_jax.config import TASKS
from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.columns import Collector
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
INFO = Info("squares", TASKS, licence="CC0", note="Squares on black.", cluster_word="square")


def read(folder, split, options, skipped):
    # One generator over all splits: each continues where the last one ended.
    rng = np.random.default_rng(0)
    for name in INFO.splits:
        made = list(_split(name, options.get("images", 24), rng))
        if name == split:
            for example, sources in made:
                # this image's questions are too long for any row
                if example.images == (options.get("long"),):
                    example = dataclasses.replace(example, question=example.question + " again" * 600)
                yield example, sources
            return


def _split(split, images, rng):
    for i in range(images):
        key, (name, colour) = f"{split}{i}", list(COLOURS.items())[rng.integers(4)]
        x, y, side = *rng.integers(0, 12, 2), int(rng.integers(6, 18))
        box = (int(x), int(y), int(x) + side, int(y) + side)
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = colour
        place = box_to_text(box, 32, 32)
        meta = {"prompt": name, "plane": "axial", "answer_type": "OPEN"}
        for task, question, answer in (
            ("vqa", "What colour is the square?", name),
            ("refer", f"{name} square", place),
            ("identify", place, f"{name} square"),
            ("caption", "", f"There is one {name} square of {side} pixels in the image."),
            ("cls", "", name),
            ("qa", f"What is {i} plus 1?", str(i + 1)),
        ):
            keys = () if task == "qa" else (key,)
            boxed = box if task in ("refer", "identify") else None
            facts = {"template": task} | meta
            example = Example(f"{key}/{task}", task, question, answer, keys, boxed, f"c{i % 6}", facts)
            yield example, (pixels,) * len(keys)


class Squares:
    """Holds the same set in memory."""

    id, name, info, checksum = "squares", "squares", INFO, "0" * 64

    def __init__(self, images=24):
        self._images, self._examples = {}, {}
        for split in INFO.splits:
            self._examples[split] = []
            for example, sources in read(None, split, {"images": images}, []):
                self._examples[split].append(example)
                self._images.update(zip(example.images, sources, strict=True))
        self.splits = tuple(split for split, examples in self._examples.items() if examples)

    def examples(self, split):
        return self._examples[split]

    def columns(self, split):
        collector = Collector()
        for example in self._examples[split]:
            collector.add(example)
        return collector.columns()

    def image(self, key):
        return self._images[key]
