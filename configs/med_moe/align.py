"""Med-MoE, stage 1: the projector alone learns to name what CLIP sees, from images with captions.

python -m unimed_jax.main --config=configs/med_moe/align.py:stablelm --config.data.root=... (what else it needs is said)
"""

from pathlib import Path

from unimed_jax.settings import load_config_file


def get_config(size=""):
    config = load_config_file(f"{Path(__file__).with_name('base.py')}:{size}")
    config.name = f"med_moe_{size}/align"
    config.init = (("seed", ""), ("clip", ""), ("hf", ""))

    # An image and its caption, nothing else; CLIP's crop.
    config.text.form, config.data.fit = "plain", "crop"
    config.data.sources = (dict(name="llava", path="llava_med_align"),)

    # One epoch of 500,000 pairs in batches of 64.
    config.optimizer.lr, config.train.steps, config.optimizer.warmup_steps = 1e-3, 7813, 235
    config.train.rules = (dict(match="connector/*", train=True), dict(match="*", train=False))

    if size == "tiny":
        config.init = (("seed", ""), ("run", "runs/brain_tiny"))
        config.data.sources = (dict(name="domains", tasks=("caption",)),)
        config.data.row_tokens, config.data.row_images, config.data.row_answers = 112, 2, 96
        config.optimizer.lr, config.train.steps, config.optimizer.warmup_steps = 2e-3, 200, 6
    return config
