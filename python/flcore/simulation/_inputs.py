"""What a batched computation gets beside the parameters: mini-batches and inputs of losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Extra", "Kind"]


@dataclass
class Extra:
    """The further inputs of the losses of some clients.

    Parameters
    ----------
    stacked : dict of name to (clients, ...) tensor
        One for each client.
    shared : dict of name to tensor
        The same for all.
    plain : dict of name to value
        Numbers and strings, the same for all.
    """

    stacked: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Any:
        """What inputs have in common that the same computation serves."""
        stacked = tuple((n, tuple(t.shape[1:]), t.dtype) for n, t in self.stacked.items())
        shared = tuple((n, tuple(t.shape), t.dtype) for n, t in self.shared.items())
        return stacked, shared, tuple(self.plain.items())

    def tensors(self, clients: int) -> list[torch.Tensor]:
        """Give the tensors, of the first so many clients."""
        return [*(t[:clients] for t in self.stacked.values()), *self.shared.values()]

    def zeros(self, clients: int) -> list[torch.Tensor]:
        """Give zeros in the place of the tensors."""
        stacked = [t.new_zeros(clients, *t.shape[1:]) for t in self.stacked.values()]
        return [*stacked, *map(torch.zeros_like, self.shared.values())]


@dataclass(frozen=True)
class Kind:
    """What mini-batches have in common that the same computation serves.

    Parameters
    ----------
    size : int
        Examples.
    x, y : (shape, dtype)
        Of one example and of its label.
    """

    size: int
    x: tuple[tuple[int, ...], torch.dtype]
    y: tuple[tuple[int, ...], torch.dtype]

    @classmethod
    def of(cls, size: int, x: torch.Tensor, y: torch.Tensor) -> Kind:
        """Give the kind of mini-batches of these data."""
        return cls(size, (tuple(x.shape[1:]), x.dtype), (tuple(y.shape[1:]), y.dtype))

    def zeros(self, clients: int, device: Any) -> list[torch.Tensor]:
        """Give examples, labels and weights of zeros."""
        kinds = (*(self.x, self.y), ((), torch.float32))
        return [
            torch.zeros(clients, self.size, *shape, dtype=dtype, device=device)
            for shape, dtype in kinds
        ]
