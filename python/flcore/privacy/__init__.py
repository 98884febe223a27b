"""Privacy: sums of which the server learns the total and nothing else."""

from flcore.privacy._secure_round import SecureRound
from flcore.privacy._secure_sum import SecureSum

__all__ = ["SecureRound", "SecureSum"]
