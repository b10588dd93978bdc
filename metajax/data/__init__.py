"""Sources of episodes, and the pipeline that draws from them."""

from metajax.data._cache import cache_folder
from metajax.data._episodes import batches, episode, episode_batch, episodes
from metajax.data._glyphs import glyphs
from metajax.data._image_folder import image_folder
from metajax.data._omniglot import omniglot
from metajax.data._sinusoids import sinusoids
from metajax.data._sources import ClassSource, Source
from metajax.data._spec import EpisodeSpec
from metajax.data._transforms import random_affine

__all__ = [
    "ClassSource",
    "EpisodeSpec",
    "Source",
    "batches",
    "cache_folder",
    "episode",
    "episode_batch",
    "episodes",
    "glyphs",
    "image_folder",
    "omniglot",
    "random_affine",
    "sinusoids",
]
