"""Makes rows from ids, laid out as the original of Uni-Med lays them out."""

from collections.abc import Sequence

from unimed_jax.data.layout import Batch, Group, RowShape, Specials, encode_ids, training_batch


def training_rows(
    segments: Sequence[Sequence[Sequence[int]]],
    answers: Sequence[Sequence[int]],
    tokens_per_image: int,
    specials: Specials,
    *,
    tasks: Sequence[str],
    reduction: str = "token",
    image_size: int = 0,
) -> Batch:
    """Lays out published training rows: one example a row, all as long as the longest.

    Images are left zero.

    segments[b]: ids around the images of example b (one list: text only); answers[b]: ids as they
    stand in the row, end of text included. Returns what `training_batch` does, with M the most
    images of an example.
    """
    encoded = [
        encode_ids(around, answer, tokens_per_image, specials.bos, task=task)
        for around, answer, task in zip(segments, answers, tasks, strict=True)
    ]
    shape = RowShape(
        tokens=max(e.tokens - e.answer for e in encoded) + max(e.answer for e in encoded),
        images=max(len(s) - 1 for s in segments),
        answers=max(e.answer for e in encoded),
        tokens_per_image=tokens_per_image,
        image_size=image_size,
    )
    return training_batch([[Group((e,))] for e in encoded], shape, specials.pad, reduction)
