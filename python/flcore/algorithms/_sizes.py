"""What methods share that weigh the clients' losses instead of their updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.state import Client, Payload, Server

__all__ = ["WeighedLosses"]


@dataclass(frozen=True, kw_only=True)
class WeighedLosses(FedAvg):
    """FedAvg with uniform means over clients, which may learn their relative sizes n_i / n."""

    weighting: str = "uniform"

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[Sequence[Payload], Sequence[Payload]] | None:
        """Let clients tell how many examples they have, where that matters."""
        if self.weighting != "examples":
            return None
        server["mean_examples"] = sum(client.examples for client in clients) / len(clients)
        return [{"examples": client.examples} for client in clients], []

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w, and the mean number of examples where it matters."""
        payload = super().downlink(server, client)
        if self.weighting == "examples":
            payload["mean_examples"] = server["mean_examples"]
        return payload

    def relative(self, examples: int, known: Mapping[str, Any]) -> float:
        """Give the weight of a client's loss: 1, or n_i / n."""
        return examples / known["mean_examples"] if self.weighting == "examples" else 1.0

    def client_weight(self, examples: int) -> float:
        """Weigh all clients alike in means."""
        return 1.0
