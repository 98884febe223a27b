"""Global contrastive losses: denominators over all data, and a temperature for every example.

The objective of anchor i, with similarities ``s_ij`` and ``h_ij = s_ij - s_i,positive``::

    F_i = tau_i log E_j exp(h_ij / tau_i) + rho tau_i,      tau_min <= tau_i <= tau_max

The mean over j goes over all data. A batch sees few of them, so every example keeps a moving
estimate u_i of its denominator (SogCLR) and, if wanted, its own temperature (iSogCLR)::

    m_i = mean_j exp(h_ij / tau_i),    u_i <- (1 - gamma) u_i + gamma m_i
    p_ij = exp(h_ij / tau_i) / u_i
    loss_i = mean_j p_ij h_ij   (p constant: the gradient is that of tau_i log u_i)
    G_i = log u_i + rho - mean_j p_ij h_ij / tau_i,    v_i <- (1 - beta) v_i + beta G_i
    tau_i <- clip(tau_i - eta v_i, tau_min, tau_max)

The state is that of the data: in federated training it stays with the client between rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flcore.errors import InvalidInputError
from flcore.losses._examples import checked_index, last_rows

__all__ = ["GlobalContrastiveLoss", "TwoModalityContrastiveLoss"]


@dataclass(frozen=True)
class _Rules:
    """Numbers of the update of u, v and tau; checked when made."""

    individual: bool
    temperature: float
    lowest: float
    highest: float
    rho: float
    eta: float
    beta: float
    gamma: float
    eps: float

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.temperature <= self.highest < math.inf:
            raise InvalidInputError(
                "temperature: expected 0 < low <= temperature <= high, got "
                f"{self.lowest!r}, {self.temperature!r}, {self.highest!r}"
            )
        for name in ("beta", "gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidInputError(
                    f"{name}: expected a number in (0, 1], got {getattr(self, name)!r}"
                )
        if not (self.eta >= 0 and self.rho >= 0 and self.eps > 0):
            raise InvalidInputError("expected rho >= 0, eta >= 0 and eps > 0")


class _State(torch.nn.Module):
    """u, tau, v and (for large exponents) b of every example."""

    u: Tensor
    tau: Tensor
    v: Tensor
    b: Tensor

    def __init__(self, examples: int, rules: _Rules) -> None:
        super().__init__()
        if examples < 1:
            raise InvalidInputError(f"examples: expected at least 1, got {examples!r}")
        self.rules = rules
        self.register_buffer("u", torch.zeros(examples))
        self.register_buffer("tau", torch.full((examples,), float(rules.temperature)))
        self.register_buffer("v", torch.zeros(examples))
        self.register_buffer("b", torch.full((examples,), -torch.inf))

    def step(self, h: Tensor, keep: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights p (N, M), new u relative to exp(b), and new b, for anchors in rows of `h`."""
        tau = self.tau[index, None]
        exponents = (h / tau).masked_fill(~keep, -torch.inf)
        old = self.b[index]
        b = torch.maximum(old, exponents.amax(1))
        e = torch.exp(exponents - b[:, None])
        mean = e.sum(1) / keep.sum(1)
        seen = self.u[index] > 0
        decayed = torch.where(seen, torch.exp(old - b) * self.u[index], 0.0)
        gamma = torch.where(seen, self.rules.gamma, 1.0)
        u = (1 - gamma) * decayed + gamma * mean
        return e / u.clamp(min=self.rules.eps)[:, None], u, b

    def slope(self, h: Tensor, keep: Tensor, p: Tensor, u: Tensor, b: Tensor, i: Tensor) -> Tensor:
        """Derivative G of the objective in tau."""
        mean = (p * h.masked_fill(~keep, 0)).sum(1) / keep.sum(1)
        return u.clamp(min=self.rules.eps).log() + b + self.rules.rho - mean / self.tau[i]

    def write(self, index: Tensor, u: Tensor, b: Tensor, slope: Tensor) -> None:
        """Store what the rows of a batch have found; the last row of an example decides."""
        last = last_rows(index)
        self.u[index], self.b[index] = u[last], b[last]
        if self.rules.individual:
            r = self.rules
            v = ((1 - r.beta) * self.v[index] + r.beta * slope)[last]
            self.v[index] = v
            self.tau[index] = (self.tau[index] - r.eta * v).clamp(r.lowest, r.highest)


