"""Fixed classifiers: the layer that skewed clients bias most is neither trained nor sent.

Only features are learned. All clients make the same matrix from a seed, so their scores, and those
of old and new models, stay comparable. Modules keep the matrix as a buffer outside the state_dict:
nothing is exchanged but, where there is one, the scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flcore.errors import InvalidInputError
from flcore.nn import _fixed_matrices as matrices

__all__ = [
    "DSimplex",
    "EquiangularClassifier",
    "FedETFHead",
    "SimplexETF",
    "dot_regression_loss",
]


class _Scaled(torch.nn.Module):
    """A number that multiplies the scores, learned or fixed."""

    scale: Tensor

    def __init__(self, scale: float, learn_scale: bool) -> None:
        super().__init__()
        if not (scale > 0 and math.isfinite(scale)):
            raise InvalidInputError(f"scale: expected a positive number, got {scale!r}")
        if learn_scale:
            self.scale = torch.nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("scale", torch.tensor(float(scale)), persistent=False)


class SimplexETF(_Scaled):
    """Scores ``scale * h^T M`` of a simplex equiangular tight frame M.

    Parameters
    ----------
    features, classes : int
        d >= C >= 2.
    seed : int
        Of the frame; the same on every client.
    scale : float
        Of the scores. Without one, normalised features cannot bring the loss below
        ``log(1 + (C - 1) exp(-C / (C - 1)))``.
    learn_scale : bool
        Train the scale: one number, averaged like a weight.
    normalize : bool
        Divide the features by their length (at least 1e-12).
    sparse : bool
        A frame in which every feature belongs to one class: d additions instead of d C products
        and no matrix in memory.

    Attributes
    ----------
    matrix : (features, classes) Tensor
        M, formed on demand if `sparse`.

    Raises
    ------
    InvalidInputError
        Sizes or a scale that do not fit.

    References
    ----------
    Yang et al., NeurIPS 2022; Li et al., "No Fear of Classifier Biases: Neural Collapse Inspired
    Federated Learning with Synthetic and Fixed Classifier", ICCV 2023, arXiv 2303.10058. The sparse
    form is flcore's: any U with orthonormal columns gives such a frame.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        seed: int = 0,
        scale: float = 1.0,
        learn_scale: bool = False,
        normalize: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__(scale, learn_scale)
        self.features, self.classes = features, classes
        self.normalize, self.sparse = normalize, sparse
        if sparse:
            owner, sign = matrices.sparse_frame(classes, features, seed=seed)
            each = features // classes
            # features without a class are added to a bin that is dropped
            self._keep("owner", torch.from_numpy(owner % (classes + 1)))
            self._keep("weight", torch.from_numpy(sign / math.sqrt(each)).float())
        else:
            frame = matrices.simplex_etf(classes, features, seed=seed)
            self._keep("frame", torch.from_numpy(frame).float())

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def matrix(self) -> Tensor:
        """M, (features, classes)."""
        if not self.sparse:
            return self.frame  # type: ignore[no-any-return, return-value]
        weight: Tensor = self.weight  # type: ignore[assignment]
        return self._frame_scores(torch.eye(self.features).to(weight))

    def forward(self, h: Tensor) -> Tensor:
        """Scores (..., C) of features (..., d)."""
        if self.normalize:
            h = torch.nn.functional.normalize(h, dim=-1, eps=1e-12)
        scores = self._frame_scores(h) if self.sparse else h @ self.matrix.to(h.dtype)
        return self.scale.to(h.dtype) * scores

    def _frame_scores(self, h: Tensor) -> Tensor:
        terms = h * self.weight.to(h.dtype)  # type: ignore[operator, union-attr]
        bins = terms.new_zeros((*h.shape[:-1], self.classes + 1))
        sums = bins.index_add(-1, self.owner, terms)[..., : self.classes]  # type: ignore[arg-type]
        centred = sums - sums.mean(-1, keepdim=True)
        return math.sqrt(self.classes / (self.classes - 1)) * centred


