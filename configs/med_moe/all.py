"""Med-MoE from an aligned projector to its experts, all stages in turn: with :stablelm, :phi2 or :tiny."""

from pathlib import Path

import ml_collections

STAGES = ("align", "instruct", "router", "moe")


def get_config(size=""):
    files = tuple(f"{Path(__file__).with_name(stage)}.py:{size}" for stage in STAGES)
    return ml_collections.ConfigDict(dict(name=f"med_moe_{size}", stages=files))
