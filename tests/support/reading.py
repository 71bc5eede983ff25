"""Opens what the readers make of a raw folder, and compares it with the raw records."""

import hashlib

import numpy as np

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources, reader_of
from unimed_jax.data.images import read_image
from unimed_jax.data.store import RECORDS, pack
from unimed_jax.data.twins import TWINS
from unimed_jax.errors import UserError

# options of a reader or layout
NEEDED = {
    "medmnist": {"name": "dermamnist"},
    "medqa/four": {"options": 4},
    "medqa/mainland": {"region": "Mainland", "options": 4},
    "medqa/taiwan": {"region": "Taiwan"},
    "choices/tsv": {"split": "split"},
}


def opened(place, name, cache=None, **fields):
    source = SourceConfig(name, path=str(place), **fields)
    (found,) = open_sources(DataConfig((source,), cache=str(cache or place.parent / "cache")))
    return found


def options_of(name, layout):
    """The options without which a reader does not read the twin of a layout."""
    return NEEDED.get(name, NEEDED.get(f"{name}/{layout}", {}))


def layouts_of_twins():
    return [
        (name, layout, options_of(name, layout)) for name, layouts in TWINS.items() for layout in layouts
    ]


def everything(data):
    return [(split, example) for split in data.splits for example in data.examples(split)]


def left_out(data):
    return (data.folder / "skipped.txt").read_text(encoding="utf-8").splitlines()


def check_against_raw(data, name, place, options):
    """A prepared set holds the reader's examples with all fields, the pixels of the raw files, and the
    checksum as it is defined: one record after the other.
    """
    reader = reader_of(name)
    digest = hashlib.sha256(f"{RECORDS}\0{reader.INFO.version}".encode())
    examples, pixels, refused, skipped = [], {}, 0, []
    for split in reader.INFO.splits:
        for example, sources in reader.read(place, split, options, skipped):
            given = dict(zip(example.images, sources, strict=True))
            new = {key: source for key, source in given.items() if key not in pixels}
            try:
                found = {key: _raw(source) for key, source in new.items()}
            except UserError:
                refused += 1
                continue
            if not example.answer.strip():
                refused += 1
                continue
            for key, (image, content) in found.items():
                pixels[key] = image
                digest.update(f"\0{key}\0".encode() + hashlib.sha256(content).digest())
            digest.update(f"\0{split}\0".encode() + pack(example))
            examples.append((split, example))
    assert everything(data) == examples
    for key, image in pixels.items():
        np.testing.assert_array_equal(data.image(key), image)
    assert data.checksum == digest.hexdigest()
    assert data.skipped == refused + len(skipped)


def _raw(source):
    """The pixels of a source, and the bytes that the checksum is of."""
    if isinstance(source, np.ndarray):
        image = source if source.ndim == 3 else np.repeat(source[..., None], 3, axis=2)
        return image, str(source.shape).encode() + source.tobytes()
    image = read_image(source)
    return image, source if isinstance(source, bytes) else source.read_bytes()
