"""Run folders: their files and their lock.

In a job of several processes, process 0 locks the folder and writes the files that describe the run. All processes must
see the same folder.
"""

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

from metajax.run import _config, _sources, _values

_ELSEWHERE = ("mesh",)  # sections of a config that may change when a run resumes
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "tensorflow-cpu", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run folder.

    Attributes:
      folder: path of the folder.
      finished: whether results.json, which is written last, exists.
      lock: an open file of process 0, which locks the folder while it is open.
    """

    folder: pathlib.Path
    finished: bool
    lock: Any = dataclasses.field(repr=False)

    @classmethod
    def open(cls, folder: pathlib.Path, config: Any, facts: Any, *, resume: bool, beside: pathlib.Path | None) -> Run:
        """Starts a run in an empty folder, or opens an existing run if `resume` is set.

        Args:
          folder: the run folder.
          config: a complete config.
          facts: facts about the data, which are stored in the folder.
          resume: whether the folder may hold a run of this config.
          beside: folder of the config file, in which user-defined parts are found.

        Raises:
          ValueError: the folder is not empty and `resume` is not set, it holds a run of another config, it cannot be
            written, or another job uses it; or the processes of this job differ in config or code, or do not share
            one folder.
        """
        from metajax import parallel

        resolved = _config.resolved(config)
        _require_same(resolved)
        opened: list[Run] = []

        def first() -> list[Any]:
            token = os.urandom(8).hex()
            try:
                opened.append(cls._open(folder, config, resolved, facts, resume=resume, beside=beside))
                (folder / ".token").write_text(token, encoding="utf-8")
            except OSError as error:
                raise _unwritable(folder, error) from error
            return [opened[0].finished, token]

        finished, token = parallel.from_first(first)
        try:
            parallel.agree(lambda: _require_shared(folder, token))
        finally:
            if opened:
                (folder / ".token").unlink()
        return opened[0] if opened else cls(folder, finished, None)

    @classmethod
    def _open(
        cls, folder: pathlib.Path, config: Any, resolved: dict[str, Any], facts: Any, *, resume: bool,
        beside: pathlib.Path | None,
    ) -> Run:  # fmt: skip
        path = folder / "config.json"
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {folder / ".lock"}):
                raise ValueError(f"workdir must be a new or empty folder, or hold a run, got {str(folder)!r}")
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            # the config is written first: a folder with a config can be resumed
            write_json(path, resolved)
            write_json(folder / "run.json", _environment(config, resolved, facts, beside))
            return cls(folder, False, lock)
        if not resume:
            raise ValueError(f"workdir {str(folder)!r} holds a run: continue it with --resume, or name another folder")
        changed = _differences(_counting(json.loads(path.read_text(encoding="utf-8"))), _counting(resolved))
        if changed:
            raise ValueError(f"config differs from that of the run in {str(folder)!r}: {'; '.join(changed)}")
        _sources.check_base(folder, config)
        lock = _lock(folder)
        return cls(folder, (folder / "results.json").exists(), lock)

    def finish(self, config: Any, found: Any, params: Any, *, seconds: float) -> None:
        """Writes results.json, after which the run counts as finished."""
        from metajax import training

        results = {
            "learner": config.learner.name,
            **describe(found),
            "train_seconds": round(seconds, 1),
            "steps": config.training.steps,
            "params_sha256": training.params_sha256(params),
        }
        write_json(self.folder / "results.json", results)


def _lock(folder: pathlib.Path) -> Any:
    """Locks the folder for this process. The system releases the lock when the process ends for any reason."""
    file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115 held as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"workdir {str(folder)!r} is in use by another process") from error
    return file


def describe(found: Any) -> dict[str, Any]:
    """Returns the fields of an evaluation for results.json and evaluation.json."""
    from metajax import evaluation

    told: dict[str, tuple[float, float]] = {}
    for suffix, scores in (("", found.scores), ("_before", found.before or {})):
        told |= {f"{name}{suffix}": evaluation.mean_and_interval(values) for name, values in scores.items()}
    if found.gain is not None:
        told[f"{found.metric}_gain"] = found.gain
    values = {
        f"{name}_{part}": value
        for name, pair in told.items()
        for part, value in zip(("mean", "ci95"), pair, strict=True)
    }
    return {
        "ways": found.spec.ways,
        "shots": found.spec.shots,
        "queries": found.spec.queries,
        "episodes": found.episodes,
        "metric": found.metric,
        **values,
        **({"nonfinite": found.nonfinite} if found.nonfinite else {}),
        "transductive": found.transductive,
        "normalisation": found.normalisation,
        "seed": found.seed,
    }


def out_file(value: str | pathlib.Path) -> pathlib.Path:
    """Returns the path in `--output`.

    Raises:
      ValueError: the path is a folder, or its folder does not exist.
    """
    output = pathlib.Path(value)
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {str(output)!r}")
    return output


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a file atomically, even if several processes write it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(pathlib.Path(folder) / "a.json", {"a": 1})
    ...     json.loads((pathlib.Path(folder) / "a.json").read_text())
    {'a': 1}
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _require_same(config: dict[str, Any]) -> None:
    """Raises a ValueError if a process differs from process 0 in its config, code or package versions."""
    from metajax import parallel

    told = parallel.exchange({"config": config, "code": code_sha256(), **_versions()})
    for process, other in enumerate(told):
        different = _differences(told[0], other, "")
        if different:
            raise ValueError(
                f"all processes must have the same config and code, got process {process} that differs from process 0: "
                + "; ".join(line.removeprefix(".") for line in different)
            )


def _require_shared(folder: pathlib.Path, token: str) -> None:
    """Raises a ValueError if the folder is not the one that process 0 sees, or if this process cannot write into it."""
    path = folder / ".token"
    if not path.is_file() or path.read_text(encoding="utf-8") != token:
        raise ValueError(f"workdir must be one folder that all hosts share, got {str(folder)!r}, here another one")
    mine = folder / f".{token}-{os.getpid()}"
    try:
        mine.touch()
        mine.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: pathlib.Path, error: OSError) -> ValueError:
    return ValueError(f"workdir must be a folder that can be written, got {str(folder)!r}: {error.strerror}")


def code_sha256() -> str:
    """Returns a hash of the Python files of the package."""
    import metajax

    digest = hashlib.sha256()
    root = pathlib.Path(metajax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _counting(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections of a config that must not change when a run resumes."""
    return {name: value for name, value in config.items() if name not in _ELSEWHERE}


def _differences(old: Any, new: Any, path: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [text for name in names for text in _differences(old.get(name), new.get(name), f"{path}.{name}")]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _environment(config: Any, resolved: dict[str, Any], facts: Any, beside: pathlib.Path | None) -> dict[str, Any]:
    import jax

    base, own = _sources.base_sha256(config), _values.own_parts(resolved)
    return {
        **({"base_sha256": base} if base else {}),
        **({"own_parts": own, "config_folder": str(beside)} if own else {}),
        "data": facts.to_json(),
        "seed": config.seed,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": _versions(),
        "processes": jax.process_count(),
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
