"""Whether the bytes that clients may send are enough for the rounds that they have.

A client that takes part V times and sends a share r of its coordinates each time has told the
server about at most the share ``V r`` of an update by the end. Error control only delays what is
not sent; what would have to wait beyond the last round is lost.
"""

from __future__ import annotations

import math

from flcore.simulation.settings import Settings

__all__ = ["ENOUGH", "advice", "coverage"]

ENOUGH = 0.2
"""Share of an update below which runs ended clearly behind uncompressed ones.

docs/compression-training.md: at 0.06 two to three points behind, at 0.3 to 0.6 about one or less.
"""


def coverage(settings: Settings, numel: int) -> float:
    """Return the share of an update of `numel` values that a client can send in the whole run.

    Above 1 every value can be sent several times. Codecs that send every value, in few bits, give
    the number of times a client takes part.
    """
    visits = settings.rounds * settings.participants / settings.clients
    count = getattr(settings.codec, "count", None)
    return visits * (count(numel) / max(numel, 1) if count else 1.0)


def advice(settings: Settings, numel: int) -> str | None:
    """Return a sentence when the budget cannot converge in the chosen rounds, else None."""
    share = coverage(settings, numel)
    if share >= ENOUGH or not hasattr(settings.codec, "count"):
        return None
    visits = settings.rounds * settings.participants / settings.clients
    rounds = math.ceil(round(settings.rounds * ENOUGH / share, 6))
    return (
        f"a client takes part about {visits:.3g} times and sends {share / visits:.2%} of its "
        f"values each time: {share:.0%} of an update in the whole run. With any error control that "
        f"is too little to catch up with an uncompressed run; send {min(ENOUGH / visits, 1):.2g} "
        f"of the values, or train for {rounds} rounds, or let more clients take part. EControl "
        "with a server learning rate of 2.5 loses least"
    )
