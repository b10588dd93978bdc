"""Sources of episodes, and the pipeline that draws from them."""

from metajax.data._arrays import arrays
from metajax.data._cache import cache_folder
from metajax.data._cycles import cycles
from metajax.data._device_sampler import DeviceData, device_sampler
from metajax.data._episodes import episode, episode_batch
from metajax.data._glyphs import glyphs
from metajax.data._image_folder import image_folder
from metajax.data._inspect import Description, describe, show
from metajax.data._mixture import mixture
from metajax.data._multiple_choice import multiple_choice
from metajax.data._omniglot import omniglot
from metajax.data._pipeline import EpisodeIterator, batches, episodes
from metajax.data._prefetch import prefetch_to_device
from metajax.data._published import (
    cifar_fs,
    class_lists,
    cub,
    fc100,
    meta_dataset,
    mini_imagenet,
    tiered_imagenet,
)
from metajax.data._questions import AnswerSource, question_answering
from metajax.data._sampler_source import from_sampler
from metajax.data._sinusoids import sinusoids
from metajax.data._sources import ClassSource, Drawn, Source
from metajax.data._spec import Bucket, EpisodeSpec, Imbalanced
from metajax.data._text import text
from metajax.data._tfds import tfds_source
from metajax.data._transformed import transformed
from metajax.data._transforms import (
    Transform,
    colour_jitter,
    normalise,
    per_class,
    per_episode,
    random_affine,
    random_crop,
    random_flip,
    random_rotate90,
    resize,
)
from metajax.data.readers._squad import Question

__all__ = [
    "AnswerSource",
    "Bucket",
    "ClassSource",
    "Description",
    "DeviceData",
    "Drawn",
    "EpisodeIterator",
    "EpisodeSpec",
    "Imbalanced",
    "Question",
    "Source",
    "Transform",
    "arrays",
    "batches",
    "cache_folder",
    "cifar_fs",
    "class_lists",
    "colour_jitter",
    "cub",
    "cycles",
    "describe",
    "device_sampler",
    "episode",
    "episode_batch",
    "episodes",
    "fc100",
    "from_sampler",
    "glyphs",
    "image_folder",
    "meta_dataset",
    "mini_imagenet",
    "mixture",
    "multiple_choice",
    "normalise",
    "omniglot",
    "per_class",
    "per_episode",
    "prefetch_to_device",
    "question_answering",
    "random_affine",
    "random_crop",
    "random_flip",
    "random_rotate90",
    "resize",
    "show",
    "sinusoids",
    "text",
    "tfds_source",
    "tiered_imagenet",
    "transformed",
]
