"""A run folder: what is written when, and who may write into it.

In a job of several processes, process 0 holds the folder and writes what describes the run; all see the same folder.
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

_ELSEWHERE = ("mesh",)  # sections of a config in which a run may go on otherwise than it began
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "tensorflow-cpu", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run folder.

    Attributes:
      folder: where it is.
      finished: whether results.json, which is written last, is there.
      lock: an open file of process 0; the folder is the job's as long as it lives.
    """

    folder: pathlib.Path
    finished: bool
    lock: Any = dataclasses.field(repr=False)

    @classmethod
    def open(cls, folder: pathlib.Path, config: dict[str, Any], *, resume: bool) -> Run:
        """Starts a run in an empty folder, or with `resume` finds the one that is there.

        Raises:
          ValueError: the folder holds something and `resume` is not set, holds a run of another config, cannot be
            written, or another job writes into it; the processes of this job differ in config or code, or do not see
            one folder.
        """
        from metajax import parallel

        resolved = json.loads(json.dumps(config))  # tuples become lists, as they are in the file
        _require_same(resolved)
        opened: list[Run] = []

        def first() -> list[Any]:
            token = os.urandom(8).hex()
            try:
                opened.append(cls._open(folder, resolved, resume=resume))
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
    def _open(cls, folder: pathlib.Path, resolved: dict[str, Any], *, resume: bool) -> Run:
        from metajax.training._data import check_base

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
        changed = _differences(_filled(json.loads(path.read_text(encoding="utf-8"))), _filled(resolved))
        if changed:
            raise ValueError(f"config differs from that of the run in {str(folder)!r}: {'; '.join(changed)}")
        check_base(folder, resolved)
        lock = _lock(folder)
        return cls(folder, (folder / "results.json").exists(), lock)

    def finish(self, config: Any, found: Any, params: Any, *, seconds: float) -> None:
        """Writes results.json, after which the run counts as finished."""
        from metajax import training

        results = {
            "learner": config.learner.name,
            **describe(found),
            "train_seconds": round(seconds, 1),
            "steps": config.outer.steps,
            "params_sha256": training.params_sha256(params),
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


def out_folder(value: str) -> pathlib.Path:
    """The folder that `--out` names, which need not be there yet.

    Raises:
      ValueError: it is something else.
    """
    out = pathlib.Path(value)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got {str(out)!r}")
    return out


def out_file(value: str | pathlib.Path) -> pathlib.Path:
    """The file that `--output` names, in a folder that is there.

    Raises:
      ValueError: it is something else.
    """
    output = pathlib.Path(value)
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {str(output)!r}")
    return output


def require_seeds(seeds: int, name: str, value: int, at_least: int = 1) -> None:
    """Raises ValueError where seeds are too few for an interval, or the flag `name` is below `at_least`."""
    if seeds < 2 or value < at_least:
        raise ValueError(f"seeds must be at least 2 and {name} at least {at_least}, got {seeds} and {value}")


def told(values: Any, digits: int) -> str:
    """Mean and 95 % interval of values as text."""
    from metajax import evaluation

    mean, ci95 = evaluation.mean_and_interval(values)
    return f"{mean:.{digits}f} +- {ci95:.{digits}f}"


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a file that is there whole or not at all, also where several processes write it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _require_same(config: dict[str, Any]) -> None:
    """Refuses processes that differ from process 0 in their config or their code."""
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
    """Refuses a folder that is not the one that process 0 sees, or that this process cannot write into."""
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
    """A hash of the Python files of the package and of the launchers."""
    import metajax

    digest = hashlib.sha256()
    for root in (pathlib.Path(metajax.__file__).parent, pathlib.Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    """What counts of a config: a run of old goes on with the defaults of fields that it does not have."""
    from experiments.configs import _base

    base = json.loads(json.dumps(_base.base().to_dict()))
    return {
        name: {**base.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in (base | config).items()
        if name not in _ELSEWHERE
    }


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


def _environment(config: dict[str, Any]) -> dict[str, Any]:
    import jax

    from metajax.training._data import base_sha256

    base = base_sha256(config)
    return {
        **({"base_sha256": base} if base else {}),
        "seed": config["seed"],
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
