"""The tensors of local steps as kernels see them: groups of pieces, each with its own norm."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError

__all__ = [
    "SLOTS",
    "Operand",
    "Pieces",
    "check_in_place",
    "check_rows_apart",
    "one_model",
    "parse_rows",
    "row_operand",
    "slots",
]

SLOTS = ("x", "g", "q", "state", "out")  # operands of LocalArgs in csrc/api.h, in this order


@dataclass
class Operand:
    """One of the five tables: an array for each piece.

    Attributes
    ----------
    arrays : (rows, d) array, (d,) array or list of arrays
        Rows of a matrix, one row for all of them, or the tensors of a model.
    addresses : list of int
        Of the pieces; empty for rows.
    base, stride : int
        Address of the first row and bytes between rows (0: one row for all).
    copies : list
        Arrays that kernels cannot write, each with the copy that is written for it.
    """

    arrays: Any
    addresses: list[int] = field(default_factory=list)
    base: int = 0
    stride: int = 0
    copies: list[tuple[Any, Any]] = field(default_factory=list)
    shared: bool = False

    def piece(self, p: int) -> Any:
        """Return the array of piece `p`, of any shape."""
        return self.arrays if self.shared else self.arrays[p]

    def tensors(self) -> list[Any]:
        """Return its torch tensors."""
        arrays = self.arrays if isinstance(self.arrays, list) else [self.arrays]
        return [x for x in arrays if not isinstance(x, np.ndarray)]


@dataclass
class Pieces:
    """Groups of pieces and their operands.

    Attributes
    ----------
    first_piece : list of int
        [groups + 1]: group k has the pieces first_piece[k] .. first_piece[k + 1] - 1.
    numel, codes : list of int
        [pieces] lengths and dtype codes.
    device : str
    operands : dict
        By name, see `SLOTS`.
    written : tuple of str
        Operands that are written.
    cache : dict
        What a variant keeps from call to call.
    """

    first_piece: list[int]
    numel: list[int]
    codes: list[int]
    device: str
    operands: dict[str, Operand]
    written: tuple[str, ...]
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.first_piece) - 1

    def deliver(self, written: Iterable[str] | None = None) -> None:
        """Put the results where the caller has its arrays, and tell autograd of the change."""
        for name in self.written if written is None else written:
            operand = self.operands[name]
            for target, values in operand.copies:
                _arrays.assign(target, values)
            for x in operand.tensors():
                sys.modules["torch"].autograd.graph.increment_version(x)  # written by its address


# ---- one model: the tensors of one group -------------------------------------------------------


def one_model(given: dict[str, tuple[str, Any]], written: tuple[str, ...]) -> Pieces:
    """View the tensors of one model.

    Parameters
    ----------
    given : dict
        Slot -> (name of the argument, array or list, tuple or dict of arrays). The first one says
        what structure, shapes, dtypes and device all have.
    written : tuple of str
        Slots that are written. They share no memory with others; "out" may be another operand.

    Raises
    ------
    InvalidInputError, DTypeError
        See `flcore.ops.local_step`.
    """
    (name, first), *_ = given.values()
    layout, arrays = _updates.flatten(first, name)
    for j, x in enumerate(arrays):  # named once more, with its place in the structure
        if not isinstance(x, np.ndarray):
            _arrays.view(x, layout.label(name, j))
    operands: dict[str, Operand] = {}
    views: dict[str, list[View]] = {}
    orders = [None if _is_plain(x) else _order(x) for x in arrays]
    for slot, (name, value) in given.items():
        operand = Operand([])
        views[slot] = []
        for j, x in enumerate(layout.layers(value, name)):
            y, order = x, orders[j]
            if order is not None:  # channels last, transposed: the values are dense all the same
                y = x.transpose(order) if isinstance(x, np.ndarray) else x.detach().permute(order)
            v = _arrays.view(y, layout.label(name, j))
            if slot in written and _arrays.writable_view(y, layout.label(name, j), v) is None:
                operand.copies.append((y, v.array))
            views[slot].append(v)
        operand.arrays = [v.array for v in views[slot]]
        operand.addresses = [v.ptr for v in views[slot]]
        operands[slot] = operand
    _check_devices(views)
    names = {slot: name for slot, (name, _) in given.items()}
    for slot in written:
        _check_disjoint(slot, names, views)
    some = next(iter(views.values()))
    return Pieces(
        [0, len(some)],
        [v.numel for v in some],
        [v.code for v in some],
        some[0].device if some else "cpu",
        operands,
        written,
    )


def _is_plain(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return bool(x.flags.c_contiguous)
    return str(x.layout) != "torch.strided" or bool(x.is_contiguous())


def _order(x: Any) -> list[int]:
    strides = x.strides if isinstance(x, np.ndarray) else x.stride()
    return sorted(range(x.ndim), key=lambda axis: -abs(strides[axis]))


def _check_devices(views: dict[str, list[View]]) -> None:
    devices = sorted({v.device for vs in views.values() for v in vs})
    if len(devices) > 1:
        raise InvalidInputError(f"x: expected all tensors on one device, got {devices}")


def _check_disjoint(slot: str, names: dict[str, str], views: dict[str, list[View]]) -> None:
    mine = views[slot]
    ends = sorted((v.ptr, v.ptr + v.numel * _arrays.ITEMSIZE[v.dtype]) for v in mine if v.numel)
    for (_, end), (start, _) in itertools.pairwise(ends):
        if start < end:
            raise InvalidInputError(
                f"{names[slot]}: two tensors share memory; give each tensor once"
            )
    for other, theirs in views.items():
        if other == slot:
            continue
        kept = list(zip(mine, theirs, strict=True))
        if slot == "out":
            kept = [(a, b) for a, b in kept if a.ptr != b.ptr]
        if _arrays.overlap([a for a, _ in kept], [b for _, b in kept]):
            raise InvalidInputError(f"{names[slot]}: it shares memory with {names[other]}")


# ---- rows of a matrix: a group each ------------------------------------------------------------


def parse_rows(given: dict[str, tuple[str, Any]], written: tuple[str, ...]) -> Pieces:
    """View the rows of matrices of one shape; operand q may be one row for all of them.

    Raises
    ------
    InvalidInputError, DTypeError
        See `flcore.ops.local_step_rows`.
    """
    (name, first), *_ = given.values()
    if not _arrays.is_array(first):
        raise DTypeError(f"{name}: expected an array (rows, d), got {type(first).__name__}")
    if first.ndim != 2:
        raise InvalidInputError(f"{name}: expected (rows, d), got shape {tuple(first.shape)}")
    if not _arrays.is_float(first):
        _arrays.view(first, name)  # raises
    operands = {
        slot: row_operand(value, name, first, slot in written, slot == "q")
        for slot, (name, value) in given.items()
    }
    names = {slot: name for slot, (name, _) in given.items()}
    rows, d = first.shape
    for slot in written:
        check_rows_apart(slot, names, operands, first)
    code = _arrays.DTYPE_CODES[_arrays.dtype_name(first)]
    return Pieces(
        list(range(rows + 1)),
        [d] * rows,
        [code] * rows,
        _arrays.device_of(first),
        operands,
        written,
    )


def row_operand(x: Any, name: str, like: Any, written: bool, may_share: bool) -> Operand:
    """Check one matrix against another one, and find its rows."""
    dtype, device = _arrays.dtype_name(like), _arrays.device_of(like)
    if not _arrays.is_array(x) or isinstance(x, np.ndarray) != isinstance(like, np.ndarray):
        library = "NumPy array" if isinstance(like, np.ndarray) else "torch tensor"
        raise DTypeError(f"{name}: expected a {library} like x, got {type(x).__name__}")
    if x.dtype != like.dtype or _arrays.device_of(x) != device:
        got = f"{_arrays.dtype_name(x)} on {_arrays.device_of(x)}"
        raise DTypeError(f"{name}: expected {dtype} on {device}, got {got}")
    shared = may_share and x.ndim == 1
    shape = tuple(like.shape)
    if tuple(x.shape) != (shape[1:] if shared else shape):
        wanted = f"{shape} or {shape[1:]}" if may_share else f"{shape}"
        raise InvalidInputError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")
    if not isinstance(x, np.ndarray):
        x = x.detach()
    elif written and not x.flags.writeable:
        raise InvalidInputError(f"{name}: the array is read-only; pass one that can be written")
    stride = _row_stride(x)
    if stride is None:
        if written:
            raise InvalidInputError(
                f"{name}: expected rows whose values lie one after the other in memory, got "
                f"strides {x.strides if isinstance(x, np.ndarray) else x.stride()}"
            )
        x = np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()
        stride = _row_stride(x)
        assert stride is not None
    empty = 0 in tuple(x.shape)
    return Operand(
        x, base=0 if empty else _arrays.address(x), stride=0 if shared else stride, shared=shared
    )


def _itemsize(x: Any) -> int:
    return int(x.itemsize) if isinstance(x, np.ndarray) else int(x.element_size())


def _row_stride(x: Any) -> int | None:
    """Bytes from row to row; None where a kernel cannot read the rows."""
    item = _itemsize(x)
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            return None
        strides = x.strides
    else:
        strides = tuple(s * item for s in x.stride())
    d = int(x.shape[-1])
    if d > 1 and strides[-1] != item:
        return None
    if x.ndim == 1 or x.shape[0] < 2:
        return d * item
    return strides[0] if strides[0] >= d * item else None


def check_rows_apart(
    slot: str, names: dict[str, str], operands: dict[str, Operand], like: Any
) -> None:
    """Raise where rows of `slot` share memory with those of the other operands in `names`."""
    rows, d = like.shape
    mine, width = operands[slot], d * _itemsize(like)
    if not rows or not d:
        return
    for other in names:
        if other == slot:
            continue
        theirs = operands[other]
        same_place = theirs.base == mine.base and theirs.stride == mine.stride
        if slot == "out" and same_place:
            continue
        last = rows - 1
        apart = (
            mine.base + last * mine.stride + width <= theirs.base
            or theirs.base + last * theirs.stride + width <= mine.base
        )
        if not apart and mine.stride == theirs.stride:  # columns of one wide matrix
            behind = (theirs.base - mine.base) % mine.stride
            apart = width <= behind <= mine.stride - width
        if not apart:
            raise InvalidInputError(f"{names[slot]}: it shares memory with {names[other]}")


def check_in_place(operands: dict[str, Operand], given: dict[str, tuple[str, Any]]) -> None:
    """Raise unless kernels read and write the arrays themselves, and no copies of them.

    Raises
    ------
    InvalidInputError
        An array has gaps.
    """
    for slot, (name, value) in given.items():
        operand = operands[slot]
        if isinstance(operand.arrays, list):
            layout, arrays = _updates.flatten(value, name)
            found = operand.addresses
        else:
            layout, arrays, found = None, [value], [operand.base]
        for j, (x, address) in enumerate(zip(arrays, found, strict=True)):
            if address and _arrays.address(x) != address:
                label = name if layout is None else layout.label(name, j)
                raise InvalidInputError(
                    f"{label}: expected an array without gaps, which stays where it is; this one "
                    "would have to be copied at every call"
                )


def slots(**given: Any) -> dict[str, tuple[str, Any]]:
    """Return operands that are there, by slot; a value is (name of the argument, array)."""
    return {slot: pair for slot, pair in given.items() if pair[1] is not None}
