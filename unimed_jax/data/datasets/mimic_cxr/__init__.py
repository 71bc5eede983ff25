"""Reads MIMIC-CXR-JPG: chest X-rays and their reports (task caption), in either of two layouts.

R2Gen's annotation, of which a record is one image with the findings of its study:

    annotation.json
    files/p10/p10000032/s50414267/<dicom_id>.jpg

or the official files, of which a study is one example:

    mimic-cxr-2.0.0-split.csv, mimic-cxr-2.0.0-metadata.csv, mimic-cxr-2.0.0-chexpert.csv (or .csv.gz)
    files/p10/p10000032/s50414267/<dicom_id>.jpg
    files/p10/p10000032/s50414267.txt          or below mimic-cxr-reports

Access is credentialed (PhysioNet), and nothing of it may be passed on.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimed_jax.data.datasets.mimic_cxr import official
from unimed_jax.data.example import Example
from unimed_jax.data.info import Info
from unimed_jax.data.records import at_least, chosen_options, one_of
from unimed_jax.data.reports import FILE, studies
from unimed_jax.errors import UserError

INFO = Info(
    name="mimic_cxr",
    tasks=("caption",),
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    citation="Johnson et al., MIMIC-CXR-JPG, 2019; split and reports of R2Gen, Chen et al., EMNLP 2020",
    cluster_word="patient",
    files=(FILE, *official.FILES),
    counts={"train": 270790, "val": 2130, "test": 3858},
    # By another parser of sections, which differs from ours in a few reports; no source was at hand to
    # check these numbers, so a difference of a few per cent proves nothing.
    other_counts={"official files, findings (unverified)": {"train": 152173, "val": 1196, "test": 2347}},
)
# Of the official files; R2Gen's annotation has chosen already.
OFFICIAL: dict[str, Any] = {
    "text": "findings",  # findings, impression, or both
    "views": ["PA", "AP"],  # view positions that are shown first, in this order
}
OPTIONS = {
    "images": 1,  # of a study at most; Uni-Med shows one
    "layout": "",  # r2gen or official; empty: R2Gen's annotation where it lies there
    **OFFICIAL,
}


def read(
    folder: Path | None, split: str, options: Mapping[str, Any], skipped: list[str]
) -> Iterator[tuple[Example, tuple[Path, ...]]]:
    """Yields the studies of a split, of which those of one patient belong together."""
    assert folder is not None  # INFO names files
    chosen = chosen_options(options, OPTIONS, "mimic_cxr")
    at_least(chosen, "images", 1, "mimic_cxr")
    one_of(chosen, "text", official.TEXTS, "mimic_cxr")
    layout = one_of(chosen, "layout", ("", "r2gen", "official"), "mimic_cxr")
    if not all(isinstance(view, str) for view in chosen["views"]):
        raise UserError(
            "config.data.sources: option views of mimic_cxr takes a list of texts: PA, AP ..."
        )
    if layout == "official" or not layout and not (folder / FILE).exists():
        yield from official.studies(folder, split, chosen, skipped)
        return
    for key, value in OFFICIAL.items():
        if chosen[key] != value:
            raise UserError(
                f"config.data.sources: option {key} of mimic_cxr has no effect on R2Gen's annotation in "
                f"{folder}; leave it out, or set layout='official'."
            )
    yield from studies(folder, folder / "files", split, chosen["images"], "subject_id")
