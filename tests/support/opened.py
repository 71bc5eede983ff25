"""Opens prepared sets of coloured squares as a config's sources name them."""

from unimed_jax.config import DataConfig, SourceConfig
from unimed_jax.data.datasets import open_sources

NAME = "support.squares"


def opened(cache, *sources, **fields):
    """Opens one data set per source; without one, the squares with these fields of their source."""
    sources = sources or (SourceConfig(NAME, **fields),)
    return open_sources(DataConfig(tuple(sources), cache=str(cache)))
