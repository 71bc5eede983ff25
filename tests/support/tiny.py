"""Makes tiny models whose every leaf is random, so that no zero or one hides a mistake."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimed_jax.config import (
    TASKS,
    VISUAL_TASKS,
    Config,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RuleConfig,
    TrainConfig,
    VisionConfig,
)
from unimed_jax.data import layout
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.model.unimed import UniMed
from unimed_jax.settings import check_model

BOS, EOS, PAD = 1, 2, 0
COORDINATE_START = 12  # id of the first of the 101 coordinate tokens

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=4, width=12, depth=2, heads=2, mlp_width=20),
    connector=ConnectorConfig(experts=3, hidden=10, router_hidden=14),
    decoder=DecoderConfig(vocab=120, width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=24),
    lora=LoraConfig(rank=2, alpha=16.0, dropout=0.0),
)
TOKENS = CONFIG.tokens_per_image  # 4


def config(**parts) -> ModelConfig:
    """Replaces fields of the tiny configuration: config(decoder={"tied_head": True})."""
    changed = {
        name: dataclasses.replace(getattr(CONFIG, name), **fields) for name, fields in parts.items()
    }
    out = dataclasses.replace(CONFIG, **changed)
    check_model(out)
    return out


def model(settings: ModelConfig = CONFIG, seed: int = 0) -> UniMed:
    """Draws kernels of gain 0.7, norm scales around 1, and the rest away from 0."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in parameters(abstract(settings)).items():
        name = path.split("/")[-1]
        if name.endswith(("bias", "scale")):
            std = 0.2
        elif name in ("embedding", "positions", "cls", "task_tokens"):
            std = 0.5
        else:
            std = 0.1 if name == "lora_b" else 0.7 * leaf.shape[-2] ** -0.5
        leaves[path] = jnp.asarray(
            std * rng.standard_normal(leaf.shape) + name.endswith("scale"), jnp.float32
        )
    return with_parameters(abstract(settings), leaves)


def sharp_model(settings: ModelConfig) -> UniMed:
    """Makes a model from seed 0 whose head is sharp, so that no near tie decides a greedy answer."""
    found = UniMed(settings, nnx.Rngs(0))
    found.decoder.head[...] = found.decoder.head[...] * 8
    return found


def encoded(
    rng, task: str = "vqa", question: int = 5, answer: int = 3, images: int = 1, left=None
) -> layout.Encoded:
    """Draws ids around the images (none for text only) and of the answer, which ends with EOS."""
    low, high = COORDINATE_START + 101, CONFIG.decoder.vocab
    ids = rng.integers(low, high, question + answer)
    left = [[low, low + 1]] * images if left is None else left
    tail = [*ids[question:-1], EOS] if answer else []
    return layout.encode_ids([*left, ids[:question]], tail, TOKENS, BOS, task=task, record="r")


def image(rng) -> np.ndarray:
    size = CONFIG.vision.image_size
    return rng.integers(0, 256, (size, size, 3)).astype(np.uint8)


def group(rng, task: str = "vqa", questions: int = 1, images: int = 1, **lengths) -> layout.Group:
    """Makes questions that share their images; the q-th is q tokens longer than the first."""
    length = lengths.pop("question", 5)
    asked = [encoded(rng, task, length + q, images=images, **lengths) for q in range(questions)]
    return layout.Group(tuple(asked), tuple(image(rng) for _ in range(images)))


def shape(tokens: int = 48, images: int = 2, answers: int = 16) -> layout.RowShape:
    return layout.RowShape(tokens, images, answers, TOKENS, CONFIG.vision.image_size)


def mixed_batch(rng, rows: int = 4, reduction: str = "token") -> dict[str, np.ndarray]:
    """Makes one example a row, tasks in turn (text only too), answers of 2, 3, ... tokens."""
    groups = []
    for row in range(rows):
        task = (*VISUAL_TASKS, TASKS[-1])[row % len(TASKS)]
        groups.append([group(rng, task, images=int(task in VISUAL_TASKS), answer=2 + row)])
    return layout.training_batch(groups, shape(), PAD, reduction)


ADAPT = (RuleConfig("connector/*", True), RuleConfig("*/lora_?", True), RuleConfig("*", False))


def training(model: ModelConfig | None = None, rows: int = 8, **train) -> Config:
    """Returns settings that train connector and adapters of one layer on `mixed_batch`."""
    row = shape()
    return Config(
        model=model or config(vision={"depth": 1}, decoder={"depth": 1}),
        data=DataConfig(
            rows=rows, row_tokens=row.tokens, row_images=row.images, row_answers=row.answers
        ),
        optimizer=OptimizerConfig(skip_unused=True),
        train=TrainConfig(rules=ADAPT, **train),
    )
