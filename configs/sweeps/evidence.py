"""CMoE against connectors without experts or router; in the regime :brain, :frozen, :narrow or :real.

    python -m unimed_jax.main sweep --config=configs/sweeps/evidence.py:brain

brain: everything trains (configs/brain_tiny.py). frozen: the connector is new, and encoder and decoder
are frozen, those of a finished brain_tiny of the same seed (configs/brain_frozen.py). narrow: the same
with one visual token and narrow experts. real: configs/real_small.py at 1,500 steps
(--config.data.root=DIR).

On two CPU cores, of 4 min 44 s and 71 MB for a run of brain_tiny: brain 35 runs, 2 h 46 min and 2.5 GB;
frozen 5 + 35 runs, of which those of the variants took 4.4 min of processor time and 11 to 42 MB each:
2 h 34 min of processor time beside 24 min for the starts, and 1.4 GB; narrow likewise, 3.7 min and 8 to
28 MB a run: 2 h 10 min beside the starts, and 1 GB. real 15 runs, of 22 to 25 min on one core beside
other work and 79 to 85 MB each: 6 h of one core and 1.2 GB.

`mlp2x` is as wide as one expert, as published. `mlp2x_b` has as many parameters as all experts,
`mlp2x_c` as many as experts, router and task tokens: their hidden widths are the nearest whole ones.
"""

from unimed_jax.errors import UserError

# Hidden widths of mlp2x_b and mlp2x_c; mlp2x takes that of one expert from the base.
HIDDEN = {"brain": (640, 766), "frozen": (640, 766), "narrow": (80, 96), "real": (640, 766)}
BASE = {
    "brain": "../brain_tiny.py",
    "frozen": "../brain_frozen.py",
    "narrow": "../brain_frozen.py:narrow",
    "real": "../real_small.py",
}
KIND, WIDTH, ROUTER = "model.connector.kind", "model.connector.hidden", "model.connector.router"


def get_config(regime=""):
    if regime not in BASE:
        known = ", ".join(f":{name}" for name in BASE)
        raise UserError(f"evidence.py needs a regime, not {regime!r}; add one of {known} to its name.")
    experts, whole = HIDDEN[regime]
    variants = {
        "cmoe": {},
        "linear": {KIND: "linear"},
        "mlp2x": {KIND: "mlp2x_gelu"},
        "mlp2x_b": {KIND: "mlp2x_gelu", WIDTH: experts},
        "mlp2x_c": {KIND: "mlp2x_gelu", WIDTH: whole},
        "constant": {ROUTER: "constant"},
        "hard": {ROUTER: "hard"},
    }
    if regime == "real":
        variants = {name: variants[name] for name in ("cmoe", "mlp2x_b", "constant")}
    return dict(
        base=BASE[regime],
        settings={"train.steps": 1500} if regime == "real" else {},
        stages={"start": "../brain_tiny.py"} if regime in ("frozen", "narrow") else {},
        variants=variants,
        baseline="cmoe",
        seeds=(0, 1, 2, 3, 4),
    )
