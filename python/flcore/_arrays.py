"""Views of NumPy and torch arrays without copies, and the structure of an update.

A kernel needs an address, a length, a dtype and a device; a user holds arrays in a list or a dict.
This module is the only place that translates between the two, and the only one that words the
errors about arrays. torch is never imported here: a tensor can only come from an imported torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flcore._native import core
from flcore.errors import DTypeError, InvalidInputError

__all__ = [
    "DTYPE_CODES",
    "Layout",
    "View",
    "flatten",
    "is_array",
    "parse_updates",
    "parse_weights",
    "queue",
    "to_float64",
    "view",
    "writable_view",
]

DTYPE_CODES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3}  # DType in csrc/api.h
FLOATS = "float64, float32, float16 or bfloat16"


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_array(x: Any) -> bool:
    """Whether `x` is a NumPy array or a torch tensor."""
    return isinstance(x, np.ndarray) or is_torch(x)


_dtype_names: dict[Any, str] = {}  # asking NumPy for the name takes 3 us, this 0.05


def dtype_name(x: Any) -> str:
    """Name of an array's dtype, the same for NumPy and torch ("float32", "int64", "bool")."""
    name = _dtype_names.get(x.dtype)
    if name is None:
        name = x.dtype.name if isinstance(x, np.ndarray) else str(x.dtype).removeprefix("torch.")
        _dtype_names[x.dtype] = name
    return name


def device_of(x: Any) -> str:
    """Return "cpu", "cuda:0", ... ."""
    return "cpu" if isinstance(x, np.ndarray) else str(x.device)


def is_float(x: Any) -> bool:
    """Whether kernels can read the dtype of `x`."""
    return dtype_name(x) in DTYPE_CODES


def numel(x: Any) -> int:
    """Return the number of elements."""
    return int(x.size if isinstance(x, np.ndarray) else x.numel())


# ---- one array ---------------------------------------------------------------------------------


class View(NamedTuple):
    """One contiguous array as a kernel sees it.

    Attributes
    ----------
    ptr : int
        Address of the first element (0 when there is none).
    numel : int
        Number of elements.
    dtype : str
        Key of `DTYPE_CODES`.
    device : str
        "cpu" or "cuda:<index>".
    array : array
        Owner of the memory; kept alive for as long as the view is.
    """

    ptr: int
    numel: int
    dtype: str
    device: str
    array: Any

    @property
    def code(self) -> int:
        """The dtype's code in csrc/api.h."""
        return DTYPE_CODES[self.dtype]


def view(x: Any, name: str = "array") -> View:
    """View `x` for reading; data that is not contiguous and native is copied once.

    Raises
    ------
    DTypeError
        `x` is not an array of a floating dtype that kernels can read.
    """
    if isinstance(x, np.ndarray):
        dtype = dtype_name(x)
        if dtype not in DTYPE_CODES:
            raise DTypeError(f"{name}: expected {FLOATS}, got {dtype}")
        if not (x.flags.c_contiguous and x.dtype.isnative):
            x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
        return View(core.address(x) if x.size else 0, x.size, dtype, "cpu", x)
    if not is_torch(x):
        raise DTypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(x).__name__}"
        )
    dtype = dtype_name(x)
    if dtype not in DTYPE_CODES:
        raise DTypeError(f"{name}: expected {FLOATS}, got {dtype}")
    torch = sys.modules["torch"]
    if x.layout != torch.strided or x.device.type not in ("cpu", "cuda"):
        raise DTypeError(
            f"{name}: expected a dense tensor on cpu or cuda, got {x.layout} on {x.device}"
        )
    x = x.detach().contiguous()
    return View(x.data_ptr(), x.numel(), dtype, str(x.device), x)


def writable_view(x: Any, name: str, like: View) -> View | None:
    """View `x` for writing what has the size, dtype and device of `like`.

    Returns None when `x` can be written but is not contiguous: the caller then copies into it.

    Raises
    ------
    InvalidInputError
        `x` is read-only or has another number of elements.
    DTypeError
        `x` has another dtype, kind or device.
    """
    if not is_array(x) or dtype_name(x) != like.dtype or device_of(x) != like.device:
        got = f"{dtype_name(x)} on {device_of(x)}" if is_array(x) else type(x).__name__
        raise DTypeError(f"{name}: expected {like.dtype} on {like.device}, got {got}")
    if numel(x) != like.numel:
        raise InvalidInputError(f"{name}: expected {like.numel} values, got {numel(x)}")
    if isinstance(x, np.ndarray):
        if not x.flags.writeable:
            raise InvalidInputError(f"{name}: the array is read-only; pass one that can be written")
        return view(x, name) if x.flags.c_contiguous and x.dtype.isnative else None
    return view(x, name) if x.is_contiguous() else None


