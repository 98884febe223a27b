"""Philox4x32-10 streams in Triton: random bits and uniforms, the bits of the other variants.

The stream layout is the one of ``csrc/philox.h``. Writes 4 bytes a value and reads nothing.
Integer arithmetic, and one exact scaling by a power of two, so no option of the compiler and no
block size changes a bit.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["fill"]

BLOCK = 1024  # Philox blocks of four values a program


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
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[j] = element 4 first_block + skip + j of the stream, 0 <= j < numel; skip < 4.

    out_ptr: int32 (bits) or float32 (uniform); first_block .. client: 32-bit words as int32.
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
    # [BLOCK, 2, 2] with the words of a block in order: each thread stores whole blocks
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([4 * BLOCK])
    j = 4 * local - skip + tl.arange(0, 4 * BLOCK)
    inside = (j >= 0) & (j < numel)
    if UNIFORM:
        tl.store(out_ptr + j, (words >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=inside)
    else:
        tl.store(out_ptr + j, words.to(tl.int32, bitcast=True), mask=inside)


def fill(out, uniform, seed, round, tensor, client, offset):
    """Variant `triton` of the op: write the values, or the bits in their place, into `out`.

    Parameters
    ----------
    out : flcore._arrays.View of float32
    uniform : bool
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
            values if uniform else values.view(torch.int32),
            out.numel,
            offset & 3,
            *(word - ((word >> 31) << 32) for word in words),  # the int32 with the same bits
            UNIFORM=uniform,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
