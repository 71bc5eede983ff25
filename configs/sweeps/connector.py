"""Connectors without experts, and experts under every router (the published block of that name).

    python -m unimed_jax.main sweep --config=configs/sweeps/connector.py

On the brain set; :real for configs/real_small.py, :full for configs/cmoe.py on the twelve sets. 30 runs:
2 h 22 min and 2.1 GB on two CPU cores, of 4 min 44 s and 71 MB for the base's.
"""

from bases import base

ROUTERS = ("soft", "sparse", "hard", "constant")
KIND, ROUTER = "model.connector.kind", "model.connector.router"


def get_config(size=""):
    experts = {
        f"{kind}_{router}": {KIND: kind, ROUTER: router}
        for kind in ("moe_linear", "moe_mlp")
        for router in ROUTERS
    }
    return dict(
        base=base(size, "connector"),
        variants={"linear": {KIND: "linear"}, "mlp2x": {KIND: "mlp2x_gelu"}, **experts},
        baseline="mlp2x",
    )
