"""Med-MoE, stage 2: decoder and projector learn to follow instructions about images; CLIP stays frozen."""

from pathlib import Path

from unimed_jax.settings import load_config_file


def get_config(size=""):
    config = load_config_file(f"{Path(__file__).with_name('base.py')}:{size}")
    config.name = f"med_moe_{size}/instruct"
    config.init = (("run", f"runs/med_moe_{size}/align"),)

    # Conversations; images padded to a square.
    config.data.fit = "pad"
    config.data.sources = (dict(name="llava", path="llava_med_instruct"),)

    # Three epochs of 60,000 in batches of 64.
    config.optimizer.lr, config.train.steps, config.optimizer.warmup_steps = 2e-5, 2814, 85
    config.train.rules = (dict(match="vision/*", train=False), dict(match="*", train=True))

    if size == "tiny":
        config.data.sources = (dict(name="domains", tasks=("vqa", "cls"), questions=3),)
        config.optimizer.lr, config.train.steps, config.optimizer.warmup_steps = 1e-3, 400, 12
    return config
