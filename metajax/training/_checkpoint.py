"""Checkpoints: written by Orbax beside the training, and sealed, so that what is not whole is never restored.

A checkpoint is a folder `KIND/STEP` of Orbax's files. It counts from the moment in which its seal, the last thing
written, names them all; older ones are removed after that. A kill at any moment so leaves the checkpoint before.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from metajax.core import _tree, _validate
from metajax.core._types import MetaState, Params
from metajax.parallel import from_first
from metajax.training import _leaves, _seal

_TIMEOUT = 20 * 60 * 1000  # milliseconds that a process waits for the slowest one, as in Orbax
_barriers = itertools.count()  # a name is good for one barrier


class CheckpointError(OSError):
    """A checkpoint could not be written, to a full disk for one; those before it are as they were.

    >>> issubclass(CheckpointError, OSError)
    True
    """


class Checkpoints:
    """Saves and restores a `MetaState` with a dict of JSON values.

    There are two kinds, each with a folder: `last` holds the newest checkpoints, `best` the one with the best score.
    An older one is removed when its successor is whole and sealed, never before. In a job of several processes, all
    call each method, with states of global arrays and a folder that all of them see.

    Args:
      folder: where to keep them; made where it does not exist.
      keep: how many of kind `last` stay.
      base: a hash of the frozen base that stands beside the state, such as `params_sha256(frozen)`; it is written into
        each checkpoint. None where there is no base.

    Attributes:
      damaged: one line for each checkpoint that was passed over: its file, and what is wrong with it.

    Raises:
      ValueError: `keep` is below 1.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> state = MetaState({"w": jnp.ones(2)}, (), (), jnp.zeros([], jnp.int32), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder)
    ...     checkpoints.save(1, state, {"seconds": 2.0})
    ...     restored, extra = checkpoints.restore(state)
    ...     checkpoints.close()
    >>> restored.params["w"].tolist(), extra
    ([1.0, 1.0], {'seconds': 2.0})
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, base: str | None = None):
        self._root = pathlib.Path(folder).absolute()
        self._keep = {"last": _validate.positive_int("keep", keep), "best": 1}
        if base is not None and not isinstance(base, str):
            raise ValueError(f"base must be a hash such as params_sha256(frozen), or None, got {type(base).__name__}")
        self._base = base
        self.damaged: list[str] = []
        self._known: _seal.Known = {}  # by process 0
        # Compression costs more than it saves on random numbers. Who restores says where to, so the file of
        # shardings, a quarter of the time where arrays are small, is left out.
        arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        )
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: MetaState, extra: dict[str, Any], *, kind: str = "last") -> None:
        """Saves a checkpoint; returns when `state`, which may then be donated, is copied to the host.

        The rest goes on in the background; a save that comes before it has ended waits for it. A step that is there
        and sound, with the same `extra`, is left as it is: a run that was killed between two checkpoints passes it
        again.

        Args:
          step: the step, at least 0.
          state: its arrays, none of them empty, may be spread over devices and processes.
          extra: JSON values.
          kind: "last" or "best".

        Raises:
          CheckpointError: this checkpoint, or the one that was being written, could not be written.
          ValueError: an argument is not of this form.
        """
        path = self._folder(kind) / str(_validate.int_at_least("step", step, 0))
        try:
            extra = json.loads(json.dumps(extra))
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must hold JSON values, got {extra!r}: {error}") from error
        arrays = _leaves.to_save(state)
        self.wait()
        if from_first(lambda: self._has(path, extra)):
            return
        self._known.pop(path, None)
        try:
            if jax.process_index() == 0:
                for left in path.parent.glob(f"*{_seal.UNFINISHED}*"):  # by a kill
                    shutil.rmtree(left)
            self._writer.save(path, args=ocp.args.PyTreeSave(arrays), force=True)
        except OSError as error:
            raise _failed(path, error) from error
        told = {"step": step, "extra": extra} | ({} if self._base is None else {"base": self._base})
        self._writing = self._thread.submit(self._finish, path, told, next(_barriers))

    def _has(self, path: pathlib.Path, extra: dict[str, Any]) -> bool:
        found = _seal.look(path, self._known) if path.is_dir() else None
        return isinstance(found, dict) and (found["extra"], found.get("base")) == (extra, self._base)

    def _finish(self, path: pathlib.Path, values: dict[str, Any], number: int) -> None:
        """What follows on Orbax's writing, in the background."""
        first = jax.process_index() == 0
        try:
            self._writer.wait_until_finished()
            try:
                if first:
                    _seal.write(path, values)
            finally:  # the others learn of the end, good or bad
                self._barrier(key=f"metajax_sealed_{number}", timeout_ms=_TIMEOUT)
            if not (path / _seal.NAME).exists():
                raise OSError("process 0 could not seal it")
            if first:
                self._known[path] = values
                self._remove_old(path)
        except Exception as error:  # those of Orbax, and of what is below it, are of many types
            raise _failed(path, error) from error

    def _remove_old(self, path: pathlib.Path) -> None:
        """Removes the checkpoints before this one that are too many, and those that are known to be damaged."""
        # later ones stay: a run that a damaged one has set back comes to them again
        until = [old for old in _seal.checkpoints(path.parent) if int(old.name) <= int(path.name)]
        sound = [old for old in until if not isinstance(self._known.get(old), str)]
        for old in until:
            if old not in sound[: self._keep[path.parent.name]]:
                self._known.pop(old, None)
                shutil.rmtree(old)

    def wait(self) -> None:
        """Waits until what was saved is whole and sealed.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._writing is not None:
            concurrent.futures.wait([self._writing])  # after an interrupt here, it is still there to be waited for
            writing, self._writing = self._writing, None
            writing.result()

    def latest(self, kind: str = "last") -> int | None:
        """The step of the newest sound checkpoint, None where there is none; waits for what is being written.

        Every byte of a checkpoint is looked at the first time.

        Raises:
          CheckpointError: what was being written could not be written.
          ValueError: `kind` is neither "last" nor "best".
        """
        found = self._newest(self._folder(kind))
        return None if found is None else found["step"]

    def restore(self, like: MetaState, *, kind: str = "last") -> tuple[MetaState, dict[str, Any]]:
        """Restores the newest sound checkpoint.

        Args:
          like: gives structure, shapes, dtypes and shardings. Its leaves are `jax.Array` or `jax.ShapeDtypeStruct`; one
            without a sharding goes to the first device of the process. Devices, mesh and number of processes may
            differ from those that saved.
          kind: "last" or "best".

        Returns:
          The state, and the `extra` that was saved with it.

        Raises:
          CheckpointError: what was being written could not be written.
          ValueError: there is no sound checkpoint, it does not fit `like` (the error names the leaves), or it stands on
            another base.
        """
        folder = self._folder(kind)
        self._known.clear()  # what is restored is looked at now
        found = self._newest(folder)
        if found is None:
            raise ValueError(_nothing(folder, self.damaged))
        if self._base is not None and found.get("base") is None:
            raise ValueError(
                f"base must be None for the checkpoint in {folder}, which stands on none, got {self._base}"
            )
        _require_base(found, self._base, folder)
        return _leaves.read_state(folder / str(found["step"]), like), found["extra"]

    def close(self) -> None:
        """Waits for what is being written, and ends.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def _folder(self, kind: str) -> pathlib.Path:
        return self._root / _validate.one_of("kind", kind, tuple(self._keep))

    def _newest(self, folder: pathlib.Path) -> dict[str, Any] | None:
        self.wait()
        found, damaged = from_first(lambda: _seal.newest(folder, self._known))
        self.damaged += [line for line in damaged if line not in self.damaged]
        return found


