"""The random-k codec: values at coordinates that both ends derive from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job
from flcore.compression._settings import check_choice
from flcore.compression._share import check_share, share_of
from flcore.errors import InvalidInputError
from flcore.ops.randk import randk
from flcore.reference import wire

__all__ = ["RandK"]


@dataclass(frozen=True)
class RandK(Codec):
    """Keep k coordinates drawn without replacement; only their values are sent.

    Parameters
    ----------
    ratio : float, optional
        Share of the coordinates that is kept, in (0, 1]: ``k = max(1, ceil(ratio * d))``.
    k : int, optional
        Number of coordinates, at least 1; all of them in an update with fewer. Either `ratio` or
        `k`.
    scaled : bool
        Send values times d / k, so that a packet is the update on average (omega = d / k - 1), for
        use without error control. Unscaled, it contracts with delta = k / d: inside EF14, EF21 and
        EControl.
    values : {"float32", "float16", "bfloat16", "int8"}
        Type of the values on the wire.
    shared : bool
        All clients of a round draw the same coordinates: their packets can be summed value by
        value, and a broadcast of the sum is as small as a packet. Otherwise every client draws its
        own, whose differences average out (an encoder needs its client's number for that).

    Raises
    ------
    InvalidInputError
        Neither or both of `ratio` and `k`, or a value that cannot be used.

    Notes
    -----
    The coordinates follow from seed and round, so that one of them must change from packet to
    packet; with both fixed the same coordinates are sent for ever. Cheaper than top-k and without
    indices on the wire, but it needs many more rounds: at 1 % it keeps 1 % of the energy.

    References
    ----------
    Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, RandK, decode
    >>> g = np.array([4, -3, 2, 1], np.float32)
    >>> packet = Encoder(RandK(k=2), like=g).encode(g, round=1)
    >>> int(np.count_nonzero(decode(packet)))
    2
    """

    ratio: float | None = None
    k: int | None = None
    scaled: bool = False
    values: str = "float32"
    shared: bool = False
    name: ClassVar[str] = "randk"
    dense_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share("RandK", self.ratio, self.k)
        for name in ("scaled", "shared"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        check_choice("values", self.values, wire.VALUE_DTYPES)

    @property
    def shared_seed(self) -> bool:  # type: ignore[override]
        """Whether all clients draw the same coordinates."""
        return self.shared

    def count(self, numel: int) -> int:
        """Return the number of coordinates kept of `numel`."""
        return share_of(numel, self.ratio, self.k)

    def entries(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the number of values that a packet of layers of these shapes holds."""
        return self.count(sum(math.prod(shape) for shape in shapes))

    def eta(self, numel: int) -> float:
        """Return k/d."""
        return self.count(numel) / max(numel, 1)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on."""
        return randk(
            job.update,
            k=self.count(job.numel),
            scaled=self.scaled,
            state=job.state,
            values=self.values,
            **job.header,
        )
