"""FedSAM: local steps along the gradient at a point uphill from the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flcore.algorithms.base import check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.step import Ascent, StepSpec

__all__ = ["FedSAM"]


@dataclass(frozen=True, kw_only=True)
class FedSAM(FedAvg):
    r"""Sharpness-aware local steps (Qu et al., ICML 2022; Caldarola et al., arXiv 2203.11834).

    With the same mini-batch for both gradients, and the norm over all parameters together,

    .. math::
        g_1 = \nabla f_i(x), \qquad g_2 = \nabla f_i(x + \rho g_1 / (\|g_1\| + 10^{-7})), \qquad
        x \leftarrow x - \eta (\mathrm{clip}(g_2) + \omega x) ,

    two gradients a step.  The rest is FedAvg.

    Parameters
    ----------
    rho : float
        Length of the ascent; 0 is FedAvg at twice the cost.
    adaptive : bool
        Ascend by :math:`\rho x^2 g_1 / \| |x| g_1 \|` instead (ASAM).
    """

    name: ClassVar[str] = "fedsam"

    rho: float = 0.1
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, lambda v: v >= 0, "a number from 0")

    def spec(self, round: int, *, decay: float = 0.0, **numbers: Any) -> StepSpec:
        """Give the method's step with the ascent in it."""
        ascent = Ascent(self.rho, adaptive=self.adaptive)
        return super().spec(round, decay=decay, **{"shift": ascent, **numbers})
