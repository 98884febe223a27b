"""Move scales and shifts of channels from activations into the ops around them.

For the input X [T, K] of linears y = X W^T + b, a scale s and a shift z of its channels:

    X~ = (X - z) / s,   b~ = b + W z (the W before scaling),   W~ = W diag(s)

leave y as it was. X~ comes out of the op in front once its own weights took up s and z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.quantization.preparation._capture import Calibration, evaluating, first_tensor
from flcore.quantization.preparation._groups import ScalingGroup, can_shift, check_groups, fold_of
from flcore.quantization.preparation._statistics import select_tokens

__all__ = ["Migrated", "fold_scales"]

torch: Any = require("torch", extra="torch")

# How far outputs of the whole model may move, relative to the largest one: rounding of some
# dozens of layers stays well below, a group that misses a reader of its input does not.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}


class Migrated(torch.nn.Module):
    """A module with an affine map of the channels [..., K] at its output or its input.

    Parameters
    ----------
    module : torch.nn.Module
    factor, offset : torch.Tensor, [K]
        ``x * factor + offset``.
    at : {"output", "input"}
    """

    def __init__(self, module: Any, factor: Any, offset: Any, at: str) -> None:
        super().__init__()
        self.module = module
        self.at = at
        self.register_buffer("factor", factor)
        self.register_buffer("offset", offset)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the map before or after it."""
        if self.at == "input":
            return self.module(x * self.factor + self.offset, *args, **kwargs)
        return self.module(x, *args, **kwargs) * self.factor + self.offset

    def extra_repr(self) -> str:
        """Channels and side."""
        return f"channels={self.factor.numel()}, at={self.at!r}"


