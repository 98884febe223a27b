"""The threshold codec: send what is large, however much that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job
from flcore.compression._settings import check_choice
from flcore.compression._share import check_ratio, decimal, share_of
from flcore.compression._topk import INDICES, carried_tau
from flcore.errors import InvalidInputError
from flcore.ops.sparsify import sparsify
from flcore.ops.threshold import sample_threshold
from flcore.reference import wire

__all__ = ["Threshold"]

ESTIMATES = ("carried", "sampled")


@dataclass(frozen=True)
class Threshold(Codec):
    """Keep the entries whose magnitude reaches a threshold: their number varies.

    Parameters
    ----------
    tau : float, optional
        The threshold, fixed, >= 0. Either `tau` or `ratio`.
    ratio : float, optional
        Share of the entries that a packet should hold on average, in (0, 1]; the threshold is
        estimated.
    max_ratio : float, optional
        Share of the entries that a packet may hold. Where more reach the threshold, the largest
        are sent: exact top-k, so that no index is favoured. ``min(1, 1.3 * ratio)``, or 1 with
        `tau`, unless given.
    estimate : {"carried", "sampled"}
        With `ratio`: the threshold that would have held `ratio` of the last update, or a sample's
        in the first round and after one with too few entries; or a sample's in every round. A
        sample takes about one value in a hundred and is right to about 5 % of the count.
    values : {"float32", "float16", "bfloat16", "int8"}
        Type of the values on the wire; int8 with a scale for each 65,536 coordinates.
    index : {"auto", "smallest", "tile16", "bitmask", "bitpack", "rice"}
        How positions are written, as in :class:`TopK`.

    Raises
    ------
    InvalidInputError
        Neither or both of `tau` and `ratio`, or a value that cannot be used.

    Notes
    -----
    One pass over the update when e and v have spares, whatever the threshold.

    References
    ----------
    Lin et al., "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887, whose code sends the first
    entries by index where there are too many.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, Threshold, decode
    >>> g = np.array([4, -3, 2, 1], np.float32)
    >>> print(decode(Encoder(Threshold(tau=2), like=g).encode(g)))
    [ 4. -3.  2.  0.]
    """

    tau: float | None = None
    ratio: float | None = None
    max_ratio: float | None = None
    estimate: str = "carried"
    values: str = "float32"
    index: str = "auto"
    name: ClassVar[str] = "threshold"
    dense_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.tau is None) == (self.ratio is None):
            raise InvalidInputError("Threshold: expected either tau or ratio, e.g. ratio=0.01")
        largest = float(np.finfo(np.float32).max)
        if self.tau is not None and not 0 <= self.tau <= largest:
            raise InvalidInputError(f"tau: expected a finite float32 >= 0, got {self.tau!r}")
        check_ratio(self.ratio)
        if self.max_ratio is not None and not (self.ratio or 0) <= self.max_ratio <= 1:
            raise InvalidInputError(
                f"max_ratio: expected {self.ratio or 0} to 1, got {self.max_ratio!r}"
            )
        check_choice("estimate", self.estimate, ESTIMATES)
        check_choice("values", self.values, wire.VALUE_DTYPES)
        check_choice("index", self.index, INDICES)

    def count(self, numel: int) -> int:
        """Return the number of entries of `numel` that `ratio` asks for."""
        return share_of(numel, self.ratio)

    def entries(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the largest number of entries that a packet of layers of these shapes holds."""
        numel = sum(math.prod(shape) for shape in shapes)
        most = Fraction(1)
        if self.max_ratio is not None:
            most = decimal(self.max_ratio)
        elif self.ratio is not None:
            most = decimal(self.ratio) * 13 / 10
        return share_of(numel, most)

    def eta(self, numel: int) -> float:
        """Return the share of the entries that is expected.

        Raises
        ------
        InvalidInputError
            The threshold is fixed, so that the share is not known.
        """
        if self.ratio is None:
            raise InvalidInputError(
                'eta: "auto" needs the share that is sent, and tau leaves it open; give a number'
            )
        return self.ratio

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on."""
        tau, floor, rank = None, self.tau or 0.0, 0
        if self.ratio is not None and job.numel > 0:
            tau, rank = carried_tau(job, 1), self.count(job.numel)
            floor = float(tau.view(np.float32)[0])
            if self.estimate == "sampled" or floor == 0:
                floor = sample_threshold(
                    job.update, ratio=self.ratio, state=job.state, phase=job.round
                )
            if not math.isfinite(floor):
                floor = 0.0  # the selection meets the value that is not finite and says where
        packet = sparsify(
            job.update,
            k=self.entries(job.shapes),
            floor=floor,
            rank=rank,
            tau=tau,
            state=job.state,
            values=self.values,
            index=self.index,
            **job.header,
        )
        if tau is not None:
            job.memory["tau"] = tau
        return packet
