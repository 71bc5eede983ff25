"""Med-MoE, between stages 2 and 3: the router learns to tell modalities apart, from the hidden states of stage 2.

Nothing else trains. The run's folder gets `router/` (for config.init 'router'), router.json and router.png.
"""

from pathlib import Path

from unimed_jax.settings import load_config_file


def get_config(size=""):
    config = load_config_file(f"{Path(__file__).with_name('base.py')}:{size}")
    config.name = f"med_moe_{size}/router"
    config.init = (("run", f"runs/med_moe_{size}/instruct"),)
    config.train.rules = (dict(match="*", train=False),)

    # Prompts of stage 3, each image with its modality; the classes in the order of the experts.
    config.data.fit, config.data.sources = "pad", config.evaluate.sources
    router = config.router_fit
    config.job = "router"
    router.key, router.classes = "modality", ("MRI", "CT", "pathology", "X-ray")
    router.labels, router.epochs, router.batch, router.lr = (50, 100, 200, 500, 1000), 10, 32, 1e-3

    if size == "tiny":
        config.data.sources = (dict(name="domains", tasks=("vqa", "cls")),)
        router.classes, router.labels = (), (10, 30, 100, 300, 1000)
        router.epochs, router.lr = 100, 1e-2  # features of a sixteenth of the width separate less
    return config
