"""What the methods are told about a model: which op feeds which linears, and where errors count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["FOLDS", "ScalingGroup", "check_groups", "find_module", "fold_of"]

torch: Any = require("torch", extra="torch")

FOLDS = ("auto", "norm", "linear", "output")


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that read one tensor, and the op in front of them that can take up its scale.

    Parameters
    ----------
    previous : str or None
        Dotted name of the module whose output, after nothing but ops through which a positive
        factor a channel passes (attention over values, ReLU, a product with a gate), is the input
        of `linears`. None: there is none, every linear gets the division in front of it.
    linears : str or sequence of str
        Dotted names of the `torch.nn.Linear` modules. All must read the same input; the first one
        is where it is recorded. All readers of the output of `previous` belong here (of a mixture
        of experts the router, first, and all experts) or in `residual`.
    inspect : str or callable, optional
        Whose output error a search minimises. A dotted name: that module, run with its recorded
        arguments. A callable ``f(outputs, mask)``: a function of the outputs of the linears, such
        as `JointAttention` or `Gated`. None: the outputs of the linears themselves.
    fold : {"auto", "norm", "linear", "output"}
        How `previous` takes the scale: weight (and bias) of a norm, the last rows of a linear, or
        a division put after the module, for activations such as GELU. "auto" reads it from the
        type of the module.
    residual : str or sequence of str
        Modules (such as an `torch.nn.Identity` on the skip path of a post-norm block) that read
        the output of `previous` too: they get the restored tensor.
    shift : bool, optional
        Whether OS+ may move the centres of the channels too. By default where `previous` has a
        bias or gets a division after it, and not through a linear: a constant passes through
        attention (pass True there), but not through a ReLU or a gate.
    """

    previous: str | None
    linears: Sequence[str]
    inspect: str | Callable[..., Any] | None = None
    fold: str = "auto"
    residual: Sequence[str] = ()
    shift: bool | None = None

    def __post_init__(self) -> None:
        for field in ("linears", "residual"):
            names = getattr(self, field)
            names = (names,) if isinstance(names, str) else tuple(names)
            object.__setattr__(self, field, names)
        if not self.linears:
            raise InvalidInputError("linears: expected at least one name, got none")
        if self.fold not in FOLDS:
            raise InvalidInputError(f"fold: expected one of {FOLDS}, got {self.fold!r}")

    @property
    def together(self) -> Callable[..., Any] | None:
        """`inspect` where it is a function of the outputs of the linears."""
        return None if isinstance(self.inspect, str) else self.inspect

    @property
    def name(self) -> str:
        """``previous -> linears``, for reports and messages."""
        return f"{self.previous} -> {', '.join(self.linears)}"


