"""Sources of episodes, one kind in each file."""

from metajax.data.sources._arrays import arrays
from metajax.data.sources._cycles import cycles
from metajax.data.sources._glyphs import glyphs
from metajax.data.sources._image_folder import image_folder
from metajax.data.sources._mixture import mixture
from metajax.data.sources._multiple_choice import multiple_choice
from metajax.data.sources._omniglot import omniglot
from metajax.data.sources._published import (
    cifar_fs,
    class_lists,
    cub,
    fc100,
    meta_dataset,
    mini_imagenet,
    tiered_imagenet,
)
from metajax.data.sources._questions import AnswerSource, question_answering
from metajax.data.sources._sampler_source import from_sampler
from metajax.data.sources._sinusoids import sinusoids
from metajax.data.sources._text import text
from metajax.data.sources._tfds import tfds_source

__all__ = [
    "AnswerSource",
    "arrays",
    "cifar_fs",
    "class_lists",
    "cub",
    "cycles",
    "fc100",
    "from_sampler",
    "glyphs",
    "image_folder",
    "meta_dataset",
    "mini_imagenet",
    "mixture",
    "multiple_choice",
    "omniglot",
    "question_answering",
    "sinusoids",
    "text",
    "tfds_source",
    "tiered_imagenet",
]
