"""Codes of buckets with feedback, from an update to a packet: validation and choice of variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import InvalidInputError, PacketError
from flcore.ops import _encode
from flcore.reference import quantize as reference
from flcore.reference import wire, wire_bucket, wire_frame
from flcore.reference.buckets import Settings

__all__ = ["MEASURES", "quantize"]

MEASURES: dict[str, dict[str, int]] = {
    "sign": {"mean": 0, "l2": 1},
    "uniform": {"max": 0, "l2": 1},
    "ternary": {"max": 0},
    "affine": {"ends": 0, "two_means": 2},
    "rotated": {"unbiased": 0, "mse": 1},
}
"""How a codec can find its scales, by name; the first is the default."""

NEAR = 2048
"""Coordinates that stay in the fast caches with all that is made of them; whole bytes of codes."""

MAX_NUMEL = 2**35
"""Coordinates that have random bits of their own."""


def quantize(
    update: Any,
    *,
    codec: str,
    bits: int,
    bucket: int,
    form: int = 0,
    values: str = "float32",
    rounding: str = "nearest",
    measure: str | None = None,
    levels: int | None = None,
    clip: float = 0.0,
    state: State | None = None,
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> np.ndarray:
    """Cut an update into buckets, encode each, move the state on; one pass over memory.

    u is the update with what the client remembers, and D what a receiver decodes
    (:class:`flcore._state.State`). Packet and state are the same bits for every variant, level and
    thread count. Reads update and state once and writes the new state and bits / 8 bytes a
    coordinate: 12 + bits / 8 bytes with e, 20 with e and h, 4 without state. State without spares
    is updated in place and read once more, to see that all of it is finite.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        float64, float32, float16 or bfloat16; state on the same device. Layers are read where they
        lie (on a GPU several are first put together); buckets run across layers.
    codec : str
        A codec of buckets: dense, sign, uniform, affine, natural, minifloat, ternary, rotated.
    bits, form : int
        Width of a code and variety of the codec, as docs/packet.md says.
    bucket : int
        Coordinates of a bucket, 1 to 65,536; the last one may be shorter.
    values : str
        Type of the scales: "float32" or "bfloat16" (rounded up); "e8m0" for minifloat.
    rounding : {"nearest", "stochastic"}
        Half to even, or with probability by distance: unbiased, with random bits of stream
        (seed, round).
    measure : str, optional
        How scales are found, one of ``MEASURES[codec]``.
    levels : int, optional
        Uniform codec: positive levels in use, 1 to 2**(bits - 1) - 1, which is the default.
    clip : float
        Ternary codec: magnitudes above `clip` root mean squares of the bucket are cut; 0: none.
    state : State, optional
        Moved on.
    round, seed, epoch, flags : int
        Header fields; FLAG_CHECKSUM is always set.
    tensors : bytes
        A tensor table of `flcore.reference.wire_writer.pack_tensors`, or nothing.
    variant : {"reference", "cpu", "cuda", "triton"}, optional
        Which implementation runs; "triton" has the codecs sign, uniform, affine, ternary and
        minifloat with buckets up to 8192, "cuda" has rotated.

    Returns
    -------
    (nbytes,) uint8 array
        The packet.

    Raises
    ------
    InvalidInputError
        Sizes or options that cannot be used; nothing is written.
    DTypeError
        A layer or a state of a type that cannot be read.
    NonFiniteError
        A value to be sent is a NaN or an infinity; the state is unchanged.

    References
    ----------
    Alistarh et al., "QSGD", NeurIPS 2017, arXiv 1610.02132. Karimireddy et al., "Error Feedback
    Fixes SignSGD", ICML 2019, arXiv 1901.09847. Wen et al., "TernGrad", NeurIPS 2017,
    arXiv 1705.07878.
    """
    layout, views, numel = _encode.viewed(update)
    if numel > MAX_NUMEL:
        raise InvalidInputError(f"update: expected at most 2**35 coordinates, got {numel}")
    fields = {"round": round, "seed": seed, "epoch": epoch, "flags": flags}
    _encode.check_header(**fields, tensors=tensors)
    if rounding not in ("nearest", "stochastic"):
        raise InvalidInputError(f"rounding: expected nearest or stochastic, got {rounding!r}")
    for name, x, most in (("bits", bits, 32), ("form", form, 255), ("bucket", bucket, 65_536)):
        if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x <= most:
            raise InvalidInputError(f"{name}: expected an integer up to {most}, got {x!r}")
    settings = Settings(
        codec=codec,
        bits=bits,
        bucket=bucket,
        form=form,
        values=values,
        stochastic=rounding == "stochastic",
        measure=_measure(codec, bits, measure),
        levels=_levels(codec, bits, levels),
        clip=_clip(clip),
        seed=seed,
        round=round,
    )
    _check_settings(settings, numel)
    device = _encode.device_of(views)
    if state is not None:
        state.check(numel, device)
    op = "rotate" if codec == "rotated" else "quantize"  # they have other variants on a GPU
    packet = _variants.choose(op, device, variant)(
        views,
        settings,
        state,
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


def _measure(codec: str, bits: int, measure: str | None) -> int:
    known = MEASURES.get(codec, {"default": 0})
    name = next(iter(known)) if measure is None else measure
    if name not in known:
        raise InvalidInputError(f"measure: expected one of {', '.join(known)}, got {measure!r}")
    if name == "two_means" and bits != 1:
        raise InvalidInputError(f"measure: two_means has 1 bit a code, got bits={bits}")
    return known[name]


def _levels(codec: str, bits: int, levels: int | None) -> int:
    most = (1 << max(bits - 1, 0)) - 1
    if codec != "uniform":
        if levels is not None:
            raise InvalidInputError(f"levels: the codec {codec} has none, got {levels!r}")
        return 0
    if levels is None:
        return most
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= most:
        raise InvalidInputError(f"levels: expected 1 to {most} with {bits} bits, got {levels!r}")
    return levels


def _clip(clip: float) -> float:
    if not 0 <= clip < float("inf"):
        raise InvalidInputError(f"clip: expected a number >= 0, got {clip!r}")
    return float(clip)


def _check_settings(s: Settings, numel: int) -> None:
    """Raise unless a header with these settings is one that readers accept."""
    if s.codec not in wire_bucket.CODEC_NAMES:
        raise InvalidInputError(
            f"codec: expected one of {', '.join(wire_bucket.CODEC_NAMES)}, got {s.codec!r}"
        )
    if s.values not in wire_frame.VALUE_CODES:
        raise InvalidInputError(
            f"values: expected one of {', '.join(wire_frame.VALUE_CODES)}, got {s.values!r}"
        )
    header = wire.Header(
        codec=s.codec,
        numel=numel,
        payload_bytes=0,
        round=s.round,
        seed=s.seed,
        epoch=0,
        source_dtype="float32",
        value_dtype=s.values,
        form=s.form,
        bits=s.bits,
        tile=s.bucket,
        flags=0,
        crc=0,
    )
    try:
        wire_bucket.RULES.header(header)
    except PacketError as error:
        raise InvalidInputError(str(error).removeprefix("packet: ")) from None
    scales = wire_bucket.scales_per_bucket(s.codec)
    element = wire_frame.VALUE_BYTES[wire_frame.VALUE_CODES[s.values]]
    nbytes = scales * element + wire_bucket.bucket_bytes(s.codec, s.form, s.bits, s.bucket)
    if nbytes > 8 * s.bucket:  # no reader would take the packet
        raise InvalidInputError(
            f"bucket: expected buckets of at most 8 bytes a coordinate, got {nbytes} for {s.bucket}"
        )


# ---- variants ----------------------------------------------------------------------------------


def packet_frame(s: Settings, numel: int, fields: dict[str, Any]) -> Any:
    """Return the frame of a packet of these settings; `fields`: what its header says besides."""
    count = wire_bucket.scales_per_bucket(s.codec) * -(-numel // s.bucket)
    code = wire_frame.VALUE_CODES[s.values]
    sections = [
        (wire_frame.CODES, 1, wire_bucket.code_bytes(s.codec, s.form, s.bits, s.bucket, numel))
    ]
    if wire_bucket.scales_per_bucket(s.codec):
        element = wire_frame.VALUE_BYTES[code]
        sections.insert(0, (wire_frame.SCALES, element, element * count))
    return _native.core.PacketFrame(
        codec=wire.CODECS[s.codec],
        numel=numel,
        value_dtype=code,
        form=s.form,
        bits=s.bits,
        tile=s.bucket,
        source_dtype=wire.SOURCE_DTYPES[fields["source_dtype"]],
        flags=fields["flags"] | wire.FLAG_CHECKSUM,
        round=s.round,
        seed=s.seed,
        epoch=fields["epoch"],
        sections=sections,
        tensors=fields["tensors"],
    )


def _near_bucket(s: Settings) -> int:
    """Return the bucket that the kernel works in: codes without scales are the same in any."""
    return s.bucket if wire_bucket.scales_per_bucket(s.codec) or s.bucket % NEAR else NEAR


def _cpu(
    views: Sequence[View], s: Settings, state: State | None, fields: dict[str, Any]
) -> np.ndarray | None:
    frame = packet_frame(s, sum(v.numel for v in views), fields)
    source = _encode.native_source(views, state or State())
    out = np.empty(frame.nbytes, np.uint8)
    start = _arrays.address(out)
    finite = _native.core.quantize(
        **source,
        in_place=state is not None and state.in_place,
        codec=wire.CODECS[s.codec],
        form=s.form,
        bits=s.bits,
        bucket=_near_bucket(s),
        scale_dtype=wire_frame.VALUE_CODES[s.values],
        measure=s.measure,
        stochastic=s.stochastic,
        levels=s.levels,
        clip=s.clip,
        seed=s.seed,
        round=s.round,
        scales=start + frame.offset(wire_frame.SCALES),
        codes=start + frame.offset(wire_frame.CODES),
    )
    if not finite:
        return None
    frame.seal(start, threads=source["threads"])
    if state is not None:
        state.commit()
    return out


def _reference(
    views: Sequence[View], s: Settings, state: State | None, fields: dict[str, Any]
) -> np.ndarray | None:
    packet = reference.quantize(_encode.flat_float32(views), s, state=state, **fields)
    return None if packet is None else np.frombuffer(bytearray(packet), np.uint8)


_variants.add("quantize", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("quantize", "reference", lambda: _reference, _variants.cpu_only)
_variants.add(
    "quantize",
    "triton",
    _variants.lazy("flcore.ops._quantize_triton", "quantize"),
    _variants.needs_triton,
)
_variants.add("rotate", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("rotate", "reference", lambda: _reference, _variants.cpu_only)
_variants.add(
    "rotate", "cuda", _variants.lazy("flcore.ops._rotate_cuda", "quantize"), _variants.needs_cuda
)
