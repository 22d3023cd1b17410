"""Figures about labels that a report reads too, without the tensors that `labels` makes them of."""

UNIFORM_ENTROPY = 0.9995
"""Labels whose entropy is above this share of ln K count as uniform; at K = 8 they differ by about 3% of their size."""
