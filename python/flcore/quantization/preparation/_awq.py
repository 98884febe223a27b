"""AWQ: scales of input channels that make weight rounding hurt the output less.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, arXiv 2306.00978; search space, normalisation and clipping as the
authors' code has them.
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
from flcore.quantization.preparation._clip import Clip, clip_linear, is_clipped, strided
from flcore.quantization.preparation._fold import fold_scales
from flcore.quantization.preparation._grid import as_weight_grid
from flcore.quantization.preparation._groups import ScalingGroup, check_groups
from flcore.quantization.preparation._losses import (
    at_least_float,
    joint_outputs,
    linear_loss,
    rerun,
    squared_errors,
    with_weights,
)
from flcore.quantization.preparation._statistics import ActivationStatistics

__all__ = ["AWQReport", "ScaleSearch", "awq", "awq_scale", "merge_searches", "search_scales"]

torch: Any = require("torch", extra="torch")

FLOOR = 1e-4


def awq_scale(mean_abs: Any, exponent: float) -> Any:
    """Return the scale of each channel, ``mean_abs^exponent`` with ``max * min = 1``.

    Parameters
    ----------
    mean_abs : torch.Tensor, [K]
    exponent : float
        alpha, 0 to 1; 0 gives scales of 1.

    Returns
    -------
    torch.Tensor, [K] float64
    """
    scale = torch.clamp(mean_abs.double() ** exponent, min=FLOOR)
    return scale / torch.sqrt(scale.max() * scale.min())


@dataclass(frozen=True)
class ScaleSearch:
    """What a search found for one group.

    Attributes
    ----------
    group : ScalingGroup
    mean_abs : torch.Tensor, [K] float64
        The statistic that scales are powers of.
    losses : tuple of float
        Mean squared output error for alpha = 0, 1/grid, ...; the first is plain rounding.
    elements : int
        Output elements the mean is over: the weight of these losses among those of clients.
    """

    group: ScalingGroup
    mean_abs: Any
    losses: tuple[float, ...]
    elements: int

    @property
    def best(self) -> int:
        """Position of the first smallest loss."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    @property
    def exponent(self) -> float:
        """Alpha of the first smallest loss."""
        return self.best / len(self.losses)

    @property
    def scale(self) -> Any:
        """Scale of each channel, [K] float64."""
        return awq_scale(self.mean_abs, self.exponent)


@dataclass(frozen=True)
class AWQReport:
    """What `awq` did: searches by group, and clips by the name of the linear."""

    scales: tuple[ScaleSearch, ...]
    clips: Mapping[str, Clip]

    def __str__(self) -> str:
        lines = [
            f"{s.group.name}: alpha {s.exponent:.2f}, loss {s.losses[0]:.3g} -> {min(s.losses):.3g}"
            for s in self.scales
        ]
        lines += [
            f"{name}: clipped, loss {clip.before:.3g} -> {clip.after:.3g}"
            for name, clip in self.clips.items()
        ]
        return "\n".join(lines)


def search_scales(
    model: Any,
    groups: Iterable[ScalingGroup],
    batches: Iterable[Any],
    weights: Any = "int4-asym",
    *,
    grid: int = 20,
    statistics: Mapping[str, ActivationStatistics] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = "attention_mask",
    at_once: int = 4,
    progress: bool | Tell = True,
) -> tuple[ScaleSearch, ...]:
    """Search the exponent of the scales of every group; the model stays as it is.

    The loss of linears without an inspected module needs no forward passes: ``X^T X`` is formed
    once and serves all candidates (directly, where there are fewer tokens than channels).

    Parameters
    ----------
    model : torch.nn.Module
    groups : sequence of ScalingGroup
    batches : iterable
        Calibration data: tensors, tuples of arguments or mappings of keyword arguments.
    weights : flcore.quantization.Scheme, str or UniformGrid
        How weights are going to be rounded.
    grid : int
        Candidates: alpha = 0, 1/grid, ..., (grid - 1)/grid.
    statistics : mapping, optional
        By the name of the first linear of a group: merged statistics of all clients, so that all
        of them search the same scales. By default those of `batches`.
    forward, mask : optional
        See `collect_statistics`.
    at_once : int
        Groups whose inputs are held in memory at a time; each such set costs a run of the model
        over all batches.
    progress : bool or callable

    Returns
    -------
    tuple of ScaleSearch
        In the order of `groups`. `merge_searches` joins those of clients.
    """
    groups, calibration = check_groups(model, groups), Calibration.of(batches, forward, mask)
    settings = _Settings(weights, grid, statistics, at_once)
    with evaluating(model), progress_bar(progress, settings.steps(groups, calibration)) as tell:
        searches, _ = settings.search(model, groups, calibration, tell, keep=False)
    return searches


