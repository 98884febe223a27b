"""The local step of federated optimisation, in place, over the tensors of a model or over rows."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flcore import _native, _variants
from flcore.errors import InvalidInputError
from flcore.ops._local_numbers import active_rows, parse_number
from flcore.ops._local_pieces import SLOTS, Operand, Pieces, one_model, parse_rows, slots

__all__ = [
    "CLIP_MODES",
    "EPS",
    "KINDS",
    "local_step",
    "local_step_rows",
    "place",
    "run",
    "take_step",
]

KINDS = ("step", "norm", "shift", "sam", "update", "dual", "control")  # LocalKind in csrc/api.h
CLIP_MODES = ("reference", "full")
EPS = 1e-7
"""Added to the norm that a gradient is divided by."""


def local_step(
    x: Any,
    g: Any,
    q: Any = None,
    *,
    lr: float,
    alpha: float = 1.0,
    decay: float = 0.0,
    clip: float | None = None,
    clip_mode: str = "reference",
    momentum: float = 0.0,
    nesterov: bool = False,
    buffer: Any = None,
    first: bool = False,
    variant: str | None = None,
) -> None:
    r"""Take one local step of a model, in place: ``x <- x - lr (s (alpha g + q) + decay x)``.

    ``s = min(1, clip / ||alpha g + q||)``, the norm being that of all tensors together. With
    `momentum` the bracket b goes through a buffer, ``buffer <- momentum buffer + b``, and x moves
    along it (`nesterov`: along ``b + momentum buffer``). FedProx, SCAFFOLD, FedDyn, FedSpeed, FedCM
    and others are this step with a vector q that does not change in a round (see the table in
    docs/local-step.md). It reads x, g and q and writes x: 16 bytes a float32 value, 8 more with a
    buffer; the norm reads g and q before, 8 bytes, from cache where the model fits.

    Parameters
    ----------
    x : array, or list, tuple or dict of arrays
        The tensors of one model: NumPy, or torch on CPU or CUDA; float64, float32, float16 or
        bfloat16 in any mixture. Overwritten.
    g : like x
        The gradient; only read.
    q : like x, optional
        What is added to the gradient; only read.
    lr, alpha, decay : float
    clip : float, optional
        Above 0: the largest norm. Where the norm is NaN or infinite, x becomes NaN, so that a
        divergence is seen.
    clip_mode : {"reference", "full"}
        "reference": the limit is on ``alpha g + q``, as above. "full": on the whole bracket,
        ``s (alpha g + q + decay x)``.
    momentum : float
    nesterov : bool
    buffer : like x, optional
        The momentum buffer, needed with `momentum`. Overwritten.
    first : bool
        The buffer is empty: it becomes the bracket, whatever it holds.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Raises
    ------
    InvalidInputError
        Structures or shapes that differ, options or numbers that cannot be used, memory that is
        shared or read-only.
    DTypeError
        dtypes or devices that differ or cannot be read.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    float64 is computed in float64, all else in float32, each operation rounded by itself; norms are
    float64 sums. The bits are the same on every instruction set, for every number of threads, and
    in Triton. The scale s stays on the device. NaN in x, g or q passes through. Under torch.compile
    the torch op ``flcore::local_step`` is called.

    References
    ----------
    The order of clipping and decay in "reference" is that of the FL-Simulator code base of Sun et
    al., "FedSpeed", ICLR 2023, arXiv 2302.10429.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import local_step
    >>> x = np.array([1.0, 2.0])
    >>> local_step(x, np.array([3.0, 4.0]), lr=0.5, clip=1.0)
    >>> x
    array([0.7, 1.6])
    """
    given = slots(x=("x", x), g=("g", g), q=("q", q), state=("buffer", buffer))
    if variant is None and _in_torch_compile(x):
        from flcore import _torch_local_step  # comes back here with plain tensors

        _torch_local_step.local_step(
            x, g, q, lr, alpha, decay, clip, clip_mode, momentum, nesterov, buffer, first
        )
        return
    pieces = one_model(given, ("x",) if buffer is None else ("x", "state"))
    take_step(
        pieces,
        lr,
        alpha,
        decay,
        clip,
        clip_mode,
        momentum,
        nesterov,
        first,
        rows=None,
        active=None,
        variant=variant,
    )
    pieces.deliver()


def local_step_rows(
    x: Any,
    g: Any,
    q: Any = None,
    *,
    lr: Any,
    alpha: Any = 1.0,
    decay: Any = 0.0,
    clip: Any = None,
    clip_mode: str = "reference",
    momentum: Any = 0.0,
    nesterov: bool = False,
    buffer: Any = None,
    first: bool = False,
    active: Any = None,
    variant: str | None = None,
) -> None:
    """Take one local step of many models, a row each: `local_step` with a norm for each row.

    Parameters
    ----------
    x, g, buffer : (rows, d) array
        Values of a row lie one after the other; rows may be further apart than d.
    q : (rows, d) or (d,) array, optional
        (d,): the same for all rows.
    lr, alpha, decay, momentum, clip : float or (rows,) float64
        One for all rows, or one each; infinity is a clip that does nothing.
    active : (rows,) bool or int, optional
        Rows that take part, or how many of the first ones; others are neither read nor written.
    clip_mode, nesterov, first, variant
        As `local_step`.

    Raises
    ------
    InvalidInputError, DTypeError, VariantUnavailableError
        As `local_step`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import local_step_rows
    >>> x = np.zeros((2, 2))
    >>> local_step_rows(x, np.array([[3.0, 4.0], [0.3, 0.4]]), lr=[1.0, 2.0], clip=1.0)
    >>> x
    array([[-0.6, -0.8],
           [-0.6, -0.8]])
    """
    given = slots(x=("x", x), g=("g", g), q=("q", q), state=("buffer", buffer))
    pieces = parse_rows(given, ("x",) if buffer is None else ("x", "state"))
    take_step(
        pieces,
        lr,
        alpha,
        decay,
        clip,
        clip_mode,
        momentum,
        nesterov,
        first,
        rows=pieces.groups,
        active=active,
        variant=variant,
    )
    pieces.deliver()


# ---- what all forms share ----------------------------------------------------------------------


def take_step(
    pieces: Pieces,
    lr: Any,
    alpha: Any,
    decay: Any,
    clip: Any,
    clip_mode: str,
    momentum: Any,
    nesterov: bool,
    first: bool,
    *,
    rows: int | None,
    active: Any,
    variant: str | None,
) -> None:
    """Take a step with parsed operands; checks the numbers, `rows` of them where given."""
    if clip_mode not in CLIP_MODES:
        raise InvalidInputError(f"clip_mode: expected one of {CLIP_MODES}, got {clip_mode!r}")
    beta = parse_number(momentum, "momentum", rows)
    has_buffer = "state" in pieces.operands
    if not has_buffer and (beta.any() if isinstance(beta, np.ndarray) else beta):
        raise InvalidInputError("buffer: momentum needs a buffer of the shape of x")
    run(
        pieces,
        "step",
        rate=parse_number(lr, "lr", rows),
        alpha=parse_number(alpha, "alpha", rows),
        decay=parse_number(decay, "decay", rows),
        clip=None if clip is None else parse_number(clip, "clip", rows, positive=True),
        momentum=beta,
        full=clip_mode == "full",
        nesterov=bool(nesterov),
        first=bool(first),
        active=active_rows(active, rows or 1),
        variant=variant,
    )


def run(pieces: Pieces, kind: str, *, variant: str | None, **numbers: Any) -> None:
    """Run a kernel on parsed operands; `numbers` as `flcore.reference.local_step`."""
    function = pieces.cache.get("function")
    if function is None:
        function = _variants.choose("local_step", pieces.device, variant)
        pieces.cache["function"] = function
    function(pieces, kind, **numbers)


def _in_torch_compile(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and not isinstance(x, np.ndarray) and torch.compiler.is_compiling()


# ---- variants ----------------------------------------------------------------------------------


def place(core: Any, slot: int, operand: Operand) -> None:
    """Tell the kernel where the pieces of an operand are."""
    if operand.addresses or isinstance(operand.arrays, list):
        core.set(slot, operand.addresses)
    else:
        core.set_rows(slot, operand.base, operand.stride)


def _local_step_cpu(
    pieces: Pieces,
    kind: str,
    *,
    rate: float | np.ndarray = 0.0,
    alpha: float | np.ndarray = 1.0,
    decay: float | np.ndarray = 0.0,
    clip: float | np.ndarray | None = None,
    momentum: float | np.ndarray = 0.0,
    full: bool = False,
    nesterov: bool = False,
    first: bool = False,
    with_q: bool | None = None,
    eps: float = EPS,
    active: Any = None,
    norms: Any = None,
) -> None:
    """csrc/cpu/local_step.isa.cpp."""
    cache = pieces.cache
    core = cache.get("core")
    if core is None:
        core = _native.core.LocalCall(pieces.first_piece, pieces.numel, pieces.codes)
        for slot, name in enumerate(SLOTS):
            if name in pieces.operands:
                place(core, slot, pieces.operands[name])
        cache["core"], cache["work"] = core, sum(pieces.numel)
    if with_q is None:
        with_q = kind == "step" and "q" in pieces.operands
    threads = _native.threads_for(cache["work"])
    target = norms if norms is None or isinstance(norms, np.ndarray) else norms.numpy()
    # fmt: off
    core.run(KINDS.index(kind), rate, alpha, decay, clip, momentum, full, nesterov, first, with_q,
             eps, active, target, threads)
    # fmt: on


_variants.add("local_step", "cpu", _variants.lazy(__name__, "_local_step_cpu"), _variants.cpu_only)
_variants.add(
    "local_step", "reference", _variants.lazy("flcore.reference.local_step", "local_step")
)
_variants.add(
    "local_step",
    "triton",
    _variants.lazy("flcore.pykernels.local_step", "local_step"),
    _variants.needs_triton,
)
