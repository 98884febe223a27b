"""The THC codec: packets that a server adds without decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job, eta_of_bits
from flcore.compression._packet import _as_packet
from flcore.compression._rotated import check_block
from flcore.compression._settings import check_integer
from flcore.errors import InvalidInputError
from flcore.ops.decode import ParsedPacket
from flcore.ops.lut_add import lut_add
from flcore.ops.thc import block_norms, thc, thc_mean
from flcore.reference import wire
from flcore.reference.codes_thc import clip_of, grid_table
from flcore.reference.wire_frame import CODEBOOK, CODES, NORM
from flcore.reference.wire_thc import LARGEST_TABLE, code_count

__all__ = ["THC", "agree_norms", "decode_sum", "thc_sum"]


@lru_cache
def _grid(bits: int, granularity: int, clip: float) -> tuple[float, tuple[int, ...]]:
    t = clip_of(clip)
    return t, grid_table(bits, granularity, t)


@dataclass(frozen=True)
class THC(Codec):
    """Rotate, then round at random onto a grid of integers that all clients share.

    The server adds the integers of all packets (:func:`thc_sum`), in 8 bits as long as
    ``n * granularity <= 255``, and decodes once (:func:`decode_sum`), or sends the sums back as
    they are. For that the clients agree on the norms of the blocks first: each sends
    ``encoder.norm(update)``, the server answers with :func:`agree_norms`, and each calls
    ``encoder.encode(update, norm=agreed)``. Without `norm` a client takes its own, and its packet
    can be decoded, but not added to others. Seed and round must be the same for all clients: they
    give the rotation. What is rounded at random differs by the `client` of the encoder.

    Parameters
    ----------
    bits : {2, 4}
        Width of a code.
    granularity : int
        g: the codes stand for 2**bits of the integers 0 .. g, chosen so that the error for normal
        numbers is least. At least ``2**bits - 1``, which makes the grid uniform (UTHC), at most
        255. A larger g is finer and leaves room for fewer clients in narrow sums.
    clip : float
        Share of the values that may lie outside the grid and are cut, 1e-6 to 0.5. Feedback takes
        care of what is cut.
    block : int
        Coordinates that are rotated together, 256, 512, 1024, 2048 or 4096.
    norms : {"block", "all"}
        One norm a block, 32 bits each, which follows layers of different scale; or one for the
        whole update.

    Raises
    ------
    InvalidInputError
        A value that cannot be used.

    Notes
    -----
    ``bits / 8 + 4 / block`` bytes a coordinate on the wire, norms included, and as many for the
    exchange of norms.

    References
    ----------
    Li et al., "THC: Accelerating Distributed Deep Learning Using Tensor Homomorphic Compression",
    NSDI 2024, arXiv 2302.08545.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import THC, Encoder, agree_norms, decode_sum, thc_sum
    >>> updates = [np.full(1000, float(i)) for i in range(4)]
    >>> encoders = [Encoder(THC(), like=g, client=i) for i, g in enumerate(updates)]
    >>> agreed = agree_norms([e.norm(g) for e, g in zip(encoders, updates)])
    >>> packets = [e.encode(g, norm=agreed) for e, g in zip(encoders, updates)]
    >>> sums, total = thc_sum(packets)
    >>> bool(abs(decode_sum(sums, total, packets[0]).mean() - 1.5) < 0.1)
    True
    """

    bits: int = 4
    granularity: int = 30
    clip: float = 1 / 32
    block: int = 1024
    norms: str = "block"
    name: ClassVar[str] = "thc"
    shared_seed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (2, 4):
            raise InvalidInputError(f"bits: expected 2 or 4, got {self.bits!r}")
        check_integer("granularity", self.granularity, (1 << self.bits) - 1, LARGEST_TABLE)
        if not 1e-6 <= self.clip <= 0.5:
            raise InvalidInputError(f"clip: expected a share from 1e-6 to 0.5, got {self.clip!r}")
        check_block(self.block)
        if self.norms not in ("block", "all"):
            raise InvalidInputError(f"norms: expected block or all, got {self.norms!r}")

    @property
    def table(self) -> tuple[int, ...]:
        """The integers that codes stand for."""
        return _grid(self.bits, self.granularity, self.clip)[1]

    @property
    def clip_at(self) -> float:
        """Where values are cut, in standard deviations of a rotated value."""
        return _grid(self.bits, self.granularity, self.clip)[0]

    def eta(self, numel: int) -> float:
        """Return 0.3 with two bits, 0.5 with four."""
        return eta_of_bits(self.bits)

    def norm(self, job: Job) -> np.ndarray:
        """Return what the client tells the others: the norm of each block, or of all of it.

        float32, (blocks,) or (1,). Reads update and state and changes neither.
        """
        norms = block_norms(job.update, block=self.block, state=job.state)
        if self.norms == "block":
            return norms
        square = np.add.accumulate(np.square(norms, dtype=np.float64))[-1:]
        return np.sqrt(square).astype(np.float32) if norms.size else np.zeros(1, np.float32)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on."""
        norm = job.options.get("norm")
        t, table = _grid(self.bits, self.granularity, self.clip)
        return thc(
            job.update,
            norms=self.norm(job) if norm is None else norm,
            table=table,
            clip=t,
            bits=self.bits,
            block=self.block,
            state=job.state,
            client=job.client,
            **job.header,
        )


