"""Modules of torch.nn's kind around flcore's functions. Needs torch (``flcore[torch]``)."""

from __future__ import annotations

from flcore import _extras

_extras.require("torch", "torch")

from flcore.nn import functional  # noqa: E402  (torch is checked first)
from flcore.nn._domain import DomainAdversarial  # noqa: E402
from flcore.nn._experts import ExpertMixture, routing_weights  # noqa: E402
from flcore.nn._fixed import (  # noqa: E402
    DSimplex,
    EquiangularClassifier,
    FedETFHead,
    SimplexETF,
    dot_regression_loss,
)
from flcore.nn._fixed_matrices import (  # noqa: E402
    d_simplex,
    equiangular_basis_vectors,
    simplex_etf,
    welch_bound,
)
from flcore.nn._linear_losses import (  # noqa: E402
    LinearCrossEntropyLoss,
    StableMaxLinearCrossEntropyLoss,
)
from flcore.nn._losses import (  # noqa: E402
    CrossEntropyLoss,
    LogStableMax,
    StableMax,
    StableMaxCrossEntropyLoss,
)
from flcore.nn._quant_embedding import QuantEmbedding, QuantEmbeddingBag  # noqa: E402
from flcore.nn._quant_linear import QuantLinear  # noqa: E402
from flcore.nn._standardized import (  # noqa: E402
    ScaledWSConv2d,
    normalizer_free,
    standardized_weight,
)

__all__ = [
    "CrossEntropyLoss",
    "DSimplex",
    "DomainAdversarial",
    "EquiangularClassifier",
    "ExpertMixture",
    "FedETFHead",
    "LinearCrossEntropyLoss",
    "LogStableMax",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantLinear",
    "ScaledWSConv2d",
    "SimplexETF",
    "StableMax",
    "StableMaxCrossEntropyLoss",
    "StableMaxLinearCrossEntropyLoss",
    "d_simplex",
    "dot_regression_loss",
    "equiangular_basis_vectors",
    "functional",
    "normalizer_free",
    "routing_weights",
    "simplex_etf",
    "standardized_weight",
    "welch_bound",
]
