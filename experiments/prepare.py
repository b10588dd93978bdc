"""Prepares images as a TensorFlow dataset for `metajax.data.tfds_source`.

    python -m experiments.prepare --builder=omniglot --path=PATH                   # the folder of the published zips
    python -m experiments.prepare --builder=image_folder --path=PATH --name=birds  # a folder or zip of CLASS/NAME.png

Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from absl import flags

from metajax import run

_BUILDERS, _FORMATS = ("omniglot", "image_folder"), ("array_record", "tfrecord")

_BUILDER = flags.DEFINE_string("builder", None, f"What to prepare: {' or '.join(_BUILDERS)}.", required=True)
_PATH = flags.DEFINE_string("path", None, "Folder or zip of the images.", required=True)
_NAME = flags.DEFINE_string("name", None, "Name of the set; image_folder only, and needed there.")
_CHANNELS = flags.DEFINE_integer("channels", None, "1 (grey) or 3 (RGB) where images differ; image_folder only.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where sets are kept; as TFDS does by default.")
_FORMAT = flags.DEFINE_string("format", "array_record", f"Of the shards: {' or '.join(_FORMATS)}.")
_SHARDS = flags.DEFINE_integer("shards", None, "Shards of each TFDS split; as TFDS does by default.")


def main() -> int:
    """Prepares the dataset and prints how to read it."""
    run.prepare()
    from metajax.core import _validate

    _validate.one_of("builder", _BUILDER.value, _BUILDERS)
    _validate.one_of("format", _FORMAT.value, _FORMATS)
    if _SHARDS.value is not None:
        _validate.positive_int("shards", _SHARDS.value)
    options = {"data_dir": _DATA_DIR.value, "file_format": _FORMAT.value}

    import tensorflow_datasets as tfds

    builder = _builder(options)
    if builder.is_prepared():
        raise ValueError(f"data_dir already holds {builder.info.full_name}, in {builder.data_dir!r}; delete it first")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, although there is none
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=_SHARDS.value))
    images, classes = builder.info.splits.total_num_examples, builder.info.features["label"].num_classes
    print(f"{images} images of {classes} classes in {builder.data_dir}")
    where = "" if _DATA_DIR.value is None else f", data_dir={_DATA_DIR.value!r}"
    print(f"metajax.data.tfds_source({builder.name!r}{where}) reads them")
    return 0


def _builder(options: dict[str, Any]) -> Any:
    from metajax.data import builders

    if _BUILDER.value == "image_folder":
        if _NAME.value is None:
            raise ValueError("name must be given for builder image_folder, got none")
        return builders.ImageFolder(_PATH.value, name=_NAME.value, channels=_CHANNELS.value, **options)
    for flag in (_NAME, _CHANNELS):
        if flag.value is not None:
            raise ValueError(f"{flag.name} is for builder image_folder only, got {flag.value!r}")
    return builders.Omniglot(_PATH.value, **options)


if __name__ == "__main__":
    run.launch(main)
