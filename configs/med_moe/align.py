"""Med-MoE, stage 1: only the projector learns, to name what CLIP sees, from images with captions.

python -m unimed_jax.main --config=configs/med_moe/align.py:stablelm --config.data.root=... (it says
what else it needs)
"""

import common


def get_config(size=""):
    config = common.med_moe(size)
    config.name = f"med_moe_{size}/align"
    config.init = (("seed", ""), ("clip", ""), ("hf", ""))

    # An image and its caption, nothing else; CLIP's crop.
    config.text.form = "plain"
    config.data.fit = "crop"
    config.data.sources = (dict(name="llava", path="llava_med_align"),)

    # One epoch of 500,000 pairs in batches of 64.
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 235
    config.train.steps = 7813
    config.train.rules = (
        dict(match="connector/*", train=True),
        dict(match="*", train=False),
    )

    if size == "tiny":
        config.init = (("seed", ""), ("run", "runs/brain_tiny"))
        config.data.sources = (dict(name="domains", tasks=("caption",)),)
        config.data.row_tokens = 112
        config.data.row_images = 2
        config.data.row_answers = 96
        config.optimizer.lr = 2e-3
        config.optimizer.warmup_steps = 6
        config.train.steps = 200

    if size == "real":
        # No encoder or decoder of this size knows patients: all of it learns from the captions, cut
        # to so many words, and its vocabulary too.
        config.init = (("seed", ""),)
        config.data.sources = common.real_sets(("caption",))[1:]
        config.data.fit = "pad"
        config.text.max_words = 50
        config.data.rows = 8
        config.data.row_tokens = 320
        config.data.row_images = 4
        config.data.row_answers = 256
        config.optimizer.lr = 1e-3
        config.optimizer.warmup_steps = 10
        config.train.steps = 150
        config.train.rules = (dict(match="*", train=True),)
        config.evaluate.limit = 100  # it answers no question yet
    return config
