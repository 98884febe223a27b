"""What the codes of buckets share in Triton: memory, statistics, scales, rounding, packing.

The formulas are those of ``csrc/cpu/feedback.h``, ``codes_linear.h`` and ``codes_minifloat.h``, in
the same order: maxima and integers do not depend on it, float32 operations are rounded one by one
(compile with ``enable_fp_fusion=False``), float64 sums take 16 lanes and the same tree.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "affine_form",
    "affine_scales",
    "bits_of",
    "cast_float",
    "float_of",
    "float_scale",
    "grid_unit",
    "halves",
    "store_codes",
    "store_memory",
    "store_scale",
    "to_grid",
    "wire_scale",
]

F64, F32, F16, BF16 = (tl.constexpr(code) for code in range(4))  # DType in csrc/api.h
E8M0 = tl.constexpr(5)  # WireValue in csrc/api.h
SIGN, UNIFORM, AFFINE = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # CodecId in csrc/api.h
MINIFLOAT, TERNARY = tl.constexpr(6), tl.constexpr(7)
L2 = tl.constexpr(1)  # Measure in csrc/api.h
INT8 = tl.constexpr(6)  # form of MINIFLOAT that is not sign and magnitude
ROUNDING, STATE = tl.constexpr(0x51), tl.constexpr(0x56)  # STREAM_ in csrc/api.h

LANES = tl.constexpr(16)  # of a float64 sum
MAGIC, MAGIC_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # ROUND_MAGIC in codes.h
TWO_23, TWO_23_BITS = tl.constexpr(8388608.0), tl.constexpr(0x4B000000)
WIRE_LARGEST = tl.constexpr(3.402823e38)
TINY = tl.constexpr(2.0**-126)
# what is summed over a bucket
MAGNITUDES, SQUARES = tl.constexpr(0), tl.constexpr(1)


# ---- bits of floats ------------------------------------------------------------------------------


@triton.jit
def bits_of(x):
    """Bits of float32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(x):
    """Float32 of int32 bits."""
    return x.to(tl.float32, bitcast=True)


@triton.jit
def halves(at, k0, k1, round, tensor, client):
    """16 random bits of each coordinate, int32."""
    zero = (at * 0).to(tl.uint32)  # broadcasts the scalar words, whose type is then certain
    w0, w1, w2, w3 = tl.philox_impl(
        (at >> 3).to(tl.uint32),
        zero + tensor,
        zero + round.to(tl.uint32, bitcast=True),
        zero + client,
        zero + k0.to(tl.uint32, bitcast=True),
        zero + k1.to(tl.uint32, bitcast=True),
    )
    which = (at >> 1) & 3
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return tl.where((at & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32)


# ---- update and memory ---------------------------------------------------------------------------


@triton.jit
def load_values(x_ptr, at, inside, D: tl.constexpr):
    """Values of dtype D as float32; bfloat16 comes as int16 bits."""
    x = tl.load(x_ptr + at, mask=inside, other=0)
    if D == BF16:
        return float_of(x.to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def affine_form(
    g_ptr, e_ptr, h_ptr, v_ptr, at, inside, a, b, p, q,
    D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Return s, t, u and h; M: dtype of e and v."""
    s = load_values(g_ptr, at, inside, D)
    if V:
        s = p * load_values(v_ptr, at, inside, M) + q * s
    t = s
    u = s
    h = s
    if E:
        e = load_values(e_ptr, at, inside, M)
        t = b * e + s
        u = a * e + s
    if H:
        h = load_values(h_ptr, at, inside, F32)
        t = t - h
        u = u - h
    return s, t, u, h


@triton.jit
def store_memory(
    out_ptr, at, inside, x, k0, k1, round, client: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Store e (client 0) or v (1), to bfloat16 stochastically and never to infinity."""
    if M == BF16:
        old = bits_of(x)
        up = old + halves(at, k0, k1, round, STATE, client)
        up = tl.where((up & 0x7FFFFFFF) >= 0x7F800000, old, up)
        tl.store(out_ptr + at, (up >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(out_ptr + at, x, mask=inside)


# ---- statistics of buckets: [ROWS, 1] -----------------------------------------------------------


@triton.jit
def lane_sum(
    g_ptr, e_ptr, h_ptr, v_ptr, first, n, a, b, p, q,
    D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    TERM: tl.constexpr, ROWS: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """Sum over each bucket in float64: lane c % 16 takes coordinate c, then a tree."""
    lane = tl.arange(0, LANES)[None, :]
    total = tl.zeros([ROWS, LANES], tl.float64)
    for step in range(0, BUCKET, LANES):
        inside = step + lane < n
        at = first + step + lane
        _, _, u, _ = affine_form(g_ptr, e_ptr, h_ptr, v_ptr, at, inside, a, b, p, q, D, E, H, V, M)
        x = u.to(tl.float64)
        x = tl.abs(x) if TERM == MAGNITUDES else x * x
        total = tl.where(inside, total + x, total)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 8]), axis=1)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 4]), axis=1)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 2]), axis=1)
    return tl.sum(tl.reshape(total, [ROWS, 2, 1]), axis=1)


