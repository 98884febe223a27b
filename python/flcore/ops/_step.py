"""What a step of a server optimiser is: its kind and numbers, its noise, its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from flcore.errors import InvalidInputError

__all__ = ["CAST", "INPUTS", "KINDS", "SERVER_STREAM", "Noise", "Step", "Stepped"]

# codes of enum StepKind in csrc/api.h
KINDS = ("sgd", "momentum", "adagrad", "adam", "yogi", "linear")
INPUTS = ("updates", "models")
SERVER_STREAM = 0xFFFFFFFF  # the word `client` of the streams that the server's noise comes from
CAST = ("float16", "bfloat16")


@dataclass(frozen=True)
class Step:
    """One step of a server optimiser, along the aggregate D of the client updates.

    ``sgd``: ``w += lr D``. ``momentum``: ``m = beta1 m + D; w += lr m`` (torch.optim.SGD on the
    gradient -D, whose buffer is -m). The others: ``m = beta1 m + (1 - beta1) D;
    w += lr m / (sqrt(v) + tau)`` with ``v += D^2`` (``adagrad``),
    ``v = beta2 v + (1 - beta2) D^2`` (``adam``), or
    ``v -= (1 - beta2) D^2 sign(v - D^2)`` (``yogi``). ``linear``: see `Step.linear`.
    """

    kind: str
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInputError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        for name in ("lr", "beta1", "beta2", "tau"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and math.isfinite(value)):
                raise InvalidInputError(f"{name}: expected a finite number, got {value!r}")

    @classmethod
    def linear(cls, *, a: float = 1.0, b: float = 0.0, c: float = 1.0, e: float = 0.0) -> Step:
        """Return the step ``m = a m + b D; w = (w + c D) + e m``, the new m being the one added.

        With D the mean update of S of N clients, it is the server of FedDyn and FedSpeed
        (``a=1, b=S/N, c=1, e=1``: m is the mean of the dual variables), of SCAFFOLD when all take K
        local steps (``a=1-S/N, b=-S/(N K lr), c=server_lr``: m is the control variate), of FedCM
        (``a=0, b=-1/(K lr)``: m is the direction that clients get), and server momentum
        (``a=beta, b=1, c=0, e=server_lr``). The numbers lie in beta1, beta2, lr and tau.
        """
        return cls("linear", lr=c, beta1=a, beta2=b, tau=e)

    @property
    def states(self) -> tuple[str, ...]:
        """Which state the step reads and writes: none, m, or m and v."""
        if self.kind == "sgd":
            return ()
        return ("m",) if self.kind in ("momentum", "linear") else ("m", "v")


@dataclass(frozen=True)
class Noise:
    """Normal noise of standard deviation `std` that is added to D, drawn by coordinate.

    Standard normals are those of `flcore.ops.random_normal`. The stream of layer l is named by
    (seed, round, tensor=l, client=SERVER_STREAM); coordinate j takes its element j.
    """

    std: float
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        std = self.std
        if not (isinstance(std, Real) and math.isfinite(std) and std >= 0):
            raise InvalidInputError(f"std: expected a finite number >= 0, got {std!r}")
        for name, bits in (("seed", 64), ("round", 32)):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and 0 <= int(value) < 1 << bits):
                raise InvalidInputError(
                    f"{name}: expected an integer >= 0 below 2^{bits}, got {value!r}"
                )


class Stepped(NamedTuple):
    """What a step gives; None for what it does not have."""

    model: Any
    m: Any = None
    v: Any = None
    cast: Any = None
