"""The top-k codec: which entries of an update are sent, and in what form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job
from flcore.errors import InvalidInputError
from flcore.ops.sparsify import sparsify
from flcore.reference import wire

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(Codec):
    """Keep the k entries of largest magnitude; ties go to the smaller index.

    Parameters
    ----------
    ratio : float, optional
        Share of the entries that is kept, in (0, 1]: ``k = max(1, ceil(ratio * d))``.
    k : int, optional
        Number of entries, at least 1; all of them in an update with fewer. Either `ratio` or `k`.
    values : {"float32", "float16", "bfloat16"}
        Type of the values on the wire.
    index : {"auto", "tile16", "bitmask"}
        How positions are written: 16 bits an entry, or one bit a coordinate. "auto" takes the
        bitmask where it is smaller, above a ratio of 1/16.

    Raises
    ------
    InvalidInputError
        Neither or both of `ratio` and `k`, or a value that cannot be used.

    Notes
    -----
    The scope is the whole update: layers of a list or dict compete with each other.

    Examples
    --------
    >>> TopK(ratio=0.01).count(1000), TopK(k=3).count(1000)
    (10, 3)
    """

    ratio: float | None = None
    k: int | None = None
    values: str = "float32"
    index: str = "auto"
    name: ClassVar[str] = "topk"
    dense_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.k is None):
            raise InvalidInputError("TopK: expected either ratio or k, e.g. TopK(ratio=0.01)")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise InvalidInputError(f"ratio: expected 0 < ratio <= 1, got {self.ratio!r}")
        if self.k is not None and (
            isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1
        ):
            raise InvalidInputError(f"k: expected an integer of at least 1, got {self.k!r}")
        if self.values not in wire.VALUE_DTYPES:
            raise InvalidInputError(
                f"values: expected one of {', '.join(wire.VALUE_DTYPES)}, got {self.values!r}"
            )
        if self.index not in ("auto", *wire.INDEX_CODINGS):
            raise InvalidInputError(
                f"index: expected auto, {', '.join(wire.INDEX_CODINGS)}, got {self.index!r}"
            )

    def count(self, numel: int) -> int:
        """Return the number of entries kept of `numel`."""
        if self.k is not None:
            return min(self.k, numel)
        # as a decimal: 0.07 of 100 is 7, while 0.07 * 100 is a little more in binary
        share = Fraction(repr(float(self.ratio or 0)))
        return min(numel, max(1, math.ceil(share * numel)))

    def index_coding(self, numel: int) -> str:
        """Return "tile16" or "bitmask", whichever `index` means for an update of `numel`."""
        if self.index != "auto":
            return self.index
        return "bitmask" if 16 * self.count(numel) > numel else "tile16"

    def eta(self, numel: int) -> float:
        """Return k/d."""
        return self.count(numel) / max(numel, 1)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on."""
        return sparsify(
            job.update,
            k=self.count(job.numel),
            state=job.state,
            values=self.values,
            index=self.index_coding(job.numel),
            **job.header,
        )