def awq(
    model: Any,
    groups: Iterable[ScalingGroup],
    batches: Iterable[Any],
    weights: Any = "int4-asym",
    *,
    grid: int = 20,
    clip: bool | Callable[[str], bool] = True,
    statistics: Mapping[str, ActivationStatistics] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = "attention_mask",
    at_once: int = 4,
    progress: bool | Tell = True,
) -> AWQReport:
    """Prepare a model for weight-only quantisation: search scales, fold them, clip weights.

    The weights stay floating point; quantise them afterwards, for example by
    `flcore.quantization.quantize_model`, with the same scheme. Scales leave the function of the
    model as it is, clipping does not.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    groups, batches, weights, grid, statistics, forward, mask, at_once, progress
        See `search_scales`. All searches see the model as it was given.
    clip : bool or callable
        Whether weights are clamped to the limit, by group of a row, that rounds best; a callable
        decides by the name of the linear. True leaves out queries and keys, whose errors are not
        those of their outputs: names that hold "q_", "k_", "query", "key" or "Wqkv".

    Returns
    -------
    AWQReport

    Raises
    ------
    DTypeError, InvalidInputError
        See `ScalingGroup` and `fold_scales`; the model is as it was then.
    """
    groups, calibration = check_groups(model, groups), Calibration.of(batches, forward, mask)
    settings = _Settings(weights, grid, statistics, at_once)
    wanted = is_clipped if clip is True else clip if callable(clip) else lambda name: False
    names = [name for group in groups for name in group.linears if wanted(name)]
    if names:
        settings.check_clip()
    steps = settings.steps(groups, calibration) + len(names)
    with evaluating(model), progress_bar(progress, steps) as tell:
        searches, samples = settings.search(model, groups, calibration, tell, keep=bool(names))
        linears = {name: model.get_submodule(name) for group in groups for name in group.linears}
        fold_scales(model, groups, [s.scale for s in searches], batches=calibration)
        clips = {}
        for search, sample in zip(searches, samples, strict=False):
            x = sample / search.scale.to(sample)
            for name in search.group.linears:
                if wanted(name):
                    clips[name] = clip_linear(linears[name], x, weights)
                    tell(f"clip {name}")
    return AWQReport(searches, clips)


def merge_searches(clients: Iterable[Sequence[ScaleSearch]]) -> tuple[ScaleSearch, ...]:
    """Join the searches of clients into that of their data pooled: one alpha for all.

    Parameters
    ----------
    clients : iterable of sequence of ScaleSearch
        Of one model, with the same `statistics`.

    Raises
    ------
    InvalidInputError
        No client, or groups, grids or statistics that differ.
    """
    merged: tuple[ScaleSearch, ...] = ()
    for number, client in enumerate(clients):
        if number == 0:
            merged = tuple(client)
            continue
        if len(client) != len(merged):
            raise InvalidInputError(
                f"clients[{number}]: expected {len(merged)} groups, got {len(client)}"
            )
        merged = tuple(_join(a, b, number) for a, b in zip(merged, client, strict=True))
    if not merged:
        raise InvalidInputError("clients: expected at least one, got none")
    return merged


def _join(a: ScaleSearch, b: ScaleSearch, number: int) -> ScaleSearch:
    same = a.group.name == b.group.name and len(a.losses) == len(b.losses)
    if not same or not torch.equal(a.mean_abs, b.mean_abs):
        raise InvalidInputError(
            f"clients[{number}]: {b.group.name}: groups, grids and statistics must be the same; "
            "merge the statistics first and search with those"
        )
    elements = a.elements + b.elements
    pairs = zip(a.losses, b.losses, strict=True)
    losses = tuple((x * a.elements + y * b.elements) / elements for x, y in pairs)
    return ScaleSearch(a.group, a.mean_abs, losses, elements)


