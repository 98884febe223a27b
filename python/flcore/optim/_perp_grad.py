"""`PerpGrad`: any torch optimiser, on gradients without their part along the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flcore._extras import require
from flcore.errors import DTypeError
from flcore.ops.perp_grad import FLOOR
from flcore.optim._project import Projection

__all__ = ["PerpGrad"]

_Optimizer: Any = require("torch.optim", extra="torch").Optimizer


class PerpGrad(_Optimizer):
    """Project gradients with `perp_grad_`, then take the step of another optimiser.

    Moments see the projected gradient; weight decay is not projected. There is no state of its own:
    `state`, `param_groups`, `state_dict` and `zero_grad` are those of the base optimiser, so that
    learning-rate schedulers, `torch.amp.GradScaler` and checkpoints work as with it.

    Parameters
    ----------
    base_optimizer : torch.optim.Optimizer
        Owns parameters, state and learning rates, and is not stepped by anyone else.
    scope, renormalize, eps, floor, skip_1d
        As `flcore.ops.perp_grad`. Scope "global" is over all parameter groups.
    process_group : torch.distributed.ProcessGroup, optional
        See `perp_grad_`: for sharded parameters only.

    Raises
    ------
    DTypeError
        `base_optimizer` is not a torch optimiser; in `step`, a sparse or complex gradient.
    InvalidInputError
        Options that cannot be used.

    Notes
    -----
    A parameter group with ``"perp_grad": False`` keeps its gradients.

    A closure is evaluated first and its gradients are projected then, also those of an optimiser
    that evaluates it several times (`torch.optim.LBFGS`).

    Gradients may be scaled or not: the projection of a multiple is the multiple.

    Examples
    --------
    >>> import torch
    >>> from flcore.optim import PerpGrad
    >>> model = torch.nn.Linear(8, 2)
    >>> optimizer = PerpGrad(torch.optim.AdamW(model.parameters(), lr=0.01))
    >>> model(torch.ones(3, 8)).square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    """

    # unscaled by GradScaler, whatever the base optimiser could do by itself: its `found_inf`
    # would come too late for the projection
    _step_supports_amp_scaling = False

    def __init__(
        self,
        base_optimizer: Any,
        *,
        scope: str = "tensor",
        renormalize: bool = True,
        eps: float = 1e-30,
        floor: float = FLOOR,
        skip_1d: bool = False,
        process_group: Any = None,
    ) -> None:
        if not isinstance(base_optimizer, _Optimizer):
            raise DTypeError(
                "base_optimizer: expected a torch.optim.Optimizer, such as "
                f"torch.optim.AdamW(model.parameters()), got {type(base_optimizer).__name__}"
            )
        self._project = Projection(scope, renormalize, eps, floor, skip_1d, process_group)
        self.base_optimizer = base_optimizer
        super().__setstate__({})  # hooks and the profiler's name, without groups of its own

    # ---- what belongs to the base optimiser ----------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the base optimiser."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """State of the base optimiser."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the base optimiser."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        # not `step`, which a scheduler replaces in the instance
        return {name: self.__dict__[name] for name in ("base_optimizer", "_project")}

    def __repr__(self) -> str:
        options = self._project
        return (
            f"PerpGrad(scope={options.scope!r}, renormalize={options.renormalize}, "
            f"skip_1d={options.skip_1d})\n{self.base_optimizer!r}"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimiser."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimiser, which fits with and without the projection."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state into the base optimiser."""
        self.base_optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Callable, prepend: bool = False) -> Any:
        """Register a hook with the base optimiser."""
        return self.base_optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable, prepend: bool = False) -> Any:
        """Register a hook with the base optimiser."""
        return self.base_optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable, prepend: bool = False) -> Any:
        """Register a hook with the base optimiser."""
        return self.base_optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable, prepend: bool = False) -> Any:
        """Register a hook with the base optimiser."""
        return self.base_optimizer.register_load_state_dict_post_hook(hook, prepend)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimiser does."""
        self.base_optimizer.zero_grad(set_to_none)

    # ---- the step ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients and take a step of the base optimiser.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss and its gradients, returns the loss.

        Returns
        -------
        loss
            What the step of the base optimiser returns.
        """
        if closure is None:
            self._project_gradients()
            return self.base_optimizer.step()

        def projected() -> Any:
            loss = closure()
            self._project_gradients()
            return loss

        return self.base_optimizer.step(projected)

    def _project_gradients(self) -> None:
        chosen = (g["params"] for g in self.param_groups if g.get("perp_grad", True))
        self._project([p for params in chosen for p in params])
