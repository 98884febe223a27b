"""What one round of a private mean takes from each client, and how its budget is shared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flcore.aggregation._checks import number
from flcore.errors import InvalidInputError

__all__ = ["DPTerms", "update_noise_multiplier"]


@dataclass(frozen=True)
class DPTerms:
    """How each client enters a round. Computed from raw updates, hence private: do not publish.

    Attributes
    ----------
    norms : (n,) float64
        L2 norms of the updates; infinite for one that holds a NaN or an infinity.
    scales : (n,) float64
        ``min(1, clip / norm)``; 0 for a client that was left out.
    shares : (n,) float64
        What the update is multiplied by: weight times scale over the divisor.
    noise_std : float
        Standard deviation of the noise on each coordinate of the result.
    """

    norms: np.ndarray
    scales: np.ndarray
    shares: np.ndarray
    noise_std: float


def update_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    r"""Noise multiplier of the sum, when noise on the clipping counts shares the budget.

    Parameters
    ----------
    noise_multiplier : float
        z >= 0, of the round as a whole.
    count_noise : float
        Standard deviation of the noise on the number of unclipped updates.

    Returns
    -------
    float
        :math:`z_\Delta = (z^{-2} - (2 \sigma_b)^{-2})^{-1/2}`, at least z.

    Raises
    ------
    InvalidInputError
        The count noise is at most z / 2: it would use up all of the budget.

    References
    ----------
    Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping",
    NeurIPS 2021, arXiv 1905.03871, Theorem 1.

    Examples
    --------
    >>> from flcore.privacy import update_noise_multiplier
    >>> round(update_noise_multiplier(1.0, 5.0), 5)
    1.00504
    """
    z = number("noise_multiplier", noise_multiplier, 0)
    sigma = number("count_noise", count_noise, 0)
    if z == 0:
        return 0.0
    if 2 * sigma <= z:
        raise InvalidInputError(
            f"count_noise: expected more than noise_multiplier / 2 = {z / 2:g}, got {sigma:g}, "
            "which leaves no privacy budget for the updates; raise it, lower noise_multiplier, or "
            "(for the default, a twentieth of the clients) have more clients in a round"
        )
    return z / math.sqrt(1 - (z / (2 * sigma)) ** 2)
