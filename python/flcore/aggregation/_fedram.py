"""The two weight vectors of FedRAM as they move over the rounds of the proxy model."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.aggregation._checks import check_keys, client_mask, vector
from flcore.aggregation._reweighting import check_eta, check_smoothing, log_simplex, log_step
from flcore.errors import InvalidInputError

__all__ = ["FedRAM"]

SCOPES = ("client", "global")


class FedRAM:
    r"""The two weight vectors of FedRAM over the rounds of the proxy model.

    A round of the proxy: every client takes its `task_weights`, measures `excess_loss`, trains on
    ``sum_tau alpha_tau * excess_tau`` and reports its `differential_loss`; the server calls
    `update_tasks` and `update_clients` and averages the proxies by examples. Afterwards the large
    model is trained with both fixed: each client draws a task by its task weights and an example of
    that task uniformly, and the server takes ``x + sum_k w_k D_k`` (`flcore.ops.combine` with
    `client_weights`, which sum to 1).

    Parameters
    ----------
    examples : (K, T) numbers >= 0
        Examples that client k has of task tau.
    eta_task, eta_client : float
        Scaling factors of the two steps.
    smoothing : float
        Weight of the old value in both, in [0, 1].
    scope : {"client", "global"}
        Whether every client keeps task weights of its own (the paper's listing), or the server
        averages them by examples after each round, so that all start from the same.
    start : {"global", "client"}
        First task weights: the share of each task in all data, or in the client's own data. With
        scope "global" only the first.

    Attributes
    ----------
    task_weights : (K, T) float64
        Each row in the simplex, 0 for the tasks a client has no data of; a copy.
    client_weights : (K,) float64
        In the simplex, uniform at first; a copy.

    Notes
    -----
    The state is kept as logarithms, so a weight that became too small for float64 can grow again.
    With scope "global" a client that lacks a task leaves the weight of that task as it was: without
    any excess the average is then the old vector.

    References
    ----------
    Wu, Yan, Liu, Lim, "FedRAM: Federated Reweighting and Aggregation for Multi-Task Learning",
    NeurIPS 2025, Algorithm 1.

    Examples
    --------
    >>> weights = FedRAM([[30, 10], [0, 40]])
    >>> weights.task_weights.round(3)
    array([[0.375, 0.625],
           [0.   , 1.   ]])
    >>> weights.update_tasks([[1.0, 0.0], [0.0, 0.5]]).task_weights.round(3)
    array([[0.398, 0.602],
           [0.   , 1.   ]])
    """

    def __init__(
        self,
        examples: Any,
        *,
        eta_task: float = 0.1,
        eta_client: float = 0.1,
        smoothing: float = 0.01,
        scope: str = "client",
        start: str = "global",
    ) -> None:
        count = vector("examples", examples, (None, None), least=0.0)
        for axis, what in ((1, "client"), (0, "task")):
            empty = np.flatnonzero(count.sum(axis=axis) == 0)
            if count.size == 0 or empty.size:
                raise InvalidInputError(
                    f"examples: expected a positive number for every {what}, got none"
                    + (f" for {what} {empty[0]}" if empty.size else "")
                )
        for name, value in (("scope", scope), ("start", start)):
            if value not in SCOPES:
                raise InvalidInputError(f"{name}: expected one of {SCOPES}, got {value!r}")
        if scope == "global" and start == "client":
            raise InvalidInputError('start: expected "global" with scope "global", got "client"')
        self.eta_task, self.eta_client = (
            check_eta("eta_task", eta_task),
            check_eta("eta_client", eta_client),
        )
        self.smoothing, self.scope = check_smoothing(smoothing), scope
        self._present = count > 0
        self._share = count.sum(axis=1) / count.sum()
        first = count if start == "client" else np.broadcast_to(count.sum(axis=0), count.shape)
        if scope == "client":
            first = np.where(self._present, first, 0.0)
        self._log_alpha = np.stack([log_simplex("examples", row) for row in first])
        self._log_w = np.full(len(count), -np.log(len(count)))

    @property
    def task_weights(self) -> np.ndarray:
        """Weights that each client uses in its round, (K, T)."""
        masked = np.where(self._present, self._log_alpha, -np.inf)
        return np.exp(masked - np.logaddexp.reduce(masked, axis=1, keepdims=True))

    @property
    def client_weights(self) -> np.ndarray:
        """Weights of the clients in the mean, (K,)."""
        return np.exp(self._log_w)

    def update_tasks(self, excess: Any, clients: Any = None) -> FedRAM:
        """Take one step of the task weights.

        Parameters
        ----------
        excess : (K, T) numbers, or (n, T) with `clients`
            See `excess_loss`; what stands for a task the client has no data of is not used.
        clients : (n,) indices, optional
            Who took part, in the order of the rows, each once. The others keep their weights and,
            with scope "global", do not count in the average.

        Returns
        -------
        FedRAM
            Itself.

        Raises
        ------
        InvalidInputError
            Shapes or values that cannot be used; nothing was changed.
        """
        who = self._who(clients)
        gain = vector("excess", excess, (who.size, self._present.shape[1]))
        if who.size == 0:
            return self
        stepped = np.stack(
            [
                log_step(self._log_alpha[k], row, self.eta_task, self.smoothing, self._present[k])
                for k, row in zip(who, gain, strict=True)
            ]
        )
        if self.scope == "client":
            self._log_alpha[who] = stepped
            return self
        share = np.log(self._share[who] / self._share[who].sum())
        merged = np.logaddexp.reduce(stepped + share[:, None], axis=0)
        self._log_alpha[:] = merged - np.logaddexp.reduce(merged)
        return self

    def update_clients(self, differential: Any, clients: Any = None) -> FedRAM:
        """Take one step of the client weights.

        Parameters
        ----------
        differential : (K,) numbers, or (n,) with `clients`
            See `differential_loss`.
        clients : (n,) indices, optional
            Who took part, in that order, each once. The others keep their weight, and these share
            what remains.

        Returns
        -------
        FedRAM
            Itself.

        Raises
        ------
        InvalidInputError
            Shapes or values that cannot be used; nothing was changed.
        """
        who = self._who(clients)
        gain = np.zeros(self._log_w.size)
        gain[who] = vector("differential", differential, (who.size,))
        mask = np.zeros(self._log_w.size, bool)
        mask[who] = True
        if who.size:
            self._log_w = log_step(self._log_w, gain, self.eta_client, self.smoothing, mask)
        return self

    def _who(self, clients: Any) -> np.ndarray:
        total = self._log_w.size
        if clients is None:
            return np.arange(total)
        who = np.asarray(clients)
        if who.dtype == bool or client_mask("clients", who, total).sum() != who.size:
            raise InvalidInputError(f"clients: expected different indices, got {clients!r}")
        return who.astype(np.int64)

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: the float64 arrays "log_task" (K, T), "log_client" (K,)."""
        return {"log_task": self._log_alpha.copy(), "log_client": self._log_w.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that `state_dict` returned.

        Raises
        ------
        InvalidInputError
            It has other shapes, or values that are not logarithms of weights; nothing was changed.
        """
        check_keys(state, {"log_task", "log_client"})
        mine = {"log_task": self._log_alpha, "log_client": self._log_w}
        arrays = {}
        for name, old in mine.items():
            array = np.array(state[name], dtype=np.float64)
            if array.shape != old.shape:
                raise InvalidInputError(
                    f"state[{name!r}]: expected shape {old.shape}, got {array.shape}"
                )
            if not (array <= 1e-9).all() or not (np.isneginf(array) == np.isneginf(old)).all():
                raise InvalidInputError(f"state[{name!r}]: expected logarithms of weights")
            arrays[name] = array
        self._log_alpha, self._log_w = arrays["log_task"], arrays["log_client"]
