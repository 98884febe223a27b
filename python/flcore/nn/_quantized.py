"""What modules over a quantised weight share: its parts as buffers, moves, state."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from flcore._torch_qmatmul import scheme_from_text, scheme_text
from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization import QuantizedTensor

__all__ = ["QuantizedModule", "rank_and_scaling"]

PARTS = ("codes", "scales", "zeros")


class QuantizedModule(torch.nn.Module):
    """A module whose weight is a `QuantizedTensor` that is not trained.

    The parts are buffers, so that they move and are saved with the module; ``.half()`` and its kin
    leave them as they are. What the codes mean is part of the state, too: loading the state of
    another scheme or shape is an error.

    Parameters
    ----------
    weight : QuantizedTensor
        Taken over in the layout `LAYOUT`.

    Raises
    ------
    DTypeError
        `weight` is not quantised.
    """

    LAYOUT = "tile16"
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedTensor):
            raise DTypeError(f"weight: expected a QuantizedTensor, got {type(weight).__name__}")
        held = weight.to_layout(self.LAYOUT).torch()
        self.scheme, self.shape = weight.scheme, weight.shape
        self._scheme_text = scheme_text(weight.scheme)  # made here: torch.compile cannot
        for name in PARTS:
            self.register_buffer(name, getattr(held, name))

    @property
    def weight(self) -> QuantizedTensor:
        """The quantised weight; it shares the module's memory."""
        held: QuantizedTensor | None = self.__dict__.get("_held")
        if held is None or any(getattr(held, name) is not getattr(self, name) for name in PARTS):
            held = QuantizedTensor(
                self.shape, self.scheme, self.LAYOUT, self.codes, self.scales, self.zeros
            )
            self.__dict__["_held"] = held
        return held

    @property
    def parts(self) -> tuple[Any, ...]:
        """The weight as `flcore._torch_qmatmul` takes it."""
        return self.codes, self.scales, self.zeros, self._scheme_text, *self.shape

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_held"}

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedModule:
        before = {name: getattr(self, name) for name in PARTS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:  # codes mean nothing in another dtype
                self._buffers[name] = old.to(new.device)
        return self

    # ---- state -----------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Scheme and shape as bytes of JSON."""
        text = json.dumps({"scheme": self._scheme_text, "shape": list(self.shape)})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Compare scheme and shape with those of a state that is being loaded.

        Raises
        ------
        CheckpointError
            The state is of another weight, or no state of this module.
        """
        try:
            fields = json.loads(bytes(state.tolist()))
            scheme, shape = scheme_from_text(fields["scheme"]), tuple(fields["shape"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"extra_state: expected bytes of JSON: {error}") from None
        if scheme != self.scheme or shape != self.shape:
            raise CheckpointError(
                f"state: expected a weight {self.shape} of {self.scheme}, got {shape} of {scheme}"
            )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        scheme = self.scheme
        group = "row" if scheme.group == -1 else scheme.group
        kind = scheme.codebook if isinstance(scheme.codebook, str) else scheme.kind
        return f"{self.shape[1]}, {self.shape[0]}, bits={scheme.bits}, {kind}, group={group}"


def rank_and_scaling(rank: Any, alpha: float | None) -> tuple[int, float]:
    """Return the rank of adapters and alpha / rank; alpha is 2 rank unless given.

    Raises
    ------
    InvalidInputError
        A rank that is no whole number, or an alpha that is not positive.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise InvalidInputError(f"lora_rank: expected a whole number from 0, got {rank!r}")
    if alpha is not None and not (alpha > 0 and alpha < float("inf")):
        raise InvalidInputError(f"lora_alpha: expected a positive number, got {alpha!r}")
    if rank == 0:
        return 0, 1.0
    return rank, (2.0 * rank if alpha is None else float(alpha)) / rank
