"""Med-MoE, stage 2: decoder and projector learn to follow instructions about images.

CLIP stays frozen.
"""

import common


def get_config(size=""):
    config = common.med_moe(size)
    config.name = f"med_moe_{size}/instruct"
    config.init = (("run", f"runs/med_moe_{size}/align"),)

    # Conversations; images padded to a square.
    config.data.fit = "pad"
    config.data.sources = (dict(name="llava", path="llava_med_instruct"),)

    # Three epochs of 60,000 in batches of 64.
    config.optimizer.lr = 2e-5
    config.optimizer.warmup_steps = 85
    config.train.steps = 2814
    config.train.rules = (
        dict(match="vision/*", train=False),
        dict(match="*", train=True),
    )

    if size == "tiny":
        common.tiny_questions(config)
    if size == "real":  # the vision encoder has much to learn yet
        common.real_questions(config)
        config.train.rules = (dict(match="*", train=True),)
    return config
