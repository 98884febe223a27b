"""Rules that find the scales and codes of low-bit weights; the definition, in NumPy.

Every operation is rounded once, in the type of the weights that come in: float32 gives the bits of
the kernels, float64 the numbers of the papers. Scales are rounded to their storage type before
codes are formed, unless the rule says otherwise.

===========  =============================================================================
rule         scale s, and codes before the limits 0 .. 2^b - 1
===========  =============================================================================
centred      s = absmax / ((2^b - 1) / 2);  q = rne(w / s) + 2^(b-1)             (Marlin)
narrow       s = absmax / (2^(b-1) - 1);  q = rne(w / s) + 2^(b-1), at least 1
q8_0         as narrow, halves away from 0, q formed with the unrounded s          (ggml)
q4_0         s = m / -2^(b-1), m the value of largest magnitude with its sign;
             q = trunc(w (1 / s) + 2^(b-1) + 1/2) with the unrounded s             (ggml)
min_max      s = (mx - mn) / (2^b - 1); with integer zeros Z = -rne(mn / s) and
             q = rne(w / s) + Z (AWQ); with floating zeros zero = mn + 2^(b-1) s and
             q = rne((w - zero) / s) + 2^(b-1)                      (torch's tinygemm)
absmax       s = absmax / (largest level);  q = the level nearest to w / s        (QLoRA)
floor        s = 2^(floor(log2 absmax) - emax)                                  (OCP MX)
ceil         s = 2^(ceil(log2 absmax) - emax)
rceil        s = 2^ceil(log2(absmax / largest level))
even         as floor, with the mantissa of absmax rounded to that of a level first
===========  =============================================================================

rne rounds halves to even. Sources: Lin et al., "AWQ", arXiv 2306.00978; Frantar et al., "MARLIN",
arXiv 2408.11743; Dettmers et al., "QLoRA", arXiv 2305.14314; OCP Microscaling Formats 1.0; the
formats Q4_0 and Q8_0 are those of the library ggml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flcore.reference import weight_quant as wq

__all__ = [
    "RULES",
    "Rule",
    "minifloat_codes",
    "nearest_codes",
    "quantize",
    "round_scales",
    "scale_values",
]

# enum WeightRule in csrc/api.h
RULES = (
    "centred",
    "narrow",
    "q8_0",
    "q4_0",
    "min_max",
    "absmax",
    "floor",
    "ceil",
    "rceil",
    "even",
)
SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
LANES = 16  # of a group's sum of squared errors


@dataclass(frozen=True)
class Rule:
    """What a quantiser needs to know.

    Attributes
    ----------
    bits, kind, group : int
        As in `weight_quant`.
    rule : str
        One of `RULES`.
    scale_dtype : {"float32", "float16", "bfloat16", "float64"}
        Storage type of scales and floating zeros; kernels do not have float64.
    table : array (16,) float32, optional
        Levels of the codes.
    force_zero : bool
        min_max: the range of a group includes 0.
    range_floor : float
        min_max: the least mx - mn.
    factors : sequence of float
        Candidates: the range, or the scale of the rules that give powers of two, is multiplied by
        each, and the one with the least sum of squared errors is kept, the first one among equals.
    tensor : bool
        All rows share one scale; `group` is at least k. Errors of rows, float32, are added in
        float64 from the first row on.
    """

    bits: int
    kind: int
    group: int
    rule: str
    scale_dtype: str = "float32"
    table: np.ndarray | None = None
    force_zero: bool = True
    range_floor: float = 0.0
    factors: Sequence[float] = (1.0,)
    tensor: bool = False

    @property
    def largest(self) -> float:
        """Largest magnitude of a level."""
        return float(np.abs(wq.code_levels(self.bits, self.kind, self.table)).max())

    @property
    def emax(self) -> int:
        """Exponent of the largest level."""
        return int(np.frexp(self.largest)[1]) - 1

    @property
    def mantissa(self) -> int:
        """Bits of a level's mantissa, for the rule "even"."""
        return {wq.E4M3: 3, wq.E5M2: 2}.get(self.kind, 1)


