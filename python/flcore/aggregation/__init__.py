"""Aggregation rules: `rule(updates, weights=None)` gives an aggregate of the kind of one update."""

from flcore.aggregation._accumulator import Accumulator
from flcore.aggregation._mean import Mean

__all__ = ["Accumulator", "Mean"]
