"""Losses of training that stay exact where float32 softmax stops: torch in, torch out.

Needs torch (``pip install 'flcore[torch]'``); the NumPy form is `flcore.ops`.
"""

from __future__ import annotations

from flcore import _extras

_extras.require("torch", "torch")

from flcore.losses._alignment import (  # noqa: E402  (torch is checked first)
    model_contrastive_loss,
    multi_kernel_mmd,
    reverse_gradient,
    supervised_contrastive_loss,
)
from flcore.losses._collapse import (  # noqa: E402
    CollapseMetrics,
    softmax_collapse_metrics,
)
from flcore.losses._comp_sum import (  # noqa: E402
    adversarial_inputs,
    comp_sum_loss,
    generalized_cross_entropy,
    mae_loss,
    smooth_adversarial_comp_sum_loss,
    sum_exponential_loss,
)
from flcore.losses._contrastive import (  # noqa: E402
    GlobalContrastiveLoss,
    TwoModalityContrastiveLoss,
)
from flcore.losses._cross_entropy import (  # noqa: E402
    cross_entropy,
    stablemax_cross_entropy,
    taylor_cross_entropy,
)
from flcore.losses._ldr import ALDRLoss, ldr_loss  # noqa: E402
from flcore.losses._linear import (  # noqa: E402
    linear_cross_entropy,
    stablemax_linear_cross_entropy,
)
from flcore.losses._long_tail import (  # noqa: E402
    adjust_logits,
    balanced_softmax_cross_entropy,
    balanced_stablemax_cross_entropy,
    calibrated_cross_entropy,
    logit_adjusted_cross_entropy,
    restricted_softmax_cross_entropy,
)
from flcore.losses._stablemax import log_stablemax, stablemax  # noqa: E402
from flcore.losses._vocab_parallel import (  # noqa: E402
    vocab_parallel_cross_entropy,
    vocab_parallel_stablemax_cross_entropy,
)

__all__ = [
    "ALDRLoss",
    "CollapseMetrics",
    "GlobalContrastiveLoss",
    "TwoModalityContrastiveLoss",
    "adjust_logits",
    "adversarial_inputs",
    "balanced_softmax_cross_entropy",
    "balanced_stablemax_cross_entropy",
    "calibrated_cross_entropy",
    "comp_sum_loss",
    "cross_entropy",
    "generalized_cross_entropy",
    "ldr_loss",
    "linear_cross_entropy",
    "log_stablemax",
    "logit_adjusted_cross_entropy",
    "mae_loss",
    "model_contrastive_loss",
    "multi_kernel_mmd",
    "restricted_softmax_cross_entropy",
    "reverse_gradient",
    "smooth_adversarial_comp_sum_loss",
    "softmax_collapse_metrics",
    "stablemax",
    "stablemax_cross_entropy",
    "stablemax_linear_cross_entropy",
    "sum_exponential_loss",
    "supervised_contrastive_loss",
    "taylor_cross_entropy",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_stablemax_cross_entropy",
]
