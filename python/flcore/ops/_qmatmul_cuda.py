"""Variant `cuda` of products with quantized weights: kernels/qmatmul.cu, on torch's current stream.

The codes of a weight are brought into the order of tensor-core operands by its first product (which
cannot be captured into a CUDA graph), and kept for as long as the weight is. Codes of 2 and 3 bits
take 4 there.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore.ops import _qmatmul_call
from flcore.ops._qmatmul_call import QMatmulCall
from flcore.reference import weight_quant as wq

__all__ = ["qmatmul", "qmatmul_int8"]

CODED = (wq.TABLE, wq.E4M3, wq.E5M2)
PLAIN = {"lookup": 0, "terms": 1, "unit": 1.0}


def qmatmul(call: QMatmulCall) -> None:
    """Write ``x W^T + bias + low up^T`` into `call.out`.

    float16 and bfloat16 x: float32 sums of exact products of x and codes, a scale once a group.
    float32 x goes as three bfloat16 parts that add up to it. The same bits in every run on devices
    with the same number of multiprocessors.
    """
    if call.x.shape[1] == 0:
        _constant(call)
    elif _arrays.dtype_name(call.x) == "float32":
        _split(call)
    else:
        native = _qmatmul_call.native(call)
        with_rows = _aligned(call.x)
        native["x"], native["x_stride"] = _arrays.address(with_rows), with_rows.stride(0)
        options = _fragments(call.weight).lookups(_arrays.dtype_name(call.x), 2)[0]
        _launch(call.weight, native, options, call.out)


def qmatmul_int8(call: QMatmulCall) -> None:
    """Write the product of quantised activations with a weight into `call.out`.

    Activations have the codes and scales of the CPU kernel. Sums of a block are exact; blocks are
    added in float32, in order but for the places where K is divided among multiprocessors.
    """
    if call.x.shape[1] == 0:
        _constant(call)
        return
    options = {**PLAIN, "asymmetric": call.asymmetric, "int8": True}
    _launch(call.weight, _qmatmul_call.native(call), options, call.out)


def _launch(weight: Any, native: dict[str, int], options: dict[str, Any], like: Any) -> None:
    torch, cuda = sys.modules["torch"], _native.cuda
    device, stream = _arrays.queue(str(like.device))
    fields = _fragments(weight).fields
    options = {"asymmetric": False, "int8": False, **options}
    size = cuda.qmatmul_workspace(fields, native, options, device)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=like.device)
    place = _arrays.address(workspace)
    if place % 256:  # the allocator of a device never does that
        workspace = torch.empty(size + 256, dtype=torch.uint8, device=like.device)
        place = -(-_arrays.address(workspace) // 256) * 256
    cuda.qmatmul(fields, native, options, place, device, stream)


# ---- weights -------------------------------------------------------------------------------------


@dataclass
class _Fragments:
    """Codes in fragment order, and what a call needs to read them.

    Attributes
    ----------
    source : tuple
        Addresses, versions and scheme of the weight it was made of.
    fields : dict
        Fields of QWeight, with the addresses of `arrays`.
    arrays : tuple
        Owners of the memory.
    levels : (256,) float64, or (16,), or None
        What the codes stand for, where that is a table.
    """

    source: tuple[Any, ...]
    fields: dict[str, int]
    arrays: tuple[Any, ...]
    levels: np.ndarray | None
    device: Any
    found: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)
    tables: list[Any] = field(default_factory=list)

    def lookups(self, dtype: str, terms: int) -> list[dict[str, Any]]:
        """Return options of one or more launches, whose results are added.

        A level is the sum of up to `terms` values of `dtype`, two a launch.
        """
        if self.levels is None:
            return [dict(PLAIN)]
        key = dtype, terms
        if key not in self.found:
            unit = _unit(self.levels, dtype)
            rest, values = self.levels / unit, []
            for _ in range(terms):
                bits, rounded = _rounded(rest, dtype)
                values.append(bits)
                rest = np.where(np.isfinite(rounded), rest - rounded, 0.0)
            while len(values) > 1 and not (values[-1] & 0x7FFF).any():
                values.pop()
            self.found[key] = [
                self._lookup(values[i : i + 2], unit) for i in range(0, len(values), 2)
            ]
        return self.found[key]

    def _lookup(self, values: list[np.ndarray], unit: float) -> dict[str, Any]:
        torch = sys.modules["torch"]
        table = np.zeros((256, 2), np.uint32)
        code = np.arange(256)
        for i, bits in enumerate(values):
            low, high = (bits[code & 15], bits[code >> 4]) if bits.size == 16 else (bits, 0 * bits)
            table[:, i] = low.astype(np.uint32) | high.astype(np.uint32) << 16
        self.tables.append(torch.from_numpy(table.view(np.int32)).to(self.device))
        address = _arrays.address(self.tables[-1])
        return {"lookup": address, "terms": len(values), "unit": unit}


@functools.cache
def _kept() -> Any:
    """Return what was made of a weight, by the tensor of its codes in the layout tile16."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def _fragments(weight: Any) -> _Fragments:
    """Return the codes of a weight in fragment order, made again where one of its parts changed."""
    tiled = weight.tiled()
    fields = weight.kernel_args()
    places = tuple(value for name, value in fields.items() if name != "table")
    versions = tuple(-1 if x.is_inference() else x._version for x in tiled.arrays.values())
    source = places, versions, weight.scheme
    found: _Fragments | None = _kept().get(tiled.codes)
    if found is None or found.source != source:
        found = _kept()[tiled.codes] = _repacked(weight, source)
    return found