@dataclass(frozen=True)
class _Settings:
    """The options of a search, and the search."""

    weights: Any
    grid: int
    statistics: Mapping[str, ActivationStatistics] | None
    at_once: int

    def __post_init__(self) -> None:
        as_weight_grid(self.weights)
        for name in ("grid", "at_once"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name}: expected an integer of at least 1, got {value!r}")

    def check_clip(self) -> None:
        """Refuse one scale for a whole tensor, where clipping a group changes all others."""
        if as_weight_grid(self.weights)[1] == 0:
            raise InvalidInputError(
                "clip: expected weights with a scale by group or row, got one scale for the "
                "tensor; pass clip=False"
            )

    def steps(self, groups: Sequence[ScalingGroup], calibration: Calibration) -> int:
        """Return how many steps the bar has."""
        runs = -(-len(groups) // self.at_once)
        return runs * len(calibration.batches) + len(groups) * self.grid

    def search(
        self,
        model: Any,
        groups: Sequence[ScalingGroup],
        calibration: Calibration,
        tell: Callable[[str], None],
        keep: bool,
    ) -> tuple[tuple[ScaleSearch, ...], list[Any]]:
        """Return the searches, and strided rows of the inputs where asked to keep them."""
        searches, samples = [], []
        for start in range(0, len(groups), self.at_once):
            part = groups[start : start + self.at_once]
            recorded = record(model, part, calibration, lambda: tell("calibration"))
            for group in part:
                seen = recorded.pop(0)  # its inputs are freed once it is searched
                searches.append(self._group(model, group, seen, tell))
                if keep:
                    samples.append(strided(seen.rows()))
        return tuple(searches), samples

    def _group(
        self, model: Any, group: ScalingGroup, seen: Recorded, tell: Callable[[str], None]
    ) -> ScaleSearch:
        statistics = self._statistics_of(group, seen)
        linears = [model.get_submodule(name) for name in group.linears]
        loss, elements = self._loss(model, group, linears, seen)
        losses = []
        for step in range(self.grid):
            losses.append(loss(awq_scale(statistics, step / self.grid)))
            tell(f"scale {group.name}")
        if not all(value < float("inf") for value in losses):
            raise InvalidInputError(f"batches: a loss of {group.name} is not finite: {losses}")
        return ScaleSearch(group, statistics, tuple(losses), elements)

    def _statistics_of(self, group: ScalingGroup, seen: Recorded) -> Any:
        if self.statistics is None:
            return ActivationStatistics.of(seen.rows()).mean_abs
        found = self.statistics.get(group.linears[0])
        channels = seen.inputs[0].shape[-1]
        if found is None or found.channels != channels:
            raise InvalidInputError(
                f"statistics: expected those of {channels} channels for {group.linears[0]!r}, got "
                f"{'none' if found is None else found.channels}"
            )
        return found.mean_abs

    def _loss(
        self, model: Any, group: ScalingGroup, linears: list[Any], seen: Recorded
    ) -> tuple[Callable[[Any], float], int]:
        """Return a function of the scale, and over how many elements it is the mean."""
        grid, _ = as_weight_grid(self.weights)
        weights = [at_least_float(linear.weight.detach()) for linear in linears]

        def rounded(weight: Any, scale: Any) -> Any:
            s = scale.to(weight)
            return grid(weight * s) / s

        if group.inspect is None:
            return linear_loss(weights, rounded, seen)

        def quantized(scale: Any) -> list[Any]:
            return [rounded(weight, scale) for weight in weights]

        if group.together is not None:
            biases = [linear.bias for linear in linears]
            masks, targets = seen.masks, joint_outputs(group.together, seen, weights, biases)

            def outputs(scale: Any) -> list[Any]:
                return joint_outputs(group.together, seen, quantized(scale), biases)
        else:
            module = model.get_submodule(group.inspect)
            masks, targets = seen.call_masks, seen.targets

            def outputs(scale: Any) -> list[Any]:
                with with_weights(linears, quantized(scale)):
                    return rerun(module, seen)

        elements = squared_errors(targets, targets, masks)[1]
        return lambda s: squared_errors(outputs(s), targets, masks)[0] / elements, elements
