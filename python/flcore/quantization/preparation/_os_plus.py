"""Outlier Suppression+: shift and scale channels so that activations round well too.

Wei et al., "Outlier Suppression+: Accurate Quantization of Large Language Models by Equivalent and
Optimal Shifting and Scaling", EMNLP 2023, arXiv 2304.09145.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.quantization.preparation._capture import (
    Calibration,
    Recorded,
    Tell,
    evaluating,
    progress_bar,
    record,
)
from flcore.quantization.preparation._fold import fold_scales
from flcore.quantization.preparation._grid import ActivationGrid, UniformGrid, as_weight_grid
from flcore.quantization.preparation._groups import (
    ScalingGroup,
    can_shift,
    check_groups,
    fold_of,
)
from flcore.quantization.preparation._losses import (
    at_least_float,
    joint_outputs,
    rerun,
    squared_errors,
    with_weights,
)
from flcore.quantization.preparation._statistics import ActivationStatistics

__all__ = [
    "Migration",
    "OSPlusReport",
    "migration_scale",
    "os_plus",
    "search_migrations",
    "thresholds",
]

torch: Any = require("torch", extra="torch")


def migration_scale(low: Any, high: Any, threshold: float) -> Any:
    """Return the scale of each channel, ``max(1, high / t, -low / t)``.

    Parameters
    ----------
    low, high : torch.Tensor, [K]
        Range of each channel, after the shift.
    threshold : float
        t: only channels beyond it are shrunk, each exactly to it.

    Returns
    -------
    torch.Tensor, [K] float64
    """
    reach = torch.maximum(high.double(), -low.double())
    return torch.clamp(reach / threshold, min=1.0)


def thresholds(largest: float, lower: float, steps: int | None = None) -> list[float]:
    """Return A, A - step, ..., down to `lower`: what the search tries.

    Parameters
    ----------
    largest : float
        A, the largest magnitude after the shift. It alone is tried if not above `lower`.
    lower : float
    steps : int, optional
        ``max(100, floor(A / 0.5))`` by default, the step is ``(A - lower) / steps``.
    """
    if steps is None:
        steps = max(100, int(largest / 0.5))
    if not largest > lower:
        return [largest]
    return [largest - (largest - lower) * i / steps for i in range(steps + 1)]


@dataclass(frozen=True)
class Migration:
    """What a search found for one group.

    Attributes
    ----------
    group : ScalingGroup
    shift, scale : torch.Tensor, [K] float64
        z and s of ``X~ = (X - z) / s``.
    threshold : float or None
        t; None where nothing was better than leaving all as it was.
    before, shifted, after : float
        Mean over tokens of the summed squared output error: as it was, with the shift alone, and
        with shift and scale.
    losses : tuple of (float, float)
        Every threshold tried, and its error.
    """

    group: ScalingGroup
    shift: Any
    scale: Any
    threshold: float | None
    before: float
    shifted: float
    after: float
    losses: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class OSPlusReport:
    """What `os_plus` did, by group."""

    migrations: tuple[Migration, ...]

    def __str__(self) -> str:
        lines = []
        for m in self.migrations:
            t = "as it was" if m.threshold is None else f"t {m.threshold:.3g}"
            lines.append(
                f"{m.group.name}: {t}, loss {m.before:.3g} -> shift {m.shifted:.3g} -> "
                f"{m.after:.3g}"
            )
        return "\n".join(lines)


def search_migrations(
    model: Any,
    groups: Iterable[ScalingGroup],
    batches: Iterable[Any],
    weights: Any = UniformGrid(8, 0, symmetric=True),  # noqa: B008 - frozen
    activations: ActivationGrid = ActivationGrid(8, "tensor"),  # noqa: B008 - frozen
    *,
    lower: float | None = None,
    steps: int | None = None,
    outside: float = 0.0,
    statistics: Mapping[str, ActivationStatistics] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = "attention_mask",
    at_once: int = 4,
    progress: bool | Tell = True,
) -> tuple[Migration, ...]:
    """Search shift and scale of every group; the model stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
    groups : sequence of ScalingGroup
        `inspect` as in the paper: `JointAttention` for query, key and value; `Gated` for gate and
        up; nothing for the others.
    batches : iterable
        Calibration data: tensors, tuples of arguments or mappings of keyword arguments.
    weights : flcore.quantization.Scheme, str or UniformGrid
        How weights are going to be rounded.
    activations : ActivationGrid
        How inputs of the linears are going to be rounded.
    lower : float, optional
        Smallest threshold. By default the 5 % quantile of the reach of the channels (the authors'
        code has 1.0 for OPT and BLOOM, 0.1 for LLaMA), or half of the largest reach if less.
    steps : int, optional
        Thresholds tried; see `thresholds`.
    outside : float
        Share of the tokens at either end of a channel that do not count for its centre; 0 as
        in the paper. Not with `statistics`.
    statistics : mapping, optional
        Merged ranges of all clients, by the name of the first linear of a group.
    forward, mask, at_once, progress
        See `search_scales`.
    """
    groups, calibration = check_groups(model, groups), Calibration.of(batches, forward, mask)
    settings = _Settings(weights, activations, lower, steps, outside, statistics, at_once)
    with evaluating(model), progress_bar(progress, settings.steps_of(groups, calibration)) as tell:
        return settings.search(model, groups, calibration, tell)


def os_plus(
    model: Any,
    groups: Iterable[ScalingGroup],
    batches: Iterable[Any],
    weights: Any = UniformGrid(8, 0, symmetric=True),  # noqa: B008 - frozen
    activations: ActivationGrid = ActivationGrid(8, "tensor"),  # noqa: B008 - frozen
    **options: Any,
) -> OSPlusReport:
    """Prepare a model for quantised activations: search shifts and scales, and fold them.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; its float function stays as it is.
    groups, batches, weights, activations, **options
        See `search_migrations`. All searches see the model as it was given.

    Returns
    -------
    OSPlusReport

    Raises
    ------
    DTypeError, InvalidInputError
        See `ScalingGroup` and `fold_scales`; the model is as it was then.
    """
    groups = check_groups(model, groups)
    keys = ("forward", "mask")
    calibration = Calibration.of(batches, **{k: options.pop(k) for k in keys if k in options})
    found = search_migrations(model, groups, calibration, weights, activations, **options)
    fold_scales(
        model, groups, [m.scale for m in found], [m.shift for m in found], batches=calibration
    )
    return OSPlusReport(found)


@dataclass(frozen=True)
class _Settings:
    """The options of a search, and the search."""

    weights: Any
    activations: ActivationGrid
    lower: float | None
    steps: int | None
    outside: float
    statistics: Mapping[str, ActivationStatistics] | None
    at_once: int

    def __post_init__(self) -> None:
        as_weight_grid(self.weights)
        if self.lower is not None and not self.lower > 0:
            raise InvalidInputError(f"lower: expected a number above 0, got {self.lower}")
        if not 0 <= self.outside < 0.5:
            raise InvalidInputError(f"outside: expected 0 <= outside < 0.5, got {self.outside}")
        if self.outside and self.statistics is not None:
            raise InvalidInputError("outside: merged statistics have no quantiles; leave one out")
        for name in ("steps", "at_once"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidInputError(f"{name}: expected an integer of at least 1, got {value!r}")

    def steps_of(self, groups: Sequence[ScalingGroup], calibration: Calibration) -> int:
        """Return how many steps the bar has."""
        return -(-len(groups) // self.at_once) * len(calibration.batches) + len(groups)

    def search(
        self,
        model: Any,
        groups: Sequence[ScalingGroup],
        calibration: Calibration,
        tell: Callable[[str], None],
    ) -> tuple[Migration, ...]:
        """Return what was found for every group."""
        found = []
        for start in range(0, len(groups), self.at_once):
            part = groups[start : start + self.at_once]
            recorded = record(model, part, calibration, lambda: tell("calibration"))
            for group in part:
                found.append(self._group(model, group, recorded.pop(0)))
                tell(group.name)
        return tuple(found)

    def _group(self, model: Any, group: ScalingGroup, seen: Recorded) -> Migration:
        low, high, centre = self._range(group, seen)
        previous = None if group.previous is None else model.get_submodule(group.previous)
        if not can_shift(group, previous, fold_of(group, previous, low.numel())):
            centre = torch.zeros_like(centre)
        error = _Evaluator(model, group, seen, self.weights, self.activations)
        ones, zeros = torch.ones_like(low), torch.zeros_like(low)
        before = error(zeros, ones, low, high)
        low, high = low - centre, high - centre
        reach = torch.maximum(high, -low)
        largest = float(reach.max())
        if largest == 0:  # a constant input: the shift takes all of it
            return Migration(group, centre, ones, 0.0, before, before, before, ())
        lower = self.lower
        if lower is None:
            lower = min(float(torch.quantile(reach, 0.05)), largest / 2)
            lower = max(lower, largest * 1e-3)
        losses = []
        for t in thresholds(largest, lower, self.steps):
            scale = migration_scale(low, high, t)
            losses.append((t, error(centre, scale, low / scale, high / scale)))
        best = min(range(len(losses)), key=lambda i: losses[i][1])
        threshold, after = losses[best]
        shifted = losses[0][1]
        if not after < before:
            return Migration(group, zeros, ones, None, before, shifted, before, tuple(losses))
        scale = migration_scale(low, high, threshold)
        return Migration(group, centre, scale, threshold, before, shifted, after, tuple(losses))

    def _range(self, group: ScalingGroup, seen: Recorded) -> tuple[Any, Any, Any]:
        """Return smallest and largest value and centre of each channel."""
        if self.statistics is None:
            rows = seen.rows()
            found = ActivationStatistics.of(rows)
            if not self.outside:
                return found.minimum, found.maximum, found.centre
            cut = int(self.outside * (rows.shape[0] - 1))
            ordered = rows.sort(0).values.double().cpu()
            return found.minimum, found.maximum, (ordered[cut] + ordered[-1 - cut]) / 2
        merged = self.statistics.get(group.linears[0])
        channels = seen.inputs[0].shape[-1]
        if merged is None or merged.channels != channels:
            raise InvalidInputError(
                f"statistics: expected those of {channels} channels for {group.linears[0]!r}, got "
                f"{'none' if merged is None else merged.channels}"
            )
        return merged.minimum, merged.maximum, merged.centre


class _Evaluator:
    """Output error of a group, weights and inputs rounded, as a function of shift and scale."""

    def __init__(
        self,
        model: Any,
        group: ScalingGroup,
        seen: Recorded,
        weights: Any,
        activations: ActivationGrid,
    ) -> None:
        self.grid, _ = as_weight_grid(weights)
        self.activations, self.seen, self.group = activations, seen, group
        self.linears = [model.get_submodule(name) for name in group.linears]
        self.weights = [at_least_float(linear.weight.detach()) for linear in self.linears]
        self.biases = [linear.bias for linear in self.linears]
        if isinstance(group.inspect, str):
            self.module = model.get_submodule(group.inspect)
            self.targets, self.masks = seen.targets, seen.call_masks
        else:
            self.module = None
            self.targets = joint_outputs(group.together, seen, self.weights, self.biases)
            self.masks = seen.masks

    def __call__(self, shift: Any, scale: Any, low: Any, high: Any) -> float:
        """Return the mean over tokens of summed squares; low and high are of X~, [K]."""
        weights, biases = [], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            s, z = scale.to(weight), shift.to(weight)
            weights.append(self.grid(weight * s))
            moved = weight @ z
            biases.append(moved if bias is None else bias.detach().to(weight) + moved)
        ends = (float(low.min()), float(high.max()))

        def rounded(x: Any) -> Any:
            x = (at_least_float(x) - shift.to(x.device, weights[0].dtype)) / scale.to(
                x.device, weights[0].dtype
            )
            if self.activations.scope == "tensor":
                return self.activations(x, *ends)
            return self.activations(x)

        if self.module is None:
            got = joint_outputs(self.group.together, self.seen, weights, biases, rounded)
        else:
            got = self._inspected(weights, biases, rounded)
        total, _, tokens = squared_errors(got, self.targets, self.masks)
        return total / tokens

    def _inspected(
        self, weights: list[Any], biases: list[Any], rounded: Callable[[Any], Any]
    ) -> list[Any]:
        hooks = [
            linear.register_forward_pre_hook(
                lambda _module, args: (rounded(args[0]).to(args[0].dtype), *args[1:])
            )
            for linear in self.linears
        ]
        try:
            with with_weights(self.linears, weights, biases):
                return rerun(self.module, self.seen)
        finally:
            for hook in hooks:
                hook.remove()
