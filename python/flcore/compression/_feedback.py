"""Error control: what a client remembers of the part of its updates that was not sent.

Every form is a set of factors of one affine map (:class:`flcore._state.State`) and says which of
the vectors e, h and v it keeps; no arithmetic on vectors happens here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from flcore.compression._codec import Codec
from flcore.compression._settings import Settings
from flcore.errors import InvalidInputError
from flcore.reference import wire

__all__ = ["DGC", "EF14", "EF21", "EControl", "Factors", "Feedback"]


class Factors(NamedTuple):
    """Factors of :class:`flcore._state.State` for one packet."""

    a: float = 1.0
    b: float = 1.0
    p: float = 0.0
    q: float = 1.0
    mask: bool = False


class Feedback(Settings, ABC):
    """Base of the error controls: frozen dataclasses that hold settings only.

    Attributes
    ----------
    states : tuple of str
        Which of e, h and v a client keeps.
    flags : int
        Header flags of every packet: FLAG_INCREMENT where packets are changes of h, a vector that
        both sides keep.
    """

    family: ClassVar[str] = "feedback"
    states: ClassVar[tuple[str, ...]] = ()

    @property
    def flags(self) -> int:
        """Header flags of every packet."""
        return wire.FLAG_INCREMENT if "h" in self.states else 0

    @property
    def kept(self) -> tuple[str, ...]:
        """Which of e, h and v these settings keep."""
        return self.states

    @abstractmethod
    def factors(self, codec: Codec, numel: int, epoch: int) -> Factors:
        """Return the factors for the packet that follows `epoch` others."""


def _number(value: Any, name: str, low: float, high: float, words: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and low <= value <= high):
        raise InvalidInputError(f"{name}: expected {words}, got {value!r}")


@dataclass(frozen=True)
class EF14(Feedback):
    """Classic error feedback: what was not sent is added to the next update.

    ``u = decay * e + g``, ``D = decode(encode(u))``, ``e <- u - D``. With ``decay=1``,
    ``D + e' = e + g`` in every round: nothing is lost, only late.

    Parameters
    ----------
    decay : float
        Factor of the memory before use, 0 to 1; below 1 this is LoCo.
    reset_every : int, optional
        Forget e after that many packets, and again after as many more.

    Notes
    -----
    One float32 vector a client. Stalls on heterogeneous clients, where EControl does not.

    References
    ----------
    Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847. Decay and
    reset: Xie et al., "LoCo: Low-Bit Communication Adaptor for Large-scale Model Training", 2024,
    arXiv 2407.04480.
    """

    decay: float = 1.0
    reset_every: int | None = None
    name: ClassVar[str] = "ef14"
    states: ClassVar[tuple[str, ...]] = ("e",)

    def __post_init__(self) -> None:
        _number(self.decay, "decay", 0.0, 1.0, "a number from 0 to 1")
        every = self.reset_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
            raise InvalidInputError(f"reset_every: expected a whole number or None, got {every!r}")
        if every is not None and every < 1:
            raise InvalidInputError(f"reset_every: expected at least 1, got {every}")

    def factors(self, codec: Codec, numel: int, epoch: int) -> Factors:
        """Return decay as both factors of e, or 0 where e is to be forgotten."""
        forget = self.reset_every is not None and epoch > 0 and epoch % self.reset_every == 0
        decay = 0.0 if forget else float(self.decay)
        return Factors(a=decay, b=decay)


@dataclass(frozen=True)
class EF21(Feedback):
    """Compress the change of the update against an estimate h that the server shares.

    ``D = decode(encode(v - h))``, ``h <- h + D``, where v is the update g, or with `momentum` its
    running mean ``v <- (1 - momentum) v + momentum g`` (EF21-SGDM). The server keeps
    ``H = sum_i w_i h_i`` by adding the packets, and steps with H: see :class:`ControlledSum`.

    Parameters
    ----------
    momentum : float, optional
        beta in (0, 1]: the share of the new update; 1 is EF21 itself. 0.03 to 0.3 is usual.

    Notes
    -----
    One float32 vector a client, two with momentum. Exact for any heterogeneity when updates are
    full gradients; with noisy ones prefer momentum, or EControl.

    References
    ----------
    Richtarik, Sokolov, Fatkhullin, "EF21", NeurIPS 2021, arXiv 2106.05203. Fatkhullin, Tyurin,
    Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023, arXiv 2305.15155.
    """

    momentum: float | None = None
    name: ClassVar[str] = "ef21"
    states: ClassVar[tuple[str, ...]] = ("h", "v")

    def __post_init__(self) -> None:
        if self.momentum is not None:
            _number(self.momentum, "momentum", 0.0, 1.0, "a number above 0, up to 1, or None")
            if self.momentum == 0:
                raise InvalidInputError("momentum: expected a number above 0, up to 1, or None")

    @property
    def kept(self) -> tuple[str, ...]:
        """``h``, and v with momentum."""
        return ("h",) if self.momentum is None else ("h", "v")

    def factors(self, codec: Codec, numel: int, epoch: int) -> Factors:
        """Return the factors of v and g in the running mean."""
        if self.momentum is None:
            return Factors()
        return Factors(p=1.0 - self.momentum, q=float(self.momentum))


@dataclass(frozen=True)
class EControl(Feedback):
    """Error control: a memory e of what was not sent and an estimate h that the server shares.

    ``u = eta * e + g - h``, ``D = decode(encode(u))``, ``e <- e + g - h - D``, ``h <- h + D``. The
    server keeps ``H = sum_i w_i h_i`` by adding the packets, and steps with H: packets are
    increments, and carry a flag that says so. Absent clients send nothing and keep their state.

    Parameters
    ----------
    eta : float or "auto"
        Strength of the memory, >= 0. "auto" asks the codec: k/d, near the best for top-k, where
        4 k/d and more diverges; 0.4 k/d for random k; 0.3 to 0.5 for codes of a few bits. 0 leaves
        the memory unused, which is EF21.

    Notes
    -----
    Two float32 vectors a client. Keep the scale of the updates constant over the rounds, or call
    :meth:`Encoder.rescale`: e and h live in those units.

    References
    ----------
    Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error
    Control", ICLR 2024, arXiv 2311.05645.
    """

    eta: float | str = "auto"
    name: ClassVar[str] = "econtrol"
    states: ClassVar[tuple[str, ...]] = ("e", "h")

    def __post_init__(self) -> None:
        if self.eta != "auto":
            _number(self.eta, "eta", 0.0, math.inf, 'a number >= 0 or "auto"')

    def factors(self, codec: Codec, numel: int, epoch: int) -> Factors:
        """Return eta as the factor of e in what is sent."""
        return Factors(a=codec.eta(numel) if self.eta == "auto" else float(self.eta))


@dataclass(frozen=True)
class DGC(Feedback):
    """Deep Gradient Compression: momentum before selection, and a memory of what was not sent.

    ``m <- momentum m + g``, ``u = e + m``, ``D = decode(encode(u))``, ``e <- u - D``, and with
    `masking` ``m <- 0`` where something was sent. The server averages the packets and takes a plain
    step: the momentum is already in them.

    Parameters
    ----------
    momentum : float
        mu, 0 to 1.
    masking : bool
        Forget the momentum of what was sent, so that old directions do not act on stale values.

    Notes
    -----
    Two float32 vectors a client. The paper clips each of the N clients' updates to N**-0.5 of the
    global limit before this, and warms up: see :meth:`density`.

    References
    ----------
    Lin et al., "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887.

    Examples
    --------
    >>> [DGC.density(epoch) for epoch in range(6)]
    [0.25, 0.0625, 0.015625, 0.00390625, 0.001, 0.001]
    """

    momentum: float = 0.9
    masking: bool = True
    name: ClassVar[str] = "dgc"
    states: ClassVar[tuple[str, ...]] = ("e", "v")

    def __post_init__(self) -> None:
        _number(self.momentum, "momentum", 0.0, 1.0, "a number from 0 to 1")
        if not isinstance(self.masking, bool):
            raise InvalidInputError(f"masking: expected True or False, got {self.masking!r}")

    def factors(self, codec: Codec, numel: int, epoch: int) -> Factors:
        """Return the momentum, and whether to mask it."""
        return Factors(p=float(self.momentum), mask=self.masking)

    @staticmethod
    def density(epoch: int, target: float = 0.001) -> float:
        """Return the share of entries to send in an epoch of the warm-up: 1/4, 1/16, ..., `target`.

        Hand it to the encoder as ``encode(update, codec=TopK(ratio=DGC.density(epoch)))``.

        Parameters
        ----------
        epoch : int
            Passes over the data that are complete.
        target : float
            Share after the warm-up, in (0, 1].
        """
        if not 0 < target <= 1:
            raise InvalidInputError(f"target: expected a number above 0, up to 1, got {target!r}")
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise InvalidInputError(f"epoch: expected a whole number from 0, got {epoch!r}")
        return max(float(target), 0.25 ** (epoch + 1))
