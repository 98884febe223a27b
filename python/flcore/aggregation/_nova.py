"""FedNova: normalised averaging of clients that take different numbers or kinds of local steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _updates
from flcore.aggregation._checks import check_keys, number, vector
from flcore.aggregation._server_sum import check_options, client_count, server_sum
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.combine import combine

__all__ = ["FedNova", "NovaSteps", "nova_normalizer", "nova_weights"]


class NovaSteps:
    r"""Counts a client's local steps the way FedNova weighs them, for rates that may change.

    The normaliser is the sum of the coefficients with which the gradients of the local steps enter
    the change of the model, in units of the learning rate. One local step with momentum rho and a
    proximal term mu, ``d = rho d + g``, ``x -= lr (d + mu (x - x_0))``, gives

    .. math::
        r \leftarrow \rho r + 1, \qquad A \leftarrow (1 - \eta \mu) A + r .

    Parameters
    ----------
    momentum : float
        rho in [0, 1); the buffer starts at zero in every round.
    proximal : float
        mu >= 0.

    Attributes
    ----------
    steps : int
        tau, local steps so far.
    normalizer : float
        A.

    Notes
    -----
    The authors' code differs where momentum *and* proximal term are on: it counts
    ``A <- (1 - lr mu) (A + r) + 1``, which adds a step twice. Nesterov momentum is counted as plain
    momentum there; its own count would be ``1 + rho r`` in place of r.

    References
    ----------
    Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous
    Federated Optimization", NeurIPS 2020, arXiv 2007.07481, section 4.

    Examples
    --------
    >>> count = NovaSteps(momentum=0.9)
    >>> for _ in range(5):
    ...     count.step()
    >>> round(count.normalizer, 4)
    13.1441
    """

    def __init__(self, momentum: float = 0.0, proximal: float = 0.0) -> None:
        self.momentum = number("momentum", momentum, 0.0, 1.0, open="high")
        self.proximal = number("proximal", proximal, 0.0)
        self.steps, self.normalizer, self._velocity = 0, 0.0, 0.0

    def step(self, lr: float | None = None) -> None:
        """Count one local step; `lr` is its learning rate, needed with a proximal term only."""
        decay = _decay(self.proximal, lr)
        self._velocity = self.momentum * self._velocity + 1.0
        self.normalizer = (1.0 - decay) * self.normalizer + self._velocity
        self.steps += 1

    def reset(self) -> None:
        """Begin a round: no steps, no velocity."""
        self.steps, self.normalizer, self._velocity = 0, 0.0, 0.0


def nova_normalizer(
    steps: Any, *, momentum: float = 0.0, proximal: float = 0.0, lr: float | None = None
) -> np.ndarray:
    r"""Normaliser of clients that took `steps` local steps at one learning rate.

    .. math::
        \text{SGD: } \tau \qquad
        \text{momentum: } \frac{1}{1 - \rho}
            \Bigl(\tau - \frac{\rho (1 - \rho^\tau)}{1 - \rho}\Bigr) \qquad
        \text{proximal: } \frac{1 - (1 - \eta \mu)^\tau}{\eta \mu}

    and the recursion of `NovaSteps` for momentum and proximal term together.

    Parameters
    ----------
    steps : array of whole numbers >= 1
        tau of each client.
    momentum, proximal : float
        rho in [0, 1) and mu >= 0.
    lr : float, optional
        eta, needed with a proximal term; ``eta * mu <= 1``.

    Returns
    -------
    float64 array
        Of the shape of `steps`.

    Raises
    ------
    InvalidInputError
        Values that cannot be used.

    Examples
    --------
    >>> nova_normalizer([2, 4], momentum=0.9)
    array([2.9  , 9.049])
    """
    rho, decay = number("momentum", momentum, 0.0, 1.0, open="high"), _decay(proximal, lr)
    tau = vector("steps", steps, None, least=1.0)
    broken = tau != np.floor(tau)
    if broken.any():
        raise InvalidInputError(f"steps: expected whole numbers, got {tau[broken][0]}")
    if rho and decay:
        count, table = NovaSteps(rho, decay), [0.0]
        for _ in range(int(tau.max(initial=0))):
            count.step(1.0)
            table.append(count.normalizer)
        return np.array(table)[tau.astype(np.int64)]
    if rho:
        return (tau - rho * (1.0 - rho**tau) / (1.0 - rho)) / (1.0 - rho)
    if decay:
        with np.errstate(divide="ignore"):  # decay 1: the logarithm is -inf, the result 1
            return -np.expm1(tau * np.log1p(-decay)) / decay
    return tau


def nova_weights(examples: Any, normalizers: Any, steps: Any = None) -> np.ndarray:
    r"""Weights of FedNova, ``tau_eff p_i / A_i`` with ``p_i`` the clients' shares of the examples.

    ``tau_eff = sum_i p_i A_i``; or ``sum_i p_i tau_i`` where the clients' `steps` are given, as the
    authors do with a proximal term. They do not sum to 1 in general.

    Parameters
    ----------
    examples : (n,) numbers >= 0
        Of the clients that take part in the round; not all zero.
    normalizers : (n,) numbers > 0
        ``A_i``, see `nova_normalizer` and `NovaSteps`.
    steps : (n,) numbers >= 1, optional
        ``tau_i``.

    Returns
    -------
    (n,) float64

    Raises
    ------
    InvalidInputError
        Shapes or values that cannot be used.

    Examples
    --------
    >>> nova_weights([1, 3], [2, 6])
    array([0.625, 0.625])
    """
    a = vector("normalizers", normalizers, (None,))
    if (a <= 0).any():
        i = int(np.flatnonzero(a <= 0)[0])
        raise InvalidInputError(f"normalizers[{i}]: expected a number above 0, got {a[i]}")
    q = np.array(_updates.parse_weights(examples, a.size, signed=False, name="examples"))
    tau = a if steps is None else vector("steps", steps, a.shape, least=1.0)
    p = q / q.sum()
    return (p @ tau) * p / a


class FedNova:
    r"""Server of FedNova: one weighted sum of the updates, then server momentum.

    .. math::
        x \leftarrow x + \sum_i \frac{\tau_{eff}\, p_i}{A_i} D_i ,
        \qquad \text{with momentum } \gamma: \quad
        b \leftarrow \gamma b + \frac{1}{\eta} \sum_i \frac{\tau_{eff}\, p_i}{A_i} D_i, \quad
        x \leftarrow x + \eta b .

    With equal normalisers this is FedAvg.

    Parameters
    ----------
    momentum : float
        gamma in [0, 1), on the server; the local one goes into the normalisers.
    accumulate, nonfinite
        See `flcore.ops.combine`. "exclude" leaves a client out and computes shares and ``tau_eff``
        of the others again.

    Attributes
    ----------
    buffer : update or None
        b, of the structure and dtypes of an update; None without momentum or before the first step.

    References
    ----------
    Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous
    Federated Optimization", NeurIPS 2020, arXiv 2007.07481, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> updates = [np.array([-0.2, 0.0]), np.array([0.0, -0.6])]
    >>> FedNova().step(np.zeros(2), updates, examples=[1, 3], normalizers=[2, 6])
    array([-0.125, -0.375])
    """

    def __init__(
        self, *, momentum: float = 0.0, accumulate: str = "float32", nonfinite: str = "raise"
    ) -> None:
        self.momentum = number("momentum", momentum, 0.0, 1.0, open="high")
        check_options(accumulate, nonfinite)
        self.accumulate, self.nonfinite = accumulate, nonfinite
        self.buffer: Any = None

    def step(
        self,
        model: Any,
        updates: Any,
        examples: Any,
        normalizers: Any,
        *,
        steps: Any = None,
        lr: float = 1.0,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Give the next model.

        Parameters
        ----------
        model : update
            x; of the structure, shapes and dtypes of an update, floating layers only.
        updates : sequence of updates, or array of shape (n, ...)
            ``D_i``, local model minus x (the negative of the paper's cumulated change).
        examples, normalizers, steps : (n,) numbers
            See `nova_weights`.
        lr : float
            eta, the learning rate of the clients; with server momentum only, and of no effect there
            as long as it is the same in all rounds.
        out : update, optional
            Where the model goes; it may be `model`.
        variant : str, optional
            See `flcore.ops.combine`.

        Returns
        -------
        update

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            See `nova_weights` and `flcore.ops.combine`; the buffer is unchanged.
        """
        eta = number("lr", lr, 0.0, open="low")
        q = nova_weights(examples, normalizers, steps)  # checks everything once
        share, a = np.asarray(examples, np.float64), np.asarray(normalizers, np.float64)
        tau = a if steps is None else np.asarray(steps, np.float64)
        unit = eta if self.momentum else 1.0

        def weights(keep: set[int]) -> list[float]:
            left = sorted(keep)
            if not share[left].sum() > 0:
                raise NonFiniteError("updates: no client of positive weight is finite")
            w = np.zeros(q.size)
            w[left] = nova_weights(share[left], a[left], tau[left]) / unit
            return w.tolist()

        _updates.parse_weights(q, client_count(updates), signed=True, name="normalizers")
        options: dict[str, Any] = {
            "accumulate": self.accumulate,
            "nonfinite": self.nonfinite,
            "variant": variant,
        }
        if not self.momentum:
            return server_sum(model, updates, weights, name="model", out=out, **options)
        buffer = server_sum(
            self.buffer, updates, weights, name="buffer", scale=self.momentum, **options
        )
        options["nonfinite"] = "raise" if self.nonfinite == "exclude" else self.nonfinite
        result = server_sum(
            model, [buffer], lambda keep: [eta if keep else 0.0], name="model", out=out, **options
        )
        self.buffer = buffer
        return result

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: "buffer", an update or None."""
        return {"buffer": _copy(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that `state_dict` returned.

        Raises
        ------
        InvalidInputError, DTypeError
            It is something else, not finite, or a buffer for a server without momentum; nothing was
            changed.
        """
        check_keys(state, {"buffer"})
        if state["buffer"] is not None and not self.momentum:
            raise InvalidInputError("state['buffer']: expected None without momentum, got a buffer")
        self.buffer = _copy(state["buffer"])


def _copy(buffer: Any) -> Any:
    return None if buffer is None else combine([buffer], [1.0])


def _decay(proximal: float, lr: float | None) -> float:
    """Return ``lr * proximal``, in [0, 1]."""
    mu = number("proximal", proximal, 0.0)
    if mu == 0:
        return 0.0
    if lr is None:
        raise InvalidInputError("lr: expected the learning rate with a proximal term, got None")
    return number("lr * proximal", number("lr", lr, 0.0, open="low") * mu, 0.0, 1.0)
