"""The top-k codec: which entries of an update are sent, and in what form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job
from flcore.compression._settings import check_choice, check_integer
from flcore.compression._share import check_share, decimal, share_of
from flcore.errors import InvalidInputError
from flcore.ops.sparsify import sparsify
from flcore.reference import wire
from flcore.reference.wire_frame import TILE

__all__ = ["TopK", "carried_tau"]


def carried_tau(job: Job, segments: int) -> np.ndarray:
    """Return a copy of the thresholds that the last packet left, (segments,) uint32, else zeros."""
    tau = np.zeros(segments, np.uint32)
    carried = job.memory.get("tau")
    if carried is not None and np.shape(carried) == tau.shape:
        tau[:] = carried
    return tau


SCOPES = ("global", "tensor", "tile")
INDICES = ("auto", "smallest", *wire.INDEX_CODINGS)


@dataclass(frozen=True)
class TopK(Codec):
    """Keep the k entries of largest magnitude; ties go to the smaller index.

    Parameters
    ----------
    ratio : float, optional
        Share of the entries that is kept, in (0, 1]: ``k = max(1, ceil(ratio * d))`` of the d in
        the update or, with scope "tensor", in a layer. Blocks keep ``max(1, round(ratio * tile))``
        (half up), a shorter last one ``ceil(ratio * its length)``.
    k : int, optional
        Number of entries, at least 1, of the update, of each layer or of each block; all of them
        where there are fewer. Either `ratio` or `k`.
    scope : {"global", "tensor", "tile"}
        What entries compete in: the whole update, which keeps most energy; each layer of a list or
        dict; blocks of `tile` coordinates, counted through the layers. Blocks across layers of very
        different scale lose much: 8 % of the energy at 1 % where "global" keeps 31 %.
    tile : int
        Coordinates of a block, 1 to 65,536.
    values : {"float32", "float16", "bfloat16", "int8"}
        Type of the values on the wire; int8 with a scale for each 65,536 coordinates.
    index : {"auto", "smallest", "tile16", "bitmask", "bitpack", "rice"}
        How positions are written: 16 bits an entry; one bit a coordinate; the gaps between entries,
        packed (9.6 bits an entry at 1 %, 2 ns to write and read) or Rice-coded (8.2 bits, 5 ns).
        "auto" takes the bitmask instead of 16 bits where it is smaller, above a ratio of 1/16;
        "smallest" the shortest of all four, for slow links.

    Raises
    ------
    InvalidInputError
        Neither or both of `ratio` and `k`, or a value that cannot be used.

    Notes
    -----
    The threshold of the last packet is carried (it is part of the encoder's state), so that one
    pass over the update suffices as long as it drifts slowly; the packet does not depend on it.

    References
    ----------
    Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599. Blocks: Modoranu et
    al., "MicroAdam", NeurIPS 2024, arXiv 2405.15593.

    Examples
    --------
    >>> TopK(ratio=0.01).count(1000), TopK(k=3).count(1000)
    (10, 3)
    """

    ratio: float | None = None
    k: int | None = None
    values: str = "float32"
    index: str = "auto"
    scope: str = "global"
    tile: int = TILE
    name: ClassVar[str] = "topk"
    dense_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share("TopK", self.ratio, self.k)
        check_choice("values", self.values, wire.VALUE_DTYPES)
        if self.index not in INDICES:
            raise InvalidInputError(f"index: expected {', '.join(INDICES)}, got {self.index!r}")
        check_choice("scope", self.scope, SCOPES)
        check_integer("tile", self.tile, 1, TILE)

    def entries(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the number of entries that a packet of layers of these shapes holds."""
        return int(self.segments(shapes)[1].sum())

    def count(self, numel: int) -> int:
        """Return the number of entries kept of `numel` that compete."""
        return share_of(numel, self.ratio, self.k)

    def segments(self, shapes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Return first coordinates (segments + 1,) and counts (segments,) of what is selected.

        Both int64. Segments are the update, its layers, or blocks of coordinates.
        """
        sizes = np.array([math.prod(shape) for shape in shapes], np.int64)
        numel = int(sizes.sum())
        if self.scope == "global":
            return np.array([0, numel], np.int64), np.array([self.count(numel)], np.int64)
        if self.scope == "tensor":
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
            return starts, np.array([self.count(int(n)) for n in sizes], np.int64)
        blocks, rest = divmod(numel, self.tile)
        counts = np.full(blocks + (rest > 0), self._block_count(), np.int64)
        if rest:
            counts[-1] = self.count(rest)
        return np.minimum(np.arange(counts.size + 1) * self.tile, numel), counts

    def _block_count(self) -> int:
        """Return the number of entries kept of a whole block."""
        if self.k is not None:
            return min(self.k, self.tile)
        return max(1, math.floor(decimal(self.ratio or 0) * self.tile + Fraction(1, 2)))

    def eta(self, numel: int) -> float:
        """Return the share of the entries that is kept."""
        if self.scope == "tile":
            return self._block_count() / self.tile
        return self.count(numel) / max(numel, 1)

    def needs_spares(self, memory: Mapping[str, Any]) -> bool:
        """Return whether one pass will do: for tiles, or with a threshold to start from."""
        return self.scope == "tile" or "tau" in memory

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on."""
        starts, counts = self.segments(job.shapes)
        tau = None
        if self.scope != "tile":  # blocks are selected in cache, which needs no guess
            tau = carried_tau(job, counts.size)
        packet = sparsify(
            job.update,
            k=counts,
            segments=starts,
            tau=tau,
            state=job.state,
            values=self.values,
            index=self.index,
            **job.header,
        )
        if tau is not None:
            job.memory["tau"] = tau
        return packet
