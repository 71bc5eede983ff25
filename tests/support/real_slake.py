"""SLAKE's real questions with made pictures, since its pictures may not lie beside its questions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def slake_with_pictures(real: Path, folder: Path) -> Path:
    """Links SLAKE's questions into a folder and makes a picture for each that they ask about."""
    if not (real / "slake" / "train.json").is_file():
        pytest.skip(f"needs {real / 'slake'}, which does not exist (docs/real_data.md)")
    names: dict[str, None] = {}
    for split in ("train", "validate", "test"):
        file = real / "slake" / f"{split}.json"
        (folder / file.name).write_bytes(file.read_bytes())
        names |= dict.fromkeys(record["img_name"] for record in json.loads(file.read_bytes()))
    for number, name in enumerate(names):
        path = folder / "imgs" / name
        path.parent.mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(noise).resize((24, 24)).save(path)
    return folder
