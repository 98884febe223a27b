"""Stateless functions with explicit buffers, one module a stem; `variant=` names the backend."""

from flcore.ops.combine import combine
from flcore.ops.rng import random_bits, random_uniform

__all__ = ["combine", "random_bits", "random_uniform"]
