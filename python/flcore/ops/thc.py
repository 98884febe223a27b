"""THC: norms that clients agree on, codes on the grid they then share, and the way back from sums.

:func:`flcore.ops.lut_add.lut_add` adds the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops import _encode
from flcore.reference import codes_thc as reference
from flcore.reference import feedback, wire, wire_frame, wire_thc
from flcore.reference.codes_thc import Grid

__all__ = ["block_norms", "thc", "thc_mean"]

_TOO_LARGE = "update: finite, but its norm is above 2**120; nothing was encoded"


def _check_block(block: int) -> None:
    if isinstance(block, bool) or block not in wire_thc.BLOCKS:
        raise InvalidInputError(f"block: expected one of {wire_thc.BLOCKS}, got {block!r}")


def _opened(update: Any, state: State | None) -> tuple[_updates.Layout, list[View], int]:
    layout, views, numel = _encode.viewed(update)
    if state is not None:
        state.check(numel)
    return layout, views, numel


def block_norms(
    update: Any, *, block: int, state: State | None = None, variant: str | None = None
) -> np.ndarray:
    """Return the Euclidean norm of every block of u, the update with what the client remembers.

    Sums of squares are float64; reads update and state once and changes nothing.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        float64, float32, float16 or bfloat16, on the CPU; blocks run across layers.
    block : {256, 512, 1024, 2048, 4096}
        Coordinates of a block; the last one may be shorter.
    state : State, optional
        What the client remembers.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (blocks,) float32 array

    Raises
    ------
    InvalidInputError, DTypeError
        The arguments cannot be used.
    NonFiniteError
        u holds a NaN or an infinity, or a norm is above 2**120.
    """
    _check_block(block)
    layout, views, numel = _opened(update, state)
    squares = _variants.choose("block_norms", _encode.device_of(views), variant)(
        views, numel, block, state
    )
    if squares is None:
        raise _encode.nonfinite_error(views, layout)
    norms = np.sqrt(squares)
    if norms.size and norms.max() > wire_thc.LARGEST_NORM:
        raise NonFiniteError(_TOO_LARGE)
    return norms.astype(np.float32)


def _grid(norms: Any, clip: float, table: Any, bits: int, blocks: int) -> Grid:
    """Check what clients share as a reader would."""
    found = np.asarray(norms)
    if found.dtype.kind not in "fiu":
        raise DTypeError(f"norms: expected numbers, got {found.dtype}")
    found = np.ascontiguousarray(found, np.float32)
    if found.shape not in ((1,), (blocks,)):
        raise InvalidInputError(
            f"norms: expected one, or {blocks} for as many blocks, got shape {found.shape}"
        )
    if not (found >= 0).all() or (found > wire_thc.LARGEST_NORM).any():
        raise InvalidInputError("norms: expected numbers from 0 to 2**120")
    if not wire_thc.SMALLEST_CLIP <= clip <= wire_thc.LARGEST_CLIP:
        raise InvalidInputError(f"clip: expected 2**-10 to 16 standard deviations, got {clip!r}")
    values = np.asarray(table, np.int64)
    if values.shape != (1 << bits,):
        raise InvalidInputError(f"table: expected {1 << bits} values, got {values.size}")
    if (
        values[0] != 0
        or values[-1] > wire_thc.LARGEST_TABLE
        or (np.diff(values) <= 0).any()
        or (values + values[::-1] != values[-1]).any()
    ):
        raise InvalidInputError(
            "table: expected values increasing from 0 to at most "
            f"{wire_thc.LARGEST_TABLE}, each with its mirror image"
        )
    shared = found.size == 1 and blocks != 1
    return Grid(found, shared, np.float32(clip), values.astype(np.uint16))


def thc(
    update: Any,
    *,
    norms: Any,
    table: Any,
    clip: float,
    bits: int = 4,
    block: int = 1024,
    state: State | None = None,
    client: int = 0,
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> np.ndarray:
    """Encode an update as codes on the grid that all clients share, and move the state on.

    Packet and state are the same bits for every variant, level and thread count. Reads update and
    state once and writes the new state and bits / 8 bytes a coordinate, as
    :func:`flcore.ops.quantize.quantize` does.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        float64, float32, float16 or bfloat16, on the CPU.
    norms : (blocks,) or (1,) numbers
        What the clients agreed on: a norm for every block, or one for the whole update. Rotated
        values above `clip` standard deviations, which follow from it, are cut.
    table : (2**bits,) integers
        From 0 to at most 255, increasing and symmetric.
    clip : float
        Standard deviations, 2**-10 to 16; rounded to float32.
    bits : {2, 4}
    block : {256, 512, 1024, 2048, 4096}
        Coordinates that are rotated together.
    state : State, optional
        Moved on.
    client : int
        Names this client's own stream of rounding bits, modulo 2**32. Seed and round must be those
        of all clients: they give the signs of the rotation.
    round, seed, epoch, flags, tensors
        Header fields.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (nbytes,) uint8 array
        The packet.

    Raises
    ------
    InvalidInputError, DTypeError
        The arguments cannot be used; nothing is written.
    NonFiniteError
        A value to be sent is a NaN or an infinity; the state is unchanged.

    References
    ----------
    Li et al., "THC: Accelerating Distributed Deep Learning Using Tensor Homomorphic Compression",
    NSDI 2024, arXiv 2302.08545.
    """
    if bits not in (2, 4):
        raise InvalidInputError(f"bits: expected 2 or 4, got {bits!r}")
    _check_block(block)
    _encode.check_header(round=round, seed=seed, epoch=epoch, flags=flags, tensors=tensors)
    layout, views, numel = _opened(update, state)
    grid = _grid(norms, clip, table, bits, -(-numel // block))
    packet = _variants.choose("thc", _encode.device_of(views), variant)(
        views,
        grid,
        state,
        {"bits": bits, "block": block, "seed": seed, "round": round, "client": client % 2**32},
        {
            "epoch": epoch,
            "flags": flags,
            "source_dtype": _encode.source_dtype(views),
            "tensors": tensors,
        },
    )
    if packet is None:
        raise _encode.nonfinite_error(views, layout)
    return packet


def thc_mean(
    sums: np.ndarray,
    total: int,
    *,
    numel: int,
    block: int,
    norms: Any,
    table: Any,
    clip: float,
    bits: int = 4,
    seed: int = 0,
    round: int = 0,
    variant: str | None = None,
) -> np.ndarray:
    """Return the weighted mean of the updates whose codes were added.

    One transform of integers, exact until the last rounding: for weights of 1 the mean of the
    decoded packets.

    Parameters
    ----------
    sums : (codes,) uint8, uint16 or uint32 array
        Sums of :func:`flcore.ops.lut_add.lut_add`, the last block filled up to a power of two.
    total : int
        Sum of the weights: the number of packets if all are 1.
    numel, block, norms, table, clip, bits, seed, round
        What the packets say.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (numel,) float32 array

    Raises
    ------
    InvalidInputError, DTypeError
        The arguments do not fit together, or ``2 * total * table[-1] * block`` exceeds 2**31.
    """
    _check_block(block)
    grid = _grid(norms, clip, table, bits, -(-numel // block))
    if not isinstance(sums, np.ndarray) or sums.dtype.name not in ("uint8", "uint16", "uint32"):
        got = sums.dtype if isinstance(sums, np.ndarray) else type(sums).__name__
        raise DTypeError(f"sums: expected an array of uint8, uint16 or uint32, got {got}")
    want = wire_thc.code_count(numel, block)
    if sums.shape != (want,):
        raise InvalidInputError(f"sums: expected shape ({want},), got {sums.shape}")
    g = int(grid.table[-1])
    if isinstance(total, bool) or not 1 <= total <= 2**31 // (2 * block * g):
        raise InvalidInputError(
            f"total: expected 1 to {2**31 // (2 * block * g)} with this table and block, "
            f"got {total}"
        )
    if want and int(sums.max()) > total * g:
        raise InvalidInputError(
            f"sums: expected at most total * {g} = {total * g}, got {int(sums.max())}"
        )
    return _variants.choose("thc_mean", "cpu", variant)(
        np.ascontiguousarray(sums), int(total), grid, numel, block, seed, round
    )


# ---- variants ----------------------------------------------------------------------------------


def _norms_cpu(
    views: Sequence[View], numel: int, block: int, state: State | None
) -> np.ndarray | None:
    squares = np.empty(-(-numel // block))
    finite = _native.core.block_norms(
        **_encode.native_source(views, state or State()),
        block=block,
        squares=_arrays.address(squares),
    )
    return squares if finite else None


def _norms_reference(
    views: Sequence[View], numel: int, block: int, state: State | None
) -> np.ndarray | None:
    form = feedback.form(_encode.flat_float32(views), state or State())
    return reference.block_squares(form.u, block) if form.finite else None


def _thc_cpu(
    views: Sequence[View],
    grid: Grid,
    state: State | None,
    options: dict[str, int],
    fields: dict[str, Any],
) -> np.ndarray | None:
    numel, bits, block = sum(v.numel for v in views), options["bits"], options["block"]
    codes = -(-wire_thc.code_count(numel, block) * bits // 8)
    numbers = np.concatenate([[grid.clip], grid.norms]).astype("<f4")
    table = grid.table.astype("<u2")
    sections = [
        (wire_frame.NORM, 4, numbers.nbytes),
        (wire_frame.CODEBOOK, 2, table.nbytes),
        (wire_frame.CODES, 1, codes),
    ]
    frame = _native.core.PacketFrame(
        codec=wire.CODECS["thc"],
        numel=numel,
        value_dtype=wire_frame.VALUE_CODES["float32"],
        form=int(grid.shared),
        bits=bits,
        tile=block,
        source_dtype=wire.SOURCE_DTYPES[fields["source_dtype"]],
        flags=fields["flags"] | wire.FLAG_CHECKSUM,
        round=options["round"],
        seed=options["seed"],
        epoch=fields["epoch"],
        sections=sections,
        tensors=fields["tensors"],
    )
    out = np.empty(frame.nbytes, np.uint8)
    for kind, array in ((wire_frame.NORM, numbers), (wire_frame.CODEBOOK, table)):
        at = frame.offset(kind)
        out[at : at + array.nbytes] = array.view(np.uint8)
    finite = _native.core.thc(
        **_encode.native_source(views, state or State()),
        in_place=state is not None and state.in_place,
        norms=_arrays.address(grid.norms),
        shared=grid.shared,
        clip=float(grid.clip),
        table=grid.table.tolist(),
        codes=_arrays.address(out) + frame.offset(wire_frame.CODES),
        **options,
    )
    if not finite:
        return None
    frame.seal(_arrays.address(out))
    if state is not None:
        state.commit()
    return out


def _thc_reference(
    views: Sequence[View],
    grid: Grid,
    state: State | None,
    options: dict[str, int],
    fields: dict[str, Any],
) -> np.ndarray | None:
    flat = _encode.flat_float32(views)
    packet = reference.quantize(flat, grid, state=state, **options, **fields)
    return None if packet is None else np.frombuffer(bytearray(packet), np.uint8)


def _mean_cpu(
    sums: np.ndarray, total: int, grid: Grid, numel: int, block: int, seed: int, round: int
) -> np.ndarray:
    out = np.empty(numel, np.float32)
    _native.core.lut_decode(
        numel=numel,
        block=block,
        lane_bytes=sums.itemsize,
        sums=_arrays.address(sums),
        total=total,
        g=int(grid.table[-1]),
        norms=_arrays.address(grid.norms),
        shared=grid.shared,
        clip=float(grid.clip),
        seed=seed,
        round=round,
        out=_arrays.address(out),
        threads=_native.threads_for(numel),
    )
    return out


def _mean_reference(
    sums: np.ndarray, total: int, grid: Grid, numel: int, block: int, seed: int, round: int
) -> np.ndarray:
    return reference.decode(sums, grid, numel, block, total, seed=seed, round=round)


_variants.add("block_norms", "cpu", lambda: _norms_cpu, _variants.cpu_only)
_variants.add("block_norms", "reference", lambda: _norms_reference, _variants.cpu_only)
_variants.add("thc", "cpu", lambda: _thc_cpu, _variants.cpu_only)
_variants.add("thc", "reference", lambda: _thc_reference, _variants.cpu_only)
_variants.add("thc_mean", "cpu", lambda: _mean_cpu, _variants.cpu_only)
_variants.add("thc_mean", "reference", lambda: _mean_reference, _variants.cpu_only)
