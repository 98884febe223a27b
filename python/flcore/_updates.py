"""The structure of an update, and the arguments that many clients bring: updates and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["Layout", "flatten", "parse_updates", "parse_weights"]


def _describe(x: Any) -> tuple[str, str, tuple[int, ...], str]:
    library = "NumPy array" if isinstance(x, np.ndarray) else "torch tensor"
    return library, _arrays.dtype_name(x), tuple(x.shape), _arrays.device_of(x)


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

    def views(
        self, arrays: Sequence[Any], name: str, codes: dict[str, int] = _arrays.DTYPE_CODES
    ) -> list[_arrays.View]:
        """View the layers of one update; the labels are made only when one cannot be read."""
        try:
            return [_arrays.view(x, codes=codes) for x in arrays]
        except DTypeError:
            for j, x in enumerate(arrays):
                _arrays.view(x, self.label(name, j), codes)
            raise

    def build(self, layers: Sequence[Any]) -> Any:
        """Put `layers` into an update of this structure."""
        if self.kind is object:
            return layers[0]
        if self.kind is dict:
            return dict(zip(self.keys, layers, strict=True))
        return self.kind(layers)

    def layers(self, update: Any, name: str, *, dtypes: bool = True) -> list[Any]:
        """Return the arrays of `update`, checked against this layout; dtypes too unless told not.

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
                dtype = _arrays.dtype_name(x) if dtypes else spec[1]
                if (dtype, x.shape) == spec[1:3] and spec[0] == "NumPy array":
                    continue
            label = self.label(name, i)
            if not _arrays.is_array(x):
                raise DTypeError(f"{label}: expected a {spec[0]}, got {type(x).__name__}")
            got = _describe(x)
            if got[2] != spec[2]:
                raise InvalidInputError(
                    f"{label}: expected shape {spec[2]} like the first update, got {got[2]}"
                )
            for what, want, have in zip(("kind", "dtype", "", "device"), spec, got, strict=True):
                if want != have and (dtypes or what != "dtype"):
                    raise DTypeError(
                        f"{label}: expected {what} {want} like the first update, got {have}"
                    )
        return arrays

    def _open(self, update: Any, name: str) -> list[Any]:
        if self.kind is object:
            if not _arrays.is_array(update):
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
    if _arrays.is_array(update):
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
        if not _arrays.is_array(x):
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
    if _arrays.is_array(updates):
        if updates.ndim < 1 or updates.shape[0] == 0:
            raise InvalidInputError(
                f"{name}: expected shape (n, ...) with n >= 1 clients, got {tuple(updates.shape)}"
            )
        layout, first = flatten(updates[0], f"{name}[0]")
        if not _arrays.is_array(updates[0]):  # a 1-D array: its rows are scalars, not arrays
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
    if layout.kind is object and all(map(_arrays.is_array, updates)) and _alike(updates):
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
    if _arrays.is_torch(weights):
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
