"""MoFedSAM: FedCM's momentum with gradients taken uphill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flcore.algorithms.fedcm import FedCM
from flcore.algorithms.fedsam import FedSAM

__all__ = ["MoFedSAM"]


@dataclass(frozen=True, kw_only=True)
class MoFedSAM(FedSAM, FedCM):
    r"""FedSAM with client-level momentum (Qu et al., ICML 2022).

    :math:`g_2` as in `FedSAM`, its ascent computed from the unscaled :math:`g_1`; the rest is
    `FedCM`:

    .. math::
        x \leftarrow x - \eta_t (\mathrm{clip}(\alpha g_2 + (1 - \alpha) \Delta^t) + \omega x) .

    Parameters
    ----------
    alpha : float
        Share of the fresh gradient; 1 is FedSAM.
    rho : float
        Length of the ascent; 0 is FedCM.
    """

    name: ClassVar[str] = "mofedsam"

    weighting: str = "uniform"
