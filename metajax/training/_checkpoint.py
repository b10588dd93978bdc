"""Checkpoints, written by Orbax in the background and sealed, so that incomplete checkpoints are never restored.

A checkpoint is a folder `KIND/STEP` of Orbax files. It is valid once its seal is written, which lists all files and is
written last. Older checkpoints are removed only after that, so a kill at any time leaves the previous checkpoint.
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
from metajax.training import _checkpoint_io, manifest

_TIMEOUT = 20 * 60 * 1000  # milliseconds that a process waits for the slowest one, as in Orbax
_barriers = itertools.count()  # each name is valid for one barrier


class CheckpointError(OSError):
    """Raised if a checkpoint could not be written, for example to a full disk. Earlier checkpoints are unchanged.

    >>> issubclass(CheckpointError, OSError)
    True
    """


class Checkpoints:
    """Saves and restores a `MetaState` with a dict of JSON values.

    There are two kinds, each with its own folder: `last` holds the newest checkpoints, `best` the one with the best
    score. An old checkpoint is removed only after its successor is complete and sealed. In a job of several processes,
    every process must call each method, with states of global arrays and a shared folder.

    Args:
      folder: the folder of the checkpoints; created if it does not exist.
      keep: how many checkpoints of kind `last` to keep.
      base: a hash of the frozen base, such as `params_sha256(frozen)`, which is written into each checkpoint. None if
        there is no base.

    Attributes:
      damaged: one line for each damaged checkpoint that was skipped, with the file and what is wrong with it.

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
        self._known: manifest.Known = {}  # by process 0
        # Compression costs more than it saves on random numbers. `restore` is given the shardings, so the sharding
        # file, which takes a quarter of the time for small arrays, is not written.
        arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self._writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
        )
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: MetaState, extra: dict[str, Any], *, kind: str = "last") -> None:
        """Saves a checkpoint and returns once `state` is copied to the host and may be donated.

        The files are written in the background. The next call of `save` waits until they are complete. If a sound
        checkpoint of this step with the same `extra` exists, it is kept: a run that was killed between two checkpoints
        reaches the same step again.

        Args:
          step: the step, at least 0.
          state: its arrays may be spread over devices and processes. None of them may be empty.
          extra: JSON values.
          kind: "last" or "best".

        Raises:
          CheckpointError: this checkpoint or the previous one could not be written.
          ValueError: an argument is invalid.
        """
        path = self._folder(kind) / str(_validate.int_at_least("step", step, 0))
        try:
            extra = json.loads(json.dumps(extra))
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must hold JSON values, got {extra!r}: {error}") from error
        arrays = _checkpoint_io.to_save(state)
        self.wait()
        if from_first(lambda: self._has(path, extra)):
            return
        self._known.pop(path, None)
        try:
            if jax.process_index() == 0:
                for left in path.parent.glob(f"*{manifest.UNFINISHED}*"):  # by a kill
                    shutil.rmtree(left)
            self._writer.save(path, args=ocp.args.PyTreeSave(arrays), force=True)
        except OSError as error:
            raise _failed(path, error) from error
        told = {"step": step, "extra": extra} | ({} if self._base is None else {"base": self._base})
        self._writing = self._thread.submit(self._finish, path, told, next(_barriers))

    def _has(self, path: pathlib.Path, extra: dict[str, Any]) -> bool:
        found = manifest.look(path, self._known) if path.is_dir() else None
        return isinstance(found, dict) and (found["extra"], found.get("base")) == (extra, self._base)

    def _finish(self, path: pathlib.Path, values: dict[str, Any], number: int) -> None:
        """Seals the checkpoint after Orbax has written it, in the background."""
        first = jax.process_index() == 0
        try:
            self._writer.wait_until_finished()
            try:
                if first:
                    manifest.write(path, values)
            finally:  # tells the other processes, also after a failure
                self._barrier(key=f"metajax_sealed_{number}", timeout_ms=_TIMEOUT)
            if not (path / manifest.NAME).exists():
                raise OSError("process 0 could not seal it")
            if first:
                self._known[path] = values
                self._remove_old(path)
        except Exception as error:  # Orbax and its dependencies raise errors of many types
            raise _failed(path, error) from error

    def _remove_old(self, path: pathlib.Path) -> None:
        """Removes checkpoints up to this one that exceed the number to keep or are known to be damaged."""
        # later ones stay: a run that restarted before a damaged checkpoint reaches them again
        until = [old for old in manifest.checkpoints(path.parent) if int(old.name) <= int(path.name)]
        sound = [old for old in until if not isinstance(self._known.get(old), str)]
        for old in until:
            if old not in sound[: self._keep[path.parent.name]]:
                self._known.pop(old, None)
                shutil.rmtree(old)

    def wait(self) -> None:
        """Waits until the saved checkpoint is complete and sealed.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._writing is not None:
            concurrent.futures.wait([self._writing])  # after an interrupt here, a later call can still wait for it
            writing, self._writing = self._writing, None
            writing.result()

    def latest(self, kind: str = "last") -> int | None:
        """Returns the step of the newest sound checkpoint, or None. Waits for the checkpoint that is being written.

        The first call for a checkpoint reads and checks all of its bytes.

        Raises:
          CheckpointError: the checkpoint that was being written could not be written.
          ValueError: `kind` is neither "last" nor "best".
        """
        found = self._newest(self._folder(kind))
        return None if found is None else found["step"]

    def restore(self, like: MetaState, *, kind: str = "last") -> tuple[MetaState, dict[str, Any]]:
        """Restores the newest sound checkpoint.

        Args:
          like: a state with the structure, shapes, dtypes and shardings to restore. Its leaves are `jax.Array` or
            `jax.ShapeDtypeStruct`. A leaf without a sharding is placed on the first device of the process. Devices,
            mesh and number of processes may differ from those of the job that saved it.
          kind: "last" or "best".

        Returns:
          The state, and the `extra` that was saved with it.

        Raises:
          CheckpointError: the checkpoint that was being written could not be written.
          ValueError: there is no sound checkpoint, it does not match `like` (the error names the leaves), or it was
            saved with another base.
        """
        folder = self._folder(kind)
        self._known.clear()  # checks the checkpoint again before it is restored
        found = self._newest(folder)
        if found is None:
            raise ValueError(_nothing(folder, self.damaged))
        if self._base is not None and found.get("base") is None:
            raise ValueError(
                f"base must be None for the checkpoint in {folder}, which stands on none, got {self._base}"
            )
        _require_base(found, self._base, folder)
        return _checkpoint_io.read_state(folder / str(found["step"]), like), found["extra"]

    def close(self) -> None:
        """Waits for the checkpoint that is being written and closes the writer.

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
        found, damaged = from_first(lambda: manifest.newest(folder, self._known))
        self.damaged += [line for line in damaged if line not in self.damaged]
        return found