def agree_norms(norms: Sequence[Any], quantile: float = 1.0) -> np.ndarray:
    """Return the norms on which clients agree, from what each of them sent.

    Parameters
    ----------
    norms : sequence of arrays
        ``encoder.norm(update)`` of every client, all of one shape.
    quantile : float
        1 takes the largest of each block, so that nothing is cut for its length alone. One client
        can then coarsens the grid of all: a smaller quantile, 0.9 say, is robust against that, and
        cuts the updates of the clients above it, whose feedback keeps the rest.

    Raises
    ------
    InvalidInputError
        No norms, shapes that differ, or numbers that are not finite or negative.
    """
    if not len(norms):
        raise InvalidInputError("norms: expected those of at least one client")
    if not 0 < quantile <= 1:
        raise InvalidInputError(f"quantile: expected 0 < quantile <= 1, got {quantile!r}")
    rows = [np.asarray(x, np.float32) for x in norms]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.shape != rows[0].shape:
            raise InvalidInputError(f"norms[{i}]: expected shape {rows[0].shape}, got {row.shape}")
        if not (np.isfinite(row).all() and (row >= 0).all()):
            raise InvalidInputError(f"norms[{i}]: expected finite numbers >= 0")
    rank = int(np.ceil(quantile * len(rows))) - 1
    return np.sort(np.stack(rows), axis=0)[rank]


def _sections(packet: ParsedPacket) -> dict[int, np.ndarray]:
    found = {}
    for kind in (NORM, CODEBOOK, CODES):
        offset, length = packet.view.section(kind)
        found[kind] = packet._buffer[offset : offset + length]
    return found


def _grid_of(packet: ParsedPacket) -> dict[str, Any]:
    """Return what a packet says of its grid, as the ops take it."""
    h, parts = packet.header, _sections(packet)
    numbers = parts[NORM].view("<f4")
    return {
        "numel": h.numel,
        "block": h.tile,
        "bits": h.bits,
        "seed": h.seed,
        "round": h.round,
        "clip": float(numbers[0]),
        "norms": numbers[1:],
        "table": parts[CODEBOOK].view("<u2"),
    }


def _same_grid(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Return the name of the first thing in which two grids differ, or nothing."""
    return next((name for name in a if not np.array_equal(a[name], b[name])), "")


def thc_sum(
    packets: Sequence[Any], weights: Sequence[int] | None = None, *, lanes: str = "auto"
) -> tuple[np.ndarray, int]:
    """Add THC packets as integers, without decoding them.

    Parameters
    ----------
    packets : sequence of packets or their bytes
        At least one; alike in size, seed, round, norms and grid.
    weights : sequence of int, optional
        1 to 255, one a packet. Integers only, small ones best: a sum reaches
        ``sum(weights) * granularity``.
    lanes : {"auto", "uint8", "uint16", "uint32"}
        Type of the sums; "auto" takes the narrowest that cannot overflow: 8 bits for 8 clients
        with a granularity of 30, 16 bits for 2184.

    Returns
    -------
    sums : (codes,) unsigned integers
        One a coordinate, the last block filled up to a power of two. Sums of disjoint sets of
        clients may be added further, in a type that is wide enough.
    total : int
        Sum of the weights, which belongs to the sums: :func:`decode_sum` needs it.

    Raises
    ------
    InvalidInputError
        No packets, packets that cannot be added, or lanes that could overflow.
    PacketError
        Bytes that are no packet.
    """
    checked = [_as_packet(p, f"packets[{i}]") for i, p in enumerate(packets)]
    if not checked:
        raise InvalidInputError("packets: expected at least one")
    grids = []
    for i, p in enumerate(checked):
        if p.header.codec != "thc" or p.header.flags & wire.FLAG_NONFINITE:
            raise InvalidInputError(
                f"packets[{i}]: expected a packet of the codec thc, got {p.header.codec}"
            )
        grids.append(_grid_of(p))
        if different := _same_grid(grids[0], grids[i]):
            raise InvalidInputError(
                f"packets[{i}]: its {different} is not that of packets[0]; packets are added only "
                "where clients agreed on seed, round, norms and grid"
            )
    grid = grids[0]
    sums = lut_add(
        [_sections(p)[CODES] for p in checked],
        grid["table"].astype(np.int64),
        bits=grid["bits"],
        codes=code_count(grid["numel"], grid["block"]),
        weights=weights,
        lanes=lanes,
    )
    return sums, len(checked) if weights is None else int(sum(int(w) for w in weights))


def decode_sum(sums: np.ndarray, total: int, packet: Any) -> np.ndarray:
    """Return the weighted mean of the updates whose codes are in `sums`.

    For weights of 1 it is the mean of the decoded packets, up to the last rounding.

    Parameters
    ----------
    sums : (codes,) uint8, uint16 or uint32 array
    total : int
        Sum of the weights: of the clients that are in the sums, late ones left out.
    packet : packet or its bytes
        Any of the packets, for norms, grid and rotation.

    Returns
    -------
    (numel,) float32 array

    Raises
    ------
    InvalidInputError, DTypeError
        The arguments do not fit together.
    PacketError
        Bytes that are no packet.
    """
    checked = _as_packet(packet, "packet")
    if checked.header.codec != "thc":
        raise InvalidInputError(
            f"packet: expected a packet of the codec thc, got {checked.header.codec}"
        )
    return thc_mean(sums, total, **_grid_of(checked))
