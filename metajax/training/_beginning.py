"""A run that begins with the backbone of another one."""

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
_BACKBONE = "backbone"  # where the meta-parameters of learners with parts of their own hold the network


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What `begin_with` took; its text says so.

    Attributes:
      params: the meta-parameters to begin with.
      run: the folder of the run that they are from.
      step: the step of its checkpoint.
      taken: paths of the leaves that are from there.
      new: paths of those that are not.

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
    """Takes the backbone of another run: of pre-training for meta-training, say.

    Learners whose meta-parameters have parts (`pretrain`, `finetune`, `contrastive`) keep the network under `backbone`,
    the others are the network; both fit each other. Every array of the network must be in the run and have the same
    shape, and every array of the run's must be here, but those of a `head`: they are taken where they fit, and stay as
    they are where they do not. So does all that is beside the network.

    Args:
      workdir: a run folder, as `experiments.train` leaves it; its last checkpoint counts.
      params: new meta-parameters, of `learner.init`.
      base: a hash of the pretrained weights in `params`. Where the run kept its frozen base beside its state, that must
        be of these, and is no part of what is taken.

    Raises:
      ValueError: the folder holds no sound checkpoint, or one on another frozen base, or an array of the network is not
        there in this shape; the error names the arrays.

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
    """Whether these meta-parameters hold the network as one part of several.

    >>> network_is_part({"backbone": {}, "head": {}}), network_is_part({"block_0": {}})
    (True, False)
    """
    return isinstance(params, dict) and _BACKBONE in params


def _network(params: Params) -> Params:
    return params[_BACKBONE] if network_is_part(params) else params
