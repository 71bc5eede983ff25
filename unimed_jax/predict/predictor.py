"""Answers of a model to examples: prompts in length buckets, generated batch by batch."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from unimed_jax.config import Config
from unimed_jax.data import images, layout
from unimed_jax.data.example import Example
from unimed_jax.data.tokenizer import Tokenizer
from unimed_jax.model.generate import Sampling, generate
from unimed_jax.model.unimed import UniMed

BUCKET = 32  # prompt lengths are rounded up to multiples, so that few shapes are compiled


def answerer(
    model: UniMed, config: Config, tokenizer: Tokenizer
) -> Callable[[Sequence[Example], Sequence[Sequence[np.ndarray]]], list[str]]:
    """-> answer(examples, the images of each (uint8 [H, W, 3])) -> texts, in order.

    Greedy, or sampled by `config.evaluate.temperature` and `top_p` with keys from `config.seed`. Raises
    UserError for a prompt that is too long (`text.max_prompt`).
    """
    settings = config.evaluate
    encoder = layout.Encoder(tokenizer, config.text, config.model.tokens_per_image)
    sampling = Sampling(settings.temperature, settings.top_p)
    calls = 0

    def answer(examples: Sequence[Example], pixels: Sequence[Sequence[np.ndarray]]) -> list[str]:
        nonlocal calls
        texts: list[str] = []
        for start in range(0, len(examples), settings.batch):
            part = slice(start, start + settings.batch)
            batch = prompt_batch(encoder, config, tokenizer.pad, examples[part], pixels[part])
            key = jax.random.fold_in(jax.random.key(config.seed), calls) if settings.temperature else None
            calls += 1
            tokens = generate(
                model,
                batch,
                max_new_tokens=settings.max_new_tokens,
                eos=tokenizer.eos,
                pad=tokenizer.pad,
                sampling=sampling,
                key=key,
            )
            for row in np.asarray(tokens)[: len(examples[part])]:
                (ends,) = np.nonzero(row == tokenizer.eos)
                texts.append(tokenizer.decode(row[: ends[0]] if len(ends) else row).strip())
        return texts

    return answer


def prompt_batch(
    encoder: layout.Encoder,
    config: Config,
    pad: int,
    examples: Sequence[Example],
    pixels: Sequence[Sequence[np.ndarray]],
) -> layout.Batch:
    """Left-padded prompts, one a row; the rows are filled up to a power of two with copies of the first."""
    vision = config.model.vision
    groups = [
        layout.Group((encoder.prompt(example),), tuple(images.fit(image, config.data.fit, vision) for image in shown))
        for example, shown in zip(examples, pixels, strict=True)
    ]
    rows = min(config.evaluate.batch, 1 << (len(groups) - 1).bit_length())
    groups += groups[:1] * (rows - len(groups))
    longest = max(group.questions[0].tokens for group in groups)
    shape = layout.RowShape(
        tokens=-(-longest // BUCKET) * BUCKET,
        images=max(len(group.images) for group in groups),
        answers=0,
        tokens_per_image=config.model.tokens_per_image,
        image_size=vision.image_size,
    )
    return layout.prompt_batch(groups, shape, pad)
