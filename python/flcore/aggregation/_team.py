"""The processes of a torch.distributed group: what they tell each other, and shared errors.

An error on one process would leave the others waiting in a collective for ever. So every step that
can fail is followed by an exchange in which all learn of it, and all raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from flcore import errors
from flcore._extras import require
from flcore.errors import InvalidInputError, VariantUnavailableError

__all__ = ["Team"]

T = TypeVar("T")


class Team:
    """The members of a process group; each method is one collective.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        By default all processes.

    Attributes
    ----------
    rank, size : int
        Place of this process in the group, and number of processes.

    Raises
    ------
    MissingDependencyError, VariantUnavailableError, InvalidInputError
        torch is missing, is built without `torch.distributed`, or that is not initialised; or this
        process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        torch = require("torch", "torch")
        dist = torch.distributed
        if not dist.is_available():
            raise VariantUnavailableError("this build of torch has no torch.distributed")
        if not dist.is_initialized():
            raise InvalidInputError(
                "group: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first"
            )
        self.group, self._dist, self._torch = group, dist, torch
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InvalidInputError("group: this process is not a member")
        # "cpu:gloo,cuda:nccl", or "cuda:nccl" for a group that cannot send CPU memory
        devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
        self._device = "cpu" if "cpu" in devices else devices[0]

    # ---- collectives ---------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Return the values (which can be pickled) of all processes by rank."""
        values = [None] * self.size
        self._dist.all_gather_object(values, value, self.group)
        return values

    def together(self, make: Callable[[], T]) -> list[T]:
        """Return what `make` gives on every process, or raise on all what one raises."""
        found: T | None = None
        failed: Exception | None = None
        try:
            found = make()
        except Exception as error:
            failed = error
        everyone = self.gather((found, None if failed is None else pack(failed)))
        if failed is not None:
            raise failed
        for rank, (_, packed) in enumerate(everyone):
            if packed is not None:
                raise unpack(packed, rank)
        return [found for found, _ in everyone]

    def share(self, error: Exception | None) -> None:
        """Raise on all processes what some of them bring."""

        def give() -> None:
            if error is not None:
                raise error

        self.together(give)

    def add(self, words: np.ndarray) -> np.ndarray:
        """Return the sum of int64 arrays of one shape: exact, whatever the order."""
        return self._reduce(words, self._dist.ReduceOp.SUM)

    def most(self, words: np.ndarray) -> np.ndarray:
        """Return the largest of int64 arrays of one shape, element by element."""
        return self._reduce(words, self._dist.ReduceOp.MAX)

    def solved(self, solve: Callable[[], T]) -> T:
        """Return what `solve` gives on rank 0, or raise what it raises there.

        One machine decides, so that different processors or libraries cannot lead to different
        decisions.
        """
        found: list[Any] = [None]
        failed: Exception | None = None
        if self.rank == 0:
            try:
                found = [(solve(), None)]
            except Exception as error:
                found, failed = [(None, pack(error))], error
        self._dist.broadcast_object_list(found, self._global(0), self.group)
        result, packed = found[0]
        if failed is not None:
            raise failed
        if packed is not None:
            raise unpack(packed)
        return result

    def broadcast(self, x: Any, rank: int) -> None:
        """Overwrite the contiguous array or tensor `x` with that of `rank`."""
        if isinstance(x, np.ndarray):
            x = self._torch.from_numpy(x.view(np.uint8))
        x = x.view(self._torch.uint8)
        there = x.to(self._device)
        self._dist.broadcast(there, self._global(rank), self.group)
        if there is not x:
            x.copy_(there)

    def _reduce(self, words: np.ndarray, op: Any) -> np.ndarray:
        tensor = self._torch.from_numpy(np.ascontiguousarray(words)).to(self._device)
        self._dist.all_reduce(tensor, op, self.group)
        return tensor.cpu().numpy()

    def _global(self, rank: int) -> int:
        return rank if self.group is None else self._dist.get_global_rank(self.group, rank)


# ---- errors that travel ------------------------------------------------------------------------


def pack(error: Exception) -> tuple[str, str, tuple[int, ...]]:
    """Return class, message and clients of an error: not every exception can be pickled."""
    return type(error).__name__, str(error), getattr(error, "clients", ())


def unpack(packed: tuple[str, str, tuple[int, ...]], rank: int | None = None) -> Exception:
    """Return the error again, as one of `rank`; RuntimeError stands for what is not of flcore."""
    name, message, clients = packed
    kind = getattr(errors, name, None)
    if kind is None:
        kind, message = RuntimeError, f"{name}: {message}"
    if rank is not None:
        message = f"rank {rank}: {message}"
    return kind(message, clients) if kind is errors.NonFiniteError else kind(message)
