"""Networks without normalisation: convolutions whose weights are standardised instead.

Batch statistics differ between the domains of the clients, and averaging them serves none. Without
them nothing in the network depends on who else is in the batch, and a batch may be one example.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from flcore.errors import InvalidInputError

__all__ = ["ScaledWSConv2d", "normalizer_free", "standardized_weight"]


def standardized_weight(weight: Tensor, gain: Tensor, eps: float = 1e-4) -> Tensor:
    r"""Scaled weight standardisation: rows of mean 0 and of the length that `gain` says.

    With :math:`\mu_o` the mean over the N entries of row o and :math:`\sigma_o^2` their variance,
    both divided by N,

    .. math::
        \hat W_o = \gamma_o \frac{W_o - \mu_o}{\sqrt{\max(N \sigma_o^2, \epsilon)}}

    Parameters
    ----------
    weight : (O, ...) Tensor
        A row for each output; N is the product of the other axes.
    gain : (O,) Tensor
        gamma.
    eps : float
        Smallest sum of squares that a row is divided by the root of.

    Returns
    -------
    Tensor of the shape of `weight`.

    Raises
    ------
    InvalidInputError
        If there is not one gain for each row.

    Notes
    -----
    ``a W + b`` with a > 0 gives the same, so gradients are orthogonal to each row and sum to 0.

    References
    ----------
    Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized
    ResNets", ICLR 2021, arXiv 2101.08692.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import standardized_weight
    >>> standardized_weight(torch.tensor([[1.0, 2.0, 3.0, 6.0]]), torch.ones(1))
    tensor([[-0.5345, -0.2673,  0.0000,  0.8018]])
    """
    if weight.ndim < 2 or gain.shape != weight.shape[:1]:
        raise InvalidInputError(
            "expected a weight (O, ...) and a gain (O,), got "
            f"{tuple(weight.shape)} and {tuple(gain.shape)}"
        )
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    squares = centred.square().sum(1, keepdim=True).clamp(min=eps)
    return (centred * (gain[:, None] * squares.rsqrt())).view_as(weight)


class ScaledWSConv2d(torch.nn.Conv2d):
    """A convolution that uses `standardized_weight` of its weight, with a learned gain a channel.

    Parameters
    ----------
    *arguments, **options
        Of `torch.nn.Conv2d`.
    eps : float
        See `standardized_weight`.

    Attributes
    ----------
    gain : (out_channels,) Parameter
        1 at first.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import ScaledWSConv2d
    >>> ScaledWSConv2d(3, 8, 3, padding=1)(torch.zeros(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(self, *arguments: Any, eps: float = 1e-4, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.eps = eps
        self.gain = torch.nn.Parameter(self.weight.detach().new_ones(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` (N, C, H, W) with the standardised weight."""
        weight = standardized_weight(self.weight, self.gain, self.eps)
        return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:
        """Options, for ``print(module)``."""
        return f"{super().extra_repr()}, eps={self.eps}"


def normalizer_free(model: torch.nn.Module, *, eps: float = 1e-4) -> torch.nn.Module:
    """Give a copy without batch normalisation, and with `ScaledWSConv2d` for every `Conv2d`.

    Parameters
    ----------
    model : torch.nn.Module
    eps : float
        See `standardized_weight`.

    Returns
    -------
    torch.nn.Module
        Batch normalisations, told by their type, have become `torch.nn.Identity`.  Convolutions
        keep their weights, have gains of 1, and a bias, 0 where they had none: it does what the
        shift of the normalisation did.

    Notes
    -----
    Linear layers stay as they are, the classifier above all.  Branches of residual networks are
    not rescaled, which deep ones need.

    References
    ----------
    Zhuang and Lyu, "FedWon: Triumphing Multi-domain Federated Learning Without Normalization",
    ICLR 2024, arXiv 2306.05879.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import normalizer_free
    >>> layers = torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    >>> normalizer_free(torch.nn.Sequential(*layers))
    Sequential(
      (0): ScaledWSConv2d(1, 4, kernel_size=(3, 3), stride=(1, 1), eps=0.0001)
      (1): Identity()
      (2): ReLU()
    )
    """
    return _replaced(copy.deepcopy(model), eps)


def _replaced(module: torch.nn.Module, eps: float) -> torch.nn.Module:
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return torch.nn.Identity()
    if isinstance(module, torch.nn.Conv2d) and not isinstance(module, ScaledWSConv2d):
        return _standardized(module, eps)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, eps))
    return module


def _standardized(conv: torch.nn.Conv2d, eps: float) -> ScaledWSConv2d:
    made = ScaledWSConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # tuples of any length in torch's annotations
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        eps=eps,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        made.weight.copy_(conv.weight)
        assert made.bias is not None
        if conv.bias is None:
            made.bias.zero_()
        else:
            made.bias.copy_(conv.bias)
    return made.train(conv.training)