class DSimplex(_Scaled):
    """Scores ``scale * h W^T`` of the regular simplex in C - 1 dimensions, in O(C) a row.

    W is the identity plus rank one, so with ``H = sum_j h_j``::

        score_k = (h_k - m H) / rho  for k < C - 1,      score_{C-1} = (a - m) H / rho

    and no matrix is kept.

    Parameters
    ----------
    classes : int
        C >= 2; features have C - 1 dimensions. Allocate more classes than there are, and new
        ones never move the old.
    scale : float
        Of the scores.
    learn_scale : bool
        Train the scale.
    normalize : bool
        Divide the features by their length (at least 1e-12).

    Attributes
    ----------
    matrix : (classes, classes - 1) Tensor
        W, formed on demand.

    Raises
    ------
    InvalidInputError
        Sizes or a scale that do not fit.

    References
    ----------
    Biondi et al., "Stationary Representations", CVPR 2024, arXiv 2405.02581.
    """

    def __init__(
        self,
        classes: int,
        *,
        scale: float = 1.0,
        learn_scale: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__(scale, learn_scale)
        matrices.d_simplex(min(classes, 2))  # the check, without a matrix
        self.classes, self.normalize = classes, normalize

    @property
    def matrix(self) -> Tensor:
        """W, (classes, classes - 1)."""
        return torch.from_numpy(matrices.d_simplex(self.classes)).to(self.scale)

    def forward(self, h: Tensor) -> Tensor:
        """Scores (..., C) of features (..., C - 1)."""
        if h.shape[-1] != self.classes - 1:
            raise InvalidInputError(
                f"h: expected {self.classes - 1} features, got {h.shape[-1]}: a simplex of "
                f"{self.classes} classes lies in one dimension less"
            )
        if self.normalize:
            h = torch.nn.functional.normalize(h, dim=-1, eps=1e-12)
        last, mean, length = matrices.simplex_numbers(self.classes)
        total = h.sum(-1, keepdim=True)
        scores = torch.cat([h - mean * total, (last - mean) * total], -1) / length
        return self.scale.to(h.dtype) * scores


class EquiangularClassifier(_Scaled):
    """Scores ``z B^T / temperature`` of normalised features and fixed vectors B.

    Parameters
    ----------
    vectors : (classes, features) array or Tensor
        From `flcore.nn.equiangular_basis_vectors`; normalised again here.
    temperature : float
        Divides the scores.

    Raises
    ------
    InvalidInputError
        No matrix, or a temperature that is not positive.

    References
    ----------
    Shen, Sun and Wei, "Equiangular Basis Vectors", CVPR 2023, whose training adds label smoothing
    of 0.1.
    """

    vectors: Tensor

    def __init__(self, vectors: Any, *, temperature: float = 0.07) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise InvalidInputError(f"temperature: expected a positive number, got {temperature!r}")
        super().__init__(1 / temperature, False)
        b = torch.as_tensor(vectors)
        if b.ndim != 2 or not b.is_floating_point():
            raise InvalidInputError(
                f"vectors: expected a floating matrix (classes, features), got {b.dtype} of shape "
                f"{tuple(b.shape)}"
            )
        b = torch.nn.functional.normalize(b.detach().double(), dim=1).float()
        self.register_buffer("vectors", b, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """Scores (..., classes) of features (..., features)."""
        z = torch.nn.functional.normalize(h, dim=-1, eps=1e-12)
        return self.scale.to(h.dtype) * (z @ self.vectors.to(h.dtype).T)


class FedETFHead(torch.nn.Module):
    """Head of FedETF: a trained projection, normalised, in front of a simplex frame.

    Train with `flcore.losses.balanced_softmax_cross_entropy` and the client's own counts.

    Parameters
    ----------
    inputs : int
        Features of the backbone.
    classes : int
    features : int, optional
        Dimension of the projection, at least `classes`; by default `inputs`.
    seed : int
        Of the frame; the same on every client.
    scale : float
        First value of the learned scale (10 for a CNN, 1 for LeNet-5 in the authors' code).
    sparse : bool
        As in `SimplexETF`.

    Attributes
    ----------
    projection : torch.nn.Linear
    classifier : SimplexETF

    Raises
    ------
    InvalidInputError
        As `SimplexETF`.

    Notes
    -----
    Personalisation after training alternates steps on a local copy of the frame
    (`personal_frame`) and on `projection`.

    References
    ----------
    Li et al., ICCV 2023, arXiv 2303.10058.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        features: int | None = None,
        seed: int = 0,
        scale: float = 10.0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        features = inputs if features is None else features
        self.classifier = SimplexETF(
            features, classes, seed=seed, scale=scale, learn_scale=True, sparse=sparse
        )
        self.projection = torch.nn.Linear(inputs, features)

    def forward(self, h: Tensor) -> Tensor:
        """Scores (..., classes) of features (..., inputs)."""
        return self.classifier(self.projection(h))  # type: ignore[no-any-return]

    def personal_frame(self) -> torch.nn.Parameter:
        """Replace the frame by a trainable copy that stays with this client, and return it."""
        frame = torch.nn.Parameter(self.classifier.matrix.detach().clone())
        classifier = self.classifier
        classifier.sparse = False
        for name in ("frame", "owner", "weight"):
            if name in classifier._buffers:
                del classifier._buffers[name]
        classifier.frame = frame
        return frame


def dot_regression_loss(
    h: Tensor, target: Tensor, frame: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """``(m_y . h - 1)^2 / 2`` of normalised features: pulls a feature to its class's vector only.

    Parameters
    ----------
    h : (N, d) Tensor
        Features; their directions count.
    target : (N,) Tensor of integers
        Labels.
    frame : (d, C) Tensor
        Columns of length 1, such as `SimplexETF.matrix`.
    reduction : {"mean", "sum", "none"}
        Over the rows.

    Returns
    -------
    Tensor

    Raises
    ------
    InvalidInputError
        Shapes or a reduction that do not fit.

    References
    ----------
    Yang et al., NeurIPS 2022 (the loss as it is commonly quoted).
    """
    if h.ndim != 2 or frame.ndim != 2 or h.shape[1] != len(frame) or target.shape != h.shape[:1]:
        raise InvalidInputError(
            "expected h (N, d), target (N,) and frame (d, C), got "
            f"{tuple(h.shape)}, {tuple(target.shape)} and {tuple(frame.shape)}"
        )
    z = torch.nn.functional.normalize(h, dim=1, eps=1e-12)
    rows = 0.5 * ((z * frame.to(h.dtype).T[target.long()]).sum(1) - 1) ** 2
    if reduction == "none":
        return rows
    if reduction not in ("mean", "sum"):
        raise InvalidInputError(f"reduction: expected none, mean or sum, got {reduction!r}")
    return rows.mean() if reduction == "mean" else rows.sum()
