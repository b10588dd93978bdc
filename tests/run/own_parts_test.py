"""A project elsewhere, with a learner, a model, a source and a loss of its own, trains and is loaded again."""

import pathlib
import subprocess
import sys

import launchers
import pytest

import metajax
from metajax import run

CONFIG = """
def get_config():
    return {
        "data": {"name": "my_parts:numbers", "spread": 2.0},
        "model": {"name": "my_parts:line"},
        "learner": {"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.1}, "loss": "my_parts:absolute"},
        "episode": {"ways": 1, "shots": 2, "queries": 2},
        "training": {"steps": 4, "meta_batch": 2},
        "sampler": "device",
        "validation": {"every": 4, "episodes": 2},
        "evaluation": {"episodes": 4},
    }
"""
PARTS = """
import jax, jax.numpy as jnp, numpy as np, metajax

def numbers(*, spread: float = 1.0, split: str = "train") -> metajax.data.Source:
    def sample(key, ways, count):
        slope, inputs = spread * jax.random.normal(key), jnp.linspace(-1, 1, count)[:, None]
        return inputs, slope * inputs
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 1)).astype(np.float32)
    return metajax.data.arrays(inputs, np.repeat(np.arange(12), 5), targets=spread * inputs, split=split,
                               task=metajax.tasks.regression)

def line(outputs: int | None = None) -> metajax.Model:
    return metajax.Model(lambda key, x: {"w": jnp.zeros([x.shape[-1], outputs])}, lambda p, x: x @ p["w"])

def absolute(outputs, targets):
    return jnp.abs(outputs - targets).mean(axis=-1)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "my_config.py").write_text(CONFIG)
    (tmp_path / "my_parts.py").write_text(PARTS)
    return tmp_path


def test_a_project_elsewhere_trains_and_its_run_is_loaded(project):
    command = [sys.executable, "-m", "metajax.run", "train", "--config=my_config.py", "--workdir=run"]
    command += ["--config.data.spread=3.0", "--config.learner.inner.momentum=0.5"]
    package = str(pathlib.Path(metajax.__file__).parents[1])
    done = subprocess.run(
        command,
        cwd=project,
        env=launchers.environment(PYTHONPATH=package),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, params = metajax.load_run(project / "run")
    assert params["w"].shape == (1, 1)
    config = run.load_config(project / "run")
    assert (config.data.spread, config.learner.inner.momentum) == (3.0, 0.5)
    (project / "my_parts.py").write_text(PARTS + "\n# changed\n")
    with pytest.raises(ValueError, match=r"my_parts:\w+ must be the part .* that the run was made with: its file has"):
        metajax.load_run(project / "run")
    (project / "my_parts.py").unlink()
    with pytest.raises(ValueError, match=r"my_parts:\w+ must be the part .* made with: it is not there"):
        metajax.load_run(project / "run")
