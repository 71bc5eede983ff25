"""Stores the images of data sets by a pipeline of Apache Beam, so that many machines can do it.

Its first step runs the readers, one set a worker, and cuts the images into the chunks of
data/image_shards.py; its second step stores the chunks, anywhere. Whoever runs the pipeline writes
the rest: it reads the records again, finds every shard stored, and ends with the checksum that one
machine gets. The raw files and the cache must be folders that all machines see under the same path.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from unimed_jax.config import DataConfig
from unimed_jax.data.datasets import reader_of, to_prepare
from unimed_jax.data.image_shards import store_chunk
from unimed_jax.data.prepare import unstored
from unimed_jax.errors import UserError


def store_images(groups: Sequence[DataConfig], arguments: Sequence[str]) -> None:
    """Stores the images of all sources that are not stored yet.

    arguments: Beam's own, such as --runner=FlinkRunner. Raises UserError if Beam is not installed or
    does not take them.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--beam needs the package apache-beam ({error}); pip install 'unimed-jax[beam]', or leave "
            "--beam out."
        ) from error
    try:
        options = PipelineOptions(list(arguments))
    except SystemExit:  # argparse has printed what is wrong
        raise UserError(f"--beam={' '.join(arguments)!r} is not what Beam takes; mend it.") from None
    sets = [one for data in groups for one in to_prepare(data)]
    with apache_beam.Pipeline(options=options) as pipeline:
        (
            pipeline
            | "sets" >> apache_beam.Create(sets, reshuffle=False)
            | "read records" >> apache_beam.FlatMap(_chunks)
            | "spread" >> apache_beam.Reshuffle()
            | "store images" >> apache_beam.Map(_store)
        )


def _chunks(one: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Runs the reader of a set; yields the arguments of `store_chunk` for what is to be stored."""
    name, *place = one
    reader = reader_of(name)
    yield from unstored(reader, reader.INFO, *place)


def _store(chunk: tuple[Any, ...]) -> None:
    store_chunk(*chunk)
