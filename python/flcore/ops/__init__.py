"""Stateless functions with explicit buffers, one module a stem; `variant=` names the backend."""

from flcore.ops.combine import combine
from flcore.ops.mask import dequantize_sum, mask_add, modular_sum
from flcore.ops.moments import accumulate_moments, affine, moments, moments_each
from flcore.ops.rng import random_bits, random_normal, random_uniform

__all__ = [
    "accumulate_moments",
    "affine",
    "combine",
    "dequantize_sum",
    "mask_add",
    "modular_sum",
    "moments",
    "moments_each",
    "random_bits",
    "random_normal",
    "random_uniform",
]
