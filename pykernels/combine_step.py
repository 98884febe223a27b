"""A weighted sum of client rows and one step of a server optimiser along it, in Triton.

The formulas are those of ``csrc/cpu/step.h``; D stays in registers: for n rows of s bytes a value
and a float32 model, ``n*s + 24`` bytes a coordinate (adagrad, adam, yogi), ``n*s + 16`` (momentum),
``n*s + 8`` (sgd), 2 more with a copy. Noise is drawn into memory first (8 bytes a coordinate).

Exactness: the operations of the CPU kernel in the same order, each rounded by itself, with
correctly rounded square roots and quotients, so the bits agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from flcore.pykernels.sums import (
    BF16,
    BINS,
    F16,
    F32,
    F64,
    INFINITY,
    OPTIONS,
    add_rows,
    bfloat16_bits,
    divided,
    find_layer,
    load_some,
    pointer,
    store_some,
    store_typed,
    sum_flags,
    sum_type,
    to_device,
    widen,
)

from flcore import _arrays
from flcore.ops._step import KINDS, SERVER_STREAM
from flcore.ops.rng import random_normal

__all__ = ["combine_step"]

BLOCK = 1024  # coordinates a program
SCALARS = tl.constexpr(
    8
)  # divisor, lr, beta1, 1 - beta1, beta2, 1 - beta2, tau, standard deviation
# words of a layer before its row addresses: first tile, length, model, m, v, new model, new m,
# new v, copy, noise
HEAD = tl.constexpr(10)
SGD, MOMENTUM, ADAGRAD, ADAM = (tl.constexpr(KINDS.index(k)) for k in KINDS[:4])
LINEAR = tl.constexpr(KINDS.index("linear"))
STEP_NONFINITE = tl.constexpr(4)  # CombineFlags in csrc/api.h


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def scalar(scalars_ptr, i: tl.constexpr, WIDE: tl.constexpr):
    """Load an option of the step in the type of its arithmetic."""
    x = tl.load(scalars_ptr + i).to(tl.float64, bitcast=True)
    return x if WIDE else x.to(tl.float32)


@triton.jit
def quotient_by_root(numerator, v, tau, WIDE: tl.constexpr):
    """Return numerator / (sqrt(v) + tau), each operation correctly rounded."""
    if WIDE:
        return numerator / (tl.sqrt(v) + tau)
    else:
        return tl.div_rn(numerator, tl.sqrt_rn(v) + tau)


@triton.jit
def nonfinite_flag(x, inside):
    """STEP_NONFINITE where a new value is not finite."""
    finite = (x < INFINITY) & (x > -INFINITY)
    return tl.max(tl.where(finite | ~inside, 0, STEP_NONFINITE), axis=0)


@triton.jit
def step_block(
    table_ptr,
    entry_ptr,
    flags_ptr,
    rows,
    begin,
    numel,
    D: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    KIND: tl.constexpr,
    MODELS: tl.constexpr,
    NOISE: tl.constexpr,
    DIVIDE: tl.constexpr,
    EMPTY: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one block of one layer over all rows and take the step there."""
    WIDE: tl.constexpr = W == F64
    S: tl.constexpr = F64 if W == F64 else F32  # dtype of the state
    T: tl.constexpr = 1 if W == F64 else 0  # its code as a type of sums
    at = begin + tl.arange(0, BLOCK)
    inside = at < numel
    model = load_some(pointer(entry_ptr + 2, W, ALIGNED) + at, inside, FULL)

    # -0 + p is p for every p, a zero of either sign included: a sum that starts from its first term
    zero = tl.full([BLOCK], 0 if EMPTY or A == BINS else 0x80000000, tl.uint32)
    acc = zero.to(tl.float32, bitcast=True)
    if A != 0:
        acc = acc.to(tl.float64)
    # fmt: off
    acc, acc1, acc2, beyond = add_rows(
        acc, acc, acc, table_ptr + SCALARS, entry_ptr + HEAD, table_ptr, rows, widen(model, W, A),
        at, inside, D, A, False, MODELS, ALIGNED, FULL
    )
    # fmt: on
    total = (acc + acc1) + acc2 if A == BINS else acc
    flags = sum_flags(total, beyond, inside, A)
    if DIVIDE:
        total = divided(total, tl.load(table_ptr).to(tl.float64, bitcast=True))
    d = total.to(tl.float64) if WIDE else total.to(tl.float32)
    if NOISE:
        z = load_some(pointer(entry_ptr + 9, F32, ALIGNED) + at, inside, FULL)
        d = d + scalar(table_ptr, 7, WIDE) * (z.to(tl.float64) if WIDE else z)

    w = widen(model, W, T)
    lr = scalar(table_ptr, 1, WIDE)
    if KIND == SGD:
        w = w + lr * d
    else:
        m = load_some(pointer(entry_ptr + 3, S, ALIGNED) + at, inside, FULL)
        if KIND == MOMENTUM:
            m = scalar(table_ptr, 2, WIDE) * m + d
            w = w + lr * m
        elif KIND == LINEAR:
            m = scalar(table_ptr, 2, WIDE) * m + scalar(table_ptr, 4, WIDE) * d
            w = (w + lr * d) + scalar(table_ptr, 6, WIDE) * m
            flags = flags | nonfinite_flag(m, inside)
        else:
            m = scalar(table_ptr, 2, WIDE) * m + scalar(table_ptr, 3, WIDE) * d
            v = load_some(pointer(entry_ptr + 4, S, ALIGNED) + at, inside, FULL)
            square = d * d
            if KIND == ADAGRAD:
                v = v + square
            else:
                part = scalar(table_ptr, 5, WIDE) * square
                if KIND == ADAM:
                    v = scalar(table_ptr, 4, WIDE) * v + part
                else:
                    v = tl.where(v > square, v - part, tl.where(v == square, v, v + part))
            w = w + quotient_by_root(lr * m, v, scalar(table_ptr, 6, WIDE), WIDE)
            store_some(pointer(entry_ptr + 7, S, ALIGNED) + at, v, inside, FULL)
            flags = flags | nonfinite_flag(v, inside)
        store_some(pointer(entry_ptr + 6, S, ALIGNED) + at, m, inside, FULL)
    store_typed(pointer(entry_ptr + 5, W, ALIGNED) + at, w, inside, W, FULL)
    if W == F16:  # the model as stored is what has to be finite, and what is copied
        w = w.to(tl.float16).to(tl.float32)
    if W == BF16:
        w = widen(bfloat16_bits(w), W, 0)
    flags = flags | nonfinite_flag(w, inside)
    tl.atomic_or(flags_ptr, flags, mask=flags != 0)
    if C >= 0:
        store_typed(pointer(entry_ptr + 8, C, ALIGNED) + at, w, inside, C, FULL)


