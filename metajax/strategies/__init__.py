"""What surrounds meta-training: how the backbone begins, what solutions are averaged, which strategy is chosen."""

from metajax.strategies._averaging import Averaged, averaged, averaged_params, greedy_soup, soup
from metajax.strategies._contrast import contrastive, encoder_params, moco, random_view, simclr
from metajax.strategies._select import Candidate, Selection, select
from metajax.strategies._supervised import Supervised, supervised

__all__ = [
    "Averaged",
    "Candidate",
    "Selection",
    "Supervised",
    "averaged",
    "averaged_params",
    "contrastive",
    "encoder_params",
    "greedy_soup",
    "moco",
    "random_view",
    "select",
    "simclr",
    "soup",
    "supervised",
]
