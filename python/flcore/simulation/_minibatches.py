"""The mini-batches of several clients, step by step, as blocks of equal size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np

from flcore.algorithms.state import DataView

__all__ = ["Block", "blocks", "round_up"]

LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 40, 50, 64, 80)
"""Sizes that occur, up to powers of ten of the last ones; a quarter of a block may be padding."""

LONGEST = 1 << 21
"""Examples that are put in order at a time: 16 MB of indices."""


@dataclass
class Block:
    """Successive steps of the same clients, with mini-batches of the same size.

    Parameters
    ----------
    first : int
        Number of the first step.
    index : (steps, clients, size) int64
        Number of each example in the orders of all clients, one after another. Padding repeats
        an example.
    weight : (steps, clients, size) float32
        Share of each example in its client's mean; 0 for padding.
    """

    first: int
    index: np.ndarray
    weight: np.ndarray


@cache
def round_up(number: int) -> int:
    """Give the next size that is used: few sizes, so that few computations have to be prepared.

    Examples
    --------
    >>> [round_up(n) for n in (1, 7, 10, 29, 101)]
    [1, 8, 10, 32, 128]
    """
    scale = 1
    while number > LADDER[-1] * scale:
        scale *= 2
    return next(size * scale for size in LADDER if size * scale >= number)


def blocks(views: Sequence[DataView]) -> Iterator[Block]:
    """Yield the mini-batches of clients, of whom those with most steps come first.

    A client that has done its steps gets batches of weight 0 until it falls away, `round_up` of the
    number of those left at a time.  Batches above half of the largest size are filled up to that:
    short last batches of an epoch then make no new block.
    """
    counts = np.array([len(view.sizes) for view in views])
    steps = int(counts.max(initial=0))
    sizes = np.zeros((len(views), steps), np.int64)
    sizes[np.arange(steps) < counts[:, None]] = np.concatenate([view.sizes for view in views])
    ends = np.cumsum(sizes).reshape(sizes.shape)
    active = (sizes > 0).sum(0).tolist()
    largest = sizes.max(0).tolist()
    shapes = [
        (min(len(views), round_up(n)), round_up(size if 2 * size <= max(largest) else max(largest)))
        for n, size in zip(active, largest, strict=True)
    ]
    per_step = max(n * size for n, size in shapes)
    for first in range(0, steps, max(LONGEST // per_step, 1)):
        part = slice(first, first + max(LONGEST // per_step, 1))
        index, weight = _batches(sizes[:, part].T, ends[:, part].T, max(s for _, s in shapes[part]))
        k = 0
        for (clients, size), same in groupby(shapes[part]):
            stop = k + len(list(same))
            yield Block(first + k, index[k:stop, :clients, :size], weight[k:stop, :clients, :size])
            k = stop


def _batches(sizes: np.ndarray, ends: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Give numbers and weights of the examples of batches with these sizes and ends."""
    column = np.arange(largest)
    last = np.maximum(ends - 1, 0)[..., None]
    index = np.minimum((ends - sizes)[..., None] + column, last)
    share = (1.0 / np.maximum(sizes, 1)).astype(np.float32)
    weight = np.where(column < sizes[..., None], share[..., None], np.float32(0.0))
    return index, weight