@triton.jit(do_not_specialize=["rows", "layers"])
def step_kernel(
    table_ptr,
    flags_ptr,
    rows,
    layers,
    D: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    KIND: tl.constexpr,
    MODELS: tl.constexpr,
    NOISE: tl.constexpr,
    DIVIDE: tl.constexpr,
    EMPTY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of BLOCK coordinates of one layer.

    table_ptr: int64 words { SCALARS scalars, weight[rows], then for each layer: HEAD words,
    row[rows] }, doubles and addresses as their bits; flags_ptr: int32, or-ed with flags. D, W, C:
    dtypes of rows, model and copy (C < 0: none).
    """
    tile = tl.program_id(0)
    entries_ptr = table_ptr + SCALARS + rows
    layer = find_layer(entries_ptr, HEAD + rows, layers, tile)
    entry_ptr = entries_ptr + layer * (HEAD + rows)
    begin = (tile - tl.load(entry_ptr)) * BLOCK
    numel = tl.load(entry_ptr + 1)
    # fmt: off
    if begin + BLOCK <= numel:
        step_block(table_ptr, entry_ptr, flags_ptr, rows, begin, numel, D, W, C, A, KIND, MODELS,
                   NOISE, DIVIDE, EMPTY, ALIGNED, True, BLOCK)
    else:
        step_block(table_ptr, entry_ptr, flags_ptr, rows, begin, numel, D, W, C, A, KIND, MODELS,
                   NOISE, DIVIDE, EMPTY, ALIGNED, False, BLOCK)
    # fmt: on


# ---- launcher ----------------------------------------------------------------------------------


def draw(noise: Any, tensors: Sequence[int], layers: Sequence[Any], device: str) -> list[Any]:
    """Draw the standard normals of each layer, float32 on the device."""
    if noise is None:
        return []
    return [
        random_normal(
            v.numel,
            noise.seed,
            round=noise.round,
            tensor=tensor,
            client=SERVER_STREAM,
            device=torch.device(device),
        )
        for v, tensor in zip(layers, tensors, strict=True)
    ]


def combine_step(
    rows: Sequence[Sequence[Any]],
    weights: Sequence[float],
    *,
    layers: Sequence[Any],
    step: Any,
    old: Sequence[Sequence[Any]],
    new: Sequence[Sequence[Any]],
    models: bool,
    noise: Any,
    tensors: Sequence[int],
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """Variant `triton` of the op; arguments as in ``flcore.ops.combine_step``.

    Waits for the device only when `check` asks for the flags.
    """
    device = layers[0].device if layers else "cpu"
    flags = torch.zeros(1, dtype=torch.int32, device=device)
    states = len(step.states)
    copy = new[1 + states] if len(new) > 1 + states else None
    normals = draw(noise, tensors, layers, device)
    numel = np.array([v.numel for v in layers], dtype=np.int64)
    codes = np.array([(r.code, w.code) for r, w in zip(layers, old[0], strict=True)])

    def addresses(views: Sequence[Any] | None) -> np.ndarray:
        return np.array([v.ptr for v in views] if views else 0 * numel, dtype=np.int64)

    read = [*(addresses(v) for v in old), *(0 * numel for _ in range(2 - states))]
    written = [*(addresses(v) for v in new[: 1 + states]), *(0 * numel for _ in range(2 - states))]
    drawn = np.array([_arrays.address(z) for z in normals] or 0 * numel, dtype=np.int64)
    entries = np.stack([*read, *written, addresses(copy), drawn, *(addresses(r) for r in rows)])
    aligned = np.bitwise_or.reduce(entries, axis=0, initial=0) % 16 == 0
    std = noise.std if noise is not None else 0.0
    beta1, beta2 = step.beta1, step.beta2
    numbers = [divisor, step.lr, beta1, 1 - beta1, beta2, 1 - beta2, step.tau, std, *weights]
    head = np.array(numbers, dtype=np.float64).view(np.int64)
    for row_code, model_code, is_aligned in np.ndindex(4, 4, 2):
        fits = (codes == (row_code, model_code)).all(axis=1) if len(codes) else np.zeros(0, bool)
        chosen = np.flatnonzero(fits & (aligned == is_aligned) & (numel > 0))
        if not len(chosen):
            continue
        tiles = -(-numel[chosen] // BLOCK)
        table = np.empty((len(chosen), HEAD.value + len(rows)), dtype=np.int64)
        table[:, 0], table[:, 1] = np.cumsum(tiles) - tiles, numel[chosen]
        table[:, 2:] = entries[:, chosen].T
        wide = model_code == F64.value
        with torch.cuda.device_of(flags):
            step_kernel[(int(tiles.sum()),)](
                to_device(np.concatenate([head, table.reshape(-1)]), device),
                flags,
                len(rows),
                len(chosen),
                D=row_code,
                W=model_code,
                C=copy[0].code if copy else -1,
                A=sum_type(accumulate, model_code if wide else row_code),
                KIND=KINDS.index(step.kind),
                MODELS=models,
                NOISE=noise is not None,
                DIVIDE=divisor != 1.0,
                EMPTY=not rows,
                ALIGNED=bool(is_aligned),
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return int(flags.item()) if check else 0
