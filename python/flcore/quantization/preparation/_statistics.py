"""Statistics of the channels of an activation, which clients can send and a server can merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["ActivationStatistics", "merge_statistics"]

torch: Any = require("torch", extra="torch")


@dataclass
class ActivationStatistics:
    """Sums of |x|, smallest and largest value of each of K channels over the tokens seen so far.

    Merging two of them is adding sums and counts and taking elementwise minima and maxima, so that
    what clients send (4 K numbers a linear) gives the statistics of the data pooled: minima, maxima
    and counts exactly, sums in float64.

    Attributes
    ----------
    sum_abs : torch.Tensor, [K] float64
        Sum over tokens of |x|.
    minimum, maximum : torch.Tensor, [K] float64
        +inf and -inf before the first token.
    count : int
        Tokens.
    """

    sum_abs: Any
    minimum: Any
    maximum: Any
    count: int = 0

    @classmethod
    def empty(cls, channels: int) -> ActivationStatistics:
        """Return the statistics of no token."""
        full = torch.full((channels,), torch.inf, dtype=torch.float64)
        return cls(torch.zeros(channels, dtype=torch.float64), full, -full)

    @classmethod
    def of(cls, x: Any, mask: Any = None) -> ActivationStatistics:
        """Return the statistics of one activation; arguments as in `update`."""
        return cls.empty(x.shape[-1]).update(x, mask)

    @property
    def channels(self) -> int:
        """K."""
        return int(self.sum_abs.numel())

    @property
    def mean_abs(self) -> Any:
        """Mean over tokens of |x|, [K] float64: the statistic of AWQ.

        Raises
        ------
        InvalidInputError
            No token was seen.
        """
        return self._seen().sum_abs / self.count

    @property
    def centre(self) -> Any:
        """(maximum + minimum) / 2, [K] float64: the shift of OS+."""
        return (self._seen().maximum + self.minimum) / 2

    def _seen(self) -> ActivationStatistics:
        if self.count == 0:
            raise InvalidInputError("statistics: no token was seen; is everything masked?")
        return self

    def update(self, x: Any, mask: Any = None) -> ActivationStatistics:
        """Add the tokens of an activation, and return itself.

        Parameters
        ----------
        x : torch.Tensor, [..., K], floating point
        mask : torch.Tensor, [...] bool, optional
            False (or 0) for padding, which is left out.

        Raises
        ------
        InvalidInputError
            A shape that does not fit, or values that are not finite.
        """
        if x.shape[-1] != self.channels:
            raise InvalidInputError(f"x: expected {self.channels} channels, got {x.shape[-1]}")
        rows = select_tokens(x.detach(), mask)
        if rows.shape[0] == 0:
            return self
        wide = rows.to(torch.float64)  # one copy; sums below 2^53 multiples of an ulp are exact
        low, high = wide.amin(0).cpu(), wide.amax(0).cpu()
        if not bool(torch.isfinite(low + high).all()):
            raise InvalidInputError("x: an activation is not finite")
        self.sum_abs = self.sum_abs + wide.abs().sum(0).cpu()
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)
        self.count += int(rows.shape[0])
        return self

    def merge(self, other: ActivationStatistics) -> ActivationStatistics:
        """Return the statistics of both sets of tokens."""
        if not isinstance(other, ActivationStatistics):
            raise DTypeError(f"other: expected ActivationStatistics, got {type(other).__name__}")
        if other.channels != self.channels:
            raise InvalidInputError(
                f"other: expected {self.channels} channels, got {other.channels}"
            )
        return ActivationStatistics(
            self.sum_abs + other.sum_abs,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.count + other.count,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and the count, which `from_state_dict` takes."""
        return {
            "sum_abs": self.sum_abs.clone(),
            "minimum": self.minimum.clone(),
            "maximum": self.maximum.clone(),
            "count": self.count,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ActivationStatistics:
        """Return statistics from what `state_dict` gave, checked.

        Raises
        ------
        InvalidInputError
            A field is missing, shapes differ, sums or counts are negative or not finite.
        """
        missing = {"sum_abs", "minimum", "maximum", "count"} - set(state)
        if missing:
            raise InvalidInputError(f"state: {', '.join(sorted(missing))} missing")
        fields = [
            torch.as_tensor(state[name], dtype=torch.float64).clone()
            for name in ("sum_abs", "minimum", "maximum")
        ]
        total, low, high = fields
        count = int(state["count"])
        if total.ndim != 1 or low.shape != total.shape or high.shape != total.shape:
            shapes = ", ".join(str(tuple(field.shape)) for field in fields)
            raise InvalidInputError(f"state: expected three vectors of one length, got {shapes}")
        sums = bool((torch.isfinite(total) & (total >= 0)).all())
        ordered = count == 0 or bool((torch.isfinite(high - low) & (high >= low)).all())
        if count < 0 or not sums or not ordered:
            raise InvalidInputError(
                "state: expected sums >= 0, maxima >= minima, finite values and a count >= 0"
            )
        return cls(total, low, high, count)


def merge_statistics(
    clients: Iterable[Mapping[str, ActivationStatistics]],
) -> dict[str, ActivationStatistics]:
    """Merge the statistics of clients, linear by linear.

    Parameters
    ----------
    clients : iterable of mapping
        What `collect_statistics` gave on each client.

    Raises
    ------
    InvalidInputError
        No client, or clients that do not name the same linears.
    """
    merged: dict[str, ActivationStatistics] = {}
    for number, client in enumerate(clients):
        if number == 0:
            merged = dict(client)
        elif set(client) != set(merged):
            odd = ", ".join(sorted(set(client) ^ set(merged)))
            raise InvalidInputError(f"clients[{number}]: names differ from the first one's: {odd}")
        else:
            merged = {name: merged[name].merge(client[name]) for name in merged}
    if not merged:
        raise InvalidInputError("clients: expected at least one, got none")
    return merged


def select_tokens(x: Any, mask: Any) -> Any:
    """Return x [..., K] as rows [T, K], padding left out."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if mask.numel() != rows.shape[0]:
        raise InvalidInputError(
            f"mask: expected one value a token, {tuple(x.shape[:-1])}, got {tuple(mask.shape)}"
        )
    return rows[mask.reshape(-1).to(device=rows.device, dtype=torch.bool)]
