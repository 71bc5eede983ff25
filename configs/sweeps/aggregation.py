"""How four patches become one visual token (the published block "resampler", and square blocks).

    python -m unimed_jax.main sweep --config=configs/sweeps/aggregation.py

On the brain set, with 16 visual tokens a picture in place of 4, since pools join four patches; :real for
configs/real_small.py, likewise, :full for configs/cmoe.py on the twelve sets. 12 runs: 57 min and 0.9 GB
on two CPU cores, of 4 min 44 s and 71 MB for the base's.
"""

from bases import base

KINDS = ("projection", "block", "avgpool", "maxpool")


def get_config(size=""):
    # rows with room for 12 tokens more of each picture
    longer = {"": 176, "real": 236}
    settings = {"model.connector.rate": 4, "data.row_tokens": longer[size]} if size in longer else {}
    return dict(
        base=base(size, "aggregation"),
        settings=settings,
        variants={kind: {"model.connector.aggregation": kind} for kind in KINDS},
        baseline="projection",
    )
