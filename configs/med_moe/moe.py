"""Med-MoE, stage 3: experts in every second layer, each a copy of the MLP that stage 2 left, beside the meta expert."""

from pathlib import Path

from unimed_jax.settings import load_config_file


def get_config(size=""):
    config = load_config_file(f"{Path(__file__).with_name('base.py')}:{size}")
    config.name = f"med_moe_{size}/moe"
    config.init = (
        ("seed", ""),
        ("run", f"runs/med_moe_{size}/instruct"),
        ("router", f"runs/med_moe_{size}/router/router"),
    )

    # Four experts, one of them and the meta expert for every token; nothing is dropped, and nothing balances them.
    moe = config.model.moe
    moe.experts, moe.placement, moe.top_k, moe.meta, moe.aux_coef = 4, "sparse", 1, True, 0.0

    # Questions about images padded to a square.
    config.data.fit, config.data.sources = "pad", config.evaluate.sources

    # Nine epochs of 44,000 in batches of 64. All MLPs train, with experts or not, and the projector.
    config.optimizer.lr, config.train.steps, config.optimizer.warmup_steps = 2e-5, 6192, 186
    config.train.rules = (
        dict(match="decoder/layers/moe/router/*", train=False),
        dict(match="decoder/layers/m*", train=True),  # mlp, moe
        dict(match="connector/*", train=True),
        dict(match="*", train=False),
    )

    if size == "tiny":
        config.data.sources = (dict(name="domains", tasks=("vqa", "cls"), questions=3),)
        config.optimizer.lr, config.train.steps, config.optimizer.warmup_steps = 1e-3, 400, 12
    return config
