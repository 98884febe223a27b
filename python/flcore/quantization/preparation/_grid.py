"""Quantise and dequantise in float: what a search evaluates its candidates with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["ActivationGrid", "UniformGrid", "as_weight_grid", "span"]

torch: Any = require("torch", extra="torch")


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise InvalidInputError(f"bits: expected an integer from 2 to 16, got {bits!r}")


@dataclass(frozen=True)
class UniformGrid:
    """Weights W [N, K] rounded to a uniform grid of 2 to 16 bits, returned in float.

    Parameters
    ----------
    bits : int
    group : int
        Consecutive input channels that share a scale; -1: a whole row, 0: the whole tensor. The
        last group may be short.
    symmetric : bool
        Scale absmax / (2^(bits - 1) - 1) and no zero point. Otherwise scale and zero point span
        minimum to maximum, the zero point clamped to the codes (AWQ, GPTQ).
    force_zero : bool
        With a zero point: 0 is taken into the range first, without which a group of one sign is
        not representable.

    Notes
    -----
    ``q = clip(rne(w / s) + z, 0, 2^bits - 1); w^ = (q - z) s`` with ``s = (max - min) /
    (2^bits - 1)``, ``z = clip(-rne(min / s), 0, 2^bits - 1)``. A group of equal values of zero
    stays zero.
    """

    bits: int
    group: int = 128
    symmetric: bool = False
    force_zero: bool = True

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.group < -1:
            raise InvalidInputError(
                f"group: expected a size, -1 (a row) or 0 (the tensor), got {self.group}"
            )

    def __call__(self, weight: Any) -> Any:
        """Return W [N, K] rounded, in its dtype."""
        rows, channels = weight.shape
        if weight.numel() == 0:
            return weight.clone()
        size = span(self.group, channels)
        if self.group == 0:
            return self._round(weight.reshape(1, -1)).reshape(weight.shape)
        whole = channels // size * size
        parts = []
        if whole:
            parts.append(self._round(weight[:, :whole].reshape(-1, size)).reshape(rows, whole))
        if whole < channels:
            parts.append(self._round(weight[:, whole:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _round(self, w: Any) -> Any:
        """Round [groups, size]."""
        return _round_between(
            w,
            w.amin(1, keepdim=True),
            w.amax(1, keepdim=True),
            self.bits,
            self.symmetric,
            self.force_zero,
        )


def _round_between(
    x: Any, low: Any, high: Any, bits: int, symmetric: bool, force_zero: bool
) -> Any:
    """Round x to a grid for low to high; values outside go to its ends."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = torch.maximum(-low, high) / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return torch.clamp(torch.round(x / scale), -top, top) * scale
    if force_zero:
        low, high = torch.clamp(low, max=0), torch.clamp(high, min=0)
    top = 2**bits - 1
    scale = (high - low) / top
    # values that are all equal, w, have no range: |w| as the scale makes them a code each
    scale = torch.where(scale > 0, scale, high.abs())
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.clamp(-torch.round(low / scale), 0, top)
    return (torch.clamp(torch.round(x / scale) + zero, 0, top) - zero) * scale


def span(group: int, channels: int) -> int:
    """Return how many channels a group has: all of them for a row or a tensor."""
    return min(group, channels) if group > 0 else channels


@dataclass(frozen=True)
class ActivationGrid:
    """Activations X [..., K] rounded to a uniform grid, returned in float.

    Parameters
    ----------
    bits : int
    scope : {"token", "tensor"} or int
        What shares a scale: a row; the tensor, whose range is given to the call (static, from
        calibration) or taken from X; or so many consecutive channels of a row, as
        `flcore.ops.qmatmul_int8` quantises.
    symmetric : bool
        Codes -(2^(bits - 1) - 1) to 2^(bits - 1) - 1, or 0 to 2^bits - 1 with 0 in the range.
    """

    bits: int = 8
    scope: str | int = "token"
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        blocks = isinstance(self.scope, int) and self.scope > 0
        if not blocks and self.scope not in ("token", "tensor"):
            raise InvalidInputError(
                f'scope: expected "token", "tensor" or a number of channels, got {self.scope!r}'
            )

    def __call__(self, x: Any, low: Any = None, high: Any = None) -> Any:
        """Return X rounded, in its dtype; `low` and `high` for the scope "tensor" only."""
        if x.numel() == 0:
            return x.clone()
        work = x if x.dtype == torch.float64 else x.float()
        if self.scope == "tensor":
            low = work.amin() if low is None else torch.as_tensor(low, dtype=work.dtype)
            high = work.amax() if high is None else torch.as_tensor(high, dtype=work.dtype)
            low, high = low.to(work.device), high.to(work.device)
            return _round_between(work, low, high, self.bits, self.symmetric, True).to(x.dtype)
        size = self.scope if isinstance(self.scope, int) else int(x.shape[-1])
        grid = UniformGrid(self.bits, size, self.symmetric, force_zero=True)
        return grid(work.reshape(-1, x.shape[-1])).reshape(x.shape).to(x.dtype)


def as_weight_grid(scheme: Any) -> tuple[Callable[[Any], Any], int]:
    """Return a function W [N, K] -> W^ [N, K] and the group size (-1 a row, 0 the tensor).

    `scheme` is a `UniformGrid`, or a `flcore.quantization.Scheme` or the name of one.
    """
    if isinstance(scheme, UniformGrid):
        return scheme, scheme.group
    from flcore.quantization import Scheme, quantize

    if isinstance(scheme, str):
        scheme = Scheme.of(scheme)
    if not isinstance(scheme, Scheme):
        raise DTypeError(
            "weights: expected a flcore.quantization.Scheme, the name of one or a UniformGrid, "
            f"got {type(scheme).__name__}"
        )

    def rounded(weight: Any) -> Any:
        found = quantize(weight.detach().float().cpu().contiguous(), scheme)
        return found.dequantize("float32").to(weight.device, weight.dtype)

    return rounded, 0 if scheme.scope == "tensor" else scheme.group
