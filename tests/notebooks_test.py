"""Notebooks run from the first cell to the last."""

import os
import pathlib

import launchers
import nbclient
import nbformat
import pytest

_NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
_SHORT = {"steps=300": "steps=25", "episodes=200": "episodes=8", "width=32": "width=8"}


def _execute(path, monkeypatch, changes):
    monkeypatch.setenv("XLA_FLAGS", launchers.environment()["XLA_FLAGS"])
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    notebook = nbformat.read(path, as_version=4)
    for long, short in changes.items():
        holders = [cell for cell in notebook.cells if cell.cell_type == "code" and long in cell.source]
        assert len(holders) == 1, long
        holders[0].source = holders[0].source.replace(long, short)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.slow
def test_the_first_notebook_runs_with_fewer_steps(monkeypatch):
    _execute(_NOTEBOOKS[0], monkeypatch, _SHORT)


@pytest.mark.slow  # each takes a minute or two
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    _execute(path, monkeypatch, {})
