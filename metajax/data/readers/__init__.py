"""Readers: what a user has, as the examples of a task type.

A reader is looked up from the task type and the kind of inputs. Launchers, `adapt_model` and tests read through it.
"""

from metajax.core._types import TaskType
from metajax.data.readers import _pictures, _questions, _texts
from metajax.data.readers._reading import Form, Reader, Reading

__all__ = ["Form", "Reader", "Reading", "reader_of"]

_READERS = (_pictures.reader, _texts.reader, _questions.reader)


def reader_of(task: TaskType, kind: str) -> Reader:
    """Returns the reader of a task type, for inputs of a kind.

    Args:
      task: the task type.
      kind: "text" or "image".

    Raises:
      ValueError: there is none.

    >>> import metajax
    >>> reader_of(metajax.tasks.classification, "text").forms.split(", ")[1]
    'a file of texts'
    """
    for reader in _READERS:
        if (reader.task.name, reader.kind) == (task.name, kind):
            return reader
    known = ", ".join(f"{reader.task.name} of {reader.kind}s" for reader in _READERS)
    raise ValueError(f"task must be one of {known}, got {task.name} of {kind}s")
