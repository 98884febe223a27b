"""Privacy: noisy means and what they are worth, sums of which the server learns the total alone."""

from flcore.privacy._accounting import epsilon, noise_multiplier_for
from flcore.privacy._dp_mean import DPMean
from flcore.privacy._dp_terms import DPTerms, update_noise_multiplier
from flcore.privacy._secure_round import SecureRound
from flcore.privacy._secure_sum import SecureSum

__all__ = [
    "DPMean",
    "DPTerms",
    "SecureRound",
    "SecureSum",
    "epsilon",
    "noise_multiplier_for",
    "update_noise_multiplier",
]
