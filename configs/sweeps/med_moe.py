"""What Med-MoE's third stage and its parts are worth: :tiny, or :real on real patients.

    python -m unimed_jax.main sweep --config=configs/sweeps/med_moe.py:tiny

The stages before it (configs/med_moe) are trained once a seed, and all variants start from the same
stage 2: the experts; dense, for as many steps and for as many FLOPs in the decoder; without the meta
expert; with a router that learns next to the experts; top-2. :tiny starts from runs/brain_tiny; :real
takes --config.data.root=DIR. 9 + 18 runs: 57 min and 0.5 GB on two CPU cores.
"""

from unimed_jax.errors import UserError

# Steps of a dense decoder that take as many FLOPs as those of the experts, counted by `params`.
STEPS = {"tiny": 515, "real": 306}
EXPERTS, INIT, RULES = "model.moe.experts", "init", "train.rules"


def get_config(size=""):
    if size not in STEPS:
        raise UserError(f"med_moe.py needs a size, not {size!r}; add :tiny or :real to its name.")
    without_router = (("seed", ""), ("run", f"runs/med_moe_{size}/instruct"))
    rest = (
        dict(match="decoder/layers/m*", train=True),
        dict(match="connector/*", train=True),
        dict(match="*", train=False),
    )
    dense = {EXPERTS: 0, INIT: without_router, RULES: rest}
    learned = (dict(match="decoder/layers/moe/router/*", train=True), *rest)
    stages = ("align", "instruct", "router")
    return dict(
        base=f"../med_moe/moe.py:{size}",
        stages={stage: f"../med_moe/{stage}.py:{size}" for stage in stages},
        variants={
            "moe": {},
            "dense": dense,
            "dense_flops": {**dense, "train.steps": STEPS[size]},
            "no_meta": {"model.moe.meta": False},
            "learned_router": {INIT: without_router, RULES: learned},
            "top2": {"model.moe.top_k": 2},
        },
        baseline="moe",
        scores={"vqa": ("open_recall", "closed_accuracy"), "cls": ("exact_match",)},
    )