def round_scales(s: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a storage type, to nearest even; the result keeps the type of `s`."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return s.astype(np.float16).astype(s.dtype)
    if dtype == "bfloat16":
        return scale_values(scale_bits(s, dtype), dtype).astype(s.dtype)
    return s.astype(dtype).astype(s.dtype)


def scale_bits(s: np.ndarray, dtype: str) -> np.ndarray:
    """Return scales in their storage type; bfloat16 as uint16."""
    if dtype == "bfloat16":
        u = np.ascontiguousarray(s, np.float32).view(np.uint32)
        return ((u + np.uint32(0x7FFF) + ((u >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return s.astype(dtype)


def scale_values(s: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored scales as float32 numbers; the inverse of `scale_bits`."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(s).astype(np.uint32) << 16).view(np.float32)
    return s.astype(np.float32)


def nearest_codes(v: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the codes of the levels nearest to `v`, the even one of two that are equally near.

    Levels are compared through the midpoints of neighbours, rounded to float32.
    """
    order, above = thresholds(table)
    return order[(v[..., None] > above).sum(axis=-1)]


def thresholds(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes in ascending order of their levels, and 15 float32 limits between them.

    A value above j limits gets the code `order[j]`. Of two codes with one level the lower is used.
    """
    table = np.asarray(table, np.float32)
    order = np.argsort(table, kind="stable").astype(np.uint8)
    levels = table[order].astype(np.float64)
    middle = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    up = (order[1:] % 2 == 0) & (order[:-1] % 2 == 1)  # a tie goes to the upper, even code
    limits = np.where(up, np.nextafter(middle, np.float32(-np.inf)), middle)
    same = levels[1:] == levels[:-1]
    for j in np.flatnonzero(same):  # never reached: the next code of the same level
        order[j + 1] = order[j]
    return order, limits.astype(np.float32)


def minifloat_codes(v: np.ndarray, kind: int) -> np.ndarray:
    """Return the bytes of the nearest FP8 numbers, ties to even, saturating."""
    mantissa, emin, top = (3, -6, 0x7E) if kind == wq.E4M3 else (2, -14, 0x7B)
    levels = wq.code_levels(8, kind)[: top + 1]
    magnitude = np.minimum(np.abs(v).astype(np.float64), levels[top])
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, emin)
    code = np.rint(np.ldexp(magnitude, mantissa - exponent)) + (exponent - emin) * 2.0**mantissa
    return (np.minimum(code, top).astype(np.uint8)) | (np.signbit(v).astype(np.uint8) << 7)


# ---- one group size, whole groups: w (n, G, g) with NaN where a row has no value ----------------


def _scales(w: np.ndarray, r: Rule, factor: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Return unrounded scales (n, G) and the lower ends of the ranges (min_max)."""
    real = w.dtype.type
    factor = real(factor)
    half = 2.0 ** (r.bits - 1)
    if r.rule == "min_max":
        least, most = np.nanmin(w, axis=-1), np.nanmax(w, axis=-1)
        if r.tensor:
            least, most = np.full_like(least, least.min()), np.full_like(most, most.max())
        if r.force_zero:
            least, most = np.minimum(least, 0), np.maximum(most, 0)
        least, most = least * factor + real(0), most * factor  # -0 becomes 0
        width = np.maximum(most - least, real(r.range_floor))
        return width / real(2**r.bits - 1), least
    top = np.nanmax(np.abs(w), axis=-1)
    if r.rule == "q4_0":
        at = np.nanargmax(np.abs(w), axis=-1)  # the first of equals
        signed = np.take_along_axis(w, at[..., None], axis=-1)[..., 0]
        if r.tensor:
            signed = np.full_like(signed, signed[np.argmax(top)])
        return signed * factor / real(-half), None
    if r.tensor:
        top = np.full_like(top, top.max())
    if r.rule in ("floor", "ceil", "rceil", "even"):
        if r.rule == "even":
            step = 23 - r.mantissa - 1
            bits = top.astype(np.float32).view(np.uint32) + np.uint32(1 << step)
            bits = np.minimum(bits & np.uint32(0x7F800000), np.uint32(0x7F000000))
            top = bits.view(np.float32).astype(w.dtype)
        if r.rule == "rceil":
            top = top / real(r.largest)
        fraction, exponent = np.frexp(top)
        exponent = exponent - 1
        if r.rule in ("ceil", "rceil"):
            exponent = exponent + (fraction > 0.5)
        if r.rule != "rceil":
            exponent = exponent - r.emax
        s = np.ldexp(real(1), np.clip(exponent, -126, 127)) * factor
        return np.where(top > 0, s, 0).astype(w.dtype), None
    top = top * factor
    if r.rule == "centred":
        return top / real((2**r.bits - 1) / 2), None
    if r.rule == "absmax":
        return top / real(r.largest), None
    return top / real(half - 1), None


def _codes(
    w: np.ndarray, r: Rule, exact: np.ndarray, least: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return codes (n, G, g), scales (n, G) and zeros (n, G) or None."""
    real, most = w.dtype.type, 2**r.bits - 1
    half = real(2 ** (r.bits - 1))
    tiny = real(SMALLEST[r.scale_dtype])
    scales = round_scales(exact, r.scale_dtype)
    scales = np.where((scales == 0) & (exact != 0), np.copysign(tiny, exact), scales)
    one = np.where(scales == 0, real(1), scales)[..., None]
    if r.rule == "min_max" and r.kind == wq.INT:
        assert least is not None
        zeros = np.clip(-np.rint(least / one[..., 0]), 0, most)
        q = np.rint(w / one) + zeros[..., None]
    elif r.rule == "min_max":
        assert least is not None
        zeros = round_scales(least + half * scales, r.scale_dtype)
        q = np.rint((w - zeros[..., None]) / one) + half
    else:
        zeros = None
        if r.kind == wq.TABLE:
            assert r.table is not None
            q = nearest_codes((w / one).astype(np.float32), r.table)
        elif r.kind != wq.INT:
            q = minifloat_codes(w / one, r.kind)
        elif r.rule == "q4_0":
            inverse = np.where(exact == 0, real(0), real(1) / np.where(exact == 0, real(1), exact))
            q = np.trunc(np.maximum(w * inverse[..., None] + (half + real(0.5)), 0))
        elif r.rule == "q8_0":
            v = w / np.where(exact == 0, real(1), exact)[..., None]
            whole = np.trunc(v)
            away = np.where(np.abs(v - whole) >= 0.5, np.copysign(real(1), v), real(0))
            q = np.maximum(whole + away + half, 1)
        else:
            q = np.maximum(np.rint(w / one) + half, 1 if r.rule == "narrow" else 0)
    q = np.clip(np.nan_to_num(q), 0, most).astype(np.uint8)
    return q, scales, zeros


def _errors(
    w: np.ndarray, q: np.ndarray, s: np.ndarray, z: np.ndarray | None, r: Rule
) -> np.ndarray:
    """Return the sum of squared errors of each group (n, G), in 16 lanes and a tree."""
    levels = wq.code_levels(r.bits, r.kind, r.table).astype(w.dtype)[q]
    if r.kind == wq.INT:
        levels = levels - (w.dtype.type(2 ** (r.bits - 1)) if z is None else z[..., None])
    values = levels * s[..., None]
    if r.kind == wq.FLOAT_ZERO:
        assert z is not None
        values = values + z[..., None]
    d = np.where(np.isnan(w), 0, w - values)  # where the row has ended nothing is added
    lanes = np.zeros((*w.shape[:2], LANES), w.dtype)
    for at in range(0, w.shape[-1], LANES):
        part = d[..., at : at + LANES]
        lanes = lanes + part * part
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    errors = lanes[..., 0]
    if r.tensor:
        return np.full_like(errors, np.cumsum(errors, dtype=np.float64)[-1], np.float64)
    return errors


def quantize(w: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Quantise a finite weight (n, k) of float32 or float64.

    Returns
    -------
    codes : (n, k) uint8
    scales : (n, G)
        Numbers of the storage type, in the type of `w`.
    zeros : (n, G) or None
        uint8, or as the scales.
    """
    n, k = w.shape
    count = wq.groups(k, rule.group)
    padded = np.full((n, count * rule.group), np.nan, w.dtype)
    padded[:, :k] = w
    tiles = padded.reshape(n, count, rule.group)
    if n * k == 0:
        empty = np.zeros((n, count), w.dtype)
        zeros = {wq.INT: empty.astype(np.uint8), wq.FLOAT_ZERO: empty}.get(rule.kind)
        return np.zeros((n, k), np.uint8), empty, zeros if rule.rule == "min_max" else None
    best: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None
    least = np.zeros(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for factor in rule.factors:
            q, s, z = _codes(tiles, rule, *_scales(tiles, rule, factor))
            error = _errors(tiles, q, s, z, rule) if len(rule.factors) > 1 else least
            if best is None:
                best, least = (q, s, z), error
                continue
            better = error < least
            least = np.where(better, error, least)
            best = (
                np.where(better[..., None], q, best[0]),
                np.where(better, s, best[1]),
                None if z is None or best[2] is None else np.where(better, z, best[2]),
            )
    assert best is not None
    q, s, z = best
    if z is not None and rule.kind == wq.INT:
        z = z.astype(np.uint8)
    return q.reshape(n, -1)[:, :k].copy(), s, z
