"""FedAvgM, FedAdagrad, FedAdam, FedYogi: the mean update is a gradient for the server's optimiser.

The clients are FedAvg's.  The servers' steps are `flcore.ops.combine_step`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.base import check_choice, check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Server
from flcore.ops import Step, combine_step

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]


class ServerOptimised(FedAvg):
    """What the four share: a step of a server optimiser, whose moments are the server's state."""

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Step along the mean; statistics of the model (of BatchNorm) take the mean as it is."""
        model, state, step = server.layout.take(server.model), server.state, self._step()
        moments = {name: state.get(name, self._start(name, mean)) for name in step.states}
        new: Any = combine_step([mean], [1.0], model, step, **moments, nonfinite="propagate")
        for name in step.states:
            state[name] = getattr(new, name)
        still = server.layout.statistics
        new.model[still] = model[still] + mean[still]
        server.model = server.layout.put(server.model, new.model)

    def _step(self) -> Step:
        """Give the step of the server."""
        raise AssertionError("every method has its own")

    def _start(self, name: str, mean: Vector) -> Vector:
        """Give the moment called `name` before the first round."""
        return np.zeros_like(mean)


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimised):
    r"""Server momentum (Hsu et al., arXiv 1909.06335), :math:`D = \sum_i p_i u_i`.

    .. math::
        m \leftarrow \beta m + D, \qquad w \leftarrow w + \eta_g m .

    Parameters
    ----------
    beta : float
        0 is FedAvg.
    damped : bool
        :math:`m \leftarrow \beta m + (1 - \beta) D` instead, as in the code of MOON; the same as
        :math:`(1 - \beta) \eta_g` for the server's rate.
    server_lr : float
        :math:`\eta_g`; undamped, the steps add up to :math:`1 / (1 - \beta)` times FedAvg's.
    """

    name: ClassVar[str] = "fedavgm"

    beta: float = 0.9
    damped: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, lambda v: 0 <= v < 1, "a number from 0 below 1")

    def _step(self) -> Step:
        damping = 1 - self.beta if self.damped else 1.0
        return Step("momentum", lr=self.server_lr * damping, beta1=self.beta)


@dataclass(frozen=True, kw_only=True)
class Adaptive(ServerOptimised):
    """What FedAdagrad, FedAdam and FedYogi share: their numbers, and where v starts."""

    kind: ClassVar[str]

    server_lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    v0: str = "tau2"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("beta1", "beta2"):
            check_number(
                option, getattr(self, option), lambda v: 0 <= v < 1, "a number from 0 below 1"
            )
        check_number("tau", self.tau, lambda v: v >= 0, "a number from 0")
        check_choice("v0", self.v0, ("tau2", "zero"))

    def _step(self) -> Step:
        return Step(self.kind, lr=self.server_lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau)

    def _start(self, name: str, mean: Vector) -> Vector:
        return np.full_like(mean, self.tau**2 if name == "v" and self.v0 == "tau2" else 0.0)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    r"""Adaptive steps with a growing sum of squares (Reddi et al., ICLR 2021, arXiv 2003.00295).

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) D, \qquad v \leftarrow v + D^2, \qquad
        w \leftarrow w + \eta_g m / (\sqrt{v} + \tau) .

    Parameters
    ----------
    beta1 : float
        0 in the paper's experiments.
    server_lr, tau, v0
        See `FedAdam`.
    """

    name: ClassVar[str] = "fedadagrad"
    kind: ClassVar[str] = "adagrad"

    beta1: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    r"""Adaptive steps with a mean of squares (Reddi et al., ICLR 2021, arXiv 2003.00295).

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) D, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) D^2, \qquad
        w \leftarrow w + \eta_g m / (\sqrt{v} + \tau)

    without correction of the bias; :math:`D = \sum_i p_i u_i`, :math:`m = 0` at first.

    Parameters
    ----------
    server_lr : float
        :math:`\eta_g`, which the paper tunes; 0.1 in FL-Simulator and Flower.
    beta1, beta2 : float
    tau : float
        Degree of adaptivity, not a guard against division by 0: 1e-3 in the paper, 1e-2 in
        FL-Simulator, 1e-9 in Flower.
    v0 : {"tau2", "zero"}
        Start of v: :math:`\tau^2` as in the paper, or 0 as in both code bases.
    """

    name: ClassVar[str] = "fedadam"
    kind: ClassVar[str] = "adam"


@dataclass(frozen=True, kw_only=True)
class FedYogi(Adaptive):
    r"""Adaptive steps whose v moves by a bounded amount (Reddi et al., ICLR 2021).

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) D, \qquad
        v \leftarrow v - (1 - \beta_2) D^2 \mathrm{sign}(v - D^2), \qquad
        w \leftarrow w + \eta_g m / (\sqrt{v} + \tau) .

    Parameters
    ----------
    server_lr, beta1, beta2, tau, v0
        See `FedAdam`.
    """

    name: ClassVar[str] = "fedyogi"
    kind: ClassVar[str] = "yogi"
