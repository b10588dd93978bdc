"""Estimators of the hypergradient with one interface (`metajax.Hypergrad`), one family per file."""

from metajax.hypergrad._compare import Comparison, Plan, compare, plan
from metajax.hypergrad._displacement import displacement
from metajax.hypergrad._evolution import evolution, persistent_evolution
from metajax.hypergrad._explicit import first_order, mixed_mode, unrolled
from metajax.hypergrad._finite_difference import finite_difference, sama
from metajax.hypergrad._forward_mode import forward_mode
from metajax.hypergrad._implicit import implicit
from metajax.hypergrad._primitive import value_and_grad
from metajax.hypergrad._truncated import persistent_truncation, truncated

__all__ = [
    "Comparison",
    "Plan",
    "compare",
    "displacement",
    "evolution",
    "finite_difference",
    "first_order",
    "forward_mode",
    "implicit",
    "mixed_mode",
    "persistent_evolution",
    "persistent_truncation",
    "plan",
    "sama",
    "truncated",
    "unrolled",
    "value_and_grad",
]