def restore_params(folder: str | pathlib.Path, *, kind: str = "last", base: str | None = None) -> tuple[Params, int]:
    """Restores the meta-parameters alone, as NumPy arrays, and the step they are from.

    Where the frozen base had a leaf, there is None: `metajax.core.merge` joins the two.

    Raises:
      ValueError: there is no sound checkpoint of this kind, or it stands on another base.
    """
    path = _open(folder, kind, base)
    return _leaves.read_params(path), int(path.name)


def params_sha256(params: Params) -> str:
    """Returns a hash of parameters: paths, dtypes, shapes and bytes.

    >>> params_sha256({"w": jax.numpy.ones(2)}) == params_sha256({"w": jax.numpy.ones([2, 1])})
    False
    """
    digest = hashlib.sha256()
    _tree.update_hash(digest, params)
    return digest.hexdigest()


def warm_start(
    folder: str | pathlib.Path,
    params: Params,
    *,
    where: _tree.Where = None,
    kind: str = "last",
    base: str | None = None,
) -> Params:
    """Takes meta-parameters from the newest sound checkpoint of another run, such as one of pre-training.

    Args:
      folder: the folder of its `Checkpoints`.
      params: meta-parameters, arrays or `jax.ShapeDtypeStruct`.
      where: a regular expression searched in the path of each leaf, or a predicate of the path: which ones to take.
        None for all. The checkpoint may hold others too.
      kind: "last" or "best".
      base: a hash of the frozen base on which `params` stand, as for `Checkpoints`; None where there is none.

    Returns:
      `params` with the leaves that `where` picks from the checkpoint, of the shape, dtype and sharding that was given;
      where a NumPy array was given there is one again. The others are those that were given.

    Raises:
      ValueError: there is no sound checkpoint, `where` picks no leaf, or a leaf that it picks is not in the checkpoint
        or has another shape or dtype there (the error names the leaves), or the checkpoint stands on another base.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> state = MetaState({"body": jnp.ones(2), "head": jnp.ones(5)}, (), (), jnp.array(0), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder)
    ...     checkpoints.save(1, state, {})
    ...     checkpoints.close()
    ...     params = warm_start(folder, {"body": jnp.zeros(2), "head": jnp.zeros(3)}, where="body")
    >>> params["body"].tolist(), params["head"].tolist()
    ([1.0, 1.0], [0.0, 0.0, 0.0])
    """
    picked, rest = _tree.split(params, where)
    restored = _leaves.read(_open(folder, kind, base), {"params": picked}, name="params", part=True)
    return _tree.fill(restored["params"], rest)


