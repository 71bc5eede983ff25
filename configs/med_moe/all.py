"""Med-MoE, all stages in turn, from an aligned projector to its experts.

The sizes are :stablelm and :phi2 (published), :tiny (the brain set and other pictures) and :real (real
patients). A stage that is finished is skipped, so the same command continues a chain. Each stage has a
folder of its own (runs/med_moe_tiny/align ...); stages.md beside them compares their scores on one
held-out set.
"""

from pathlib import Path

import ml_collections

STAGES = ("align", "instruct", "router", "moe")


def get_config(size=""):
    files = tuple(f"{Path(__file__).with_name(stage)}.py:{size}" for stage in STAGES)
    return ml_collections.ConfigDict(dict(name=f"med_moe_{size}", stages=files))
