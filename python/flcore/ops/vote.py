"""Majority vote of clients that sent packed signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.decode import ParsedPacket
from flcore.reference import wire_frame as wire
from flcore.reference.vote import FORMS
from flcore.reference.wire_bucket import LARGEST

__all__ = ["FORMS", "vote", "vote_packet"]

BUCKET = wire.MAX_BUCKET  # coordinates that share the scale of a vote: as many as a bucket can hold


def vote(
    packets: Sequence[ParsedPacket],
    weights: Sequence[float] | None = None,
    *,
    form: str = "signs",
    out: np.ndarray | None = None,
    variant: str | None = None,
) -> np.ndarray:
    r"""Vote of n clients on the sign of every coordinate.

    Without weights (or with equal ones) the bits are counted where they lie, 128 to 512 coordinates
    at once: n/8 bytes read and 1/8 (or 4) written a coordinate. With weights the votes
    ``V_j = sum_i w_i s_ij`` are added in float32, in list order. The scales of the packets do not
    matter, and packets of weight 0 are not read.

    Parameters
    ----------
    packets : sequence of ParsedPacket
        Of codec sign, alike in the number of coordinates d; buckets may differ.
    weights : (n,) numbers >= 0, optional
        Not all zero.
    form : {"signs", "bits", "sum"}
        -1, 0 for a tie, +1, as float32 (d,); packed, bit 1 = negative and a tie positive, as uint8
        (ceil(d / 8),) with coordinate j in bit ``j % 8`` of byte ``j // 8`` and bits beyond d zero;
        or V itself, float32 (d,).
    out : array, optional
        Where the result goes: NumPy, contiguous, of that shape and dtype.
    variant : {"reference", "cpu"}, optional
        Which implementation runs; by default the best.

    Returns
    -------
    array
        `out` if it was given.

    Raises
    ------
    InvalidInputError
        No packets, other codecs, numbers of coordinates that differ, weights or `out` that cannot
        be used. Nothing is written.
    DTypeError
        Something is not a packet, or `out` has another dtype.

    References
    ----------
    Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018, and
    "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019.
    """
    if form not in FORMS:
        raise InvalidInputError(f"form: expected one of {FORMS}, got {form!r}")
    chosen, w, numel = _check(packets, weights)
    shape, dtype = ((numel + 7) // 8, np.uint8) if form == "bits" else (numel, np.float32)
    if out is None:
        out = np.empty(shape, dtype)
    elif not isinstance(out, np.ndarray) or out.dtype != dtype:
        got = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise DTypeError(f"out: expected a NumPy array of {np.dtype(dtype)}, got {got}")
    elif out.shape != (shape,) or not (out.flags.c_contiguous and out.flags.writeable):
        raise InvalidInputError(
            f"out: expected a contiguous, writable array of shape ({shape},), got {out.shape}"
        )
    if form != "sum" and w is not None and len(set(w)) == 1:
        w = None  # counted: ties are then exact
    if numel:
        _variants.choose("vote", "cpu", variant)(chosen, w, form, out)
    return out


def vote_packet(
    packets: Sequence[ParsedPacket],
    weights: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> np.ndarray:
    """Return the vote as a packet of codec sign, for the way down: (nbytes,) uint8.

    One bit a coordinate; it decodes to `scale` times -1 or +1, ties to +1.

    Parameters
    ----------
    packets, weights, variant
        As for `vote`.
    scale : float
        Finite, >= 0.
    round, seed, epoch, flags, tensors
        Header fields and tensor table.

    Raises
    ------
    InvalidInputError, DTypeError
        As `vote`; also a scale that cannot be used.
    """
    numel = _check(packets, weights)[2]
    with np.errstate(over="ignore"):
        value = np.float32(scale)
    if not 0 <= value <= LARGEST:
        raise InvalidInputError(f"scale: expected a finite number >= 0, got {scale!r}")
    count = (numel + 7) // 8
    frame = _native.core.PacketFrame(
        codec=wire.CODECS["sign"],
        numel=numel,
        value_dtype=wire.VALUE_CODES["float32"],
        form=0,
        bits=1,
        tile=BUCKET,
        source_dtype=wire.SOURCE_DTYPES["float32"],
        flags=flags,
        round=round,
        seed=seed,
        epoch=epoch,
        sections=[(wire.SCALES, 4, -(-numel // BUCKET) * 4), (wire.CODES, 1, count)],
        tensors=tensors,
    )
    packet = np.empty(frame.nbytes, np.uint8)
    scales = packet[frame.offset(wire.SCALES) :][: -(-numel // BUCKET) * 4]
    scales.view("<f4")[:] = value
    codes = packet[frame.offset(wire.CODES) :][:count]
    vote(packets, weights, form="bits", out=codes, variant=variant)
    frame.seal(_arrays.address(packet))
    return packet


def _check(
    packets: Sequence[ParsedPacket], weights: Any
) -> tuple[list[ParsedPacket], list[float] | None, int]:
    """Return the packets that are read, their weights and d."""
    packets = list(packets)
    if not packets:
        raise InvalidInputError("packets: expected at least one, got an empty list")
    for i, p in enumerate(packets):
        if not isinstance(p, ParsedPacket):
            raise DTypeError(f"packets[{i}]: expected a packet, got {type(p).__name__}")
        if p.header.codec != "sign":
            raise InvalidInputError(
                f"packets[{i}]: expected the codec sign, which can be counted, got {p.header.codec}"
            )
        if p.header.numel != packets[0].header.numel:
            raise InvalidInputError(
                f"packets[{i}]: holds {p.header.numel} coordinates, packets[0] holds "
                f"{packets[0].header.numel}"
            )
    numel = packets[0].header.numel
    if weights is None:
        return packets, None, numel
    w = _updates.parse_weights(weights, len(packets), signed=False)
    chosen = [p for p, q in zip(packets, w, strict=True) if q]
    return chosen, [q for q in w if q], numel


# ---- variants ----------------------------------------------------------------------------------


def _cpu(
    packets: Sequence[ParsedPacket], weights: list[float] | None, form: str, out: np.ndarray
) -> None:
    """csrc/cpu/vote.isa.cpp."""
    numel = packets[0].header.numel
    work = numel * len(packets) // (1 if weights or form == "sum" else 32)
    _native.core.vote(
        [p.view for p in packets],
        weights or [],
        FORMS.index(form),
        _arrays.address(out),
        numel,
        _native.threads_for(work),
    )


def _reference(
    packets: Sequence[ParsedPacket], weights: list[float] | None, form: str, out: np.ndarray
) -> None:
    from flcore.reference.vote import vote as reference

    bodies: list[Any] = [p.body() for p in packets]
    rows = [(b.codes, p.header.tile) for b, p in zip(bodies, packets, strict=True)]
    out[:] = reference(rows, packets[0].header.numel, weights, form)


_variants.add("vote", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("vote", "reference", lambda: _reference, _variants.cpu_only)
