"""Readers, which convert user data to the examples of a task type.

A reader is looked up by the task type and the kind of inputs. Launchers, `adapt_model` and tests read data through it.
"""

from metajax.core._types import TaskType
from metajax.data.readers import _pictures, _questions, _texts
from metajax.data.readers._files import parts_of, read_rows, text_files
from metajax.data.readers._questions import answered, with_choices
from metajax.data.readers._reading import Form, Reader, Reading, to_length
from metajax.data.readers._texts import read_domains
from metajax.data.readers._tokens import buckets_of, load_tokenizer

__all__ = [
    "Form",
    "Reader",
    "Reading",
    "answered",
    "buckets_of",
    "load_tokenizer",
    "parts_of",
    "read_domains",
    "read_rows",
    "reader_of",
    "text_files",
    "to_length",
    "with_choices",
]

_READERS = (_pictures.reader, _texts.reader, _questions.reader)


def reader_of(task: TaskType, kind: str) -> Reader:
    """Returns the reader for a task type and a kind of inputs.

    Args:
      task: the task type.
      kind: "text" or "image".

    Raises:
      ValueError: there is no such reader.

    >>> import metajax
    >>> reader_of(metajax.tasks.classification, "text").forms.split(", ")[1]
    'a file of texts'
    """
    for reader in _READERS:
        if (reader.task.name, reader.kind) == (task.name, kind):
            return reader
    known = ", ".join(f"{reader.task.name} of {reader.kind}s" for reader in _READERS)
    raise ValueError(f"task must be one of {known}, got {task.name} of {kind}s")
