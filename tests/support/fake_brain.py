"""A data set of coloured squares with all six tasks: small enough to train on in seconds."""

import numpy as np

from unimed_jax.config import default_config
from unimed_jax.data.example import Example
from unimed_jax.data.forms import box_to_text

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


class Squares:
    name, checksum = "squares", "0" * 64

    def __init__(self, images: int = 24):
        self._images, self._examples = {}, {}
        rng = np.random.default_rng(0)
        for split in ("train", "val", "test"):
            examples = []
            for i in range(images):
                key, (name, colour) = f"{split}{i}", list(COLOURS.items())[rng.integers(4)]
                x, y, side = *rng.integers(0, 12, 2), int(rng.integers(6, 18))
                box = (int(x), int(y), int(x) + side, int(y) + side)
                pixels = np.zeros((32, 32, 3), np.uint8)
                pixels[box[1] : box[3], box[0] : box[2]] = colour
                self._images[key] = pixels
                place = box_to_text(box, 32, 32)

                def add(task, question, answer, key=key, box=None, name=name, i=i, examples=examples):
                    images = () if task == "qa" else (key,)
                    meta = {"template": task, "prompt": name, "plane": "axial", "answer_type": "OPEN"}
                    examples.append(Example(f"{key}/{task}", task, question, answer, images, box, f"c{i % 6}", meta))

                add("vqa", "What colour is the square?", name)
                add("refer", f"{name} square", place, box=box)
                add("identify", place, f"{name} square", box=box)
                add("caption", "", f"There is one {name} square of {side} pixels in the image.")
                add("cls", "", name)
                add("qa", f"What is {i} plus 1?", str(i + 1))
            self._examples[split] = examples

    def examples(self, split):
        return self._examples[split]

    def image(self, key):
        return self._images[key]


def tiny_config(**train):
    """Settings (a ConfigDict) of a model that compiles and steps in seconds on `Squares`."""
    config = default_config()
    config.name = "squares"
    vision, connector, decoder = config.model.vision, config.model.connector, config.model.decoder
    vision.image_size, vision.patch_size, vision.width, vision.depth = 32, 8, 16, 1
    vision.heads, vision.mlp_width, vision.position_init = 2, 32, "sincos"
    connector.aggregation, connector.rate, connector.router_hidden = "block", 4, 8
    decoder.vocab = config.text.vocab = 640
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads, decoder.head_dim = 32, 1, 2, 2, 16
    decoder.mlp_width = 48
    config.data.sources = (dict(name="squares", path=".", questions=2),)
    config.data.rows, config.data.row_tokens, config.data.row_images, config.data.row_answers = 4, 160, 2, 96
    config.data.window = 32
    config.optimizer.lr, config.optimizer.warmup_lr, config.optimizer.warmup_steps = 3e-3, 0.0, 2
    config.train.steps, config.train.save_every, config.train.log_every = 12, 4, 1
    config.evaluate.batch, config.evaluate.max_new_tokens, config.evaluate.bootstrap = 16, 24, 50
    for key, value in train.items():
        config.train[key] = value
    return config
