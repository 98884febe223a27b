"""A network with a second head that tells domains apart, behind a reversed gradient."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flcore.errors import InvalidInputError
from flcore.losses import reverse_gradient

__all__ = ["DomainAdversarial"]


class DomainAdversarial(torch.nn.Module):
    """Classes and domains from the same features (domain-adversarial network).

    Parameters
    ----------
    features : torch.nn.Module
        From examples to features (n, F).
    head : torch.nn.Module
        From features to class scores.
    width : int
        F.
    hidden : int
        Units of the hidden layer of the domain head.
    domains : int
        Its outputs.
    seed : int
        Of the domain head's first parameters, which depend on nothing else.

    References
    ----------
    Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import DomainAdversarial
    >>> model = DomainAdversarial(torch.nn.Linear(4, 8), torch.nn.Linear(8, 10), 8)
    >>> scores, domains = model(torch.zeros(3, 4), reversal=0.5)
    >>> model(torch.zeros(3, 4)).shape, scores.shape, domains.shape
    (torch.Size([3, 10]), torch.Size([3, 10]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        features: torch.nn.Module,
        head: torch.nn.Module,
        width: int,
        *,
        hidden: int = 32,
        domains: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(width, hidden) < 1 or domains < 2:
            raise InvalidInputError(
                "expected width and hidden from 1 and domains from 2, got "
                f"{width!r}, {hidden!r} and {domains!r}"
            )
        self.features, self.head = features, head
        first, last = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, domains)
        self.domain = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        draw = np.random.default_rng(seed)
        with torch.no_grad():
            for layer, gain in ((first, 2.0), (last, 1.0)):
                scale = math.sqrt(gain / layer.in_features)
                weight = draw.standard_normal(tuple(layer.weight.shape)) * scale
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.zero_()

    def forward(
        self, x: Tensor, reversal: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Give class scores, and with `reversal` domain scores too.

        Parameters
        ----------
        x : (n, ...) Tensor
        reversal : float, optional
            Gradients of the domain scores reach the features times minus this.
        """
        features = self.features(x)
        if reversal is None:
            return self.head(features)
        return self.head(features), self.domain(reverse_gradient(features, reversal))
