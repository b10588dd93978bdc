"""Initialization of a run from the backbone of another run."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.core import _tree
from metajax.core._types import Params
from metajax.training import _checkpoint

_HEAD = re.compile(r"(^|/)head(/|$)")
_BACKBONE = "backbone"  # the key of the network in the meta-parameters of learners that have more parts


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The result of `begin_with`. Its text lists what was taken.

    Attributes:
      params: the initial meta-parameters.
      run: the folder of the run from which they were taken.
      step: the step of the checkpoint of that run.
      taken: paths of the leaves taken from the run.
      new: paths of the leaves that are newly initialized.

    >>> print(Beginning({}, "runs/moco", 500, ("block_0/kernel",), ("head/kernel",)))
    begins with 1 array of runs/moco (step 500); new: head/kernel
    """

    params: Params
    run: str
    step: int
    taken: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        count = f"{len(self.taken)} array" + "s" * (len(self.taken) > 1)
        return f"begins with {count} of {self.run} (step {self.step}); new: {', '.join(self.new) or 'none'}"


def begin_with(workdir: str | pathlib.Path, params: Params, *, base: str | None = None) -> Beginning:
    """Initializes the backbone from another run, for example from pre-training before meta-training.

    Learners with several parts (`pretrain`, `finetune`, `contrastive`) keep the network under `backbone` in their
    meta-parameters. The meta-parameters of other learners are the network itself. Both forms can be combined. Backbone
    arrays must match exactly: the network here and the network of the run must have the same arrays with the same
    shapes. Arrays of a `head` are copied if their shapes match and kept otherwise. Parts outside the network are kept.

    Args:
      workdir: a run folder of `experiments.train`. Its last checkpoint is loaded.
      params: new meta-parameters from `learner.init`.
      base: a hash of the pretrained weights in `params`. If the run kept a frozen base outside its state, that base
        must have this hash. The base itself is not taken from the run.

    Raises:
      ValueError: the folder has no sound checkpoint or its checkpoint has another frozen base, or an array of the
        network is missing or has another shape. The error names the arrays.

    >>> import tempfile, metajax
    >>> state = metajax.MetaState({"backbone": {"w": jnp.ones(2)}}, (), (), jnp.array(0), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = metajax.training.Checkpoints(f"{folder}/checkpoints")
    ...     checkpoints.save(1, state, {})
    ...     checkpoints.close()
    ...     found = begin_with(folder, {"w": jnp.zeros(2), "head": jnp.zeros(3)})
    >>> found.params["w"].tolist(), found.taken, found.new
    ([1.0, 1.0], ('w',), ('head',))
    """
    theirs, step = _checkpoint.restore_params(pathlib.Path(workdir) / "checkpoints", base=base)
    there = dict(zip(_tree.paths(_network(theirs)), jax.tree.leaves(_network(theirs)), strict=True))
    beside = set(_tree.gaps(_network(theirs)))
    taken: list[str] = []
    wrong: list[str] = []

    def pick(path: str, leaf: Any) -> Any:
        other = there.get(path)
        if other is not None and np.shape(other) == np.shape(leaf):
            taken.append(path)
            return jnp.asarray(other, leaf.dtype)
        if not _HEAD.search(path) and path not in beside:
            there_is = "not there" if other is None else f"{np.shape(other)} there"
            wrong.append(f"{path} is {there_is}, {np.shape(leaf)} here")
        return leaf

    network = _tree.map_with_path(pick, _network(params))
    here = set(_tree.paths(_network(params)))
    wrong += [f"{path} is there, not here" for path in there if path not in here and not _HEAD.search(path)]
    if wrong or not taken:
        told = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "") or "nothing fits"
        raise ValueError(f"init must be a run of the same network, got {str(workdir)!r}: {told}")
    new = tuple(path for path in _tree.paths(_network(params)) if path not in taken and path not in beside)
    if network_is_part(params):
        new += tuple(path for path in _tree.paths(params) if not path.startswith(f"{_BACKBONE}/"))
        network = {**params, _BACKBONE: network}
    return Beginning(network, str(workdir), step, tuple(taken), new)


def network_is_part(params: Params) -> bool:
    """Returns whether the meta-parameters hold the network as one of several parts.

    >>> network_is_part({"backbone": {}, "head": {}}), network_is_part({"block_0": {}})
    (True, False)
    """
    return isinstance(params, dict) and _BACKBONE in params


def _network(params: Params) -> Params:
    return params[_BACKBONE] if network_is_part(params) else params
