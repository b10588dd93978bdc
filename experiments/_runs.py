"""A run folder: what is written when, and who may write into it."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import numpy as np

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "tensorflow-cpu", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run folder.

    Attributes:
      folder: where it is.
      finished: whether results.json, which is written last, is there.
      lock: an open file; the folder is this process's as long as it lives.
    """

    folder: pathlib.Path
    finished: bool
    lock: Any = dataclasses.field(repr=False)

    @classmethod
    def open(cls, folder: pathlib.Path, config: dict[str, Any], *, resume: bool) -> Run:
        """Starts a run in an empty folder, or with `resume` finds the one that is there.

        Raises:
          ValueError: the folder holds something and `resume` is not set, holds a run of another config, or another
            process writes into it.
        """
        resolved = json.loads(json.dumps(config))  # tuples become lists, as they are in the file
        path = folder / "config.json"
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {folder / ".lock"}):
                raise ValueError(f"workdir must be a new or empty folder, or hold a run, got {str(folder)!r}")
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            # the config first: a folder that has one can be resumed
            write_json(path, resolved)
            write_json(folder / "run.json", _environment(resolved))
            return cls(folder, False, lock)
        if not resume:
            raise ValueError(f"workdir {str(folder)!r} holds a run: continue it with --resume, or name another folder")
        changed = _differences(json.loads(path.read_text(encoding="utf-8")), resolved)
        if changed:
            raise ValueError(f"config differs from that of the run in {str(folder)!r}: {'; '.join(changed)}")
        lock = _lock(folder)
        return cls(folder, (folder / "results.json").exists(), lock)

    def finish(self, config: Any, found: Any, params: Any, *, seconds: float) -> None:
        """Writes results.json, after which the run counts as finished."""
        results = {
            "learner": config.learner.name,
            **describe(found),
            "train_seconds": round(seconds, 1),
            "steps": config.outer.steps,
            "params_sha256": params_sha256(params),
        }
        write_json(self.folder / "results.json", results)


def _lock(folder: pathlib.Path) -> Any:
    """Takes the folder for this process; the system releases it when the process ends, however it ends."""
    file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115 held as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"workdir {str(folder)!r} is in use by another process") from error
    return file


def describe(found: Any) -> dict[str, Any]:
    """The fields of an evaluation that results.json and evaluation.json share."""
    if found.metric == "accuracy":
        values = {"accuracy_mean": found.mean, "accuracy_ci95": found.ci95}
    else:
        values = {"metric": found.metric, "value_mean": found.mean, "value_ci95": found.ci95}
    return {
        "ways": found.spec.ways,
        "shots": found.spec.shots,
        "queries": found.spec.queries,
        "episodes": found.episodes,
        **values,
        "transductive": found.transductive,
        "normalisation": found.normalisation,
        "seed": found.seed,
    }


def params_sha256(params: Any) -> str:
    """A hash of the meta-parameters: paths, dtypes, shapes and bytes."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _differences(old: Any, new: Any, path: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [text for name in names for text in _differences(old.get(name), new.get(name), f"{path}.{name}")]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def _environment(config: dict[str, Any]) -> dict[str, Any]:
    import jax

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "seed": config["seed"],
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": versions,
        "devices": [str(device.device_kind) for device in jax.local_devices()],
    }


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
