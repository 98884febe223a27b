"""Gradients without their part along the weights, written over the gradients."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError

__all__ = [
    "FLOOR",
    "SCOPES",
    "Pairs",
    "check_options",
    "pair_views",
    "perp_grad",
    "perp_grad_views",
]

SCOPES = ("tensor", "global")
FLOOR = 1e-6


def perp_grad(
    weights: Any,
    grads: Any,
    *,
    scope: str = "tensor",
    renormalize: bool = True,
    eps: float = 1e-30,
    floor: float = FLOOR,
    skip_1d: bool = False,
    variant: str | None = None,
) -> Any:
    r"""Take out of each gradient its component along the weights, in place.

    ``c = w.g / (w.w + eps)``, ``p = g - c w``, ``g <- p ||g|| / (||p|| + eps)``: the step along it
    leaves the length of the weights alone (to first order), which a network that has fitted its
    training data would otherwise grow without end. All tensors in one call: 8 bytes a float32 value
    for the sums, 12 for the result, part of them from cache.

    Parameters
    ----------
    weights, grads : array, or list, tuple or dict of arrays
        Tensors and their gradients: the same structure, shapes, dtypes (float64, float32, float16
        or bfloat16) and device; NumPy, or torch on CPU or CUDA. Gradients are overwritten and share
        no memory with one another or with weights. Strided ones are copied there and back.
    scope : {"tensor", "global"}
        Dot products over each tensor, or over all together, as one vector.
    renormalize : bool
        Stretch the result to the length that the gradient had; False: leave it at p.
    eps : float
        From 0; added to w.w and to ||p||.
    floor : float
        From 0; where ``||p|| < floor ||g||`` the result is p. Otherwise the rounding errors of a
        gradient nearly parallel to its weights (some 1e-7 in float32) would become most of a step.
    skip_1d : bool
        Leave tensors of fewer than two dimensions (biases, gains of norms) as they are.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    update
        `grads` itself.

    Raises
    ------
    InvalidInputError
        Structures or shapes that differ, unknown options, memory that is shared or read-only.
    DTypeError
        dtypes or devices that differ or cannot be read (sparse, complex).
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    With scope "tensor", tensors of one element stay as they are: the projection would be 0 and
    freeze them. w = 0 leaves g, g = 0 stays 0 and g = k w becomes 0. A NaN or an infinity passes
    into all of its tensor. float64 gradients longer than 1e150 or shorter than 1e-150 overflow.

    Sums and arithmetic are float64 and the result is rounded once. Where it is 1e-4 ||g|| or less,
    ||p|| is measured in another pass in place of ``gg - wg^2 / ww``, which cancels. The bits are
    the same on every instruction set, device and number of threads.

    In torch.compile the torch op ``flcore::perp_grad`` is called.

    References
    ----------
    Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import perp_grad
    >>> perp_grad(np.array([3.0, 4.0]), np.array([1.0, 2.0]), renormalize=False)
    array([-0.32,  0.24])
    """
    check_options(scope, renormalize, eps, floor)
    layout, ws = _updates.flatten(weights, "weights")
    gs = layout.layers(grads, "grads")
    if variant is None and _in_torch_compile(gs):
        from flcore import _torch_perp_grad  # comes back here with plain tensors

        _torch_perp_grad.perp_grad(ws, gs, scope, renormalize, eps, floor, skip_1d)
        return grads
    keep = [i for i, g in enumerate(gs) if _takes_part(g, scope, skip_1d)]
    pairs = pair_views(
        [ws[i] for i in keep],
        [gs[i] for i in keep],
        [(layout.label("weights", i), layout.label("grads", i)) for i in keep],
    )
    perp_grad_views(
        pairs,
        global_scope=scope == "global",
        renormalize=renormalize,
        eps=eps,
        floor=floor,
        variant=variant,
    )
    pairs.deliver()
    return grads


def _takes_part(g: Any, scope: str, skip_1d: bool) -> bool:
    return not ((skip_1d and g.ndim < 2) or (scope == "tensor" and _arrays.numel(g) < 2))


def _in_torch_compile(arrays: Sequence[Any]) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not arrays or isinstance(arrays[0], np.ndarray):
        return False
    return torch.compiler.is_compiling()


def check_options(scope: Any, renormalize: Any, eps: Any, floor: Any) -> None:
    """Raise what `perp_grad` says about options that cannot be used."""
    if scope not in SCOPES:
        raise InvalidInputError(f"scope: expected one of {SCOPES}, got {scope!r}")
    if not isinstance(renormalize, bool):
        raise InvalidInputError(f"renormalize: expected True or False, got {renormalize!r}")
    for name, value in (("eps", eps), ("floor", floor)):
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise InvalidInputError(f"{name}: expected a finite number from 0, got {value!r}")


# ---- views of pairs ----------------------------------------------------------------------------


@dataclass
class Pairs:
    """Tensors and their gradients as kernels see them; values lie in the same order in both.

    Attributes
    ----------
    weights, grads : list of View
    copies : list
        Gradients that no kernel can write, each with the copy that has been written for it.
    """

    weights: list[View] = field(default_factory=list)
    grads: list[View] = field(default_factory=list)
    copies: list[tuple[Any, Any]] = field(default_factory=list)

    def deliver(self) -> None:
        """Put the results where the caller has its gradients."""
        for target, values in self.copies:
            _arrays.assign(target, values)
        torch = sys.modules.get("torch")
        for v in self.grads:
            if torch is not None and not isinstance(v.array, np.ndarray):
                torch.autograd.graph.increment_version(v.array)  # written through its address


def pair_views(
    weights: Sequence[Any], grads: Sequence[Any], labels: Sequence[tuple[str, str]]
) -> Pairs:
    """View weights and gradients of equal shapes; `labels` name them in errors.

    Raises
    ------
    InvalidInputError, DTypeError
        As `perp_grad`.
    """
    pairs = Pairs()
    for w, g, (w_name, g_name) in zip(weights, grads, labels, strict=True):
        if not g.flags.c_contiguous if isinstance(g, np.ndarray) else not _plain(g):
            order = _order(g)  # channels last, transposed: the values are dense all the same
            w, g = _permuted(w, order), _permuted(g, order)
        w_view, g_view = _arrays.view(w, w_name), _arrays.view(g, g_name)
        if _arrays.writable_view(g, g_name, w_view) is None:
            pairs.copies.append((g, g_view.array))
        pairs.weights.append(w_view)
        pairs.grads.append(g_view)
    _check_disjoint(pairs)
    return pairs


def _plain(g: Any) -> bool:
    """Whether a tensor needs no other order; what is not dense at all is refused later."""
    return str(g.layout) != "torch.strided" or g.is_contiguous()


def _order(x: Any) -> list[int]:
    strides = x.strides if isinstance(x, np.ndarray) else x.stride()
    return sorted(range(x.ndim), key=lambda axis: -abs(strides[axis]))


def _permuted(x: Any, order: list[int]) -> Any:
    return x.transpose(order) if isinstance(x, np.ndarray) else x.detach().permute(order)


def _check_disjoint(pairs: Pairs) -> None:
    if _arrays.overlap(pairs.grads, pairs.weights):
        raise InvalidInputError("grads: a gradient shares memory with a weight")
    ends = sorted(
        (v.ptr, v.ptr + v.numel * _arrays.ITEMSIZE[v.dtype]) for v in pairs.grads if v.numel
    )
    for (_, end), (start, _) in itertools.pairwise(ends):
        if start < end:
            raise InvalidInputError("grads: two gradients share memory; give each tensor once")


def perp_grad_views(
    pairs: Pairs,
    *,
    global_scope: bool = False,
    renormalize: bool = True,
    eps: float = 1e-30,
    floor: float = FLOOR,
    reduce: Callable[[Any], None] | None = None,
    variant: str | None = None,
) -> None:
    """Project checked pairs; `reduce` as in `flcore.reference.perp_grad`, on their device."""
    devices = sorted({v.device for v in pairs.grads})
    if len(devices) > 1:
        raise InvalidInputError(f"grads: expected all tensors on one device, got {devices}")
    if not devices and reduce is None:
        return
    _variants.choose("perp_grad", devices[0] if devices else "cpu", variant)(
        pairs.weights,
        pairs.grads,
        global_scope=global_scope,
        renormalize=renormalize,
        eps=float(eps),
        floor=float(floor),
        reduce=reduce,
    )


# ---- variants ----------------------------------------------------------------------------------


def _perp_grad_cpu(
    weights: Sequence[View],
    grads: Sequence[View],
    *,
    global_scope: bool,
    renormalize: bool,
    eps: float,
    floor: float,
    reduce: Callable[[Any], None] | None = None,
) -> None:
    """csrc/cpu/perp_grad.isa.cpp."""
    numel = [v.numel for v in grads]
    fixed = (
        [v.ptr for v in weights],
        [v.ptr for v in grads],
        numel,
        [v.code for v in grads],
        global_scope,
        renormalize,
        eps,
        floor,
    )
    threads = _native.threads_for(sum(numel))
    project, sums_step, rest_step, apply_step = _native.core.PERP_STEPS
    if reduce is None:
        _native.core.perp_grad(project, *fixed, threads=threads)
        return
    sums, rest = np.zeros((2, len(numel), 3))
    buffers = (_arrays.address(sums), _arrays.address(rest), threads)
    _native.core.perp_grad(sums_step, *fixed, *buffers)
    reduce(sums)
    if _native.core.perp_grad(rest_step, *fixed, *buffers):
        squares = rest[:, 0].copy()
        reduce(squares)
        rest[:, 0] = squares
    _native.core.perp_grad(apply_step, *fixed, *buffers)


_variants.add("perp_grad", "cpu", _variants.lazy(__name__, "_perp_grad_cpu"), _variants.cpu_only)
_variants.add("perp_grad", "reference", _variants.lazy("flcore.reference.perp_grad", "perp_grad"))
_variants.add(
    "perp_grad",
    "triton",
    _variants.lazy("flcore.pykernels.perp_grad", "perp_grad"),
    _variants.needs_triton,
)
