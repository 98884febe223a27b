"""Local steps on arrays that stay where they are: a few microseconds a call."""

from __future__ import annotations

import math
import sys
from typing import Any

from flcore import _arrays, _native
from flcore.errors import InvalidInputError
from flcore.ops._local_numbers import active_rows, parse_number
from flcore.ops._local_pieces import (
    check_in_place,
    check_rows_apart,
    one_model,
    parse_rows,
    row_operand,
    slots,
)
from flcore.ops.local_step import CLIP_MODES, EPS, place, run, take_step

__all__ = ["LocalStep"]


class LocalStep:
    """Local steps on arrays that stay where they are: checked and looked up once.

    A call of `step` then costs some microseconds beside the arithmetic, which matters where models
    are small. One object is for one thread at a time.

    Parameters
    ----------
    x : (rows, d) array, or the tensors of one model
        A matrix is a model a row, as in `local_step_rows`; anything else is one model, as in
        `local_step`. (One model that is a matrix goes in a list.)
    g, q, buffer : like x, optional
        As there; without `g` each call brings its own.
    out : like x, optional
        Where `sam` writes.
    variant : {"reference", "cpu", "triton"}, optional

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `local_step`; InvalidInputError also for arrays with gaps, which could only be copied.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import LocalStep
    >>> x, g = np.zeros((2, 3)), np.ones((2, 3))
    >>> steps = LocalStep(x, g)
    >>> steps.step(0.5)
    >>> steps.step(0.5, active=1)
    >>> x
    array([[-1. , -1. , -1. ],
           [-0.5, -0.5, -0.5]])
    """

    def __init__(
        self,
        x: Any,
        g: Any = None,
        q: Any = None,
        buffer: Any = None,
        *,
        out: Any = None,
        variant: str | None = None,
    ) -> None:
        self._rows = bool(_arrays.is_array(x) and x.ndim == 2)
        self._x = x
        given = slots(
            x=("x", x), g=("g", g), q=("q", q), state=("buffer", buffer), out=("out", out)
        )
        written = ("x", *(slot for slot in ("state", "out") if slot in given))
        self._pieces = (parse_rows if self._rows else one_model)(given, written)
        check_in_place(self._pieces.operands, given)
        self._groups = self._pieces.groups if self._rows else None
        self._variant = variant
        self._g = g if _arrays.is_array(g) else None  # a list may get other tensors
        self._with_q = q is not None
        self._steps = written[:2] if buffer is not None else written[:1]
        self._work = sum(self._pieces.numel)
        self._core: Any = None
        self._changed = [v for name in self._steps for v in self._pieces.operands[name].tensors()]

    def step(
        self,
        lr: Any,
        alpha: Any = 1.0,
        decay: Any = 0.0,
        clip: Any = None,
        momentum: Any = 0.0,
        *,
        g: Any = None,
        clip_mode: str = "reference",
        nesterov: bool = False,
        first: bool = False,
        active: Any = None,
    ) -> None:
        """Take a step; `g`, if given, takes the place of the gradient that was there before.

        Parameters
        ----------
        g : like x, optional
        lr, alpha, decay, clip, momentum, clip_mode, nesterov, first, active
            As `local_step_rows`.

        Raises
        ------
        InvalidInputError, DTypeError, VariantUnavailableError
            As `local_step`.
        """
        if g is not self._g or g is None:
            self._gradient(g)
        core = self._core
        if core is not None and _are_plain(lr, alpha, decay, clip, momentum, clip_mode, active):
            if not momentum or len(self._steps) == 2:
                # fmt: off
                core.run(0, lr, alpha, decay, clip, momentum, clip_mode == "full", nesterov, first,
                         self._with_q, EPS, active, None, _native.threads_for(self._work))
                # fmt: on
                for x in self._changed:
                    sys.modules["torch"].autograd.graph.increment_version(x)
                return
        take_step(
            self._pieces,
            lr,
            alpha,
            decay,
            clip,
            clip_mode,
            momentum,
            nesterov,
            first,
            rows=self._groups,
            active=active,
            variant=self._variant,
        )
        self._core = self._pieces.cache.get("core")
        self._pieces.deliver(self._steps)

    def sam(self, rho: Any, *, g: Any = None, eps: float = EPS, active: Any = None) -> None:
        """Write ``x + rho / (||g|| + eps) g`` into `out`; see `flcore.ops.sam_shift`.

        Raises
        ------
        InvalidInputError, DTypeError, VariantUnavailableError
            As `local_step`; InvalidInputError also without `out`.
        """
        if g is not self._g or g is None:
            self._gradient(g)
        if "out" not in self._pieces.operands:
            raise InvalidInputError("out: sam needs an array to write into, given at the start")
        run(
            self._pieces,
            "sam",
            rate=parse_number(rho, "rho", self._groups),
            eps=parse_number(eps, "eps", None),
            active=active_rows(active, self._groups or 1),
            variant=self._variant,
        )
        self._pieces.deliver(("out",))

    def _gradient(self, g: Any) -> None:
        """Put another gradient in the place of the one that kernels read."""
        pieces = self._pieces
        if g is None:
            if "g" not in pieces.operands:
                raise InvalidInputError("g: expected a gradient, here or at the start")
            return
        if self._rows:
            operand = row_operand(g, "g", self._x, False, False)
            operands = {"x": pieces.operands["x"], "g": operand}
            check_rows_apart("x", {"x": "x", "g": "g"}, operands, self._x)
            check_in_place(operands, {"g": ("g", g)})
        else:
            given = slots(x=("x", self._x), g=("g", g))
            operands = one_model(given, ("x",)).operands
            check_in_place(operands, given)
            operand = operands["g"]
        pieces.operands["g"] = operand
        self._g = g if _arrays.is_array(g) else None  # a list may get other tensors
        core = pieces.cache.get("core")
        if core is not None:
            place(core, 1, operand)
        pieces.cache.pop("tables", None)


def _are_plain(
    lr: Any, alpha: Any, decay: Any, clip: Any, momentum: Any, clip_mode: Any, active: Any
) -> bool:
    """Whether the arguments of a step are such that nothing is left to check or convert."""
    return (
        type(lr) is type(alpha) is type(decay) is type(momentum) is float
        and math.isfinite(lr + alpha + decay + momentum)  # else the checks find out which it is
        and (clip is None or (type(clip) is float and clip > 0))
        and clip_mode in CLIP_MODES
        and (active is None or (type(active) is int and active >= 0))
    )
