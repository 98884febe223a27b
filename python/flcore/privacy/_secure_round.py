"""The server's side of one secure sum: add what arrives, remove the masks, divide."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore import _arrays, _updates
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._mask_layers import dequantize_layers
from flcore.ops._words import KEY_BYTES, Mask, whole, words_view
from flcore.ops.mask import mask_add, modular_sum

if TYPE_CHECKING:
    from flcore.privacy._secure_sum import SecureSum

__all__ = ["SecureRound", "client_number", "pair_mask", "private_mask"]

_PRIVATE, _PAIR = 0, 1  # purpose of a stream, in its nonce
_NUMBERS = -(1 << 63), (1 << 64) - 1  # of clients: what frameworks use, signed or not


def client_number(name: str, value: Any) -> int:
    """Return the number of a client; only the order of numbers has a meaning."""
    return whole(name, value, *_NUMBERS)


def _nonce(round: int, purpose: int) -> bytes:
    round = whole("round", round, 0, (1 << 32) - 1)
    return round.to_bytes(8, "little") + purpose.to_bytes(4, "little")


def _key(key: Any, name: str) -> bytes:
    if not isinstance(key, bytes | bytearray | memoryview):
        raise DTypeError(f"{name}: expected a key of {KEY_BYTES} bytes, got {type(key).__name__}")
    if len(key := bytes(key)) != KEY_BYTES:
        raise InvalidInputError(f"{name}: expected a key of {KEY_BYTES} bytes, got {len(key)}")
    return key


def private_mask(key: bytes, round: int, *, sign: int, name: str) -> Mask:
    """Mask of a client's own key."""
    return Mask(_key(key, name), sign, _nonce(round, _PRIVATE))


def pair_mask(key: bytes, client: int, other: int, round: int, *, name: str) -> Mask:
    """Mask that `client` adds for its neighbour `other`: plus when its number is the larger."""
    return Mask(_key(key, name), 1 if client > other else -1, _nonce(round, _PAIR))


