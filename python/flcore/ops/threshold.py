"""Magnitude that a share of an update exceeds, from a sample: validation and choice of variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _native, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import InvalidInputError
from flcore.ops._encode import device_of, flat_float32, native_source, viewed
from flcore.reference import feedback
from flcore.reference import sparsify as reference

__all__ = ["sample_threshold"]

WANTED = 400
"""Entries above the threshold that a sample should hold: their number is then right to 5 %."""


def sample_threshold(
    update: Any,
    *,
    ratio: float,
    state: State | None = None,
    phase: int = 0,
    variant: str | None = None,
) -> float:
    """Estimate the magnitude that a share of u reaches, from about one value in a hundred.

    u is the update with what the client remembers (:class:`flcore._state.State`). The sample is
    strided: runs of 32 neighbours, one of an odd number of runs. On independent values the share
    that reaches the estimate is `ratio` to about 5 % of it.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        float64, float32, float16 or bfloat16, on the CPU.
    ratio : float
        Share of the d values, 0 < ratio <= 1.
    state : State, optional
        Only read.
    phase : int
        Which sample, >= 0: other numbers take other runs.
    variant : {"reference", "cpu"}, optional
        Which implementation runs; both give the same number.

    Returns
    -------
    float
        The magnitude, a float32 number >= 0; 0 when there are no values, infinite or NaN when the
        sample holds such values.

    Raises
    ------
    InvalidInputError, DTypeError
        An argument cannot be used.

    References
    ----------
    Lin et al., "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887.
    """
    _, views, numel = viewed(update)
    if not 0 < ratio <= 1:
        raise InvalidInputError(f"ratio: expected 0 < ratio <= 1, got {ratio!r}")
    if isinstance(phase, bool) or not isinstance(phase, int) or phase < 0:
        raise InvalidInputError(f"phase: expected an integer >= 0, got {phase!r}")
    state = state or State()
    state.check(numel)
    if numel == 0:
        return 0.0
    runs = -(-numel // reference.RUN)
    step = max(1, min(int(ratio * numel) // WANTED, 99, runs // 64)) | 1
    phase %= min(step, runs)
    samples = reference.sample(numel, step, phase).size
    rank = max(1, round(ratio * samples))
    key = _variants.choose("sample_threshold", device_of(views), variant)(
        views, state=state, step=step, phase=phase, rank=rank
    )
    return float(np.array(key, np.uint32).view(np.float32))


def _cpu(views: Sequence[View], *, state: State, step: int, phase: int, rank: int) -> int:
    return _native.core.sample_key(
        **native_source(views, state),
        step=step,
        phase=phase,
        rank=rank,
    )


def _reference(views: Sequence[View], *, state: State, step: int, phase: int, rank: int) -> int:
    u = feedback.form(flat_float32(views), state).u
    chosen = reference.sample(u.size, step, phase)
    return int(np.sort(reference.keys(u[chosen]))[chosen.size - rank])


_variants.add("sample_threshold", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("sample_threshold", "reference", lambda: _reference, _variants.cpu_only)
