"""Reads IU X-Ray with R2Gen's annotation: chest X-rays in 1 to 5 views and reports (task caption).

    annotation.json
    images/CXR1_1_IM-0001/0.png

Words that were removed for privacy stand as XXXX. Reports repeat: about a quarter of the test
reports occur word for word in the training part.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import at_least, chosen_options
from unimed_jax.data.reports import FILE, studies

INFO = Info(
    name="iu_xray",
    tasks=("caption",),
    licence="CC BY-NC-ND 4.0",
    citation="Demner-Fushman et al., JAMIA 2016; split of R2Gen, Chen et al., EMNLP 2020",
    note="About a quarter of the test reports occur word for word in the training part.",
    cluster_word="study",
    files=(FILE,),
    by_design={"report": "reports of healthy chests are worded alike"},
    counts={"train": 2069, "val": 296, "test": 590},
    other_counts={"another annotation": {"train": 3062, "val": 382, "test": 382}},
)
OPTIONS = {"images": 5}  # of a study at most


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the studies of a split, each with all of its views."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "iu_xray")
    yield from studies(folder, folder / "images", split, at_least(chosen, "images", 1, "iu_xray"), "id")
