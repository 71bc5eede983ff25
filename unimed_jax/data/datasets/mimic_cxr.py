"""Reads MIMIC-CXR-JPG with R2Gen's annotation: chest X-rays and their reports (task caption).

    annotation.json
    files/p10/p10000032/s50414267/<dicom_id>.jpg

Access is credentialed (PhysioNet), and nothing of it may be passed on.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import at_least, chosen_options
from unimed_jax.data.reports import FILE, studies

INFO = Info(
    name="mimic_cxr",
    tasks=("caption",),
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Johnson et al., MIMIC-CXR-JPG, 2019; split and reports of R2Gen, Chen et al., EMNLP 2020",
    cluster_word="patient",
    files=(FILE,),
    counts={"train": 270790, "val": 2130, "test": 3858},
)
OPTIONS = {"images": 1}  # of a study at most; Uni-Med shows one


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the studies of a split, of which those of one patient belong together."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "mimic_cxr")
    yield from studies(
        folder, folder / "files", split, at_least(chosen, "images", 1, "mimic_cxr"), "subject_id"
    )
