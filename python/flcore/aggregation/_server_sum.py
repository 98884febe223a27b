"""A server vector plus a weighted sum of client updates, in one read of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

from flcore import _updates
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.combine import ACCUMULATE, NONFINITE, combine_layers

__all__ = ["check_options", "client_count", "server_sum"]


def check_options(accumulate: str, nonfinite: str) -> None:
    """Raise unless both are options of `flcore.ops.combine`."""
    for name, value, allowed in (
        ("accumulate", accumulate, ACCUMULATE),
        ("nonfinite", nonfinite, NONFINITE),
    ):
        if value not in allowed:
            raise InvalidInputError(f"{name}: expected one of {allowed}, got {value!r}")


def client_count(updates: Any) -> int:
    """Return the number of updates, which may be none."""
    if not isinstance(updates, Sized):
        raise DTypeError(f"updates: expected a list of updates, got {type(updates).__name__}")
    return len(updates)


def server_sum(
    base: Any,
    updates: Any,
    weights: Callable[[set[int]], Sequence[float]],
    *,
    name: str,
    scale: float = 1.0,
    out: Any = None,
    accumulate: str = "float32",
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Any:
    """Return ``scale * base + sum_i weights(kept)[i] * updates[i]``.

    The clients come first and `base` last, so that their small changes meet each other before they
    meet the large vector. `base` has the structure and dtypes of an update and is called `name` in
    errors; a NaN in it raises under "exclude" too, because only clients can be left out.
    `weights(kept)` gives a weight for each client, 0 for those not in `kept`. Without `base` (None)
    it is the sum over the clients alone.
    """
    check_options(accumulate, nonfinite)
    layout, rows = _updates.parse_updates(updates)
    n = len(rows)
    bad_base = NonFiniteError(f"{name}: NaN or infinity found")

    def all_weights(keep: set[int]) -> list[float]:
        if base is None:
            return list(weights(keep))
        if n not in keep:
            raise bad_base
        return [*weights(keep - {n}), scale]

    try:
        layers = combine_layers(
            rows if base is None else [*rows, layout.layers(base, name)],
            all_weights,
            layout=layout,
            out=None if out is None else layout.layers(out, "out"),
            accumulate=accumulate,
            nonfinite=nonfinite,
            divisor=lambda keep: 1.0,
            variant=variant,
        )
    except NonFiniteError as error:
        if n in error.clients:
            raise bad_base from None
        raise
    return out if out is not None else layout.build(layers)
