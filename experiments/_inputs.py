"""Whether inputs from elsewhere fit the parameters of a run."""

from __future__ import annotations

from typing import Any


def check_inputs(name: str, inputs: Any, learner: Any, params: Any) -> None:
    """Raises a ValueError where a learner that is made for `inputs` has other parameters than `params`.

    Args:
      name: what the error calls the inputs.
      inputs: `[n, ...]`.
      learner: of the run.
      params: of the run; it may hold more than the learner uses.
    """
    import jax
    import numpy as np

    needed = jax.eval_shape(learner.init, jax.random.key(0), np.asarray(inputs)[:1])
    there = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    for path, leaf in jax.tree.leaves_with_path(needed):
        found = there.get(jax.tree_util.keystr(path))
        if found != leaf.shape:
            raise ValueError(
                f"{name} holds inputs of shape {np.shape(inputs)[1:]}, which do not fit this run: they need "
                f"{jax.tree_util.keystr(path)} of shape {leaf.shape}, but the run has {found}"
            )
