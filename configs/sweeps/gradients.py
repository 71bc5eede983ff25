"""How gradients of several tasks are combined: their sum, as published, or ways that ease conflicts.

    python -m unimed_jax.main sweep --config=configs/sweeps/gradients.py

On the brain set; :real for configs/real_small.py, :full for configs/cmoe.py on the twelve sets. 12 runs.
The sum's three take 14 min 12 s on two CPU cores; a step of the others has a backward pass for each
task, six here. 0.9 GB of disk.
"""

from bases import base


def get_config(size=""):
    ways = ("sum", "pcgrad", "gradvac", "equal-norm")
    return dict(
        base=base(size, "gradients"),
        variants={way: {"train.gradients": way} for way in ways},
        baseline="sum",
    )
