r"""The local step of all algorithms, and the loop that takes it.

Everything that changes a client's parameters x during its local training is one form,

.. math::
    x \leftarrow x - \eta \, ( \mathrm{clip}_c(\alpha \, g(x + s) + q) + \omega x )

with a vector q that is constant for the round, numbers alpha and omega, and a shift s of the point
where the gradient is taken: none, an ascent step, or a vector that is constant for the round.

The loop works on rows: one row a client, so that clients of a round can be trained together. One
client alone is one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from flcore.algorithms.layout import Vector
from flcore.errors import InvalidInputError

__all__ = ["EPSILON", "Ascent", "DualAscent", "Shift", "StepSpec", "UnitClip", "local_steps"]

EPSILON = 1e-7
"""Added to a gradient's norm before dividing by it."""

CLIP_MODES = ("reference", "full")


@dataclass(frozen=True)
class Ascent:
    """Shift of sharpness-aware minimisation, recomputed in every step: ``rho g1 / ||g1||``.

    Parameters
    ----------
    rho : float
        Length of the shift.
    merge : float
        Weight of the gradient g2 at the shifted point; g1 gets the rest.
    normalised : bool
        False: the shift is ``rho g1``.
    adaptive : bool
        Shift ``rho x^2 g1 / || |x| g1 ||`` instead (ASAM).
    """

    rho: float
    merge: float = 1.0
    normalised: bool = True
    adaptive: bool = False


@dataclass(frozen=True)
class DualAscent:
    """Ascent along ``g1 - dual - common``; the dual follows in every step (FedSMOO).

    Parameters
    ----------
    rho : float
    dual : (d,) array
        Of the client; changed in place, ``dual += shift - common``.
    common : (d,) array
        Of the server.
    """

    rho: float
    dual: Vector
    common: Vector


@dataclass(frozen=True)
class Shift:
    """A shift that is the same in all steps of a round.

    Parameters
    ----------
    vector : (d,) array
    """

    vector: Vector


@dataclass(frozen=True)
class UnitClip:
    """Adaptive gradient clipping by output unit (Brock et al., 2021), before anything else.

    Parameters
    ----------
    threshold : float
        Largest ratio of the norm of a unit's gradient to the norm of its weights.
    rows : (d,) int64 array
        Number of the unit that each value of the vector belongs to; -1: not clipped.
    floor : float
        Least norm that weights are taken to have.
    """

    threshold: float
    rows: np.ndarray
    floor: float = 1e-3


@dataclass(frozen=True)
class StepSpec:
    """One client's local step in one round.

    Parameters
    ----------
    lr : float
        Learning rate eta of this round.
    alpha : float
        Factor on the gradient.
    q : (d,) array or None
        Vector added to every gradient of the round.
    decay : float
        omega, the coefficient of x.
    clip : float or None
        Largest Euclidean norm, over all parameters; None: no limit.
    clip_mode : {"reference", "full"}
        Whether the limit is on ``alpha g + q``, as in the code base that most published figures
        come from, or on the whole bracket.
    momentum : float
        Of a buffer over brackets that starts anew in every round.
    nesterov : bool
    shift : Ascent, DualAscent, Shift or None
    unit_clip : UnitClip or None
    adam : (beta1, beta2, epsilon) or None
        Steps of Adam along the bracket, its moments starting anew in every round, in the place of
        the plain step.
    frozen : (d,) bool array or None
        Values that the client does not change.
    pull : float
        mu of a term ``mu (x - anchor)`` that is added to the step last, outside clip and momentum.
    anchor : (d,) array or None
        Needed with `pull`.
    project : callable or None
        Called with `x` and `g`, changes `g` in place, before anything else.
    """

    lr: float
    alpha: float = 1.0
    q: Vector | None = None
    decay: float = 0.0
    clip: float | None = None
    clip_mode: str = "reference"
    momentum: float = 0.0
    nesterov: bool = False
    shift: Ascent | DualAscent | Shift | None = None
    unit_clip: UnitClip | None = None
    adam: tuple[float, float, float] | None = None
    frozen: np.ndarray | None = None
    pull: float = 0.0
    anchor: Vector | None = None
    project: Callable[[Any, Any], None] | None = None

    def __post_init__(self) -> None:
        if self.clip_mode not in CLIP_MODES:
            raise InvalidInputError(
                f"clip_mode: expected one of {', '.join(CLIP_MODES)}, got {self.clip_mode!r}"
            )


def local_steps(
    x: Any,
    gradient: Callable[[Any, int], Any],
    specs: Sequence[StepSpec],
    steps: Sequence[int],
) -> None:
    """Take the local steps of several clients.

    Parameters
    ----------
    x : (clients, d) array or torch tensor, floating
        A row holds the parameters of one client; changed in place.
    gradient : function
        Called with rows of parameters, (n, d), and the number k of the step: gives the gradients of
        the k-th mini-batches of the first n clients, (n, d), which this function may overwrite.
    specs : one StepSpec a client
        All with the same kind of shift, and alike in what is None.
    steps : one count a client
        Not increasing: who has most steps comes first.

    Notes
    -----
    A step reads x, g and q and writes x, 16 bytes a float32 value; what a shift costs comes on top.
    NaN in a gradient passes through to `x`.
    """
    if any(later > earlier for earlier, later in pairwise(steps)):
        raise InvalidInputError("steps: expected the client with most steps first")
    from flcore.algorithms._rows import Rows

    rows = Rows(x, specs)
    counts = np.asarray(steps)[:, None] > np.arange(max(steps, default=0))
    for k, active in enumerate(counts.sum(0).tolist()):
        rows.step(active, k, gradient)
    rows.finish()
