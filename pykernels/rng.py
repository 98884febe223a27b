"""Philox4x32-10 streams in Triton: random bits, uniforms, normals; the bits of the other variants.

The stream layout is the one of ``csrc/philox.h``, the normals are those of ``csrc/box_muller.h``.
Writes 4 bytes a value and reads nothing. Integer arithmetic, and float32 operations rounded one by
one (compile with ``enable_fp_fusion=False``), so no block size changes a bit.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["fill", "normal_pair"]

BLOCK = 1024  # Philox blocks of four values a program
UNIFORM, NORMAL = tl.constexpr(1), tl.constexpr(2)
FORMS = {"bits": 0, "uniform": 1, "normal": 2}  # RandomForm in csrc/api.h

# The transform of csrc/box_muller.h with its constants; exact in float32, so they may be written in
# decimal.
ATANH_0, ATANH_1 = tl.constexpr(0.3333320617675781), tl.constexpr(0.20010849833488464)
ATANH_2, ATANH_3 = tl.constexpr(0.13999570906162262), tl.constexpr(0.14012226462364197)
LN2_HI, LN2_LO = tl.constexpr(0.693145751953125), tl.constexpr(1.428606765330187e-06)
SIN_0, SIN_1 = tl.constexpr(0.07079632580280304), tl.constexpr(-0.6459634900093079)
SIN_2, SIN_3 = tl.constexpr(0.07967966794967651), tl.constexpr(-0.004600198473781347)
COS_1, COS_2 = tl.constexpr(-1.2337005138397217), tl.constexpr(0.25366923213005066)
COS_3, COS_4 = tl.constexpr(-0.02086028829216957), tl.constexpr(0.0009040217264555395)


@triton.jit
def normal_radius(word):
    """sqrt(-2 ln((word + 1) 2^-32)) of uint32 words."""
    above = word >= 2147483648  # above 1/2 the distance to 1 is converted
    whole = tl.where(above, ~word, word + 1).to(tl.float32)
    shifted = whole.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    mantissa = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(above, whole * -2.3283064365386963e-10, mantissa - 1.0)
    e = tl.where(above, 0, (shifted >> 23) - (127 + 32)).to(tl.float32)
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    p = ((z * ATANH_3 + ATANH_2) * z + ATANH_1) * z + ATANH_0
    half = s + s * (z * p)  # ln(1 + f) / 2
    return tl.sqrt_rn((e * LN2_HI + (half * 2.0 + e * LN2_LO)) * -2.0)


@triton.jit
def normal_pair(first, second):
    """Elements 2k and 2k + 1 of a stream from its words 2k and 2k + 1, all uint32 of one shape."""
    r = normal_radius(first)
    quarter = (second + 536870912) >> 30
    x = ((second << 2).to(tl.int32, bitcast=True) >> 9).to(tl.float32) * 1.1920928955078125e-07
    y = x * x
    s = x * 1.5 + x * (((y * SIN_3 + SIN_2) * y + SIN_1) * y + SIN_0)
    c = (((y * COS_4 + COS_3) * y + COS_2) * y + COS_1) * y + 1.0
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    return r * cosine.to(tl.float32, bitcast=True), r * sine.to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=["numel", "skip", "first_block", "k0", "k1", "tensor", "round", "client"],
)
def random_kernel(
    out_ptr,
    numel,
    skip,
    first_block,
    k0,
    k1,
    tensor,
    round,
    client,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[j] = element 4 first_block + skip + j of the stream, 0 <= j < numel; skip < 4.

    out_ptr: int32 (bits) or float32; first_block .. client: 32-bit words as int32.
    """
    local = tl.program_id(0).to(tl.int64) * BLOCK  # blocks before this program
    zero = tl.zeros([BLOCK], tl.uint32)  # broadcasts the scalar words, whose type is then certain
    block = (local + tl.arange(0, BLOCK)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        block + first_block.to(tl.uint32, bitcast=True),
        zero + tensor.to(tl.uint32, bitcast=True),
        zero + round.to(tl.uint32, bitcast=True),
        zero + client.to(tl.uint32, bitcast=True),
        zero + k0.to(tl.uint32, bitcast=True),
        zero + k1.to(tl.uint32, bitcast=True),
    )
    if FORM == NORMAL:
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
        w0, w1 = z0.to(tl.uint32, bitcast=True), z1.to(tl.uint32, bitcast=True)
        w2, w3 = z2.to(tl.uint32, bitcast=True), z3.to(tl.uint32, bitcast=True)
    # [BLOCK, 2, 2] with the words of a block in order: each thread stores whole blocks
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([4 * BLOCK])
    j = 4 * local - skip + tl.arange(0, 4 * BLOCK)
    inside = (j >= 0) & (j < numel)
    if FORM == UNIFORM:
        tl.store(out_ptr + j, (words >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=inside)
    elif FORM == NORMAL:
        tl.store(out_ptr + j, words.to(tl.float32, bitcast=True), mask=inside)
    else:
        tl.store(out_ptr + j, words.to(tl.int32, bitcast=True), mask=inside)


def fill(out, form, seed, round, tensor, client, offset):
    """Variant `triton` of the op: write the values, or the bits in their place, into `out`.

    Parameters
    ----------
    out : flcore._arrays.View of float32
    form : {"bits", "uniform", "normal"}
    seed : int below 2**64
    round, tensor, client : int below 2**32
    offset : int, position of out[0] in the stream; offset + out.numel <= 2**34
    """
    if out.numel == 0:
        return
    values = torch.from_numpy(out.array) if isinstance(out.array, np.ndarray) else out.array
    blocks = ((offset + out.numel + 3) >> 2) - (offset >> 2)
    words = (offset >> 2, seed & 0xFFFFFFFF, seed >> 32, tensor, round, client)
    with torch.cuda.device_of(values):
        random_kernel[(triton.cdiv(blocks, BLOCK),)](
            values.view(torch.int32) if form == "bits" else values,
            out.numel,
            offset & 3,
            *(word - ((word >> 31) << 32) for word in words),  # the int32 with the same bits
            FORM=FORMS[form],
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
