"""What a client remembers between packets, as explicit buffers: the state that encoders move on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["NAMES", "State"]

NAMES = ("e", "h", "v")


@dataclass
class State:
    """Buffers and factors of the affine form that every encoder reads.

    With g the update, in float32, in the order written, without fma; a term whose buffer is None is
    left out::

        s = p v + q g          the update with its momentum; s = g without v
        t = (b e + s) - h      what is left to send
        u = (a e + s) - h      what is compressed
        D = decode(encode(u))
        e <- t - D,   h <- h + D,   v <- s, or 0 where `mask` and D is not 0

    EF14 is ``a=b=decay`` with e; EF21 is h alone; EControl is ``a=eta, b=1`` with e and h;
    EF21-SGDM is ``p=1-beta, q=beta`` with v and h; DGC is ``p=mu, q=1, mask=True`` with v (its
    momentum) and e (what it accumulates).

    Parameters
    ----------
    e, h, v : (d,) arrays, optional
        h is float32; e and v are float32, or both uint16 that hold bfloat16 and are rounded
        stochastically, with the bits of stream (seed, round). Contiguous and writable; no two
        overlap, none overlaps the update. NumPy arrays; for an update on a GPU torch tensors on the
        same device, float32 or bfloat16.
    a, b, p, q : float
        Rounded to float32.
    mask : bool
        Forget the momentum of what was sent.
    spare : dict of arrays
        Memory like e, h, v, by name, that new state is written to: after a successful call the
        attributes name the new state and `spare` the old one. A buffer without a spare is updated
        in place, for which an encoder must look at all values before it writes the first.
    """

    e: Any = None
    h: Any = None
    v: Any = None
    a: float = 1.0
    b: float = 1.0
    p: float = 0.0
    q: float = 1.0
    mask: bool = False
    spare: dict[str, Any] = field(default_factory=dict)

    def buffers(self) -> Mapping[str, Any]:
        """Return the buffers that are kept, by name."""
        named = {name: getattr(self, name) for name in NAMES}
        return {name: array for name, array in named.items() if array is not None}

    def new(self, name: str) -> Any:
        """Return the memory that the new state of a buffer is written to."""
        return self.spare.get(name, getattr(self, name))

    @property
    def in_place(self) -> bool:
        """Whether some buffer has no spare."""
        return any(name not in self.spare for name in self.buffers())

    @property
    def dtype(self) -> str:
        """Type that e and v are stored in, "float32" or "bfloat16"."""
        kept = [x for x in (self.e, self.v) if x is not None]
        narrow = kept and _arrays.dtype_name(kept[0]) in ("uint16", "bfloat16")
        return "bfloat16" if narrow else "float32"

    def without_spare(self, name: str) -> State:
        """Return the same buffers with `name` updated in place; `take` brings the result back.

        For packets that change a buffer at few coordinates: its spare would have to be made equal.
        """
        return replace(self, spare={n: x for n, x in self.spare.items() if n != name})

    def take(self, other: State) -> None:
        """Take over buffers and spares of a state of `without_spare`, after success."""
        for name in NAMES:
            setattr(self, name, getattr(other, name))
        self.spare.update(other.spare)

    def commit(self) -> None:
        """Make what was written to the spares the state; encoders call it after success."""
        for name in self.buffers():
            if name in self.spare:
                old = getattr(self, name)
                setattr(self, name, self.spare[name])
                self.spare[name] = old

    def check(self, numel: int, device: str = "cpu") -> None:
        """Raise unless every buffer can hold the state of `numel` coordinates of a `device`.

        Raises
        ------
        DTypeError, InvalidInputError
            A buffer of another type, size or layout, or two that overlap.
        """
        seen: list[tuple[str, Any]] = []
        narrow = "uint16" if device == "cpu" else "bfloat16"
        wide = narrow if self.dtype == "bfloat16" else "float32"
        for name, x in self.buffers().items():
            dtype = "float32" if name == "h" else wide
            spare = [(f"spare[{name!r}]", self.spare[name])] if name in self.spare else []
            for label, y in [(name, x), *spare]:
                _check_buffer(y, label, numel, dtype, device)
                for other, z in seen:
                    if _overlap(y, z):
                        raise InvalidInputError(
                            f"{other} and {label}: expected two arrays that do not overlap"
                        )
                seen.append((label, y))

    def native(self) -> dict[str, Any]:
        """Return the arguments of a native encoder: addresses (0: absent) and factors."""
        kept = self.buffers()
        new = {name: self.new(name) for name in kept}
        return {
            **{n: _arrays.address(kept[n]) if n in kept else 0 for n in NAMES},
            **{f"{n}_new": _arrays.address(new[n]) if n in kept else 0 for n in NAMES},
            "a": self.a,
            "b": self.b,
            "p": self.p,
            "q": self.q,
            "mask": self.mask,
            "state_dtype": _arrays.DTYPE_CODES[self.dtype],
        }


def _check_buffer(x: Any, name: str, numel: int, dtype: str, device: str) -> None:
    known = isinstance(x, np.ndarray) if device == "cpu" else _arrays.is_torch(x)
    kind = "NumPy array" if device == "cpu" else f"torch tensor on {device}"
    if not known or _arrays.dtype_name(x) != dtype or _arrays.device_of(x) != device:
        got = type(x).__name__ if not _arrays.is_array(x) else _arrays.dtype_name(x)
        if _arrays.is_array(x) and (not known or _arrays.device_of(x) != device):
            got = f"a {type(x).__name__} on {_arrays.device_of(x)}"
        raise DTypeError(f"{name}: expected a {dtype} {kind}, got {got}")
    if isinstance(x, np.ndarray) and not x.dtype.isnative:
        raise DTypeError(f"{name}: expected a {dtype} {kind}, got {x.dtype}")
    if tuple(x.shape) != (numel,):
        raise InvalidInputError(f"{name}: expected shape ({numel},), got {tuple(x.shape)}")
    if isinstance(x, np.ndarray):
        usable = x.flags.c_contiguous and x.flags.aligned and x.flags.writeable
    else:
        usable = x.is_contiguous()
    if not usable:
        raise InvalidInputError(f"{name}: expected a contiguous, aligned, writable array")


def _overlap(x: Any, y: Any) -> bool:
    if isinstance(x, np.ndarray):
        return bool(np.may_share_memory(x, y))
    begin, other = x.data_ptr(), y.data_ptr()
    ends = begin + x.numel() * x.element_size(), other + y.numel() * y.element_size()
    return bool(begin < ends[1] and other < ends[0])
