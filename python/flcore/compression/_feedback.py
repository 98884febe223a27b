"""Error control: what a client remembers of the part of its updates that was not sent.

Every form is a pair of factors of one affine map (see :func:`flcore.ops.sparsify.sparsify`) and
says which of the state vectors e and h it keeps; no arithmetic on vectors happens here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from flcore.compression._settings import Settings
from flcore.errors import InvalidInputError
from flcore.reference import wire

__all__ = ["EF14", "EControl"]


def _number(value: Any, name: str, low: float, high: float, words: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        raise InvalidInputError(f"{name}: expected {words}, got {value!r}")


@dataclass(frozen=True)
class EF14(Settings):
    """Classic error feedback: what was not sent is added to the next update.

    ``u = decay * e + g``, ``D = decode(encode(u))``, ``e <- u - D``. With ``decay=1``,
    ``D + e' = e + g`` in every round: nothing is lost, only late.

    Parameters
    ----------
    decay : float
        Factor of the memory before use, 0 to 1.

    Notes
    -----
    One float32 vector a client. Stalls on heterogeneous clients, where EControl does not.

    References
    ----------
    Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847.
    """

    decay: float = 1.0
    family: ClassVar[str] = "feedback"
    name: ClassVar[str] = "ef14"
    states: ClassVar[tuple[str, ...]] = ("e",)
    flags: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _number(self.decay, "decay", 0.0, 1.0, "a number from 0 to 1")

    def factors(self, k: int, numel: int) -> tuple[float, float]:
        """Return (a, b), the factors of e in what is sent and in what is kept."""
        return float(self.decay), float(self.decay)


@dataclass(frozen=True)
class EControl(Settings):
    """Error control: a memory e of what was not sent and an estimate h that the server shares.

    ``u = eta * e + g - h``, ``D = decode(encode(u))``, ``e <- e + g - h - D``, ``h <- h + D``. The
    server keeps ``H = sum_i w_i h_i`` by adding the packets, and steps with H: packets are
    increments, and carry a flag that says so. Absent clients send nothing and keep their state.

    Parameters
    ----------
    eta : float or "auto"
        Strength of the memory, >= 0. "auto" is k/d, near the best for top-k; 4 k/d and more
        diverges. 0 leaves the memory unused, which is EF21.

    Notes
    -----
    Two float32 vectors a client. Keep the scale of the updates constant over the rounds: e and h
    live in those units.

    References
    ----------
    Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error
    Control", ICLR 2024, arXiv 2311.05645.
    """

    eta: float | str = "auto"
    family: ClassVar[str] = "feedback"
    name: ClassVar[str] = "econtrol"
    states: ClassVar[tuple[str, ...]] = ("e", "h")
    flags: ClassVar[int] = wire.FLAG_INCREMENT

    def __post_init__(self) -> None:
        if self.eta != "auto":
            _number(self.eta, "eta", 0.0, math.inf, 'a number >= 0 or "auto"')

    def factors(self, k: int, numel: int) -> tuple[float, float]:
        """Return (a, b), the factors of e in what is sent and in what is kept."""
        return (k / max(numel, 1) if self.eta == "auto" else float(self.eta)), 1.0