class GlobalContrastiveLoss(torch.nn.Module):
    """Two views of every example: SogCLR, or iSogCLR with ``individual=True``.

    Parameters
    ----------
    examples : int
        Number of training examples.
    individual : bool
        Learn a temperature for every example.
    temperature : float
        First (or fixed) temperature.
    temperature_range : (float, float)
        Bounds of the learned temperatures.
    rho : float
        Weight of the temperature in the objective: the divergence of the weights from uniform that
        a temperature is driven to.
    eta, beta : float
        Step size of the temperatures; weight of the new derivative in its moving mean (the
        complement of what is usually called momentum).
    gamma : float
        Weight of the batch in the moving denominators; an example's first visit counts fully.
    eps : float
        Smallest denominator.

    Raises
    ------
    InvalidInputError
        Numbers out of range.

    References
    ----------
    Qiu et al., "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with
    Automatic Temperature Individualization", ICML 2023, arXiv 2305.11965; Yuan et al., "Provable
    Stochastic Optimization for Global Contrastive Learning", ICML 2022, arXiv 2202.12387. Defaults
    of the authors' code.
    """

    def __init__(
        self,
        examples: int,
        *,
        individual: bool = True,
        temperature: float = 0.1,
        temperature_range: tuple[float, float] = (0.05, 0.7),
        rho: float = 0.3,
        eta: float = 0.01,
        beta: float = 0.9,
        gamma: float = 0.9,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        low, high = temperature_range if individual else (temperature, temperature)
        rules = _Rules(individual, temperature, low, high, rho, eta, beta, gamma, eps)
        self.state = _State(examples, rules)

    def forward(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        """Mean over the batch of the sum of both views' losses; updates the state in training.

        Parameters
        ----------
        first, second : (N, d) Tensor
            Embeddings of the two views; their directions count. N >= 2.
        index : (N,) Tensor of integers
            Number of each example.

        Returns
        -------
        Tensor of no dimension.

        Raises
        ------
        InvalidInputError, DTypeError
            Shapes that do not fit, or an index out of range.
        """
        first, second, index = _inputs(first, second, index, len(self.state.u))
        n = len(index)
        off = ~torch.eye(n, dtype=torch.bool, device=first.device)
        keep = torch.cat([off, off], 1)  # neither the anchor itself nor its positive
        positive = (first * second).sum(1, keepdim=True)
        loss = first.new_zeros(())
        found = []
        for a, b in ((first, second), (second, first)):
            h = torch.cat([a @ a.T, a @ b.T], 1) - positive
            with torch.no_grad():
                p, u, shift = self.state.step(h.detach(), keep, index)
                slope = self.state.slope(h.detach(), keep, p, u, shift, index)
            found.append((u, shift, slope))
            loss = loss + (p * h.masked_fill(~keep, 0)).sum(1).mean() / (2 * (n - 1))
        if self.training:
            with torch.no_grad():
                (u1, b1, g1), (u2, b2, g2) = found
                b = torch.maximum(b1, b2)
                u = (u1 * torch.exp(b1 - b) + u2 * torch.exp(b2 - b)) / 2
                self.state.write(index, u, b, (g1 + g2) / 2)
        return loss


class TwoModalityContrastiveLoss(torch.nn.Module):
    """Pairs of two modalities, image and text: every example has a state in each.

    Parameters
    ----------
    examples, individual, temperature, temperature_range, rho, eta, beta, gamma, eps
        As in `GlobalContrastiveLoss`, with the defaults of the authors' code for two modalities.

    Raises
    ------
    InvalidInputError
        Numbers out of range.

    References
    ----------
    Qiu et al., ICML 2023, arXiv 2305.11965.
    """

    def __init__(
        self,
        examples: int,
        *,
        individual: bool = True,
        temperature: float = 0.01,
        temperature_range: tuple[float, float] = (0.005, 0.05),
        rho: float = 6.0,
        eta: float = 0.01,
        beta: float = 0.9,
        gamma: float = 0.9,
        eps: float = 1e-20,
    ) -> None:
        super().__init__()
        low, high = temperature_range if individual else (temperature, temperature)
        rules = _Rules(individual, temperature, low, high, rho, eta, beta, gamma, eps)
        self.first, self.second = _State(examples, rules), _State(examples, rules)

    def forward(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        """Mean over the batch of the losses of both modalities.

        Parameters
        ----------
        first, second : (N, d) Tensor
            Embeddings of the two modalities; their directions count. N >= 2.
        index : (N,) Tensor of integers
            Number of each example.

        Returns
        -------
        Tensor of no dimension.

        Raises
        ------
        InvalidInputError, DTypeError
            Shapes that do not fit, or an index out of range.
        """
        first, second, index = _inputs(first, second, index, len(self.first.u))
        n = len(index)
        keep = ~torch.eye(n, dtype=torch.bool, device=first.device)
        similarity = first @ second.T
        positive = similarity.diagonal()[:, None]
        loss = first.new_zeros(())
        for state, s in ((self.first, similarity), (self.second, similarity.T)):
            h = s - positive
            with torch.no_grad():
                p, u, b = state.step(h.detach(), keep, index)
                if self.training:
                    slope = state.slope(h.detach(), keep, p, u, b, index)
                    state.write(index, u, b, slope)
            loss = loss + (p * h.masked_fill(~keep, 0)).sum(1).mean() / (n - 1)
        return loss


def _inputs(
    first: Tensor, second: Tensor, index: Tensor, examples: int
) -> tuple[Tensor, Tensor, Tensor]:
    index = checked_index(index, examples)
    if first.ndim != 2 or first.shape != second.shape or index.shape != first.shape[:1]:
        raise InvalidInputError(
            "expected two embeddings (N, d) and an index (N,), got "
            f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(index.shape)}"
        )
    if len(index) < 2:
        raise InvalidInputError("expected at least 2 examples: one alone has nothing to contrast")
    directions = torch.nn.functional.normalize
    return directions(first, dim=1), directions(second, dim=1), index
