"""Reads squares of two tasks without a validation split: `support.squares_without_val`."""

import dataclasses

from support import squares

INFO = dataclasses.replace(
    squares.INFO, name="squares_without_val", tasks=("vqa", "cls"), splits=("train", "test")
)


def read(folder, split, options, skipped):
    for example, sources in squares.read(folder, split, options, skipped):
        if example.task in INFO.tasks:
            yield example, sources
