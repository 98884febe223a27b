"""Row losses in Triton: cross-entropies of softmax, StableMax and Taylor-softmax with gradients.

Formulas: ``flcore.reference.rowloss``. Bytes of a logit, b its size:

    classes          kernels                                      forward  both  backward
    up to 64         several rows a program, sums formed anew           b    2b        2b
    up to 32,768     a row a program, from memory once                  b    2b        2b
    more             parts of rows, then rows, then element-wise        b    3b        2b

Half as many classes where there is smoothing or a soft target, and in float64: see `budget`.
No atomics and nothing waits for the device. Accuracy: ``rowloss_terms``. Loads of a row that does
not count are predicated off. In place: a program reads its rows before it writes them, and the
element-wise kernel reads and writes the same elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from flcore.pykernels.rowloss_kernels import row_kernel
from flcore.pykernels.rowloss_split import finish_kernel, gradient_kernel, partial_kernel

from flcore.errors import InvalidInputError
from flcore.ops._rowloss_call import MAPS, RowCall

__all__ = ["rowloss"]

FORWARD, BOTH, BACKWARD = range(3)
SHORT = 16  # classes up to which a row lies in one thread
TINY = 64  # classes up to which backward forms the sums anew: cheaper than reading them
THREADS = 1024  # most of a program
PART = 8192  # classes of a part
TILE = 2048  # logits of an element-wise program
MOST_ROWS = 2**31 - 1024  # rows are counted in 32 bits, also those past the end of the last tile

# Arguments: arrays, numbers of a row's place and settings; each kernel takes those it names.
FLAGS = ("MAP", "MARGIN", "SMOOTH", "ZLOSS", "TAU", "SHARD", "NESTED")


def rowloss(call: RowCall, mode: int) -> None:
    """Variant `triton` of the op: 0 loss and statistics, 1 with gradient, 2 gradient from them."""
    if call.rows == 0:
        return
    if call.rows > MOST_ROWS:
        raise InvalidInputError(f"x: expected at most {MOST_ROWS} rows, got {call.rows}")
    arguments = _arguments(call)
    limit = THREADS * budget(call)
    if mode == BACKWARD and call.soft is None:  # soft targets have one more sum to form
        limit = TINY
    whole = call.classes <= limit
    with torch.cuda.device_of(call.x):
        if whole and not (mode == BACKWARD and call.form.shard):
            _whole_rows(call, mode, arguments)
        else:
            _parts(call, mode, arguments)


def _whole_rows(call: RowCall, mode: int, arguments: dict[str, Any]) -> None:
    adjacent = call.class_stride == 1
    r, a, b, warps = tile(call.classes, adjacent, budget(call))
    outputs = dict.fromkeys(("loss_ptr", "rest_ptr", "own_ptr", "shift_ptr"))
    changed = {"grad_ptr": None} if mode == FORWARD else outputs if mode == BACKWARD else {}
    options = {
        "COLUMNS": call.classes if a * b <= SHORT and adjacent else 0,
        "AGAIN": a * b >= TINY and (budget(call) < 32 or call.x.element_size() == 2),
    }
    options |= {"R": r, "A": a, "B": b, "num_warps": warps}
    _launch(row_kernel, triton.cdiv(call.rows, r), {**arguments, **changed}, **options)


def _parts(call: RowCall, mode: int, arguments: dict[str, Any]) -> None:
    splits = triton.cdiv(call.classes, PART)
    given = mode == BACKWARD
    parts = factors = None
    device = call.x.device
    if not given or call.soft is not None:
        parts = torch.empty((4, call.rows, splits), dtype=torch.float64, device=device)
    if mode != FORWARD:
        factors = torch.empty((call.rows, 4), dtype=_dtype(call), device=device)
    arguments |= {"parts_ptr": parts, "factors_ptr": factors, "splits": splits}
    if parts is not None:
        options = {"WEIGHTS_ONLY": given, "A": 8, "B": PART // 8, "num_warps": 16}
        _launch(partial_kernel, call.rows * splits, arguments, **options)
    b = 1 if parts is None else triton.next_power_of_2(splits)
    r = max(1, 128 // b)
    warps = 4 if b <= 512 else 8
    _launch(
        finish_kernel, triton.cdiv(call.rows, r), arguments, R=r, B=b, GIVEN=given, num_warps=warps
    )
    if factors is not None:
        b = min(TILE, triton.next_power_of_2(call.classes))
        r = max(1, TILE // b)
        blocks = triton.cdiv(call.classes, b)
        programs = triton.cdiv(call.rows, r) * blocks
        _launch(gradient_kernel, programs, arguments, blocks=blocks, R=r, B=b, num_warps=4)


def budget(call: RowCall) -> int:
    """Logits a thread may hold: some 100 registers with everything that is kept beside them."""
    heavy = call.form.label_smoothing != 0 or call.soft is not None
    return 32 // (2 if heavy else 1) // (2 if call.compute == "float64" else 1)


def tile(classes: int, adjacent: bool, logits: int) -> tuple[int, int, int, int]:
    """Rows, classes as A * B, and warps of a program for whole rows; `logits` from `budget`."""
    block = triton.next_power_of_2(max(1, classes))
    rows = max(1, 64 * logits // block)
    if not adjacent and block <= 1024:  # neighbours in memory are rows then
        rows = max(rows, 32)
    elif block <= SHORT:
        rows = 128  # one a thread
    a = min(8, max(1, block // 8))
    warps = min(32, max(4, rows * block // (32 * logits)))
    return rows, a, block // a, warps


def _arguments(call: RowCall) -> dict[str, Any]:
    """Everything a kernel may name."""
    form = call.form
    names = ("x", "grad", "labels", "soft", "valid", "weight", "prior", "row_scale", "upstream")
    arrays = {f"{name}_ptr": getattr(call, name) for name in names}
    arrays |= {"scale_ptr": call.scale_tensor, "totals_ptr": call.totals}
    arrays |= {f"{name}_ptr": getattr(call, name) for name in ("loss", "rest", "own", "shift")}
    for name in ("x_ptr", "grad_ptr"):
        arrays[name] = None if arrays[name] is None else arrays[name].detach()
    if call.valid is not None:
        arrays["valid_ptr"] = call.valid.view(torch.uint8)
    numbers = {
        "scale_bits": form.logit_scale,
        "margin_bits": form.margin,
        "smoothing_bits": form.label_smoothing,
        "z_loss_bits": form.z_loss,
        "tau_bits": form.tau,
        "gain_bits": call.grad_scale,
        "weight_bits": call.weight_sum,
        "present_bits": call.classes_present,
    }
    places = ("outer_stride", "row_stride", "class_stride")
    gradient = tuple(f"grad_{name}" for name in places)
    return {
        **arrays,
        **{name: int(np.float64(value).view(np.int64)) for name, value in numbers.items()},
        **{name: getattr(call, name) for name in (*places, *gradient)},
        **{name: getattr(call, name) for name in ("rows", "classes", "inner")},
        "ignore_index": form.ignore_index,
        "label_offset": form.label_offset,
        "C": tl.float64 if call.compute == "float64" else tl.float32,
        "MAP": MAPS.index(form.map),
        "MARGIN": form.margin != 0,
        "SMOOTH": form.label_smoothing != 0,
        "ZLOSS": form.z_loss != 0,
        "TAU": form.tau != 1,
        "SHARD": form.shard,
        "NESTED": call.inner != call.rows,
    }


def _dtype(call: RowCall) -> torch.dtype:
    return torch.float64 if call.compute == "float64" else torch.float32


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], **options: Any) -> None:
    """Launch a kernel with the arguments it names."""
    everything = {**arguments, **options}
    chosen = {name: everything[name] for name in kernel.arg_names}
    kernel[(programs,)](**chosen, num_warps=options["num_warps"])
