"""Random inputs of a server step, for the tests of its numbers, buffers and errors."""

from __future__ import annotations

import numpy as np

from flcore.ops import Step
from support import np_dtype


def problem(rng: np.random.Generator, size: int, dtype: str, model: str, kind: str, n: int = 3):
    """Rows, weights, model and state as keyword arguments of `combine_step`."""
    state = np.float64 if model == "float64" else np.float32
    draw = lambda: rng.standard_normal(size)  # noqa: E731
    names = Step(kind).states
    states = {s: (abs(draw()) if s == "v" else draw()).astype(state) for s in names}
    rows = [draw().astype(np_dtype(dtype)) for _ in range(n)]
    weights = rng.uniform(0, 1, n) / n
    return {"updates": rows, "weights": weights, "model": draw().astype(np_dtype(model)), **states}


def flat(result) -> bytes:
    return b"".join(x.tobytes() for x in result if x is not None)
