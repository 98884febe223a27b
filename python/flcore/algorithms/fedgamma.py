"""FedGamma: SCAFFOLD's control variates with gradients taken uphill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flcore.algorithms.fedsam import FedSAM
from flcore.algorithms.scaffold import Scaffold

__all__ = ["FedGamma"]


@dataclass(frozen=True, kw_only=True)
class FedGamma(FedSAM, Scaffold):
    r"""Stochastic controlled sharpness-aware steps (Dai et al., IEEE TNNLS 2023).

    :math:`g_2` as in `FedSAM`; control variates and server as in `Scaffold`, so that
    :math:`c_i` is a mean of perturbed gradients:

    .. math::
        x \leftarrow x - \eta (\mathrm{clip}(g_2 + c - c_i) + \omega x) .

    Parameters
    ----------
    rho : float
        Length of the ascent, 0.01 in the FL-Simulator code base; 0 is SCAFFOLD.
    """

    name: ClassVar[str] = "fedgamma"

    weighting: str = "uniform"
    rho: float = 0.01
