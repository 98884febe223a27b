"""`Scheme`: which numbers a low-bit weight is made of and how they are found."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flcore.errors import DTypeError, InvalidInputError
from flcore.reference import weight_quant as wq
from flcore.reference.weight_rules import RULES, Rule

__all__ = ["PRESETS", "SCALE_DTYPES", "Scheme"]

KINDS = ("symmetric", "integer_zero", "float_zero", "codebook", "fp8")
SCALE_DTYPES = ("float32", "float16", "bfloat16")
SEARCHES = ("absmax", "mse")
SCOPES = ("row", "tensor")
POWERS = ("floor", "ceil", "rceil", "even")
ALLOWED = {
    "symmetric": ("centred", "narrow", "q8_0", "q4_0"),
    "integer_zero": ("min_max", "awq"),
    "float_zero": ("min_max",),
    "codebook": ("absmax", *POWERS),
    "fp8": ("absmax", *POWERS),
}
SHRINK = tuple(1.0 - 0.02 * i for i in range(31))  # 1, 0.98, .. 0.4 of the range
STEPS = (1.0, 2.0, 0.5)  # of a scale that is a power of two

# By name, so that the shape of a preset is read at one glance.
PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group": -1, "scale_dtype": "float32"},
    "int8-asym": {"bits": 8, "group": -1, "kind": "integer_zero", "scale_dtype": "float32"},
    "int4": {"bits": 4},
    "int4-asym": {"bits": 4, "kind": "integer_zero"},
    "int4-float-zero": {"bits": 4, "kind": "float_zero", "scale_dtype": "bfloat16"},
    "int3": {"bits": 3},
    "int3-asym": {"bits": 3, "kind": "integer_zero"},
    "int2": {"bits": 2, "group": 64, "kind": "integer_zero"},
    "awq": {"bits": 4, "kind": "integer_zero", "rule": "awq", "force_zero": False},
    "q4_0": {"bits": 4, "group": 32, "rule": "q4_0"},
    "q8_0": {"bits": 8, "group": 32, "rule": "q8_0"},
    "nf4": {"bits": 4, "group": 64, "kind": "codebook", "codebook": "nf4",
            "scale_dtype": "float32"},
    "fp4": {"bits": 4, "group": 64, "kind": "codebook", "codebook": "fp4",
            "scale_dtype": "float32"},
    "mxfp4": {"bits": 4, "group": 32, "kind": "codebook", "codebook": "e2m1", "rule": "floor",
              "scale_dtype": "bfloat16"},
    "mxfp8": {"bits": 8, "group": 32, "kind": "fp8", "codebook": "e4m3", "rule": "floor",
              "scale_dtype": "bfloat16"},
    "fp8": {"bits": 8, "group": -1, "kind": "fp8", "codebook": "e4m3", "scale_dtype": "float32"},
    "fp8-e5m2": {"bits": 8, "group": -1, "kind": "fp8", "codebook": "e5m2",
                 "scale_dtype": "float32"},
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the numbers of a weight are stored in few bits.

    Parameters
    ----------
    bits : {2, 3, 4, 8}
        Width of a code.
    group : int
        Consecutive inputs k of a row that share a scale, a multiple of 16; -1: the whole row.
    kind : {"symmetric", "integer_zero", "float_zero", "codebook", "fp8"}
        ``(q - 2^(b-1)) S``; ``(q - Z) S`` with Z an integer code; ``(q - 2^(b-1)) S + zero``;
        ``table[q] S``, 4 bits; ``fp8(q) S``, 8 bits.
    codebook : str or sequence of 16 floats, optional
        The table: "nf4", "fp4" (of bitsandbytes), "e2m1", or levels of one's own; for fp8 "e4m3"
        or "e5m2".
    scale_dtype : {"float16", "float32", "bfloat16"}
        Storage type of scales and of floating zeros.
    rule : str
        How scales and codes are found (`flcore.reference.weight_rules` has the formulas).
        symmetric: "centred" (for up to 4 bits), "narrow" (for 8), "q8_0", "q4_0"; integer_zero:
        "min_max", "awq" (a range of at least 1e-5); codebook and fp8: "absmax", or the powers of
        two "floor", "ceil", "rceil", "even". By default the first that fits.
    force_zero : bool
        integer_zero: the range of every group includes 0. Without it a group of values of one sign
        loses its values, because Z is limited to the codes.
    search : {"absmax", "mse"}
        Scales from the range as it is, or the one of 31 shrunken ranges (for powers of two: of
        three scales) with the least sum of squared errors.
    double_quant : bool
        codebook, float32 scales: the scales themselves are stored in 8 bits (QLoRA).
    scope : {"row", "tensor"}
        "tensor": one scale for the whole weight; `group` is -1.

    Raises
    ------
    InvalidInputError, DTypeError
        A field that does not fit; the message names it.
    """

    bits: int = 4
    group: int = 128
    kind: str = "symmetric"
    codebook: str | tuple[float, ...] | None = None
    scale_dtype: str = "float16"
    rule: str = ""
    force_zero: bool = True
    search: str = "absmax"
    double_quant: bool = False
    scope: str = "row"

    def __post_init__(self) -> None:
        for name in ("bits", "group"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise DTypeError(f"{name}: expected an integer, got {value!r}") from None
        for name, allowed in (
            ("bits", wq.BITS),
            ("kind", KINDS),
            ("scale_dtype", SCALE_DTYPES),
            ("search", SEARCHES),
            ("scope", SCOPES),
        ):
            _one_of(name, getattr(self, name), allowed)
        if self.group != -1 and (self.group < 16 or self.group % 16):
            raise InvalidInputError(
                f"group: expected a multiple of 16 or -1 for the whole row, got {self.group}"
            )
        if self.scope == "tensor" and self.group != -1:
            raise InvalidInputError(f"group: expected -1 with scope 'tensor', got {self.group}")
        self._check_codebook()
        if not self.rule:
            first = "narrow" if self.kind == "symmetric" and self.bits == 8 else None
            object.__setattr__(self, "rule", first or ALLOWED[self.kind][0])
        _one_of("rule", self.rule, ALLOWED[self.kind])
        if self.rule == ("q4_0" if self.bits == 8 else "q8_0"):
            raise InvalidInputError(f"rule: {self.rule!r} does not go with {self.bits} bits")
        if self.rule in POWERS and self.scale_dtype == "float16":
            raise InvalidInputError(
                f"scale_dtype: rule {self.rule!r} needs the exponents of bfloat16 or float32"
            )
        if self.double_quant and (
            self.kind != "codebook" or self.scale_dtype != "float32" or self.rule != "absmax"
        ):
            raise InvalidInputError(
                "double_quant: expected kind 'codebook' with rule 'absmax' and float32 scales"
            )

    def _check_codebook(self) -> None:
        book = self.codebook
        if self.kind == "fp8":
            book = "e4m3" if book is None else book
            _one_of("codebook", book, ("e4m3", "e5m2"))
        elif self.kind != "codebook":
            if book is not None:
                raise InvalidInputError(f"codebook: kind {self.kind!r} has none, got {book!r}")
        elif book is None or isinstance(book, str):
            book = "nf4" if book is None else book
            _one_of("codebook", book, tuple(wq.CODEBOOKS))
        else:
            book = _levels(book)
        if self.kind in ("codebook", "fp8") and self.bits != (4 if self.kind == "codebook" else 8):
            raise InvalidInputError(f"bits: kind {self.kind!r} does not go with {self.bits}")
        object.__setattr__(self, "codebook", book)

    @classmethod
    def of(cls, scheme: str | Scheme, **changes: Any) -> Scheme:
        """Return a preset by name, with fields changed.

        Parameters
        ----------
        scheme : str or Scheme
            "int8", "int8-asym", "int4", "int4-asym", "int4-float-zero", "int3", "int3-asym",
            "int2", "awq", "q4_0", "q8_0", "nf4", "fp4", "mxfp4", "mxfp8", "fp8" or "fp8-e5m2".
        **changes
            Fields that differ from the preset.

        Examples
        --------
        >>> Scheme.of("int4", group=32).bits_per_weight
        4.5
        """
        if isinstance(scheme, Scheme):
            return replace(scheme, **changes) if changes else scheme
        if not isinstance(scheme, str):
            raise DTypeError(f"scheme: expected a name or a Scheme, got {type(scheme).__name__}")
        if scheme not in PRESETS:
            raise InvalidInputError(f"scheme: expected one of {', '.join(PRESETS)}, got {scheme!r}")
        fields = {**PRESETS[scheme], **changes}
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise InvalidInputError(f"scheme: no field {', '.join(sorted(unknown))}")
        return cls(**fields)

    # ---- what kernels want to know ---------------------------------------------------------------

    @property
    def kind_code(self) -> int:
        """QWeightKind in csrc/api.h."""
        if self.kind == "fp8":
            return wq.E5M2 if self.codebook == "e5m2" else wq.E4M3
        return {"float_zero": wq.FLOAT_ZERO, "codebook": wq.TABLE}.get(self.kind, wq.INT)

    @property
    def table(self) -> np.ndarray | None:
        """The 16 float32 levels of a codebook."""
        if self.kind != "codebook":
            return None
        book = self.codebook
        return np.array(wq.CODEBOOKS[book] if isinstance(book, str) else book, np.float32)

    def group_size(self, k: int) -> int:
        """Positions that share a scale in a row of `k`: `group`, or all rounded up to 16."""
        return self.group if 0 < self.group < k else max(16, -(-k // 16) * 16)

    def zero_dtype(self) -> str | None:
        """Storage type of the zeros; None where there are none."""
        return {"integer_zero": "uint8", "float_zero": self.scale_dtype}.get(self.kind)

    def quantizer(self, k: int) -> Rule:
        """Return the rule that quantises rows of `k` values."""
        factors: Sequence[float] = (1.0,)
        if self.search == "mse":
            factors = STEPS if self.rule in POWERS else SHRINK
        return Rule(
            bits=self.bits,
            kind=self.kind_code,
            group=self.group_size(k),
            rule="min_max" if self.rule == "awq" else self.rule,
            scale_dtype=self.scale_dtype,
            table=self.table,
            force_zero=self.force_zero and self.kind == "integer_zero",
            range_floor=1e-5 if self.rule == "awq" else 0.0,
            factors=factors,
            tensor=self.scope == "tensor",
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight of many whole groups, scales and zeros included."""
        if self.group == -1:
            return float(self.bits)
        scale = 4 if self.scale_dtype == "float32" else 2
        extra = 8 * (1 + 4 / 256 if self.double_quant else scale)
        zero = {"integer_zero": 8, "float_zero": 8 * scale}.get(self.kind, 0)
        return self.bits + (extra + zero) / self.group


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise InvalidInputError(
            f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}"
        )


def _levels(book: Any) -> tuple[float, ...]:
    try:
        levels = np.asarray(book, np.float64).astype(np.float32)
    except (TypeError, ValueError):
        raise DTypeError(f"codebook: expected a name or 16 numbers, got {book!r}") from None
    if levels.shape != (16,) or not 2.0**-60 < np.abs(levels).max(initial=0) < 2.0**60:
        raise InvalidInputError(
            f"codebook: expected 16 levels, the largest between 2**-60 and 2**60, got {book!r}"
        )
    return tuple(levels.tolist())


assert {r for rules in ALLOWED.values() for r in rules} == {*RULES, "awq"}
