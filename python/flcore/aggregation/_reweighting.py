"""Multiplicative steps of task weights and client weights, the formulas of FedRAM."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.aggregation._checks import client_mask, number, vector
from flcore.errors import InvalidInputError

__all__ = ["client_weights", "differential_loss", "excess_loss", "task_weights"]


def excess_loss(proxy: Any, reference: Any, examples: Any = 1) -> np.ndarray:
    r"""Excess of the proxy's loss over the reference's, ``max((proxy - reference) / examples, 0)``.

    Positive where the proxy is *worse* than the reference, as in the listing of the paper and in
    DoReMi (a sentence of the paper has it the other way round).

    Parameters
    ----------
    proxy, reference : array of numbers
        Sums of the losses of the two models over the same examples of each task, without dropout;
        or means, with `examples` left at 1.
    examples : array of numbers >= 0
        Examples of each task; where there is none the excess is 0.

    Returns
    -------
    float64 array

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, or losses that are not finite.

    Examples
    --------
    >>> excess_loss([5.0, 3.0, 0.0], [1.0, 4.0, 0.0], [10, 10, 0])
    array([0.4, 0. , 0. ])
    """
    return np.maximum(differential_loss(proxy, reference, examples), 0.0)


def differential_loss(local: Any, baseline: Any, examples: Any = 1) -> np.ndarray:
    """Mean difference of two models' losses, ``(local - baseline) / examples``, of either sign.

    For the client weights of FedRAM: `local` is the client's proxy after local training and
    `baseline` the global proxy it started from (the paper's listing) or its reference model (a line
    of a proof).

    Parameters
    ----------
    local, baseline, examples
        As in `excess_loss`, for all of a client's data.
    """
    arrays = []
    for name, values in (("local", local), ("baseline", baseline), ("examples", examples)):
        arrays.append(vector(name, values, None, least=0.0 if name == "examples" else -np.inf))
    try:
        first, second, count = np.broadcast_arrays(*arrays)
    except ValueError:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise InvalidInputError(f"examples: expected one shape for all, got {shapes}") from None
    return np.divide(first - second, count, out=np.zeros(first.shape), where=count > 0)


def task_weights(
    alpha: Any,
    excess: Any,
    eta: float = 0.1,
    smoothing: float = 0.01,
    *,
    present: Any = None,
) -> np.ndarray:
    r"""One step of the task weights, ``s alpha + (1 - s) alpha+``.

    With ``alpha+`` proportional to ``alpha * exp(eta * excess)``, in the simplex.

    Parameters
    ----------
    alpha : (T,) numbers >= 0
        Old weights; only ratios matter. A weight of 0 stays 0.
    excess : (T,) numbers
        See `excess_loss`.
    eta : float
        Scaling. Positive: tasks the proxy is bad at gain.
    smoothing : float
        s in [0, 1], the weight of the **old** value: 0.01 is nearly none, 1 freezes.
    present : (T,) bool mask or indices, optional
        Tasks this client has data of; the others keep their weight, and the present ones share
        what remains. By default all.

    Returns
    -------
    (T,) float64
        Sum 1.

    Raises
    ------
    InvalidInputError
        Shapes, values or options that cannot be used.

    Notes
    -----
    Computed from logarithms, so that any finite ``eta * excess`` will do.

    References
    ----------
    Wu, Yan, Liu, Lim, "FedRAM: Federated Reweighting and Aggregation for Multi-Task Learning",
    NeurIPS 2025, Algorithm 1.

    Examples
    --------
    >>> task_weights([0.5, 0.3, 0.2], [0.4, 0.0, 1.0]).round(6)
    array([0.499701, 0.288182, 0.212117])
    """
    old = log_simplex("alpha", alpha)
    gain = vector("excess", excess, old.shape)
    mask = None if present is None else client_mask("present", present, old.size)
    return np.exp(log_step(old, gain, check_eta("eta", eta), check_smoothing(smoothing), mask))


def client_weights(
    weights: Any, differential: Any, eta: float = 0.1, smoothing: float = 0.01
) -> np.ndarray:
    """One step of the client weights, ``s w + (1 - s) w+`` with ``w+ ~ w * exp(eta * diff)``.

    Parameters
    ----------
    weights : (K,) numbers >= 0
        Old weights; only ratios matter.
    differential : (K,) numbers
        See `differential_loss`. A constant added to all changes nothing.
    eta, smoothing : float
        As in `task_weights`. Positive `eta` favours clients whose loss is larger.

    Returns
    -------
    (K,) float64
        Sum 1.

    Raises
    ------
    InvalidInputError
        Shapes, values or options that cannot be used.

    Examples
    --------
    >>> client_weights([1, 1, 1, 1], [0.2, -0.1, 0.5, 0.0]).round(6)
    array([0.251175, 0.243826, 0.258748, 0.246251])
    """
    old = log_simplex("weights", weights)
    gain = vector("differential", differential, old.shape)
    return np.exp(log_step(old, gain, check_eta("eta", eta), check_smoothing(smoothing)))


# ---- steps on logarithms -----------------------------------------------------------------------


def log_simplex(name: str, values: Any) -> np.ndarray:
    """Logarithms of `values` scaled to sum 1; -inf for 0."""
    array = vector(name, values, (None,), least=0.0)
    top = array.max(initial=0.0)
    if not top > 0:
        raise InvalidInputError(f"{name}: expected a positive sum, got {values!r}")
    with np.errstate(divide="ignore"):
        logs = np.log(array / top)  # divided first, so that the sum cannot overflow
    return logs - np.logaddexp.reduce(logs)


def log_step(
    old: np.ndarray, gain: np.ndarray, eta: float, smoothing: float, mask: np.ndarray | None = None
) -> np.ndarray:
    """One multiplicative step and smoothing, on logarithms; outside `mask` nothing moves."""
    if mask is not None and not mask.all():
        new = old.copy()
        mass = np.logaddexp.reduce(old[mask]) if mask.any() else -np.inf
        if mass > -np.inf:
            new[mask] = mass + log_step(old[mask] - mass, gain[mask], eta, smoothing)
        return new
    with np.errstate(over="ignore"):
        push = eta * gain
    if not np.isfinite(push).all():
        raise InvalidInputError(f"eta: expected finite products with the losses, got {eta:g}")
    grown = old + push
    grown -= np.logaddexp.reduce(grown)
    if smoothing == 0:
        return grown
    if smoothing == 1:
        return old
    mixed = np.logaddexp(np.log(smoothing) + old, np.log1p(-smoothing) + grown)
    return mixed - np.logaddexp.reduce(mixed)


def check_eta(name: str, value: float) -> float:
    """Return a scaling factor, checked."""
    return number(name, value, -np.inf)


def check_smoothing(value: float) -> float:
    """Return the weight of the old value, checked."""
    return number("smoothing", value, 0.0, 1.0)