class _Undo:
    """Values that were replaced, so that a fold that turns out wrong leaves nothing behind."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def write(self, module: Any, name: str, value: Any, like: Any) -> None:
        """Set a parameter; one that is not there is made in the image of `like`."""
        parameter = getattr(module, name, None)
        if parameter is None:
            value = value.to(device=like.device, dtype=like.dtype)
            new = torch.nn.Parameter(value, requires_grad=like.requires_grad)
            setattr(module, name, new)
            self.steps.append(lambda: setattr(module, name, None))
            return
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(value)
        self.steps.append(lambda: parameter.data.copy_(old))

    def replace(self, model: Any, name: str, new: Any) -> None:
        """Put another module in the place of the one called `name`."""
        owner_name, _, last = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, last)
        setattr(owner, last, new)
        self.steps.append(lambda: setattr(owner, last, old))

    def undo(self) -> None:
        """Put everything back."""
        for step in reversed(self.steps):
            step()


def fold_scales(
    model: Any,
    groups: Iterable[ScalingGroup],
    scales: Iterable[Any],
    shifts: Iterable[Any] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = "attention_mask",
) -> None:
    """Divide the inputs of the linears by scales, after shifts, in place and for free.

    The float function of the model stays what it was, up to rounding.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    groups : sequence of ScalingGroup
    scales : sequence of torch.Tensor, [K] each
        Positive; one a group. The same on all clients that aggregate weights afterwards.
    shifts : sequence of torch.Tensor [K] or None, optional
    batches, forward, mask : optional
        Calibration data: the output for the first batch is compared before and after.

    Raises
    ------
    InvalidInputError
        Scales that do not fit or are not positive, shifts where there is no room for them, or
        outputs that changed: then the description misses a reader of some channel, or names an op
        through which the scale does not pass. The model is as it was.
    """
    groups = check_groups(model, groups)
    scales = list(scales)
    shifts = [None] * len(groups) if shifts is None else list(shifts)
    if not len(scales) == len(shifts) == len(groups):
        raise InvalidInputError(
            f"scales: expected {len(groups)} (one a group), got {len(scales)} and "
            f"{len(shifts)} shifts"
        )
    checked = [
        _checked(model, group, scale, shift, number)
        for number, (group, scale, shift) in enumerate(zip(groups, scales, shifts, strict=True))
    ]
    calibration = None if batches is None else Calibration.of(batches, forward, mask)
    with _unchanged(model, calibration, groups) as undo:
        for group, (scale, shift) in zip(groups, checked, strict=True):
            _fold_group(model, group, scale, shift, undo)


def _checked(model: Any, group: ScalingGroup, scale: Any, shift: Any, number: int) -> Any:
    channels = model.get_submodule(group.linears[0]).in_features
    parts = [torch.as_tensor(scale, dtype=torch.float64).detach().cpu()]
    if shift is not None:
        parts.append(torch.as_tensor(shift, dtype=torch.float64).detach().cpu())
    for what, part in zip(("scales", "shifts"), parts, strict=False):
        if tuple(part.shape) != (channels,) or not bool(torch.isfinite(part).all()):
            raise InvalidInputError(
                f"{what}[{number}]: expected {channels} finite numbers, got shape "
                f"{tuple(part.shape)}"
            )
    if not bool((parts[0] > 0).all()):
        raise InvalidInputError(f"scales[{number}]: expected numbers above 0")
    moved = shift is not None and bool((parts[1] != 0).any())
    if moved:
        previous = None if group.previous is None else model.get_submodule(group.previous)
        fold = fold_of(group, previous, channels)
        room = fold in ("input", "output") or hasattr(previous, "bias")
        if not room:
            can_shift(ScalingGroup(group.previous, group.linears, shift=True), previous, fold)
    return parts[0], parts[1] if moved else None


@contextmanager
def _unchanged(
    model: Any, calibration: Calibration | None, groups: tuple[ScalingGroup, ...]
) -> Iterator[_Undo]:
    """Take back what the block did if the outputs for the first batch differ after it."""
    before = None if calibration is None else _outputs(model, calibration)
    undo = _Undo()
    try:
        yield undo
        if calibration is not None:
            _compare(before, _outputs(model, calibration), groups)
    except BaseException:
        undo.undo()
        raise


def _outputs(model: Any, calibration: Calibration) -> Any:
    batch = calibration.batches[0]
    mask = calibration.mask_of(batch)
    with evaluating(model):
        out = first_tensor(calibration.forward(model, batch))
    if out is None:
        raise InvalidInputError("model: expected an output with a floating-point tensor in it")
    if mask is not None and tuple(out.shape[: mask.ndim]) == tuple(mask.shape):
        return select_tokens(out.reshape(*mask.shape, -1), mask)
    return out


def _compare(before: Any, after: Any, groups: tuple[ScalingGroup, ...]) -> None:
    size = float(before.abs().max().double())
    moved = float((after - before).abs().max().double())
    limit = TOLERANCE.get(before.dtype, 1e-4)
    if not moved <= limit * size:
        raise InvalidInputError(
            f"groups: folding changed the output by {moved:.3g}, of at most {size:.3g}; a channel "
            "has a reader that is not listed, or passes an op that does not commute with its "
            f"scale or shift ({len(groups)} groups, the first one: {groups[0].name}). Nothing was "
            "changed"
        )


def _fold_group(model: Any, group: ScalingGroup, scale: Any, shift: Any, undo: _Undo) -> None:
    for name in group.linears:
        linear = model.get_submodule(name)
        weight = linear.weight.detach().double()
        s, z = scale.to(weight.device), None if shift is None else shift.to(weight.device)
        if z is not None:
            bias = 0 if linear.bias is None else linear.bias.detach().double()
            undo.write(linear, "bias", bias + weight @ z, linear.weight)
        undo.write(linear, "weight", weight * s, linear.weight)
    like = linear.weight
    for name in group.residual:
        undo.replace(model, name, _migrated(model, name, scale, shift, like, "input"))
    if group.previous is None:
        inverse, offset = 1 / scale, None if shift is None else -shift / scale
        for name in group.linears:
            undo.replace(model, name, _migrated(model, name, inverse, offset, like, "input"))
        return
    previous = model.get_submodule(group.previous)
    fold = fold_of(group, previous, scale.numel())
    if fold == "output":
        inverse, offset = 1 / scale, None if shift is None else -shift / scale
        new = _migrated(model, group.previous, inverse, offset, like, "output")
        undo.replace(model, group.previous, new)
    elif fold == "norm":
        _fold_norm(previous, scale, shift, undo, like)
    else:
        _fold_linear(previous, scale, shift, undo)


def _migrated(model: Any, name: str, factor: Any, offset: Any, like: Any, at: str) -> Migrated:
    offset = torch.zeros_like(factor) if offset is None else offset
    factor, offset = (part.to(device=like.device, dtype=like.dtype) for part in (factor, offset))
    return Migrated(model.get_submodule(name), factor, offset, at)


def _fold_norm(norm: Any, scale: Any, shift: Any, undo: _Undo, like: Any) -> None:
    weight = getattr(norm, "weight", None)
    s = scale.to(like.device)
    old = torch.ones_like(s) if weight is None else weight.detach().double()
    bias = getattr(norm, "bias", None)
    if bias is not None or shift is not None:
        old_bias = torch.zeros_like(s) if bias is None else bias.detach().double()
        z = 0 if shift is None else shift.to(like.device)
        undo.write(norm, "bias", (old_bias - z) / s, like)
    undo.write(norm, "weight", old / s, like)


def _fold_linear(linear: Any, scale: Any, shift: Any, undo: _Undo) -> None:
    """Divide the last K outputs, such as the values of a fused query-key-value projection."""
    weight = linear.weight.detach().double()
    s = scale.to(weight.device)
    first = weight.shape[0] - s.numel()
    weight[first:] /= s[:, None]
    if linear.bias is not None or shift is not None:
        if linear.bias is None:
            bias = weight.new_zeros(weight.shape[0])
        else:
            bias = linear.bias.detach().double().clone()
        z = 0 if shift is None else shift.to(weight.device)
        bias[first:] = (bias[first:] - z) / s
        undo.write(linear, "bias", bias, linear.weight)
    undo.write(linear, "weight", weight, linear.weight)
