"""TensorFlow Datasets sets built from the user's files; imported on demand. `tfds_source` reads them."""

from metajax.data.builders._folders import ImageFolder, Omniglot

__all__ = ["ImageFolder", "Omniglot"]
