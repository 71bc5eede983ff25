"""One small Uni-Med for six tasks on real data, from scratch on a CPU: the run of docs/real_data.md.

VQA-RAD (vqa), MedPix 2.0 (cls, caption), BCCD (refer, identify) and PubMedQA (qa) lie below data.root,
in folders vqa_rad, medpix2, bccd and pubmedqa.
"""

import common

from unimed_jax.config import default_config

CELLS = {"WBC": "white blood cell", "RBC": "red blood cell", "Platelets": "platelet"}
# Cells look alike from every side. The frame of identify is of one size, as a tight box tells its class.
BCCD = dict(name="voc", id="bccd", path="bccd", options=dict(names=CELLS, frame=80))
TURNED = dict(turns=True, scale=(0.8, 1.3), shift=0.3)
# Its images that VQA-RAD has too are left out.
MEDPIX = dict(
    name="medpix2",
    options=dict(caption="facts", without="../vqa_rad/VQA_RAD Image Folder"),
    augment=dict(rotate=8.0, scale=(0.85, 1.2), shift=0.1, contrast=0.2, brightness=0.1),
)
# VQA-RAD and PubMedQA have no validation part: a tenth of their training, on which settings were chosen.
VAL = {"val": "train[90%:]"}


def get_config():
    config = default_config()
    common.tiny_vision(config)
    common.tiny_connector(config)
    common.tiny_decoder(config)
    vision = config.model.vision
    vision.image_size = 96
    vision.patch_size = 12
    # Radiographs are dark and blood smears bright. By one mean for both, what all patches of a picture
    # share drowns what differs between them, and no place is learned.
    vision.normalise = "picture"
    vision.mean, vision.std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    config.model.decoder.vocab = 2048
    config.text.vocab = 2048

    data = config.data
    data.sources = (
        BCCD | dict(tasks=("refer",), weight=8.0, questions=2, augment=TURNED),
        BCCD | dict(tasks=("identify",), weight=5.0, questions=2, augment=TURNED),
        # Drawn less often, one seed of three never left the shares of the answers for the image.
        MEDPIX | dict(tasks=("cls",), weight=14.0, questions=3),
        MEDPIX | dict(tasks=("caption",), weight=2.5),
        dict(
            name="vqa_rad",
            tasks=("vqa",),
            weight=1.0,
            questions=4,
            splits=VAL,
            augment=dict(rotate=8.0, scale=(0.85, 1.2), shift=0.1, contrast=0.2, brightness=0.1),
        ),
        dict(
            name="pubmedqa",
            weight=0.4,
            splits=VAL,
            options=dict(context="conclusion", words=32),
        ),
    )
    data.rows = 12
    data.row_tokens = 200
    data.row_images = 3
    data.row_answers = 128
    config.text.max_answer = 112
    config.text.max_prompt = 256

    config.loss.coordinate_sd = 1.5
    config.loss.coordinate_weight = 1.5
    common.tiny_optimizer(config)
    # At the rate of the brain set, and ten times it for task tokens, almost all of the router's sigmoids
    # are 0 or 1 after a few hundred steps, where they have no gradient.
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.05
    train = config.train
    train.steps = 2600
    train.save_every = 400
    config.evaluate.batch = 64
    config.evaluate.max_new_tokens = 112
    return config
