"""How many experts the connector has, from one to eight (a published block).

    python -m unimed_jax.main sweep --config=configs/sweeps/experts.py

On the brain set; :real for configs/real_small.py, :full for configs/cmoe.py on the twelve sets. 15 runs:
1 h 11 min and 1.1 GB on two CPU cores, of 4 min 44 s and 71 MB for the base's.
"""

from bases import base


def get_config(size=""):
    return dict(
        base=base(size, "experts"),
        variants={str(count): {"model.connector.experts": count} for count in (1, 2, 3, 5, 8)},
        baseline="1",
    )