@triton.jit
def wire_scale(x, limit, S: tl.constexpr):
    """Return x >= 0 as the wire has it: 0 or normal, bfloat16 (S) rounded up, at most limit."""
    x = tl.minimum(tl.where(x > 0, tl.maximum(x, TINY), x), limit)
    if S == BF16:
        up = (bits_of(x) + 0xFFFF) & -65536
        x = float_of(tl.where(up > bits_of(limit), up - 0x10000, up))
    return x


@triton.jit
def store_scale(scales_ptr, index, x, keep, S: tl.constexpr):
    """Store float32 scales as float32 or as the upper half of their bits (S: BF16)."""
    if S == BF16:
        tl.store(scales_ptr + index, (bits_of(x) >> 16).to(tl.int16), mask=keep)
    else:
        tl.store(scales_ptr + index, x, mask=keep)


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def to_grid(
    x, unit, random, LEAST: tl.constexpr, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr
):  # fmt: skip
    """Return x times 1 / unit, whole and in LEAST .. LEVELS, half to even or floor(y + r)."""
    inverse = tl.div_rn(tl.zeros_like(unit) + 1.0, tl.where(unit > 0, unit, 1.0))
    y = x * tl.where(unit > 0, inverse, 0.0)  # a bucket of one value: everything is 0
    y = tl.minimum(tl.maximum(y, LEAST), LEVELS)
    if STOCHASTIC:
        return tl.floor(y + (random.to(tl.float32) + 0.5) * 1.52587890625e-05)
    else:
        return (y + MAGIC) - MAGIC


@triton.jit
def float_scale(top, S: tl.constexpr, EMAX: tl.constexpr, FRACTION: tl.constexpr):
    """Return scale, its inverse and what is stored, of buckets whose max|u| has the bits `top`."""
    if S == E8M0:
        byte = tl.maximum((top >> 23) - EMAX, 0)
        scale = float_of(tl.where(byte > 0, byte << 23, 0x400000))
        return scale, float_of(tl.where(byte < 254, (254 - byte) << 23, 0x400000)), byte
    else:
        power = ((top + (0x7FFFFF - FRACTION)) >> 23) - 127 - EMAX
        power = tl.minimum(tl.maximum(power, -126), 127 - EMAX)
        scale = float_of(tl.where(top > 0, (power + 127) << 23, 0))
        inverse = tl.where(power < 127, (127 - power) << 23, 0x400000)
        return scale, float_of(tl.where(top > 0, inverse, 0)), scale


