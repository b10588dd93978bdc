"""Adapters with few parameters for large models: low-rank paths, scales, shifts, bottlenecks, prefixes, prompts.

An adapter is an edit of a parameter tree. It wraps a `Model`: `init` returns the tree of the model with small leaves
beside the kernels, and `apply` computes with them. To learners, estimators and checkpoints the result is one more
`Model`. A path regex then says what adapts inside a task and what is meta-trained:

- `learners.maml(lora(model), inner, steps, adapts="lora")` and `outer_update(..., trainable="lora")`: the base is
  frozen, an argument that all tasks share. It is never copied for a task and has no gradient.
- `adapts="head"` (ANIL) and `adapts="bias"` (BitFit) pick leaves that the model already has, so they need no adapter.

`attach` adds adapters to a pretrained model, and `merge` turns adapted weights into plain ones.
"""

from metajax.adapters._adapter import attach, count, merge
from metajax.adapters._outputs import bitfit, bottleneck, prefix
from metajax.adapters._prompt import prompt
from metajax.adapters._weights import ia3, lora

__all__ = ["attach", "bitfit", "bottleneck", "count", "ia3", "lora", "merge", "prefix", "prompt"]