def _open(folder: str | pathlib.Path, kind: str, base: str | None) -> pathlib.Path:
    """The folder of the newest sound checkpoint."""
    place = pathlib.Path(folder).absolute() / _validate.one_of("kind", kind, ("last", "best"))
    found, damaged = from_first(lambda: _seal.newest(place, {}))
    if found is None:
        raise ValueError(_nothing(place, damaged))
    _require_base(found, base, place)
    return place / str(found["step"])


def _require_base(found: dict[str, Any], base: str | None, folder: pathlib.Path) -> None:
    """Refuses a checkpoint of meta-parameters that were trained on another frozen base."""
    there = found.get("base")
    if there not in (None, base):
        here = "none is given" if base is None else f"{base} is given"
        raise ValueError(f"base must be that of the checkpoint in {folder}, {there}; {here}")


def _nothing(folder: pathlib.Path, damaged: list[str]) -> str:
    lines = [line for line in damaged if line.startswith(f"{folder.name}/")]
    return f"there is no checkpoint in {folder}" + (f" that is whole: {'; '.join(lines)}" if lines else "")


def _failed(path: pathlib.Path, error: Exception) -> CheckpointError:
    """Removes what there is of a checkpoint that could not be written, and says why."""
    place = next(parent for parent in path.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if jax.process_index() == 0:
        for left in (path, *path.parent.glob(f"{path.name}{_seal.UNFINISHED}*")):
            if not (left / _seal.NAME).exists():
                shutil.rmtree(left, ignore_errors=True)
    return CheckpointError(f"cannot write the checkpoint {path} ({free} bytes are free there): {error}")
