"""Makes the models, examples, rows and weights that train_step.py compares all sides on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from unimed_jax.config import (
    VISUAL_TASKS,
    ConnectorConfig,
    DecoderConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuleConfig,
    TrainConfig,
    VisionConfig,
)
from unimed_jax.data import layout, packing
from unimed_jax.settings import check_model

# How the published training does it: adapters and connector train, a token is a token.
TRAINING: dict[str, Any] = dict(
    loss=LossConfig(reduction="token"),
    optimizer=OptimizerConfig(skip_unused=True),
    train=TrainConfig(
        rules=(
            RuleConfig("decoder/*/lora_?", True),
            RuleConfig("connector/*", True),
            RuleConfig("*", False),
        )
    ),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Holds a model and the shapes of the rows that it trains on."""

    model: ModelConfig
    padded: int  # tokens of a row of the case `padded`
    # Tokens, images and answer tokens of a packed row, one a step; with space for as many examples
    # as a batch of torch, each with an image of its own (`ours`), or some with a common one
    # (`ours_shared`).
    packed: dict[str, tuple[int, int, int]]


def size(vision: dict, decoder: dict, padded: int, packed: dict[str, tuple[int, int, int]]) -> Size:
    model = ModelConfig(
        vision=VisionConfig(mlp_width=4 * vision["width"], **vision),
        connector=ConnectorConfig(experts=5),
        decoder=DecoderConfig(
            kv_heads=decoder["heads"], head_dim=decoder["width"] // decoder["heads"], **decoder
        ),
        lora=LoraConfig(rank=8, alpha=16.0, dropout=0.0),
    )
    check_model(model)
    return Size(model, padded, packed)


SIZES = {
    "tiny": size(
        {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2},
        {"vocab": 512, "width": 64, "depth": 2, "heads": 4, "mlp_width": 96},
        padded=133,
        packed={"ours": (208, 4, 128), "ours_shared": (208, 3, 128)},
    ),
    # Its padded step is the one that the original takes 1.87 s for (two threads, full step).
    "small": size(
        {"image_size": 224, "patch_size": 14, "width": 384, "depth": 6, "heads": 6},
        {"vocab": 32000, "width": 512, "depth": 6, "heads": 8, "mlp_width": 1376},
        padded=193,
        packed={"ours": (496, 4, 128), "ours_shared": (400, 3, 128)},
    ),
}

# ---- examples ----------------------------------------------------------------------------------------

# Tokens left of the image; after it, to the end of the prompt; of the answer with its end of text.
# The 5th, 15th, ... 95th percentiles of the brain set's 80,425 training records, in the 32,000
# pieces of mistral-common's tokenizer.model.v1.
LENGTHS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "vqa": (6, (18, 21, 24, 25, 26, 27, 27, 28, 34, 37), (2, 2, 2, 2, 2, 2, 3, 4, 4, 7)),
    "refer": (6, (17, 17, 19, 19, 19, 20, 20, 21, 22, 23), (16,) * 10),
    "identify": (6, (29, 29, 29, 30, 30, 31, 31, 31, 33, 33), (4, 4, 4, 4, 5, 6, 6, 7, 7, 7)),
    "caption": (6, (14, 14, 16, 16, 16, 17, 17, 17, 17, 17), (20, 20, 29, 30, 39, 56, 78, 90, 92, 98)),
    "cls": (6, (25, 26, 26, 27, 27, 28, 28, 28, 29, 30), (3, 3, 3, 3, 4, 4, 4, 4, 4, 4)),
    "qa": (0, (19, 22, 22, 23, 24, 25, 25, 27, 28, 31), (6, 8, 9, 11, 12, 12, 12, 13, 14, 17)),
}
# Batches out of 25: Uni-Med's data sets are drawn 4, 10, 8, 8, 16 and 4 times out of 50.
MIXTURE = {"qa": 2, "vqa": 5, "refer": 4, "identify": 4, "caption": 8, "cls": 2}
# Questions of one image, if they are several. The brain set has 5.4, 2.8 and 2.8; SLAKE 10.9,
# Path-VQA 6.6 (vqa).
QUESTIONS = {"vqa": 4, "refer": 2, "identify": 2}
BATCH = 4  # examples
BOS, EOS, PAD = 1, 2, 0