class SecureRound:
    """One round on the server; made by `SecureSum.server`.

    Memory is one accumulator of 4 bytes a word, however many clients come. The steps: `add` each
    message, ask `missing_keys` which keys the protocol has to reconstruct, `unmask`, `result`.

    Attributes
    ----------
    clients : frozenset of int
        Who may send.
    received : set of int
        Who has sent.
    total_weight : float
        Sum of the weights of the clients in the sum; known after `unmask`.
    """

    def __init__(
        self,
        settings: SecureSum,
        like: Any,
        clients: Iterable[int],
        *,
        neighbours: Mapping[int, Iterable[int]] | None = None,
        round: int = 0,
        variant: str | None = None,
    ) -> None:
        self._settings, self._variant = settings, variant
        self._layout, layers = _updates.flatten(like, "like")
        views = self._layout.views(layers, "like")
        for i, view in enumerate(views):
            if view.device != "cpu":
                label = self._layout.label("like", i)
                raise DTypeError(f"{label}: expected an array on the CPU, got {view.device}")
        numbers = [client_number("clients", c) for c in clients]
        self.clients = frozenset(numbers)
        if len(self.clients) != len(numbers):
            raise InvalidInputError(f"clients: expected different numbers, got {sorted(numbers)}")
        settings.check_clients(len(numbers))
        self._graph = _graph(self.clients, neighbours)
        self._round = round
        _nonce(round, _PRIVATE)  # a round outside its range is an error here, not after the sum
        self._words = np.zeros(1 + sum(v.numel for v in views), np.uint32)
        self._unmasked = False
        self.received: set[int] = set()

    def add(self, client: int, words: Any) -> SecureRound:
        """Fold in the message of one client; messages may come in any order.

        Parameters
        ----------
        client : int
            Who sent it; authenticated by the protocol.
        words : (1 + numel,) uint32 array, or bytes
            What `encode` made.

        Raises
        ------
        InvalidInputError
            A client that is not in the round or has sent already, a message of another length,
            or one that comes after `unmask`; nothing was added.
        DTypeError
            Not words; nothing was added.
        """
        if client not in self.clients:
            raise InvalidInputError(f"client: {client!r} is not in this round")
        if client in self.received:
            raise InvalidInputError(f"client: {client} has sent its words already")
        if self._unmasked:
            raise InvalidInputError(f"client: {client} comes after unmask; the sum is closed")
        expected = self._words.size
        if isinstance(words, bytes | bytearray | memoryview):
            if len(data := bytes(words)) != 4 * expected:
                raise InvalidInputError(
                    f"words: expected {4 * expected} bytes ({expected} words), got {len(data)}"
                )
            words = np.frombuffer(data, "<u4")
        if (count := words_view(words, "words").numel) != expected:
            raise InvalidInputError(f"words: expected {expected} words, got {count}")
        modular_sum(
            [words], acc=self._words, bits=self._settings.modulus_bits, variant=self._variant
        )
        self.received.add(client)
        return self

    @property
    def dropped(self) -> set[int]:
        """Clients that have not sent."""
        return set(self.clients - self.received)

    def missing_keys(self) -> tuple[list[int], dict[int, list[int]]]:
        """Return which keys `unmask` needs.

        Returns
        -------
        private : list of int
            The clients that sent: their private keys.
        pairs : dict of int to list of int
            For each dropped client its neighbours that sent: the keys of those pairs.
        """
        pairs = {c: sorted(self._graph[c] & self.received) for c in sorted(self.dropped)}
        return sorted(self.received), {c: others for c, others in pairs.items() if others}

    def unmask(
        self,
        private_keys: Mapping[int, bytes],
        pair_keys: Mapping[int, Mapping[int, bytes]] | None = None,
    ) -> SecureRound:
        """Remove all masks from the sum, in one pass; it is closed after that.

        Subtracts the private mask of every client that sent. For a dropped client, cancels what
        its neighbours applied for it.

        Parameters
        ----------
        private_keys : mapping of int to 32 bytes
            For the clients that sent, and for no other: who holds both the private key of a client
            and the keys of its pairs can read its update.
        pair_keys : mapping of int to mapping of int to 32 bytes
            ``pair_keys[dropped][neighbour]``.

        Raises
        ------
        InvalidInputError
            No client sent; keys that are missing or should not be here; a key of another length.
            The sum is as it was.
        """
        if self._unmasked:
            raise InvalidInputError("unmask: the masks were removed already")
        if not self.received:
            raise InvalidInputError("unmask: no client has sent its words")
        pair_keys = pair_keys or {}
        private, pairs = self.missing_keys()
        _same_keys("private_keys", private, private_keys)
        _same_keys("pair_keys", pairs, pair_keys)
        masks = [
            private_mask(private_keys[c], self._round, sign=-1, name=f"private_keys[{c}]")
            for c in private
        ]
        for gone, others in pairs.items():
            _same_keys(f"pair_keys[{gone}]", others, pair_keys[gone])
            for other in others:
                name = f"pair_keys[{gone}][{other}]"
                # the mask the dropped client would have added is minus the one its neighbour did
                masks.append(pair_mask(pair_keys[gone][other], gone, other, self._round, name=name))
        mask_add(
            self._words,
            masks,
            bits=self._settings.modulus_bits,
            out=self._words,
            variant=self._variant,
        )
        self._unmasked = True
        return self

    @property
    def total_weight(self) -> float:
        """Sum of the integer weights, in units of the clients' weights."""
        return self._total() / self._settings.levels * self._settings.max_weight

    def result(self) -> Any:
        """Return the weighted mean of the clients that sent, of the kind of `like`.

        Raises
        ------
        InvalidInputError
            Before `unmask`; all weights are 0; or words above ``n R``: a wrong key, or a client
            that sent words no encoder makes. With ``n R = 2^modulus_bits`` also when every client
            is at the same end of the grid in a coordinate: sums 0 and n R are then the same word.
        """
        settings, total = self._settings, self._total()
        if self._full() and not self._words[1:].all():
            raise InvalidInputError(
                f"result: {len(self.received)} clients of {settings.levels} levels fill the modulus"
                " and all are at the same end of the grid in a coordinate; its sign is lost. Take "
                "one client less, or fewer levels"
            )
        if not total:
            raise InvalidInputError("result: the weights add up to 0")
        layers = [_empty(spec) for spec in self._layout.specs]
        dequantize_layers(
            words_view(self._words[1:], "words"),
            [_arrays.view(x) for x in layers],
            len(self.received),
            clip=settings.clip,
            levels=settings.levels,
            divisor=total / settings.levels,
            bits=settings.modulus_bits,
            variant=self._variant,
        )
        return self._layout.build(layers)

    def _total(self) -> int:
        if not self._unmasked:
            raise InvalidInputError("result: call unmask first")
        total = int(self._words[0])
        if total == 0 and self._full():  # every client at max_weight, as for a uniform mean
            total = 1 << self._settings.modulus_bits
        if total > len(self.received) * self._settings.levels:
            raise InvalidInputError(
                f"result: the weights add up to {total}, above n R = "
                f"{len(self.received) * self._settings.levels}: a wrong key, or a client that sent "
                "words no encoder makes"
            )
        return total

    def _full(self) -> bool:
        return len(self.received) * self._settings.levels == 1 << self._settings.modulus_bits


def _graph(
    clients: frozenset[int], neighbours: Mapping[int, Iterable[int]] | None
) -> dict[int, frozenset[int]]:
    if neighbours is None:
        return {c: clients - {c} for c in clients}
    if neighbours.keys() != clients:
        raise InvalidInputError(
            f"neighbours: expected an entry for each client, got {sorted(neighbours)}"
        )
    graph = {c: frozenset(others) for c, others in neighbours.items()}
    for c, others in graph.items():
        if c in others or not others <= clients:
            raise InvalidInputError(
                f"neighbours[{c}]: expected other clients of the round, got {sorted(others)}"
            )
        for other in others:
            if c not in graph[other]:
                raise InvalidInputError(
                    f"neighbours: {other} is a neighbour of {c}, but {c} is not one of {other}"
                )
    return graph


def _same_keys(name: str, wanted: Iterable[int], given: Mapping[int, Any]) -> None:
    wanted = set(wanted)
    if not isinstance(given, Mapping):
        raise DTypeError(f"{name}: expected a dict, got {type(given).__name__}")
    if missing := sorted(wanted - given.keys()):
        raise InvalidInputError(f"{name}: missing for {missing}")
    if extra := sorted(given.keys() - wanted):
        raise InvalidInputError(
            f"{name}: not expected for {extra}; never ask for the private key and the pair keys "
            "of one client"
        )


def _empty(spec: tuple[str, str, tuple[int, ...], str]) -> Any:
    library, dtype, shape, _ = spec
    if library == "NumPy array":
        return np.empty(shape, dtype)
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, dtype))
