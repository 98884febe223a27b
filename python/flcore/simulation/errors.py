"""What can go wrong in a run beyond a wrong argument."""

from __future__ import annotations

from flcore.errors import FlcoreError

__all__ = ["CheckpointError", "DivergedError"]


class DivergedError(FlcoreError, ArithmeticError):
    """Training left the finite numbers.

    Attributes
    ----------
    round : int
        Round in which it happened, counted from 1.
    client : int or None
        The client whose local training it was; None: the global model.
    """

    def __init__(self, message: str, *, round: int, client: int | None = None) -> None:
        super().__init__(message)
        self.round = round
        self.client = client


class CheckpointError(FlcoreError, ValueError):
    """An output folder does not fit what was asked: occupied, unreadable, or of another run."""