def examples(model: ModelConfig, tasks: list[str]) -> list[layout.Group]:
    """Makes `BATCH` examples for each entry of `tasks`; questions of one image hold one array."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(3, model.decoder.vocab, count).tolist()

    left = ids(LENGTHS["vqa"][0])  # the head of every prompt with an image
    groups: list[layout.Group] = []
    for task in tasks:
        _, right, answer = LENGTHS[task]
        for i in range(BATCH):
            around = [ids(rng.choice(right))]
            end = [*ids(rng.choice(answer) - 1), EOS]
            images: tuple[np.ndarray, ...] = ()
            if task in VISUAL_TASKS:
                around = [left, *around]
                side = model.vision.image_size
                new = i % QUESTIONS.get(task, 1) == 0
                images = (rng.integers(0, 256, (side, side, 3), np.uint8),) if new else groups[-1].images
            encoded = layout.encode_ids(around, end, model.tokens_per_image, BOS, task=task)
            groups.append(layout.Group((encoded,), images))
    return groups


def batches(chosen: Size, case: str, side: str) -> list[layout.Batch]:
    """Makes the batches of a round from the same examples for every side."""
    model = chosen.model
    order = np.random.default_rng(1)
    shares = dict.fromkeys(VISUAL_TASKS, 1) if case == "padded" else MIXTURE
    tasks = order.permutation([task for task, count in shares.items() for _ in range(count)])
    groups = examples(model, tasks.tolist())
    if case == "mixture" and side.startswith("ours"):
        if side == "ours_shared":
            groups = shared(groups)
        # As the pipeline packs a window of draws: largest first, each into the first row with space.
        sizes, capacity = np.array([extent(g) for g in groups]), np.array(chosen.packed[side])
        largest = np.argsort(-(sizes / capacity).max(axis=1), kind="stable")
        row_of = packing.first_fit(sizes, capacity, largest)
        rows = [
            [[groups[i] for i in np.flatnonzero(row_of == r)]]
            for r in order.permutation(row_of.max() + 1)
        ]
        shapes = [capacity] * len(rows)
    else:
        rows = [[[g] for g in groups[i : i + BATCH]] for i in range(0, len(groups), BATCH)]
        shapes = [np.max([extent(g) for (g,) in batch], axis=0) for batch in rows]
        if case == "padded":
            shapes = [np.array([chosen.padded, *np.max(shapes, axis=0)[1:]])] * len(rows)
    fixed = (model.tokens_per_image, model.vision.image_size)
    return [
        layout.training_batch(batch, layout.RowShape(*shape.tolist(), *fixed), PAD, "token")
        for batch, shape in zip(rows, shapes, strict=True)
    ]


def shared(groups: list[layout.Group]) -> list[layout.Group]:
    """Groups neighbours that ask about one image."""
    out: list[layout.Group] = []
    for g in groups:
        if out and g.images and out[-1].images and g.images[0] is out[-1].images[0]:
            out[-1] = layout.Group(out[-1].questions + g.questions, g.images)
        else:
            out.append(g)
    return out


def extent(g: layout.Group) -> tuple[int, int, int]:
    """Counts tokens, images and answer tokens."""
    tokens = len(g.questions[0].prefix) + sum(len(q.suffix) for q in g.questions)
    return tokens, len(g.images), sum(q.answer for q in g.questions)


# ---- weights -----------------------------------------------------------------------------------------


def write_weights(model: ModelConfig, folder: Path) -> None:
    """Writes the same random weights under our names and under the published ones."""
    from safetensors.numpy import save_file

    from unimed_jax.interop.families.hf import hf_decoder_table
    from unimed_jax.interop.families.towers import eva_table
    from unimed_jax.interop.families.unimed_names import trainable_table
    from unimed_jax.interop.tensors.table import Entry, Table, to_published
    from unimed_jax.model.parameters import abstract, parameters

    rng = np.random.default_rng(0)
    leaves = {}
    for path, leaf in parameters(abstract(model)).items():
        name = path.split("/")[-1]
        std = {"embedding": 0.5, "positions": 0.5, "cls": 0.5, "task_tokens": 0.5, "lora_b": 0.02}.get(
            name
        )
        if std is None:
            std = 0.1 if name.endswith(("bias", "scale")) else 0.7 * leaf.shape[-2] ** -0.5
        values = std * rng.standard_normal(leaf.shape, np.float32) + np.float32(name.endswith("scale"))
        leaves[path] = values.astype(np.float32)
    save_file(leaves, folder / "ours.safetensors")
    norm = (
        Entry("ln_vision.weight", "vision/output_norm/scale"),
        Entry("ln_vision.bias", "vision/output_norm/bias"),
    )
    table = trainable_table(model) + eva_table(model.vision, "visual_encoder.") + Table(norm)
    table += hf_decoder_table(model.decoder, "llm_model.base_model.model.", model.lora.targets)
    save_file(to_published(table, leaves), folder / "published.safetensors")