def restore_params(folder: str | pathlib.Path, *, kind: str = "last", base: str | None = None) -> tuple[Params, int]:
    """Restores only the meta-parameters, as NumPy arrays, and returns them with the step of the checkpoint.

    Leaves of the frozen base are None in the result; `metajax.core.merge` merges the two.

    Raises:
      ValueError: there is no sound checkpoint of this kind, or it was saved with another base.

    >>> restore_params("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: there is no checkpoint in ...
    """
    path = _open(folder, kind, base)
    return _checkpoint_io.read_params(path), int(path.name)


def params_sha256(params: Params) -> str:
    """Returns a hash of the paths, dtypes, shapes and bytes of parameters.

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
    """Loads meta-parameters from the newest sound checkpoint of another run, such as a pre-training run.

    Args:
      folder: the folder of its `Checkpoints`.
      params: meta-parameters, arrays or `jax.ShapeDtypeStruct`.
      where: selects the leaves to load: a regular expression searched in the path of each leaf, or a predicate of the
        path. None selects all leaves. The checkpoint may hold more leaves.
      kind: "last" or "best".
      base: a hash of the frozen base of `params`, as for `Checkpoints`. None if there is no base.

    Returns:
      `params` with the selected leaves from the checkpoint, with the given shape, dtype and sharding. A NumPy array is
      replaced by a NumPy array. The other leaves are returned unchanged.

    Raises:
      ValueError: there is no sound checkpoint, `where` selects no leaf, a selected leaf is not in the checkpoint or has
        another shape or dtype there (the error names the leaves), or the checkpoint was saved with another base.

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
    restored = _checkpoint_io.read(_open(folder, kind, base), {"params": picked}, name="params", part=True)
    return _tree.fill(restored["params"], rest)


def _open(folder: str | pathlib.Path, kind: str, base: str | None) -> pathlib.Path:
    """Returns the folder of the newest sound checkpoint."""
    place = pathlib.Path(folder).absolute() / _validate.one_of("kind", kind, ("last", "best"))
    found, damaged = from_first(lambda: manifest.newest(place, {}))
    if found is None:
        raise ValueError(_nothing(place, damaged))
    _require_base(found, base, place)
    return place / str(found["step"])


def _require_base(found: dict[str, Any], base: str | None, folder: pathlib.Path) -> None:
    """Raises a ValueError if the meta-parameters of a checkpoint were trained on another frozen base."""
    there = found.get("base")
    if there not in (None, base):
        here = "none is given" if base is None else f"{base} is given"
        raise ValueError(f"base must be that of the checkpoint in {folder}, {there}; {here}")


def _nothing(folder: pathlib.Path, damaged: list[str]) -> str:
    lines = [line for line in damaged if line.startswith(f"{folder.name}/")]
    return f"there is no checkpoint in {folder}" + (f" that is whole: {'; '.join(lines)}" if lines else "")


def _failed(path: pathlib.Path, error: Exception) -> CheckpointError:
    """Removes the remains of a checkpoint that could not be written, and returns the error with the reason."""
    place = next(parent for parent in path.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if jax.process_index() == 0:
        for left in (path, *path.parent.glob(f"{path.name}{manifest.UNFINISHED}*")):
            if not (left / manifest.NAME).exists():
                shutil.rmtree(left, ignore_errors=True)
    return CheckpointError(f"cannot write the checkpoint {path} ({free} bytes are free there): {error}")
