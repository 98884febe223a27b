"""The server optimisers by name: FedAvgM, FedAdagrad, FedAdam, FedYogi."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from flcore.aggregation._checks import number
from flcore.aggregation._server import ServerOptimizer
from flcore.errors import InvalidInputError
from flcore.ops._step import Step

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]

CONVENTIONS = ("paper", "flower")
CORRECTIONS = (False, "adam", "flower")


class FedAvgM(ServerOptimizer):
    r"""Server momentum, ``m = momentum * m + D; w = w + lr * m``, D the mean update.

    torch.optim.SGD's convention (no dampening, no Nesterov) on the gradient -D, so that m starts
    as D. With ``momentum=0`` and ``lr=1`` it is FedAvg, and keeps no state.

    Parameters
    ----------
    lr : float
        Server learning rate, 1 as in FedAvg.
    momentum : float
        In [0, 1); 0.9 as in Hsu et al. (Flower's default is 0).
    **options
        `inputs`, `noise_std`, `seed`, `accumulate`, `nonfinite`, `integers`: see `ServerOptimizer`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import FedAvgM
    >>> server, w = FedAvgM(lr=1.0, momentum=0.9), np.zeros(2, np.float32)
    >>> for update in ([0.1, -0.2], [0.3, 0.1]):
    ...     w = server.step(w, [np.float32(update)])
    >>> w
    array([ 0.49, -0.28], dtype=float32)

    References
    ----------
    Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", arXiv 1909.06335, 2019.
    """

    _names: ClassVar[tuple[str, ...]] = ("lr", "momentum")

    def __init__(self, lr: float = 1.0, momentum: float = 0.9, **options: Any) -> None:
        self.momentum = number("momentum", momentum, 0, 1, open="high")
        super().__init__(lr=lr, **options)

    def _step(self) -> Step:
        return Step("momentum" if self.momentum else "sgd", lr=self.lr, beta1=self.momentum)


class _Adaptive(ServerOptimizer):
    """What FedAdagrad, FedAdam and FedYogi share: betas, tau, v0 and the conventions."""

    _kind: ClassVar[str]
    _flower_tau: ClassVar[float]

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float],
        tau: float | None,
        v0: float | None,
        convention: str,
        options: dict[str, Any],
    ) -> None:
        if convention not in CONVENTIONS:
            raise InvalidInputError(
                f"convention: expected one of {CONVENTIONS}, got {convention!r}"
            )
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise InvalidInputError(f"betas: expected two numbers, got {betas!r}")
        self.convention = convention
        self.betas = tuple(number(f"betas[{i}]", b, 0, 1, open="high") for i, b in enumerate(betas))
        paper = convention == "paper"
        tau = (1e-3 if paper else self._flower_tau) if tau is None else tau
        self.tau = number("tau", tau, 0, open="low")
        self.v0 = number("v0", (self.tau**2 if paper else 0.0) if v0 is None else v0, 0)
        super().__init__(lr=lr, **options)

    def _rate(self) -> float:
        """Return the learning rate of the round that comes next."""
        return self.lr

    def _start(self, name: str) -> float:
        return self.v0 if name == "v" else 0.0

    def _step(self) -> Step:
        return Step(
            self._kind, lr=self._rate(), beta1=self.betas[0], beta2=self.betas[1], tau=self.tau
        )


class FedAdagrad(_Adaptive):
    r"""Adaptive steps with a growing sum of squares.

    ``m = beta1 m + (1 - beta1) D; v = v + D^2; w = w + lr * m / (sqrt(v) + tau)``, with m = 0 and
    v = v0 at the start.

    Parameters
    ----------
    lr : float
        Server learning rate eta. The paper tunes it and names no default; 0.1 is Flower's.
    beta1 : float
        In [0, 1); 0 in the paper's experiments and in Flower.
    tau : float, optional
        Degree of adaptivity, > 0: "paper" 1e-3, "flower" 1e-9.
    v0 : float, optional
        Start of v, >= 0: "paper" tau^2 (it asks for at least that), "flower" 0.
    convention : {"paper", "flower"}
        Where the defaults of `tau` and `v0` come from.
    **options
        `inputs`, `noise_std`, `seed`, `accumulate`, `nonfinite`, `integers`: see `ServerOptimizer`.

    References
    ----------
    Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated
    Optimization", ICLR 2021, Algorithm 2.
    """

    _names: ClassVar[tuple[str, ...]] = ("lr", "beta1", "tau", "v0")
    _kind: ClassVar[str] = "adagrad"
    _flower_tau: ClassVar[float] = 1e-9

    def __init__(
        self,
        lr: float = 0.1,
        *,
        beta1: float = 0.0,
        tau: float | None = None,
        v0: float | None = None,
        convention: str = "paper",
        **options: Any,
    ) -> None:
        self.beta1 = number("beta1", beta1, 0, 1, open="high")
        super().__init__(lr, (self.beta1, 0.0), tau, v0, convention, options)


class FedAdam(_Adaptive):
    r"""Adaptive steps with a moving average of squares.

    ``m = beta1 m + (1 - beta1) D; v = beta2 v + (1 - beta2) D^2;
    w = w + lr_t m / (sqrt(v) + tau)``, with m = 0 and v = v0 at the start.

    Parameters
    ----------
    lr : float
        Server learning rate eta. The paper tunes it and names no default; 0.1 is Flower's.
    betas : (float, float)
        Each in [0, 1); (0.9, 0.99) in the paper and in Flower.
    tau : float, optional
        Degree of adaptivity, > 0: "paper" 1e-3, "flower" 1e-9. With a tiny tau and v0 = 0 the first
        step has the size ``lr (1 - beta1) / sqrt(1 - beta2)`` in every coordinate, whatever D is.
    v0 : float, optional
        Start of v, >= 0: "paper" tau^2 (it asks for at least that), "flower" 0.
    bias_correction : {False, "adam", "flower"}, optional
        ``lr_t = lr sqrt(1 - beta2^k) / (1 - beta1^k)`` in round t = 1, 2, ... with k = t ("adam",
        Kingma & Ba) or k = t + 1 ("flower"). The paper has none. By default as `convention` says.
    convention : {"paper", "flower"}
        Where the defaults of `tau`, `v0` and `bias_correction` come from.
    **options
        `inputs`, `noise_std`, `seed`, `accumulate`, `nonfinite`, `integers`: see `ServerOptimizer`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import FedAdam
    >>> server, w = FedAdam(lr=0.1, v0=0.0), np.zeros(2, np.float32)
    >>> server.step(w, [np.float32([0.1, -0.2])]).round(4)
    array([ 0.0909, -0.0952], dtype=float32)

    References
    ----------
    Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated
    Optimization", ICLR 2021, Algorithm 2.
    """

    _names: ClassVar[tuple[str, ...]] = ("lr", "betas", "tau", "v0", "bias_correction")
    _kind: ClassVar[str] = "adam"
    _flower_tau: ClassVar[float] = 1e-9

    def __init__(
        self,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float | None = None,
        *,
        v0: float | None = None,
        bias_correction: str | bool | None = None,
        convention: str = "paper",
        **options: Any,
    ) -> None:
        if bias_correction is None:
            bias_correction = "flower" if convention == "flower" else False
        if bias_correction not in CORRECTIONS:
            raise InvalidInputError(
                f"bias_correction: expected one of {CORRECTIONS}, got {bias_correction!r}"
            )
        self.bias_correction = bias_correction
        super().__init__(lr, betas, tau, v0, convention, options)

    def _rate(self) -> float:
        if not self.bias_correction:
            return self.lr
        k = self.round + (2 if self.bias_correction == "flower" else 1)
        return self.lr * math.sqrt(1 - self.betas[1] ** k) / (1 - self.betas[0] ** k)


class FedYogi(_Adaptive):
    r"""Adaptive steps whose v moves towards D^2 by a bounded amount.

    ``m = beta1 m + (1 - beta1) D; v = v - (1 - beta2) D^2 sign(v - D^2);
    w = w + lr * m / (sqrt(v) + tau)``, with m = 0 and v = v0 at the start; sign(0) = 0.

    Parameters
    ----------
    lr : float
        Server learning rate eta. The paper tunes it and names no default; 0.01 is Flower's.
    betas : (float, float)
        Each in [0, 1); (0.9, 0.99) in the paper and in Flower.
    tau : float, optional
        Degree of adaptivity, > 0: 1e-3 in both conventions.
    v0 : float, optional
        Start of v, >= 0: "paper" tau^2 (it asks for at least that), "flower" 0.
    convention : {"paper", "flower"}
        Where the default of `v0` comes from.
    **options
        `inputs`, `noise_std`, `seed`, `accumulate`, `nonfinite`, `integers`: see `ServerOptimizer`.

    References
    ----------
    Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated
    Optimization", ICLR 2021, Algorithm 2.
    """

    _names: ClassVar[tuple[str, ...]] = ("lr", "betas", "tau", "v0")
    _kind: ClassVar[str] = "yogi"
    _flower_tau: ClassVar[float] = 1e-3

    def __init__(
        self,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float | None = None,
        *,
        v0: float | None = None,
        convention: str = "paper",
        **options: Any,
    ) -> None:
        super().__init__(lr, betas, tau, v0, convention, options)
