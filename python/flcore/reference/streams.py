"""Names of the Philox streams that compression draws from: the `tensor` word of each purpose.

The key is the seed of the packet's header, the round its round modulo 2**32, the client 0 (the
encoder has mixed a client's number into the seed). STREAM_ in csrc/api.h holds the same numbers.
"""

from __future__ import annotations

__all__ = [
    "LOW_RANK",
    "RAND_K",
    "ROTATION",
    "ROUNDING",
    "SKETCH",
    "STATE",
]

ROUNDING = 0x51
"""Stochastic rounding: coordinate i takes 16 bits, half i & 1 (low first) of element i >> 1."""
ROTATION = 0x52
"""Signs before a Hadamard transform: coordinate i takes bit i & 31 of element i >> 5."""
RAND_K = 0x53
"""Keys of the permutation whose first k values a random-k packet holds."""
SKETCH = 0x54
"""Hashes of a count sketch."""
LOW_RANK = 0x55
"""First factor of a power iteration."""
STATE = 0x56
"""Rounding of state kept as bfloat16, as ROUNDING; client 0 is e, 1 is v."""
