"""Med-MoE, stage 3: experts in every second layer, copies of stage 2's MLP, beside the meta expert."""

import common


def get_config(size=""):
    config = common.med_moe(size)
    config.name = f"med_moe_{size}/moe"
    config.init = (
        ("seed", ""),
        ("run", f"runs/med_moe_{size}/instruct"),
        ("router", f"runs/med_moe_{size}/router/router"),
    )

    # Four experts, one of them and the meta expert for every token; nothing is dropped, and nothing
    # balances them.
    moe = config.model.moe
    moe.experts = 4
    moe.placement = "sparse"
    moe.top_k = 1
    moe.meta = True
    moe.aux_coef = 0.0

    # Questions about images padded to a square.
    config.data.fit = "pad"
    config.data.sources = common.MED_MOE_QUESTIONS

    # Nine epochs of 44,000 in batches of 64. All MLPs train, with experts or not, and the projector.
    config.optimizer.lr = 2e-5
    config.optimizer.warmup_steps = 186
    config.train.steps = 6192
    config.train.rules = (
        dict(match="decoder/layers/moe/router/*", train=False),
        dict(match="decoder/layers/m*", train=True),  # mlp, moe
        dict(match="connector/*", train=True),
        dict(match="*", train=False),
    )

    if size == "tiny":
        common.tiny_questions(config)
    if size == "real":  # an expert for CT, MR and X-ray each
        common.real_questions(config)
        config.model.moe.experts = 3
        config.train.steps = 250
    return config