@triton.jit
def cast_float(
    u, scale, inverse, random,
    BITS: tl.constexpr, FORM: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr,
    TOP: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Return codes and D; the formulas are told in ``csrc/cpu/codes_minifloat.h``."""
    bits = bits_of(u)
    y = float_of(bits & 0x7FFFFFFF) * inverse
    least: tl.constexpr = (EMIN + 127) << 23
    e = tl.maximum(bits_of(y), least) & 0x7F800000
    if FORM == INT8:
        e = e * 0 + least
    z = y * float_of((127 << 23) - e + ((127 + MANTISSA) << 23))
    if STOCHASTIC:
        k = (z + (random.to(tl.float32) + 0.5) * 1.52587890625e-05).to(tl.int32)
    else:
        k = bits_of(z + TWO_23) - TWO_23_BITS
    magnitude = tl.minimum(k + ((e - least) >> (23 - MANTISSA)), TOP)
    if FORM == INT8:
        code = tl.where(bits < 0, -magnitude, magnitude)
        return code & 0xFF, code.to(tl.float32) * 0.015625 * scale
    else:
        value = tl.minimum(k.to(tl.float32) * float_of(e - (MANTISSA << 23)), LARGEST)
        d = float_of(bits_of(value * scale) | (bits & -2147483648))
        return magnitude | tl.where(bits < 0, 1 << (BITS - 1), 0), d


@triton.jit
def store_codes(
    codes_ptr, row, n, code, inside,
    BITS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack the codes of each bucket from its first byte on; spare bits are zero.

    row, n: [ROWS, 1] number and length of the buckets; STRIDE: bytes of a whole bucket.
    """
    used = (n * BITS + 7) // 8
    code = tl.where(inside, code, 0)
    if 8 % BITS == 0:  # whole codes a byte
        EACH: tl.constexpr = 8 // BITS
        BYTES: tl.constexpr = BLOCK // EACH
        shift = (tl.arange(0, EACH) * BITS)[None, None, :]
        bytes = tl.sum(tl.reshape(code, [ROWS, BYTES, EACH]) << shift, axis=2)
        j = tl.arange(0, BYTES)[None, :]
        tl.store(codes_ptr + row * STRIDE + j, bytes.to(tl.uint8), mask=j < used)
    else:  # eight codes are BITS bytes
        GROUPS: tl.constexpr = BLOCK // 8
        shift = (tl.arange(0, 8) * BITS)[None, None, :]
        words = tl.sum(tl.reshape(code, [ROWS, GROUPS, 8]).to(tl.int64) << shift, axis=2)
        byte = tl.arange(0, 8)[None, None, :]
        bytes = (words[:, :, None] >> (8 * byte)) & 0xFF
        j = tl.arange(0, GROUPS)[None, :, None] * BITS + byte
        base = (row * STRIDE)[:, :, None]
        keep = (byte < BITS) & (j < used[:, :, None])
        tl.store(codes_ptr + base + j, bytes.to(tl.uint8), mask=keep)


# ---- scales --------------------------------------------------------------------------------------


@triton.jit
def affine_scales(u, inside, n, steps: tl.constexpr, LIMIT: tl.constexpr, S: tl.constexpr):
    """Return lo and unit of each bucket as they are read from the wire, [ROWS, 1] float32."""
    least = tl.min(tl.where(inside, u, float("inf")), axis=1)[:, None]
    high = tl.max(tl.where(inside, u, float("-inf")), axis=1)[:, None]
    least = tl.where(n > 0, least, 0.0) + 0.0  # -0 and 0 are equal: which was met must not show
    high = tl.where(n > 0, high, 0.0)
    one: tl.constexpr = 3.4028228579130005e38  # the largest float32 up to WIRE_LARGEST
    limit = tl.zeros_like(least) + one
    if S == BF16:
        down = float_of(bits_of(least) & -65536)
    else:
        down = tl.minimum(least, limit)
    low = tl.where(least < 0, -wire_scale(tl.maximum(-least, 0.0), limit, S), down)
    # lo + unit * steps must not pass WIRE_LARGEST either
    size = tl.abs(low.to(tl.float64))
    rest = (WIRE_LARGEST - size) / steps
    most = tl.zeros_like(least) + LIMIT
    narrow = rest < most.to(tl.float64)
    most = tl.where(narrow, rest.to(tl.float32), most)
    for _ in tl.static_range(2):  # rounding went at most one step too far
        over = narrow & (most > 0) & (size + most.to(tl.float64) * steps > WIRE_LARGEST)
        most = tl.where(over, float_of(bits_of(most) - 1), most)
    unit = ((high.to(tl.float64) - low.to(tl.float64)) / steps).to(tl.float32)
    return low, wire_scale(tl.maximum(unit, 0.0), most, S)


@triton.jit
def grid_unit(
    g_ptr, e_ptr, h_ptr, v_ptr, first, n, top, a, b, p, q,
    D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    CODEC: tl.constexpr, MEASURE: tl.constexpr, LEVELS: tl.constexpr, CLIP: tl.constexpr,
    ROWS: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """Return the scale of sign, uniform and ternary codes before it is made fit, [ROWS, 1]."""
    count = tl.maximum(n, 1).to(tl.float64)
    if MEASURE == L2 or CLIP > 0:
        squares = lane_sum(
            g_ptr, e_ptr, h_ptr, v_ptr, first, n, a, b, p, q, D, E, H, V, M, SQUARES, ROWS, BUCKET
        )
    if CODEC == SIGN:
        if MEASURE == L2:
            return tl.sqrt(squares / count).to(tl.float32)
        else:
            total = lane_sum(
                g_ptr, e_ptr, h_ptr, v_ptr, first, n, a, b, p, q,
                D, E, H, V, M, MAGNITUDES, ROWS, BUCKET,
            )  # fmt: skip
            return (total / count).to(tl.float32)
    elif CODEC == UNIFORM:
        if MEASURE == L2:
            return (tl.sqrt(squares) / LEVELS).to(tl.float32)
        else:
            return tl.div_rn(float_of(top), tl.zeros([ROWS, 1], tl.float32) + LEVELS)
    elif CLIP > 0:
        bound = (tl.sqrt(squares / count) * CLIP).to(tl.float32)
        return tl.minimum(bound, float_of(top))
    else:
        return float_of(top)
