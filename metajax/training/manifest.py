"""The seal of a checkpoint: a file in its folder that lists all other files with their sizes and SHA-256 hashes.

A folder with a sound seal is complete: the seal is written last, after all other files have reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

NAME = "seal.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax writes into

Known = dict[pathlib.Path, dict[str, Any] | str]  # results of `look`


def write(folder: pathlib.Path, values: dict[str, Any]) -> None:
    """Seals the files in `folder`. The seal also stores JSON values, whose `step` must be the name of the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     folder = pathlib.Path(root, "last", "7")
    ...     folder.mkdir(parents=True)
    ...     _ = (folder / "file").write_text("content")
    ...     write(folder, {"step": 7})
    ...     sound = newest(folder.parent, {})
    ...     _ = (folder / "file").write_text("contents")
    ...     sound, newest(folder.parent, {})
    (({'step': 7}, []), (None, ['last/7/file is 8 bytes, was 7']))
    """
    files, folders = {}, [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
        elif path != folder / NAME:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
            _sync(path)
    body = {**values, "files": files}
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps({"sha256": _digest_of(body), **body}, indent=1), encoding="utf-8")
    for path in (temporary, *folders):
        _sync(path)
    os.replace(temporary, folder / NAME)
    _sync(folder)
    _sync(folder.parent)  # the name of the folder itself


def newest(folder: pathlib.Path, known: Known) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the values of the newest sound checkpoint in `folder`, and a line for each newer, damaged checkpoint."""
    damaged: list[str] = []
    for path in _steps(folder):
        found = look(path, known)
        if isinstance(found, dict):
            return found, damaged
        damaged.append(found)
    return None, damaged


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of the steps in `folder`, sound or not, the newest first."""
    return [path for path in _steps(folder) if UNFINISHED not in path.name]


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    numbers = {path: path.name.split(UNFINISHED)[0] for path in folder.glob("*") if path.is_dir()}
    steps = {path: int(number) for path, number in numbers.items() if number.isascii() and number.isdecimal()}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def look(path: pathlib.Path, known: Known) -> dict[str, Any] | str:
    """Returns the values of a sound checkpoint, or what is wrong with it. Reads all bytes if it is not in `known`."""
    if path not in known:
        try:
            known[path] = _check(path)
        except ValueError as error:
            known[path] = f"{path.parent.name}/{path.name}{error}"
    return known[path]


def _check(folder: pathlib.Path) -> dict[str, Any]:
    try:
        body = json.loads((folder / NAME).read_bytes())
        told = body.pop("sha256")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in body["files"].items()}
    except FileNotFoundError:
        raise ValueError(" was never finished") from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(f"/{NAME} has other bytes than were written") from None
    if told != _digest_of(body):
        raise ValueError(f"/{NAME} has other bytes than were written")
    if str(body["step"]) != folder.name:
        raise ValueError(f"/{NAME} is of step {body['step']}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"/{NAME} names {name!r}, which is outside of the folder")
        if not path.is_file():
            raise ValueError(f"/{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"/{name} is {path.stat().st_size} bytes, was {size}")
        if _digest(path) != digest:
            raise ValueError(f"/{name} has other bytes than were written")
    del body["files"]
    return body


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
