"""Makes the domains set: questions about images of four domains, for tiny runs of Med-MoE's stages.

Two domains are slices of the brain set, with its questions; two are views of the pictures in
images.py. All have as many images in a split. `meta["modality"]` names the domain: what a router is
taught.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.data.datasets import brain
from unimed_jax.data.datasets.brain import icbm152
from unimed_jax.data.datasets.brain.questions import Candidate, balanced, take_turns
from unimed_jax.data.datasets.domains.images import KINDS, OPTICAL, SCAN, SOURCES, Source, view
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info

INFO = Info(
    name="domains",
    tasks=("vqa", "caption", "cls"),
    licence=(
        "that of the brain set, and of the pictures inside scikit-image (BSD-3, CC0) and pydicom (MIT)"
    ),
    note=(
        "Slices of ONE average brain and 27 pictures of test files: it shows that the stages work, "
        "and says nothing about patients."
    ),
    cluster_word="source image",
    counts={"train": 13609, "val": 474, "test": 1074},
    version="2",
)
SPLITS = INFO.splits
T1, TISSUE = "brain T1", "brain tissue map"
MODALITIES = (T1, TISSUE, SCAN, OPTICAL)
IMAGES = {"train": 480, "val": 40, "test": 80}  # of each domain
_DOMAIN_QUESTION = "Brain T1, brain tissue map, other scan or optical image?"


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[np.ndarray, ...]]]:
    """Yields vqa and cls in all splits, caption in train only.

    The options are `seed`, `jitters` and `brain_seed`.
    """
    rng = brain.generator("domains", options.get("seed", 0), split)
    head, jitters = icbm152.load(), options.get("jitters", brain.JITTERS)
    slices = brain.asked(head, split, jitters, options.get("brain_seed", 0))
    slices.sort(key=lambda pair: pair[0].key)
    pixels = {piece.key: piece.image for piece, _ in slices}
    ours = [e for _, examples in slices for e in examples if e.task in ("vqa", "cls", "caption")]
    examples = _of_brain(ours, IMAGES[split], rng)
    pictured, views = _of_pictures(split, IMAGES[split], rng)
    for example in [*examples, *pictured]:
        if example.task != "caption" or split == "train":
            yield example, tuple((views if key in views else pixels)[key] for key in example.images)


def _of_pictures(
    split: str, each: int, rng: np.random.Generator
) -> tuple[list[Example], dict[str, np.ndarray]]:
    """Makes views of the split's pictures with their questions, and their pixels.

    A domain's pictures take turns.
    """
    pixels: dict[str, np.ndarray] = {}  # uint8 [64, 64, 3]
    views: list[tuple[str, Source]] = []
    for modality in (SCAN, OPTICAL):
        sources = [s for s in SOURCES if (s.split, s.modality) == (split, modality)]
        for i in range(each):
            source = sources[i % len(sources)]
            key = f"{source.name}_{i // len(sources):03d}"
            pixels[key] = view(source, rng)
            views.append((key, source))
    # Of each kind as many views are asked that are of it as others; a split may lack a kind.
    present = sorted({source.kind for _, source in views})
    is_kind = balanced(
        [
            Candidate(kind, i, f"Is this {KINDS[kind]}?", "yes" if source.kind == kind else "no")
            for i, (_, source) in enumerate(views)
            for kind in present
        ],
        len(views),
        rng,
    )
    # task, template, question, answer
    asked: list[list[tuple[str, str, str, str]]] = [[] for _ in views]
    for i, (_, source) in enumerate(views):
        asked[i] += [
            ("vqa", "map", "What kind of image is this?", source.kind),
            ("cls", "domain", _DOMAIN_QUESTION, source.modality),
            ("caption", "report", "", f"{_capital(KINDS[source.kind])} of {source.shown}."),
        ]
        if source.shown:
            asked[i].append(("vqa", "shown", "What is shown?", source.shown))
    for found in is_kind:
        asked[found.at].append(("vqa", "is_kind", found.question, found.answer))
    examples = []
    for (key, source), rows in zip(views, asked, strict=True):
        for number, (task, template, question, answer) in enumerate(rows):
            meta = {"template": template, "modality": source.modality, "kind": source.kind}
            if task == "vqa":
                meta["answer_type"] = "CLOSED" if template == "is_kind" else "OPEN"
            name = f"{key}/{task}/{number}"
            examples.append(Example(name, task, question, answer, (key,), None, source.name, meta))
    return examples, pixels


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _of_brain(examples: Sequence[Example], each: int, rng: np.random.Generator) -> list[Example]:
    """Takes examples about `each` T1 slices and as many tissue maps, and asks their domain.

    The examples are of the tasks vqa, cls and caption, and the slabs take turns.
    """
    clusters = {key: e.cluster for e in examples for key in e.images}
    modality = {key: T1 if e.meta["map"] == "t1" else TISSUE for e in examples for key in e.images}
    chosen: set[str] = set()
    for domain in (T1, TISSUE):
        keys = sorted(key for key in clusters if modality[key] == domain)
        chosen |= {keys[i] for i in take_turns([clusters[key] for key in keys], each, rng)}
    out = []
    for e in examples:
        if chosen.issuperset(e.images) and e.task in ("vqa", "cls", "caption"):
            meta = {**e.meta, "modality": modality[e.images[0]]}
            out.append(Example(e.id, e.task, e.question, e.answer, e.images, None, e.cluster, meta))
    for first in {e.images: e for e in reversed(out)}.values():
        meta = {**{k: first.meta[k] for k in ("plane", "map", "modality")}, "template": "domain"}
        name, domain = f"{first.images[0]}/cls/domain", meta["modality"]
        out.append(
            Example(name, "cls", _DOMAIN_QUESTION, domain, first.images, None, first.cluster, meta)
        )
    return out
