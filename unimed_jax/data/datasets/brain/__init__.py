"""The brain set: six tasks on slices of a real head, split by slabs, built once and kept as array_record.

The head is the ICBM152 average (T1 and its grey and white matter maps) inside nilearn: one average brain, so
that what is measured on it holds across slices and jitter, never across patients.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets.brain import codes as brain_codes
from unimed_jax.data.datasets.brain import questions as brain_questions
from unimed_jax.data.datasets.brain.volume import MAPS, SIZE, SLABS, Jitter, Slab, Slice, render
from unimed_jax.data.example import Example
from unimed_jax.errors import UserError

VERSION = "1.1.0"  # raise it with every change to what is generated, or old caches are taken for new
SPLITS = ("train", "val", "test")
JITTERS = 8  # of a train slice and map
_HELD_OUT_JITTERS = 2
_SEEDS = {"train": 1, "val": 2, "test": 3}
_PARTS = ("slices", "codes")


# --------------------------------------------------------------------------------------------------
# Generation: everything follows from (split, jitters, seed)
# --------------------------------------------------------------------------------------------------


def draw_slices(split: str, jitters: int = JITTERS, seed: int = 0) -> Iterator[Slice]:
    """All jittered slices of a split.

    Val and test have two jitters a slice; sagittal slices, which are rarer and may be mirrored, have twice as
    many as the others.
    """
    count = jitters if split == "train" else _HELD_OUT_JITTERS
    jobs = [
        (slab, position, name, copy)
        for slab in SLABS
        if slab.split == split
        for position in slab.positions
        for name in MAPS
        for copy in range(count * (2 if slab.plane == "sagittal" else 1))
    ]
    for slab, position, name, copy in tqdm(jobs, f"brain set, {split}", unit="image", leave=False):
        key = f"{slab.plane}_{position:+04d}_{name}_{copy:02d}"
        rng = generator(seed, _SEEDS[split], key)
        yield render(slab, position, name, Jitter.draw(rng, slab.plane), key, rng)


def plain_slices(slab: Slab) -> Iterator[Slice]:
    """The slices of a slab in all maps, without jitter."""
    for position in slab.positions:
        for name in MAPS:
            yield render(slab, position, name, Jitter(), f"{slab.plane}_{position:+04d}_{name}")


def records(split: str, part: str, jitters: int = JITTERS, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of a split: one record a slice, or one a three-character category of ICD-10-CM."""
    if part == "codes":
        for category, examples in brain_codes.ask(seed)[split].items():
            yield category, {"questions": pack(examples)}
        return
    slices = list(draw_slices(split, jitters, seed))
    asked = brain_questions.ask(slices, split, generator(seed, _SEEDS[split], "questions"))
    for piece, examples in zip(slices, asked, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(piece.image).save(buffer, "PNG")
        yield piece.key, {"image": buffer.getvalue(), "questions": pack(examples)}


def generator(*words: object) -> np.random.Generator:
    """Random numbers that follow from the words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


_FIELDS = ("id", "task", "question", "answer", "images", "box", "cluster", "meta")


def pack(examples: Sequence[Example]) -> str:
    """What a record and a checksum hold of them."""
    return json.dumps([{field: getattr(e, field) for field in _FIELDS} for e in examples], sort_keys=True)


def _unpack(text: str) -> list[Example]:
    rows = json.loads(text)
    return [
        Example(**row | {"images": tuple(row["images"]), "box": tuple(row["box"]) if row["box"] else None})
        for row in rows
    ]


# --------------------------------------------------------------------------------------------------
# Building and loading
# --------------------------------------------------------------------------------------------------


class Brain(tfds.core.GeneratorBasedBuilder):
    """`config` names the part, the jitters and the seed: `slices-8-0`, `codes-8-0`."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=f"{part}-{JITTERS}-0") for part in _PARTS]

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {"key": tfds.features.Text(), "questions": tfds.features.Text()}  # a JSON list
        if self.builder_config.name.startswith("slices"):
            features["image"] = tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Slices of the ICBM152 average brain with questions, and questions about ICD-10-CM.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterable]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        part, jitters, seed = self.builder_config.name.split("-")
        for key, record in records(split, part, int(jitters), int(seed)):
            yield key, {"key": key} | record


class BrainDataset:
    """Six tasks; images are grey, uint8 [64, 64] in memory, and come as RGB."""

    name = "brain"

    def __init__(self, folder: str | Path, jitters: int = JITTERS, seed: int = 0, tasks: Sequence[str] = ()):
        """Reads the set from `folder`, building it first where it is not there yet (about half a minute)."""
        self._examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
        self._images: dict[str, np.ndarray] = {}  # uint8 [64, 64]
        digest = hashlib.sha256(VERSION.encode())
        for part in _PARTS:
            builder = _build(Path(folder), f"{part}-{jitters}-{seed}")
            for split in SPLITS:
                for key, record in _read(builder, split):
                    questions = record["questions"].decode()
                    digest.update(f"\0{split}\0{key}\0{questions}\0".encode())
                    if "image" in record:
                        self._images[key] = np.asarray(Image.open(io.BytesIO(record["image"])))  # [64, 64]
                        digest.update(self._images[key].tobytes())
                    self._examples[split] += [e for e in _unpack(questions) if not tasks or e.task in tasks]
        self.checksum = digest.hexdigest()

    def examples(self, split: str) -> Sequence[Example]:
        if split not in self._examples:
            raise UserError(f"data set brain has no split {split!r}; choose from {', '.join(SPLITS)}.")
        return self._examples[split]

    def image(self, key: str) -> np.ndarray:
        if key not in self._images:
            raise UserError(f"data set brain has no image {key!r}.")
        return np.repeat(self._images[key][..., None], 3, axis=-1)  # [64, 64, 3]


def load(source: SourceConfig, data: DataConfig) -> BrainDataset:
    """The brain set, kept in `data.cache`."""
    return BrainDataset(data.cache_folder, tasks=source.tasks)


def _build(folder: Path, config: str) -> Brain:
    """The finished builder.

    tfds writes beside the records' place and moves them there when all are written, so that an interrupted
    build is never taken for a finished one.
    """
    tfds.disable_progress_bar()  # three nested bars; `draw_slices` shows one

    def builder() -> Brain:
        made = config if config in Brain.builder_configs else tfds.core.BuilderConfig(name=config, version=VERSION)
        return Brain(data_dir=folder, config=made, file_format="array_record")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download; there is none
            builder().download_and_prepare(file_format="array_record")  # returns at once where it is done
    except OSError as error:
        # Another process may have finished the same build first.
        if not (folder.is_dir() and builder().is_prepared()):
            raise UserError(f"the brain set cannot be kept in {folder} ({error}); set config.data.cache.") from error
    return builder()


def _read(builder: Brain, split: str) -> list[tuple[str, dict[str, bytes]]]:
    """(key, record) of a split in key order; images as the PNG bytes that are stored."""
    # tfds' own decoding of images differs where OpenCV is installed.
    skip = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    try:
        records = list(builder.as_data_source(split, decoders=skip))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the brain set in {builder.data_path} cannot be read ({str(error)[:200]}); delete that folder and run "
            "again."
        ) from error
    return sorted(((record["key"].decode(), record) for record in records), key=lambda pair: pair[0])
