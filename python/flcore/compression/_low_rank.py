"""Low-rank codecs: one packet of factors, and the PowerSGD form whose messages are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job
from flcore.errors import InvalidInputError
from flcore.ops import low_rank as ops
from flcore.reference import wire_writer

__all__ = ["LowRank"]


def check_rank(rank: object, min_compression: object) -> None:
    """Raise `InvalidInputError` unless matrices can be compressed like this."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= ops.MAX_RANK:
        raise InvalidInputError(f"rank: expected an integer from 1 to {ops.MAX_RANK}, got {rank!r}")
    number = isinstance(min_compression, int | float) and not isinstance(min_compression, bool)
    if not (number and 0 <= min_compression < float("inf")):  # type: ignore[operator]
        raise InvalidInputError(f"min_compression: expected a number >= 0, got {min_compression!r}")


@dataclass(frozen=True)
class LowRank(Codec):
    """Send two thin factors of each matrix: one power iteration from the factor sent before.

    A layer of two or more dimensions is a matrix U of n rows (its first dimension) and m columns
    (all others). With r = min(n, m, rank) it becomes ``P = orth(U Q)``, ``Q <- U^T P`` and decodes
    to ``P Q^T``, if that saves enough; other layers are sent as they are. Q is kept for the next
    packet (warm start), so that the factors follow the largest singular vectors over the rounds.

    Parameters
    ----------
    rank : int
        Columns of a factor, 1 to 32.
    min_compression : float
        A matrix is compressed iff ``(n + m) r min_compression < n m``.
    values : {"float32", "bfloat16"}
        Type of factors and values on the wire.
    start : int
        Packets of an encoder that are sent uncompressed before the first one is compressed.

    Raises
    ------
    InvalidInputError
        A setting that cannot be used.

    Notes
    -----
    Not linear: packets are summed by decoding them; `PowerSGD` has messages that sum. A client
    keeps ``m r`` float32 values a matrix. Use it with feedback, and with a smaller step than the
    uncompressed method: what is not sent at once comes later. Every packet carries a tensor table.

    References
    ----------
    Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019, arXiv 1905.13727.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, LowRank, decode
    >>> x = np.outer(np.arange(40.0), np.ones(30))  # of rank 1
    >>> packet = Encoder(LowRank(rank=1), like=x).encode(x)
    >>> bool(np.allclose(decode(packet, like=x), x)), packet.nbytes < x.size
    (True, True)
    """

    rank: int = 2
    min_compression: float = 2.0
    values: str = "float32"
    start: int = 0
    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        check_rank(self.rank, self.min_compression)
        if self.values not in ops.VALUES:
            raise InvalidInputError(
                f"values: expected one of {', '.join(ops.VALUES)}, got {self.values!r}"
            )
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise InvalidInputError(f"start: expected an integer >= 0, got {self.start!r}")

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise `InvalidInputError` if a layer does not fit in a tensor table."""
        wire_writer.pack_tensors([""] * len(shapes), list(shapes))

    def ranks(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the rank of each layer, 0 for those that are sent as they are."""
        return ops.choose_ranks(shapes, self.rank, self.min_compression)

    def eta(self, numel: int) -> float:
        """Return ``rank / sqrt(d)``: the share of its energy that factors keep of a square matrix.

        On least squares with matrices of 40 x 30 EControl converged up to 1.5 ``rank / 30`` and
        diverged at 3 ``rank / 30``; smaller values only forget old errors more slowly.
        """
        return min(1.0, self.rank / max(1, numel) ** 0.5)

    def needs_spares(self, memory: Mapping[str, Any]) -> bool:
        """Return False: a state is written only after two reads of the whole update."""
        return False

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet; see `Codec.encode`. The factor Q and the packets so far are kept."""
        sent = int(job.memory.get("packets", 0))
        ranks = self.ranks(job.shapes) if sent >= self.start else (0,) * len(job.shapes)
        plan = ops.Plan.of(job.shapes, ranks)
        header = job.header
        header["tensors"] = job.tensors or wire_writer.pack_tensors(
            [""] * len(job.shapes), list(job.shapes)
        )
        packet, following = ops.low_rank(
            job.update,
            plan=plan,
            start=ops.revive(plan, job.memory.get("q"), job.seed, job.round),
            rank=self.rank,
            values=self.values,
            state=job.state,
            **header,
        )
        job.memory["q"] = following
        job.memory["packets"] = min(sent + 1, self.start)
        return packet
