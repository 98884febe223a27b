"""Optimisers for torch: projected gradients, and the local steps of federated methods.

`PerpGrad` is a torch optimiser and imports torch when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flcore.optim._local_step import Perturbation, local_step_, sam_perturb_
from flcore.optim._project import perp_grad_

if TYPE_CHECKING:
    from flcore.optim._perp_grad import PerpGrad

__all__ = ["PerpGrad", "Perturbation", "local_step_", "perp_grad_", "sam_perturb_"]


def __getattr__(name: str) -> Any:
    if name == "PerpGrad":
        from flcore.optim._perp_grad import PerpGrad

        return PerpGrad
    raise AttributeError(f"module 'flcore.optim' has no attribute {name!r}")
