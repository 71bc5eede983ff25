"""Opens what the readers make of a raw folder."""

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources


def opened(place, name, cache=None, **fields):
    source = SourceConfig(name, path=str(place), **fields)
    (found,) = open_sources(DataConfig((source,), cache=str(cache or place.parent / "cache")))
    return found


def everything(data):
    return [(split, example) for split in data.splits for example in data.examples(split)]


def left_out(data):
    return (data.folder / "skipped.txt").read_text(encoding="utf-8").splitlines()
