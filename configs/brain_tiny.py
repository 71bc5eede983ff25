"""A small Uni-Med, trained from scratch on one average brain: the first run of the README.

Six tasks on slices of the ICBM152 template (see unimed_jax/data/datasets/brain); every parameter trains.
`:colin` scores another head too, which nothing trains on, where its files are (docs/real_data.md);
`:colin=FOLDER` says where.
"""

import common

from unimed_jax.config import default_config
from unimed_jax.errors import UserError


def get_config(head=""):
    config = default_config()
    common.tiny_vision(config)
    common.tiny_connector(config)
    common.tiny_decoder(config)

    # Mixture: a draw is one image and task with several of its questions.
    data = config.data
    data.sources = common.brain_mixture()
    data.rows = 16
    data.row_tokens = 152
    data.row_images = 2
    data.row_answers = 96
    config.text.max_answer = 96
    config.text.max_prompt = 128

    # Box coordinates: Gaussian soft targets over neighbouring hundredths.
    config.loss.coordinate_sd = 1.5
    config.loss.coordinate_weight = 1.5

    common.tiny_optimizer(config)
    config.optimizer.warmup_steps = 40
    config.optimizer.weight_decay = 0.05

    # At the common rate the task tokens hardly leave their small start within so short a run.
    train = config.train
    train.rules = (
        dict(match="connector/task_tokens", train=True, lr_scale=10.0),
        dict(match="*", train=True),
    )
    train.steps = 1200
    train.save_every = 600
    config.evaluate.batch = 128
    config.evaluate.max_new_tokens = 96
    name, _, folder = head.partition("=")
    if name not in ("", "colin"):
        raise UserError(f"configs/brain_tiny.py takes :colin or :colin=FOLDER, not :{head}.")
    if name:
        common.another_head(config, folder or common.MRICRON)
    return config
