"""`QuantizedTensor`: a weight matrix in few bits, and `quantize`, which makes one."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore import _weight_arrays as parts
from flcore.errors import InvalidInputError
from flcore.ops import weight_quant as ops
from flcore.ops.weight_quant import LAYOUTS
from flcore.quantization import _checks
from flcore.quantization._scheme import Scheme
from flcore.reference import double_quant
from flcore.reference import weight_quant as wq

__all__ = ["LAYOUTS", "QuantizedTensor", "quantize"]

PARTS = ("codes", "scales", "zeros", "scale_codes", "scale_absmax", "scale_offset")


class QuantizedTensor:
    """A weight W (n, k) in codes of 2 to 8 bits with scales; made by `quantize` or `from_parts`.

    Attributes
    ----------
    shape : tuple of int
        (n, k): outputs and inputs of ``y = x W^T``.
    scheme : Scheme
        What the codes mean.
    layout : {"rows", "tile16"}
        Order of the codes, told in `flcore.reference.weight_quant`.
    codes : array of uint8
        "rows": (n, row_bytes); "tile16": (blocks, chunks, 64 bits).
    scales : array
        "rows": (n, G); "tile16": (blocks, G, 16); of the scheme's `scale_dtype`, where NumPy holds
        bfloat16 as uint16. Decoded at every access where they are stored in 8 bits.
    zeros : array or None
        As the scales: uint8 for the kind integer_zero, `scale_dtype` for float_zero.
    table : array (16,) of float32, or None
        Levels of a codebook.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        scheme: Scheme,
        layout: str,
        codes: Any,
        scales: Any,
        zeros: Any = None,
        double: tuple[Any, Any, Any] | None = None,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.scheme = scheme
        self.layout = layout
        self.codes = codes
        self.zeros = zeros
        self._scales = scales  # None: decoded from _double
        self._double = double  # codes, absmax and offset of scales in 8 bits
        table = scheme.table
        self.table = None if table is None else parts.like(table, codes)
        self._tiled: QuantizedTensor | None = None
        self._arguments: dict[str, int] | None = None
        self._handle: Any = None

    def __repr__(self) -> str:
        n, k = self.shape
        return f"QuantizedTensor({n} x {k}, {self.scheme}, layout={self.layout!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Addresses are those of this object's memory; a copy has memory of its own.
        return {**self.__dict__, "_tiled": None, "_arguments": None, "_handle": None}

    # ---- parts -----------------------------------------------------------------------------------

    @classmethod
    def from_parts(
        cls,
        shape: tuple[int, int],
        scheme: Scheme | str,
        codes: Any,
        scales: Any = None,
        zeros: Any = None,
        *,
        scale_codes: Any = None,
        scale_absmax: Any = None,
        scale_offset: Any = None,
        layout: str = "rows",
    ) -> QuantizedTensor:
        """Make a weight of finished codes, scales and zeros, after checking every one of them.

        Parameters
        ----------
        shape : (int, int)
            (n, k).
        scheme : Scheme or str
            What the parts mean.
        codes, scales, zeros : array
            As the attributes of that name; all NumPy, or all torch on one device. They are kept,
            not copied, where they are contiguous.
        scale_codes, scale_absmax, scale_offset : array
            In the place of `scales` for a scheme with `double_quant`, in the layout "rows": uint8
            (n, G), float32 (ceil(n G / 256),) and (1,), told in `flcore.reference.double_quant`.
        layout : {"rows", "tile16"}
            Order of the parts.

        Raises
        ------
        InvalidInputError
            A shape, device or value does not fit: a scale that is not finite, a zero beyond the
            codes, a byte that is no finite FP8 number.
        DTypeError
            A part is not an array of the dtype that belongs there.
        """
        scheme = Scheme.of(scheme)
        n, k = _checks.matrix_shape(shape)
        ops.check_layout(layout)
        code_shape, group_shape = ops.part_shapes(n, k, scheme, layout)
        codes = _checks.part(codes, "codes", code_shape, "uint8", None)
        double = None
        if scale_codes is not None:
            if not scheme.double_quant or layout != "rows" or scales is not None:
                raise InvalidInputError(
                    "scale_codes: expected a scheme with double_quant, the layout 'rows' and no "
                    "scales"
                )
            blocks = -(-group_shape[0] * group_shape[1] // double_quant.BLOCK)
            double = (
                _checks.part(scale_codes, "scale_codes", group_shape, "uint8", codes),
                _checks.part(scale_absmax, "scale_absmax", (blocks,), "float32", codes),
                _checks.part(scale_offset, "scale_offset", (1,), "float32", codes),
            )
            for x, name in zip(double[1:], ("scale_absmax", "scale_offset"), strict=True):
                _checks.finite(x, name)
        else:
            scales = _checks.part(scales, "scales", group_shape, scheme.scale_dtype, codes)
            _checks.finite(scales, "scales")
        zero_dtype = scheme.zero_dtype()
        if zero_dtype is not None:
            zeros = _checks.part(zeros, "zeros", group_shape, zero_dtype, codes)
        elif zeros is not None:
            raise InvalidInputError(f"zeros: kind {scheme.kind!r} has none")
        _checks.values(codes, zeros, scheme)
        return cls((n, k), scheme, layout, codes, scales, zeros, double)

    @property
    def scales(self) -> Any:
        """Scales of the groups, in the scheme's storage type."""
        if self._scales is not None:
            return self._scales
        assert self._double is not None
        found = double_quant.decode_scales(*(parts.to_numpy(x) for x in self._double))
        return parts.like(found, self.codes)

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that hold the weight, by the names that `from_parts` gives them."""
        if self._scales is not None:
            found = {"scales": self._scales}
        else:
            assert self._double is not None
            found = dict(zip(PARTS[3:], self._double, strict=True))
        if self.zeros is not None:
            found["zeros"] = self.zeros
        return {"codes": self.codes, **found}

    @property
    def device(self) -> str:
        """Where the parts are: "cpu", "cuda:0"."""
        return _arrays.device_of(self.codes)

    @property
    def group(self) -> int:
        """Positions k that share a scale; k rounded up to 16 where it is the whole row."""
        return self.scheme.group_size(self.shape[1])

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return wq.groups(self.shape[1], self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of all `arrays`."""
        return sum(parts.nbytes(x) for x in self.arrays.values())

    @property
    def bits_per_weight(self) -> float:
        """``8 nbytes / (n k)``."""
        n, k = self.shape
        return 8 * self.nbytes / (n * k) if n * k else 0.0

    # ---- forms -----------------------------------------------------------------------------------

    def to_layout(self, layout: str) -> QuantizedTensor:
        """Return the same weight in the other layout; itself where it is in that layout.

        Scales in 8 bits become float32 in the layout "tile16", and come back as they were.
        """
        ops.check_layout(layout)
        if layout == self.layout:
            return self
        codes, scales, zeros = ops.repack_weight(self, layout)
        if self._double is not None and layout == "rows":
            scales = None
        return QuantizedTensor(self.shape, self.scheme, layout, codes, scales, zeros, self._double)

    def tiled(self) -> QuantizedTensor:
        """Return the weight in the layout "tile16"; made once and kept."""
        if self.layout == "tile16":
            return self
        if self._tiled is None:
            self._tiled = self.to_layout("tile16")
        return self._tiled

    def kernel_args(self) -> dict[str, int]:
        """Return the fields of QWeight (csrc/api.h); addresses are those of `tiled()`'s arrays."""
        tiled = self.tiled()
        if tiled._arguments is None:
            tiled._arguments = {
                "n": self.shape[0],
                "k": self.shape[1],
                "bits": self.scheme.bits,
                "kind": self.scheme.kind_code,
                "group": self.group,
                "codes": _arrays.address(tiled.codes),
                "scales": _arrays.address(tiled.scales),
                "scale_dtype": _arrays.DTYPE_CODES[self.scheme.scale_dtype],
                "zeros": 0 if tiled.zeros is None else _arrays.address(tiled.zeros),
                "table": 0 if tiled.table is None else _arrays.address(tiled.table),
            }
        return tiled._arguments

    def kernel_handle(self) -> Any:
        """Return QWeight of the core for a weight on the CPU, None for one elsewhere; kept."""
        if self._handle is None:
            handle = _native.core.QWeight(self.kernel_args()) if self.device == "cpu" else False
            self._handle = handle
        return self._handle or None

    def dequantize(self, dtype: Any = "float32", *, out: Any = None) -> Any:
        """Return the weight as an array (n, k) of `dtype`, of the kind the parts are.

        Values are rounded to float32 once and from there to narrower types; float64 has them
        unrounded. `out`, a contiguous array, is filled and returned if it is given.
        """
        return ops.dequantize_weight(self, dtype, out=out)

    def rows(self, index: Any) -> QuantizedTensor:
        """Return the rows `index` (slice or 1-D integers) as a weight in the layout "rows".

        Scales in 8 bits become float32: their blocks run over all rows.
        """
        source = self.to_layout("rows")
        if not isinstance(index, slice):
            index = _checks.row_index(index, self.shape[0], source.codes)
        scheme = Scheme.of(self.scheme, double_quant=False)
        codes, scales = (parts.contiguous(x[index]) for x in (source.codes, source.scales))
        zeros = None if source.zeros is None else parts.contiguous(source.zeros[index])
        return QuantizedTensor((len(codes), self.shape[1]), scheme, "rows", codes, scales, zeros)

    def _map(self, convert: Any) -> QuantizedTensor:
        scales, zeros = (None if x is None else convert(x) for x in (self._scales, self.zeros))
        double = None
        if self._double is not None:
            codes, absmax, offset = (convert(x) for x in self._double)
            double = (codes, absmax, offset)
        return QuantizedTensor(
            self.shape, self.scheme, self.layout, convert(self.codes), scales, zeros, double
        )

    def to(self, device: Any) -> QuantizedTensor:
        """Return the weight with parts that are torch tensors on `device`."""
        return self._map(lambda x: parts.to_torch(x, device))

    def torch(self) -> QuantizedTensor:
        """Return the weight with parts that are torch tensors; they share memory with NumPy's."""
        return self if _arrays.is_torch(self.codes) else self._map(parts.to_torch)

    def numpy(self) -> QuantizedTensor:
        """Return the weight with parts that are NumPy arrays; they share memory on the CPU."""
        return self if isinstance(self.codes, np.ndarray) else self._map(parts.to_numpy)

    # ---- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weight to a safetensors file, under the name "weight"."""
        from flcore.quantization._files import save_weights

        save_weights(path, {"weight": self})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> QuantizedTensor:
        """Read what `save` wrote.

        Raises
        ------
        CheckpointError
            The file is damaged or holds something else.
        """
        from flcore.quantization._files import load_one

        return load_one(path)


def quantize(w: Any, scheme: Scheme | str = "int4", *, layout: str = "rows") -> QuantizedTensor:
    """Quantise a weight.

    Parameters
    ----------
    w : array (n, k)
        NumPy or torch, float64 (rounded to float32 first), float32, float16 or bfloat16; finite.
    scheme : Scheme or str
        The numbers to use, or the name of a preset (`Scheme.of`).
    layout : {"rows", "tile16"}
        Order of the codes. "tile16" is what products read; "rows" what is saved.

    Returns
    -------
    QuantizedTensor
        With parts of the kind and on the device of `w`.

    Raises
    ------
    NonFiniteError
        `w` holds a NaN or an infinity.
    InvalidInputError, DTypeError
        `w` is not a matrix of floats, or a scale is too large for its storage type.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.quantization import quantize
    >>> w = quantize(np.float32([[0.9, -0.3, 2.6, 0.05]]), "nf4")
    >>> w.dequantize().round(3)
    array([[ 0.879, -0.237,  2.6  ,  0.   ]], dtype=float32)
    """
    scheme = Scheme.of(scheme)
    double = scheme.double_quant
    ops.check_layout(layout)
    first = "rows" if double else layout
    codes, scales, zeros = ops.quantize_weight(w, scheme, layout=first)
    shape = (int(w.shape[0]), int(w.shape[1]))
    if not double:
        return QuantizedTensor(shape, scheme, layout, codes, scales, zeros)
    one, two, three = double_quant.encode_scales(parts.to_numpy(scales))
    coded = (parts.like(one, w), parts.like(two, w), parts.like(three, w))
    return QuantizedTensor(shape, scheme, "rows", codes, None, zeros, coded).to_layout(layout)