def to_float64(x: Any) -> np.ndarray:
    """Copy any array into a flat float64 NumPy array (for `reference/`)."""
    if not isinstance(x, np.ndarray):
        x = x.detach().cpu().to(sys.modules["torch"].float64).numpy()
    return np.array(x, dtype=np.float64).reshape(-1)


def assign(target: Any, values: Any) -> None:
    """Write `values` (same number of elements, NumPy or the same library) into `target`."""
    if isinstance(target, np.ndarray):
        np.copyto(target, np.asarray(values).reshape(target.shape), casting="unsafe")
    else:
        torch = sys.modules["torch"]
        source = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        target.detach().copy_(source.reshape(target.shape))


def empty_like(x: Any) -> Any:
    """Return an uninitialised contiguous array of the shape, dtype and device of `x`."""
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, dtype=x.dtype.newbyteorder("="))
    torch = sys.modules["torch"]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def queue(device: str) -> tuple[int, int]:
    """Return the index of a CUDA device and the address of torch's current stream on it."""
    stream = sys.modules["torch"].cuda.current_stream(device)
    return stream.device.index, stream.cuda_stream


# ---- the structure of an update ----------------------------------------------------------------


def _describe(x: Any) -> tuple[str, str, tuple[int, ...], str]:
    library = "NumPy array" if isinstance(x, np.ndarray) else "torch tensor"
    return library, dtype_name(x), tuple(x.shape), device_of(x)


def _alike(arrays: Sequence[Any]) -> bool:
    """Whether type, dtype, shape and device agree; 0.2 us an array, where the words take 3."""
    first = arrays[0]
    kind, dtype, shape = type(first), first.dtype, first.shape
    same = all(type(x) is kind and x.dtype == dtype and x.shape == shape for x in arrays)
    return same and (kind is np.ndarray or all(x.device == first.device for x in arrays))


@dataclass(frozen=True)
class Layout:
    """What an update looks like: an array, or a list, tuple or dict of arrays (the layers).

    Attributes
    ----------
    kind : type
        `list`, `tuple` or `dict`; `object` for a single array.
    keys : tuple
        Dict keys, or positions; `(None,)` for a single array.
    specs : tuple
        Library, dtype name, shape and device of each layer.
    """

    kind: type
    keys: tuple
    specs: tuple[tuple[str, str, tuple[int, ...], str], ...]

    def label(self, name: str, layer: int) -> str:
        """Return the name of one layer as a user writes it: `update['fc.weight']`."""
        return name if self.kind is object else f"{name}[{self.keys[layer]!r}]"

    def select(self, positions: Sequence[int]) -> Layout:
        """Return the layout of some of the layers, labelled as before."""
        keys = tuple(self.keys[i] for i in positions)
        return Layout(self.kind, keys, tuple(self.specs[i] for i in positions))

    def views(self, arrays: Sequence[Any], name: str) -> list[View]:
        """View the layers of one update; the labels are made only when one cannot be read."""
        try:
            return [view(x) for x in arrays]
        except DTypeError:
            for j, x in enumerate(arrays):
                view(x, self.label(name, j))
            raise

    def build(self, layers: Sequence[Any]) -> Any:
        """Put `layers` into an update of this structure."""
        if self.kind is object:
            return layers[0]
        if self.kind is dict:
            return dict(zip(self.keys, layers, strict=True))
        return self.kind(layers)

    def layers(self, update: Any, name: str) -> list[Any]:
        """Return the arrays of `update`, checked against this layout.

        Raises
        ------
        InvalidInputError
            Number, keys or shapes of the layers differ.
        DTypeError
            Kind, dtype or device of a layer differs.
        """
        arrays = self._open(update, name)
        for i, (x, spec) in enumerate(zip(arrays, self.specs, strict=True)):
            if isinstance(x, np.ndarray):  # the common case, without building strings
                if x.shape == spec[2] and dtype_name(x) == spec[1] and spec[0] == "NumPy array":
                    continue
            label = self.label(name, i)
            if not is_array(x):
                raise DTypeError(f"{label}: expected a {spec[0]}, got {type(x).__name__}")
            got = _describe(x)
            if got[2] != spec[2]:
                raise InvalidInputError(
                    f"{label}: expected shape {spec[2]} like the first update, got {got[2]}"
                )
            for what, want, have in zip(("kind", "dtype", "", "device"), spec, got, strict=True):
                if want != have:
                    raise DTypeError(
                        f"{label}: expected {what} {want} like the first update, got {have}"
                    )
        return arrays

    def _open(self, update: Any, name: str) -> list[Any]:
        if self.kind is object:
            if not is_array(update):
                raise DTypeError(
                    f"{name}: expected one array like the first update, got {type(update).__name__}"
                )
            return [update]
        if self.kind is dict:
            if not isinstance(update, Mapping):
                raise DTypeError(f"{name}: expected a dict of arrays, got {type(update).__name__}")
            if update.keys() != set(self.keys):
                missing = [k for k in self.keys if k not in update]
                extra = [k for k in update if k not in self.keys]
                raise InvalidInputError(
                    f"{name}: expected the keys of the first update; missing {missing}, "
                    f"not expected {extra}"
                )
            return [update[k] for k in self.keys]
        if not isinstance(update, list | tuple):
            raise DTypeError(
                f"{name}: expected a list or tuple of arrays, got {type(update).__name__}"
            )
        if len(update) != len(self.keys):
            raise InvalidInputError(
                f"{name}: expected {len(self.keys)} layers like the first update, got {len(update)}"
            )
        return list(update)


