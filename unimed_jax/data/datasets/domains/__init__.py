"""The domains set: questions about images of four domains, for Med-MoE's stages at a tiny size.

Two domains are slices of the brain set, with its questions; two are views of the pictures in domains_images.py. All
have as many images in a split. `meta["modality"]` names the domain: what a router is taught.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from unimed_jax import processes
from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import brain
from unimed_jax.data.datasets.brain.questions import Candidate, balanced, take_turns
from unimed_jax.data.datasets.domains.images import KINDS, OPTICAL, SCAN, SOURCES, Source, view
from unimed_jax.data.example import Dataset, Example
from unimed_jax.errors import UserError

VERSION = "1.0.0"  # part of the checksum
T1, TISSUE = "brain T1", "brain tissue map"
MODALITIES = (T1, TISSUE, SCAN, OPTICAL)
IMAGES = {"train": 480, "val": 40, "test": 80}  # of each domain
_DOMAIN_QUESTION = "Brain T1, brain tissue map, other scan or optical image?"


class Domains:
    """vqa and cls in all splits, caption in train alone; images are uint8 [64, 64, 3]."""

    name = "domains"

    def __init__(self, slices: Dataset, tasks: Sequence[str] = (), seed: int = 0):
        """`slices`: the brain set."""
        self._slices = slices
        self._views: dict[str, np.ndarray] = {}  # uint8 [64, 64, 3]
        self._examples: dict[str, list[Example]] = {}
        digest = hashlib.sha256(f"{VERSION}\0{slices.checksum}".encode())
        for split, each in IMAGES.items():
            rng = brain.generator("domains", seed, split)
            examples = [*_of_brain(slices.examples(split), each, rng), *self._of_pictures(split, each, rng)]
            examples = [e for e in examples if e.task != "caption" or split == "train"]
            digest.update(f"\0{split}\0{brain.pack(examples)}".encode())
            self._examples[split] = [e for e in examples if not tasks or e.task in tasks]
        for key, pixels in self._views.items():
            digest.update(f"\0{key}\0".encode() + pixels.tobytes())
        self.checksum = digest.hexdigest()

    def examples(self, split: str) -> Sequence[Example]:
        if split not in self._examples:
            raise UserError(f"data set domains has no split {split!r}; choose from {', '.join(IMAGES)}.")
        return self._examples[split]

    def image(self, key: str) -> np.ndarray:
        return self._views[key] if key in self._views else self._slices.image(key)

    def counts(self) -> str:
        """A line for each split and domain: source images (of the brain: slabs), images, examples by task."""
        lines = []
        for split, examples in self._examples.items():
            for modality in MODALITIES:
                own = [e for e in examples if e.meta["modality"] == modality]
                tasks = ", ".join(f"{t} {n}" for t in ("vqa", "cls", "caption") if (n := sum(e.task == t for e in own)))
                parts = "slabs of the one brain" if modality in (T1, TISSUE) else "source images"
                lines.append(
                    f"domains, {split}, {modality}: {len({e.cluster for e in own})} {parts}, "
                    f"{len({e.images for e in own})} images; {tasks}"
                )
        return "\n".join(lines)

    def _of_pictures(self, split: str, each: int, rng: np.random.Generator) -> list[Example]:
        """Views of the split's pictures with their questions; a domain's pictures take turns."""
        views: list[tuple[str, Source]] = []
        for modality in (SCAN, OPTICAL):
            sources = [s for s in SOURCES if (s.split, s.modality) == (split, modality)]
            for i in range(each):
                source = sources[i % len(sources)]
                key = f"{source.name}_{i // len(sources):03d}"
                self._views[key] = view(source, rng)
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
        asked: list[list[tuple[str, str, str, str]]] = [[] for _ in views]  # task, template, question, answer
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
        return examples


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _of_brain(examples: Sequence[Example], each: int, rng: np.random.Generator) -> list[Example]:
    """The vqa, cls and caption of `each` T1 slices and as many tissue maps (slabs take turns), and their domain."""
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
        out.append(Example(name, "cls", _DOMAIN_QUESTION, domain, first.images, None, first.cluster, meta))
    return out


def load(source: SourceConfig, data: DataConfig) -> Domains:
    """The domains set; its brain slices are kept in `data.cache`, as the brain set's."""
    return _made(data.cache, source.tasks)


@functools.cache  # a chain asks for it at every stage
def _made(cache: str, tasks: tuple[str, ...]) -> Domains:
    slices = brain.load(SourceConfig("brain", tasks=("vqa", "cls", "caption")), DataConfig(cache=cache))
    made = Domains(slices, tasks)
    if processes.leads():
        print(made.counts(), flush=True)
    return made
