"""What the router reads: task token and visual token, or one of the two.

    python -m unimed_jax.main sweep --config=configs/sweeps/router_input.py

On the brain set; :real for configs/real_small.py, :full for configs/cmoe.py on the twelve sets. 9 runs:
43 min and 0.6 GB on two CPU cores, of 4 min 44 s and 71 MB for the base's.
"""

from bases import base


def get_config(size=""):
    inputs = ("task_token", "token", "task")
    return dict(
        base=base(size, "router_input"),
        variants={name: {"model.connector.router_input": name} for name in inputs},
        baseline="task_token",
    )