def flatten(update: Any, name: str = "update") -> tuple[Layout, list[Any]]:
    """Return the layout of `update` and its arrays in order.

    Raises
    ------
    DTypeError
        `update` is not an array, or a list, tuple or dict of arrays.
    """
    kind: type
    keys: tuple[Any, ...]
    if is_array(update):
        kind, keys, arrays = object, (None,), [update]
    elif isinstance(update, Mapping):
        kind, keys, arrays = dict, tuple(update), list(update.values())
    elif isinstance(update, list | tuple):
        kind = list if isinstance(update, list) else tuple
        keys, arrays = tuple(range(len(update))), list(update)
    else:
        raise DTypeError(
            f"{name}: expected an array, or a list, tuple or dict of arrays, "
            f"got {type(update).__name__}"
        )
    for key, x in zip(keys, arrays, strict=True):
        if not is_array(x):
            raise DTypeError(
                f"{name}[{key!r}]: expected a NumPy array or a torch tensor, got {type(x).__name__}"
            )
    return Layout(kind, keys, tuple(_describe(x) for x in arrays)), arrays


def parse_updates(updates: Any, name: str = "updates") -> tuple[Layout, list[list[Any]]]:
    """Return the common layout of the updates of n clients, and their layers `[n][layers]`.

    `updates` is a sequence of updates, or one array of shape (n, ...) with a row a client.

    Raises
    ------
    InvalidInputError
        There is no update, or structures or shapes differ.
    DTypeError
        Kinds, dtypes or devices differ, or something is not an array.
    """
    if is_array(updates):
        if updates.ndim < 1 or updates.shape[0] == 0:
            raise InvalidInputError(
                f"{name}: expected shape (n, ...) with n >= 1 clients, got {tuple(updates.shape)}"
            )
        layout, first = flatten(updates[0], f"{name}[0]")
        if not is_array(updates[0]):  # a 1-D array: its rows are scalars, not arrays
            raise InvalidInputError(f"{name}: expected shape (n, ...), got {tuple(updates.shape)}")
        return layout, [first, *([updates[i]] for i in range(1, updates.shape[0]))]
    if isinstance(updates, Mapping | str) or not isinstance(updates, Iterable):
        raise DTypeError(
            f"{name}: expected a list of updates, one a client, got {type(updates).__name__}"
        )
    updates = list(updates)
    if not updates:
        raise InvalidInputError(f"{name}: expected at least one update, got an empty list")
    layout, first = flatten(updates[0], f"{name}[0]")
    if layout.kind is object and all(map(is_array, updates)) and _alike(updates):
        return layout, [[x] for x in updates]
    rest = (layout.layers(u, f"{name}[{i}]") for i, u in enumerate(updates[1:], start=1))
    return layout, [first, *rest]


def parse_weights(weights: Any, n: int, *, signed: bool, name: str = "weights") -> list[float]:
    """Return `n` finite floats; non-negative with a positive sum unless `signed`.

    Raises
    ------
    InvalidInputError
        Wrong count, not numbers, not finite, or (unless `signed`) negative or summing to zero.
    """
    if is_torch(weights):
        weights = weights.detach().cpu().numpy()
    try:
        values = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"{name}: expected {n} numbers, one a client, got {weights!r}"
        ) from None
    if values.shape != (n,):
        raise InvalidInputError(
            f"{name}: expected {n} values, one a client, got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        i = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InvalidInputError(f"{name}[{i}]: expected a finite number, got {values[i]}")
    if not signed:
        if (values < 0).any():
            i = int(np.flatnonzero(values < 0)[0])
            raise InvalidInputError(f"{name}[{i}]: expected a number >= 0, got {values[i]}")
        if not values.any():
            raise InvalidInputError(f"{name}: expected a positive sum, got {n} zeros")
    return [float(v) for v in values]