def _repacked(weight: Any, source: tuple[Any, ...]) -> _Fragments:
    torch, cuda = sys.modules["torch"], _native.cuda
    tiled = weight.tiled()
    fields = dict(weight.kernel_args())
    device, stream = _arrays.queue(str(tiled.codes.device))
    codes = torch.empty(
        cuda.qmatmul_fragment_bytes(fields), dtype=torch.uint8, device=tiled.codes.device
    )
    cuda.qmatmul_repack(fields, _arrays.address(codes), device, stream)
    if codes.is_cuda:  # other streams may be next
        torch.cuda.current_stream(codes.device).synchronize()
    arrays = [codes]
    for name in ("scales", "zeros"):
        part = getattr(tiled, name)
        if part is not None:
            part = part if _arrays.address(part) % 16 == 0 else part.clone()
            fields[name] = _arrays.address(part)
            arrays.append(part)
    fields["codes"] = _arrays.address(codes)
    fields["table"] = fields["codes"] if fields["table"] else 0  # read through a lookup instead
    levels = None
    if fields["kind"] in CODED:
        table = None if tiled.table is None else tiled.table.cpu().numpy()
        levels = wq.code_levels(fields["bits"], fields["kind"], table)
    return _Fragments(source, fields, tuple(arrays), levels, codes.device)


def _unit(levels: np.ndarray, dtype: str) -> float:
    """Return the power of two to divide levels by, so that float16 can hold them."""
    top = float(np.abs(levels[np.isfinite(levels)]).max(initial=0.0))
    if dtype != "float16" or top == 0 or 2.0**-6 <= top < 2.0**16:
        return 1.0
    return float(2.0 ** np.floor(np.log2(top)))


def _rounded(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Round float64 to `dtype`, to nearest even; returns its bits and its values."""
    if dtype == "float16":
        half = x.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float64)
    word = x.astype(np.float32).view(np.uint32).astype(np.int64)
    word = (word + 0x7FFF + (word >> 16 & 1)) >> 16
    values = (word << 16).astype(np.uint32).view(np.float32)
    return word.astype(np.uint16), values.astype(np.float64)


# ---- activations ---------------------------------------------------------------------------------


def _aligned(x: Any) -> Any:
    """Return x with rows that begin at multiples of 16 bytes; copied only where they do not."""
    rows, width = x.shape
    apart = rows > 1 and x.stride(0) % 8
    if not apart and _arrays.address(x) % 16 == 0 and (rows > 1 or x.stride(0) >= width):
        return x
    torch = sys.modules["torch"]
    padded = torch.zeros((rows, -(-width // 8) * 8), dtype=x.dtype, device=x.device)
    padded[:, :width] = x
    return padded


def _split(call: QMatmulCall) -> None:
    """float32 x: the sum of the products of three bfloat16 parts, which hold all its digits."""
    torch = sys.modules["torch"]
    rows, width = call.x.shape
    parts = torch.zeros((3, rows, -(-width // 8) * 8), dtype=torch.bfloat16, device=call.x.device)
    rest = call.x
    for i in range(3):
        leading = (rest.contiguous().view(torch.int32) & -65536).view(torch.float32)
        parts[i, :, :width] = leading
        rest = torch.where(torch.isinf(rest), 0.0, rest - leading)
    flat = parts.reshape(3 * rows, parts.shape[2])
    products = torch.empty((3, rows, call.out.shape[1]), dtype=torch.float32, device=call.x.device)
    native = {
        **_qmatmul_call.native(call),
        **{"m": 3 * rows, "x": _arrays.address(flat), "x_stride": flat.stride(0)},
        **{"x_dtype": _arrays.DTYPE_CODES["bfloat16"], "y": _arrays.address(products)},
        **{"y_stride": products.shape[2], "bias": 0, "low": 0, "up": 0, "rank": 0},
    }
    total = None
    for options in _fragments(call.weight).lookups("bfloat16", 3):
        _launch(call.weight, native, options, call.out)
        found = (products[2] + products[1]) + products[0]
        total = found if total is None else total + found
    call.out.copy_(total)
    _add_constant(call, call.out)


def _constant(call: QMatmulCall) -> None:
    """No k: what is added is all there is."""
    torch = sys.modules["torch"]
    found = torch.zeros(call.out.shape, dtype=torch.float32, device=call.out.device)
    _add_constant(call, found)
    call.out.copy_(found)


def _add_constant(call: QMatmulCall, out: Any) -> None:
    if call.bias is not None:
        out += call.bias
    if call.rank:
        out += call.low @ call.up.T
