"""Client updates as benchmark inputs: random sets, views of them, and the check of their mean.

All contestants read the same memory: the rows given to list-shaped calls are views of the stacked
matrix, and torch tensors are views of the NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore.bench.cases import Setup, difference
from flcore.bench.environment import optional

__all__ = ["UNIT_ROUNDOFF", "Updates", "make_updates", "to_numpy"]

# Largest relative rounding error of one value stored in each type.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def to_numpy(result: Any) -> np.ndarray:
    """Flatten an update (array, tensor or list of them) into one float64 vector."""
    if isinstance(result, list | tuple):
        return np.concatenate([to_numpy(layer) for layer in result])
    if hasattr(result, "detach"):
        result = result.detach().double().cpu().numpy()
    return np.asarray(result, dtype=np.float64).ravel()


@dataclass
class Updates:
    """Input sets of a weighted mean.

    Attributes
    ----------
    stacked : list of (clients, numel) arrays
        One matrix per slot; NumPy on the host in float32, torch otherwise.
    shapes : list of tuple, optional
        Layer shapes of one update; None for flat updates.
    weights : (clients,) float32
        Example counts, not normalised.
    dtype : str
    """

    stacked: list[Any]
    weights: np.ndarray
    dtype: str
    shapes: list[tuple[int, ...]] | None = None

    @property
    def portions(self) -> np.ndarray:
        """Weights that sum to one, float32: normalising is given to the peers free of charge."""
        return (self.weights / self.weights.sum(dtype=np.float64)).astype(np.float32)

    def update(self, row: Any) -> Any:
        """One client's update as users hold it: the row itself, or its list of layers (views)."""
        if self.shapes is None:
            return row
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        starts = [0, *ends[:-1]]
        return [row[a:b].reshape(s) for a, b, s in zip(starts, ends, self.shapes, strict=True)]

    def updates(self, convert: Callable[[Any], Any] = lambda x: x) -> list[list[Any]]:
        """`[slot][client]` updates; `convert` is applied to each stacked matrix first."""
        return [[self.update(row) for row in convert(matrix)] for matrix in self.stacked]

    def check(
        self, rounding: float, portions: np.ndarray | None = None
    ) -> Callable[[int, np.ndarray], str | None]:
        """Return a check against the float64 mean.

        Any order of a float32 sum is within (clients + 4) roundings of sum |p_i x_i|; `rounding`
        replaces the unit roundoff of that sum for peers that accumulate in less, and one more
        rounding to the output type is always allowed.
        """
        known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        parts = self.portions if portions is None else portions

        def expected(slot: int) -> tuple[np.ndarray, np.ndarray]:
            if slot not in known:
                mean = size = np.zeros(self.stacked[slot].shape[1])
                for p, row in zip(parts, self.stacked[slot], strict=True):
                    term = float(p) * to_numpy(row)
                    mean, size = mean + term, size + np.abs(term)
                allowed = (len(parts) + 4) * rounding * size
                known[slot] = mean, allowed + 2 * UNIT_ROUNDOFF[self.dtype] * np.abs(mean)
            return known[slot]

        return lambda slot, result: difference(result, *expected(slot))


def make_updates(
    setup: Setup,
    clients: int,
    numel: int,
    dtype: str,
    hot: bool = False,
    shapes: list[tuple[int, ...]] | None = None,
) -> Updates:
    """Random normal updates, in as many sets as it takes to keep them out of cache."""
    rng = setup.rng()
    weights = rng.integers(50, 500, size=clients).astype(np.float32)
    itemsize = 4 if dtype == "float32" else 2
    slots = 1 if hot else setup.cold_slots(clients * numel * itemsize)
    if setup.device == "cuda" or dtype != "float32":
        torch: Any = optional("torch")[0]  # the cases that come here need it
        generator = torch.Generator(setup.device).manual_seed(setup.seed)
        stacked: list[Any] = [
            torch.randn(clients, numel, generator=generator, device=setup.device).to(
                getattr(torch, dtype)
            )
            for _ in range(slots)
        ]
    else:
        stacked = [rng.standard_normal((clients, numel), dtype=np.float32) for _ in range(slots)]
    return Updates(stacked, weights, dtype, shapes)