def find_module(model: Any, name: str, what: str) -> Any:
    """Return the module called `name`; `what` names the argument in the error."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InvalidInputError(
            f"{what}: {type(model).__name__} has no module {name!r} (names as in named_modules())"
        ) from None


def find_linear(model: Any, name: str, what: str) -> Any:
    """Return the `torch.nn.Linear` called `name`."""
    module = find_module(model, name, what)
    if not isinstance(module, torch.nn.Linear):
        raise DTypeError(
            f"{what}: expected {name!r} to be a torch.nn.Linear, got {type(module).__name__}"
        )
    if not module.weight.is_floating_point():
        raise DTypeError(f"{what}: {name!r} has weights of {module.weight.dtype}")
    return module


def fold_of(group: ScalingGroup, previous: Any, channels: int) -> str:
    """Return "input", "norm", "linear" or "output": how the scale of K channels is taken up."""
    if previous is None:
        return "input"
    if group.fold != "auto":
        return group.fold
    if isinstance(previous, torch.nn.Linear):
        return "linear"
    if isinstance(previous, torch.nn.LayerNorm):
        return "norm"
    weight = getattr(previous, "weight", None)
    is_vector = isinstance(weight, torch.Tensor) and tuple(weight.shape) == (channels,)
    return "norm" if is_vector and not isinstance(previous, torch.nn.PReLU) else "output"


def can_shift(group: ScalingGroup, previous: Any, fold: str) -> bool:
    """Whether channel centres may move into `previous`; raises when asked for the impossible."""
    has_bias = fold in ("input", "output") or hasattr(previous, "bias")
    if group.shift and not has_bias:
        raise InvalidInputError(
            f"shift: {group.previous!r} ({type(previous).__name__}) has no bias that could take up "
            "a shift; leave it out, only scales are migrated then"
        )
    if group.shift is None:
        return has_bias and fold != "linear"
    return group.shift


def check_groups(model: Any, groups: Iterable[ScalingGroup]) -> tuple[ScalingGroup, ...]:
    """Return the groups as a tuple, after a look at every name and shape.

    Raises
    ------
    DTypeError
        `model` is no `torch.nn.Module`, `groups` are not groups, or a linear is none.
    InvalidInputError
        A name that is not there, widths that do not fit, or a module in two groups.
    """
    if not isinstance(model, torch.nn.Module):
        raise DTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    groups = (groups,) if isinstance(groups, ScalingGroup) else tuple(groups)
    if not groups:
        raise InvalidInputError("groups: expected at least one ScalingGroup, got none")
    scaled: dict[str, int] = {}
    feeding: dict[str, int] = {}
    for number, group in enumerate(groups):
        if not isinstance(group, ScalingGroup):
            raise DTypeError(
                f"groups[{number}]: expected a ScalingGroup, got {type(group).__name__}"
            )
        where = f"groups[{number}]"
        _check_group(model, group, where)
        for name in group.linears:
            if name in scaled:
                raise InvalidInputError(
                    f"{where}.linears: {name!r} is also in groups[{scaled[name]}]"
                )
            scaled[name] = number
        if group.previous is not None:
            if group.previous in feeding:
                raise InvalidInputError(
                    f"{where}.previous: {group.previous!r} also feeds "
                    f"groups[{feeding[group.previous]}]; its readers share one scale: "
                    "list them in one group"
                )
            feeding[group.previous] = number
    return groups


def _check_group(model: Any, group: ScalingGroup, where: str) -> None:
    linears = [find_linear(model, name, f"{where}.linears") for name in group.linears]
    channels = linears[0].in_features
    for name, linear in zip(group.linears, linears, strict=True):
        if linear.in_features != channels:
            raise InvalidInputError(
                f"{where}.linears: {name!r} reads {linear.in_features} channels and "
                f"{group.linears[0]!r} {channels}; linears of a group read the same input"
            )
    for name in group.residual:
        find_module(model, name, f"{where}.residual")
    if isinstance(group.inspect, str):
        inspected = find_module(model, group.inspect, f"{where}.inspect")
        inside = set(inspected.modules())
        for name, linear in zip(group.linears, linears, strict=True):
            if linear not in inside:
                raise InvalidInputError(
                    f"{where}.inspect: {group.inspect!r} does not hold {name!r}"
                )
    elif group.inspect is not None and not callable(group.inspect):
        raise DTypeError(
            f"{where}.inspect: expected a name or a callable, got {type(group.inspect).__name__}"
        )
    if group.previous is None:
        return
    previous = find_module(model, group.previous, f"{where}.previous")
    fold = fold_of(group, previous, channels)
    if fold == "linear":
        linear = find_linear(model, group.previous, f"{where}.previous")
        if linear.out_features < channels:
            raise InvalidInputError(
                f"{where}.previous: {group.previous!r} has {linear.out_features} outputs for "
                f"{channels} channels (grouped-query attention?); such a pair has no scale"
            )
    if fold == "norm":
        weight = getattr(previous, "weight", None)
        shape = tuple(getattr(previous, "normalized_shape", (channels,)))
        if weight is not None:
            shape = tuple(weight.shape)
        if shape != (channels,):
            raise InvalidInputError(
                f"{where}.previous: {group.previous!r} has a weight of shape {shape}, expected "
                f"({channels},)"
            )
    can_shift(group, previous, fold)
