"""Med-MoE, between stages 2 and 3: the router learns modalities from the hidden states of stage 2.

Nothing else trains. The run's folder gets `router/` (for config.init 'router'), router.json and
router.png.
"""

import common


def get_config(size=""):
    config = common.med_moe(size)
    config.name = f"med_moe_{size}/router"
    config.job = "router"
    config.init = (("run", f"runs/med_moe_{size}/instruct"),)
    config.train.rules = (dict(match="*", train=False),)

    # Prompts of stage 3, each image with its modality (VQA-RAD names none); the classes in the
    # order of the experts.
    config.data.fit = "pad"
    config.data.sources = common.MED_MOE_QUESTIONS
    router = config.router_fit
    router.key = "modality"
    router.classes = ("MRI", "CT", "pathology", "X-Ray")
    router.labels = (50, 100, 200, 500, 1000)
    router.epochs = 10
    router.batch = 32
    router.lr = 1e-3

    if size == "tiny":
        config.data.sources = (dict(name="domains", tasks=("vqa", "cls")),)
        router.classes = ()
        router.labels = (10, 30, 100, 300, 1000)
        router.epochs = 100
        router.lr = 1e-2  # features of a sixteenth of the width separate less

    if size == "real":
        # MedPix 2.0 names CT and MR; VQA-RAD shows chests by X-ray and abdomens by CT, and does not say
        # how a head was taken.
        config.data.sources = common.real_sets(("cls",))
        router.classes = ("CT", "MR", "X-Ray")
        router.labels = (30, 100, 300, 1000, 1600)
        router.epochs = 100
        router.lr = 1e-2
    return config
