"""Reads the logs of runs for comparison."""

import json
from pathlib import Path


def logged_values(folder: str | Path) -> list[tuple]:
    """Returns every logged value that does not measure time or memory, by step."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [
        tuple((k, v) for k, v in line.items() if not k.startswith(("speed/", "memory/")))
        for line in lines
    ]
