"""Makes a toy data set of all six tasks whose answers only the images hold, and a model for it."""

import numpy as np

from unimed_jax.config import TASKS, Config, default_config
from unimed_jax.data.box_text import box_to_text
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.evaluate.answers import Journal
from unimed_jax.evaluate.run import answer_and_score
from unimed_jax.evaluate.tasks import Source, Training, units_of
from unimed_jax.settings import from_config_dict

SIZE = (48, 32)  # width, height: not square, so that mixing them up shows


def toy_config() -> Config:
    """Returns settings that score the test split of the toy data set."""
    settings = default_config()
    settings.name = "toy"
    settings.evaluate.bootstrap = 200
    settings.evaluate.batch = 16
    settings.evaluate.splits = ("test",)
    return from_config_dict(settings)


class Toy:
    """Holds twelve images in six slabs a split."""

    checksum, splits = "c" * 64, ("train", "val", "test")

    def __init__(self, per_task=24, left_out=(), id="toy", note=""):
        self.id, self.info = id, Info(id, TASKS, licence="", note=note, cluster_word="slab")
        self.rows = {}
        for s, split in enumerate(self.splits):
            self.rows[split] = [
                self.example(split, s, task, i)
                for task in TASKS
                if task not in left_out
                for i in range(per_task)
            ]

    def example(self, split, s, task, i):
        shape = ("disc", "ring", "bar")[i % 3]
        # Every slab has its place for the box, so that another slab's image misleads.
        x, y = 2 + 3 * (i % 12), 2 + (i % 3)
        box = (x, y, x + 10, y + 12)
        text = box_to_text(box, *SIZE)
        question, answer, meta = {
            "vqa": (
                f"Is the {shape} seen?",
                ("yes", "no")[i % 2],
                {"template": "seen", "answer_type": "closed"},
            )
            if i % 4
            else ("What is it?", shape, {"template": "what", "answer_type": "open"}),
            "refer": (shape, text, {"plane": ("axial", "coronal")[i % 2]}),
            "identify": (text, shape, {}),
            "caption": ("", f"A {shape} stands in the picture, small and bright, number {i % 12}.", {}),
            "cls": ("", shape, {"template": "shape"}),
            "qa": (f"Chapter of {i}?", ("heart", "lung")[i % 2], {"template": "chapter"}),
        }[task]
        return Example(
            f"{split}-{task}-{i}",
            task,
            question,
            answer,
            images=() if task == "qa" else (f"{s}-{i % 12}",),
            box=box if task in ("refer", "identify") else None,
            cluster=f"slab{i % 6}" if task != "qa" else "",
            meta=meta,
        )

    def examples(self, split):
        return self.rows[split]

    def image(self, key):
        s, i = map(int, key.split("-"))
        return np.full((SIZE[1], SIZE[0], 3), 20 * i + s, np.uint8)


class Model:
    """Answers rightly if it sees the right image or needs none.

    It also counts how much it was asked.
    """

    def __init__(self, toy, dies_after=None):
        self.toy, self.calls, self.dies_after = toy, [], dies_after

    def __call__(self, calls):
        return by_pass(lambda *asked: self.answer(*asked))

    def answer(self, examples, images, seed):
        assert len(examples) == len(images)
        if self.dies_after == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(len(examples))
        out = []
        for example, pixels in zip(examples, images, strict=True):
            keys = example.images
            assert len(pixels) == len(keys)
            right = all(
                np.array_equal(a, self.toy.image(key)) for a, key in zip(pixels, keys, strict=True)
            )
            out.append(example.answer if right else "")
        return out


class Says:
    """Answers every example with what one function returns."""

    def __init__(self, say):
        self.say = say

    def __call__(self, calls):
        return by_pass(lambda examples, images, seed: [self.say(example) for example in examples])


def by_pass(answer):
    """Makes what `answer_units` asks of a function of one pass: its examples, pixels and first seed."""

    def answers(passes, ended):
        return [
            answer(
                [question.example for question in some],
                [[picture.read() for picture in question.images] for question in some],
                some[0].seed,
            )
            for some in passes
        ]

    return answers


def sets_of(*toys):
    return {toy.id: Source(toy.id, toy, TASKS, {}) for toy in toys}


def evaluated(model, toys, config, folder, fingerprint="f"):
    """Scores the toys' units, in the order of the settings."""
    sets = sets_of(*(toys if isinstance(toys, (list, tuple)) else [toys]))
    units, _ = units_of(config, sets)
    return answer_and_score(units, Training(config, sets), model, Journal(folder, fingerprint), config)
