"""Data sets of TensorFlow Datasets, made from files that the user has; imported on demand, `tfds_source` reads them."""

from metajax.data.builders._folders import ImageFolder, Omniglot

__all__ = ["ImageFolder", "Omniglot"]
