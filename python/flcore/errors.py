"""Exceptions raised by flcore; each also derives from the built-in a caller would expect."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DTypeError",
    "EpochError",
    "FlcoreError",
    "InvalidInputError",
    "LabelError",
    "MissingDependencyError",
    "NonFiniteError",
    "PacketError",
    "VariantUnavailableError",
]


class FlcoreError(Exception):
    """Base class of every error that flcore raises on purpose."""


class InvalidInputError(FlcoreError, ValueError):
    """An argument has a value that cannot be used; the message names it and what was expected."""


class DTypeError(FlcoreError, TypeError):
    """An argument has a type or dtype that cannot be used, or dtypes that differ."""


class NonFiniteError(InvalidInputError):
    """An update holds a NaN or an infinity, or a sum overflowed.

    Attributes
    ----------
    clients : tuple of int
        Positions of the offending updates in the call; empty when every input was finite and the
        sum itself overflowed.
    """

    def __init__(self, message: str, clients: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.clients = tuple(clients)


class LabelError(InvalidInputError, IndexError):
    """A label names no class, or a class that cannot be a target.

    Attributes
    ----------
    row : int
        Position of the first such row.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class PacketError(InvalidInputError):
    """A packet is truncated, corrupt, from another version, or larger than the limits allow."""


class EpochError(PacketError):
    """A packet does not follow the last one of its sender: the two sides no longer share a state.

    Attributes
    ----------
    client : object
        The sender.
    expected, got : int
        Packets that were taken from the sender, and packets that its state had produced before
        this one.
    """

    def __init__(self, message: str, client: object, expected: int, got: int) -> None:
        super().__init__(message)
        self.client, self.expected, self.got = client, expected, got


class CheckpointError(InvalidInputError):
    """A file of weights is truncated, damaged, or does not hold what its header says."""


class MissingDependencyError(FlcoreError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class VariantUnavailableError(FlcoreError, RuntimeError):
    """The requested variant of an op cannot run here; the message says why."""
