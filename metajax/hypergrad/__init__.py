"""Estimators of the hypergradient, one family a file, behind one interface (`metajax.Hypergrad`)."""

from metajax.hypergrad._displacement import displacement
from metajax.hypergrad._explicit import first_order, mixed_mode, unrolled
from metajax.hypergrad._primitive import value_and_grad

__all__ = ["displacement", "first_order", "mixed_mode", "unrolled", "value_and_grad"]
