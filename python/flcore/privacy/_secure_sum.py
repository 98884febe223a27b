"""Settings of a secure weighted mean, and the client's side: encode an update, mask its words."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore import _updates
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._mask_layers import ROUNDING, quantize_layers
from flcore.ops._words import Mask, finite, whole
from flcore.ops.mask import mask_add
from flcore.privacy._secure_round import SecureRound, client_number, pair_mask, private_mask

__all__ = ["SecureSum"]

SATURATION = ("warn", "raise", "ignore")


@dataclass(frozen=True)
class SecureSum:
    r"""Weighted mean by masked fixed-point sums, in the arithmetic of Flower's SecAgg+.

    A client of weight e has the integer weight ``q = round(e / max_weight * R)``. It sends
    ``[q, z]`` with z the levels of ``x q / R`` on the grid ``-C .. C`` of R steps, plus its masks,
    modulo ``Q = 2^modulus_bits``. The server adds what arrives, removes the masks and has
    ``mean = (2 Z - n R) C / Qtot``. Every client of a round and the server use equal settings.

    Key agreement, secret sharing and authentication are not here: a protocol (Flower's SecAgg+,
    for one) brings the keys. What is and is not protected: docs/secure-sums.md.

    Parameters
    ----------
    clip : float
        C. Acts on the weighted value ``x q / R``, coordinate by coordinate: heavy clients are
        clipped at smaller values.
    levels : int
        R, the number of steps of ``2 C / R``.
    modulus_bits : int
        At most 32; ``R < 2^modulus_bits``. A message is 4 bytes a word for any modulus.
    max_weight : float
        The largest weight a client may have. A value far above the weights that occur wastes
        resolution: the error is proportional to it.
    rounding : {"stochastic", "nearest"}
        Unbiased; or at most half a step off.

    Raises
    ------
    InvalidInputError
        A setting outside its range.
    DTypeError
        A setting of another type.

    References
    ----------
    Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS
    2017. Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS
    2020.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.privacy import SecureSum
    >>> secure = SecureSum(rounding="nearest")
    >>> private = {5: bytes([5]) * 32, 7: bytes([7]) * 32}  # each drawn by its client
    >>> shared = bytes(range(32))                           # of the pair (5, 7)
    >>> server = secure.server(np.zeros(2), clients=[5, 7])
    >>> senders = [(5, 7, 100, [1.0, -2.0]), (7, 5, 300, [0.5, 4.0])]
    >>> for client, other, weight, x in senders:
    ...     masks = secure.masks(client, private[client], {other: shared})
    ...     words = secure.encode(np.array(x), weight, masks=masks)
    ...     _ = server.add(client, words)
    >>> server.unmask(private).result().round(6)
    array([0.625   , 2.500001])
    """

    clip: float = 8.0
    levels: int = 1 << 22
    modulus_bits: int = 32
    max_weight: float = 1000.0
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        finite("clip", self.clip, low=0.0)
        whole("modulus_bits", self.modulus_bits, 1, 32)
        whole("levels", self.levels, 1, (1 << self.modulus_bits) - 1)
        finite("max_weight", self.max_weight, low=0.0)
        if self.rounding not in ROUNDING:
            raise InvalidInputError(f"rounding: expected one of {ROUNDING}, got {self.rounding!r}")

    @property
    def max_clients(self) -> int:
        """Clients whose sum cannot overflow: the largest n with ``n R <= 2^modulus_bits``."""
        return (1 << self.modulus_bits) // self.levels

    @property
    def step(self) -> float:
        """Distance between two levels, ``2 C / R``."""
        return 2.0 * self.clip / self.levels

    def check_clients(self, clients: int) -> int:
        """Return `clients` if their sum fits the modulus; to be called before the round.

        Raises
        ------
        InvalidInputError
            ``clients * levels`` exceeds the modulus.
        """
        clients = whole("clients", clients, 1, 1 << 32)
        if clients > self.max_clients:
            raise InvalidInputError(
                f"clients: {clients} clients of {self.levels} levels overflow the modulus "
                f"2^{self.modulus_bits}; take at most {self.max_clients} clients, fewer levels "
                "or more bits"
            )
        return clients

    def integer_weight(self, weight: float) -> int:
        """Return ``q = round(weight / max_weight * R)``, ties to even.

        Raises
        ------
        InvalidInputError
            Negative, not finite, above `max_weight`, or so small that q would be 0.
        """
        weight = finite("weight", weight)
        if not 0 <= weight <= self.max_weight:
            raise InvalidInputError(
                f"weight: expected 0 <= weight <= max_weight = {self.max_weight:g}, got {weight:g}"
            )
        q = round(weight / self.max_weight * self.levels)
        if weight and not q:
            raise InvalidInputError(
                f"weight: {weight:g} is below half a step of max_weight / levels and would be "
                "lost; use a smaller max_weight or more levels"
            )
        return q

    def error_bound(self, clients: int, total_weight: float) -> float:
        """Largest error of a coordinate of the mean, for values that were not clipped.

        ``k n C / Qtot`` with k = 1 for nearest and 2 for stochastic rounding: against the mean
        with the integer weights, before it is rounded to the output type.

        Parameters
        ----------
        clients : int
            n, the clients in the sum.
        total_weight : float
            Sum of their weights.

        Examples
        --------
        >>> SecureSum(rounding="nearest").error_bound(2, total_weight=400)
        9.5367431640625e-06
        """
        clients = whole("clients", clients, 1, 1 << 32)
        total = finite("total_weight", total_weight, low=0.0) / self.max_weight * self.levels
        return (1 if self.rounding == "nearest" else 2) * clients * self.clip / total

    # ---- the client ----------------------------------------------------------------------------

    def masks(
        self,
        client: int,
        private_key: bytes,
        pair_keys: Mapping[int, bytes],
        *,
        round: int = 0,
    ) -> list[Mask]:
        """Masks a client adds: its private one, and one for each neighbour.

        The mask of a pair is added by the client with the larger number and subtracted by the
        other, so that it vanishes from the sum of both.

        Parameters
        ----------
        client : int
            The client's own number.
        private_key : 32 bytes
            Drawn by the client for this round (`secrets.token_bytes`).
        pair_keys : mapping of int to 32 bytes
            For each neighbour the key that the two agreed on for this round.
        round : int
            Part of the nonce, so that a key used in two rounds does not repeat a stream.

        Raises
        ------
        InvalidInputError, DTypeError
            A key or number that cannot be used, or the client among its own neighbours.
        """
        client = client_number("client", client)
        masks = [private_mask(private_key, round, sign=1, name="private_key")]
        if not isinstance(pair_keys, Mapping):
            raise DTypeError(
                f"pair_keys: expected a dict of neighbour and key, got {type(pair_keys).__name__}"
            )
        for other, key in pair_keys.items():
            if other == client:
                raise InvalidInputError(f"pair_keys: client {client} is its own neighbour")
            other = client_number("pair_keys", other)
            masks.append(pair_mask(key, client, other, round, name=f"pair_keys[{other}]"))
        return masks

    def encode(
        self,
        update: Any,
        weight: float,
        *,
        masks: Sequence[Mask] = (),
        seed: int | None = None,
        round: int = 0,
        client: int = 0,
        saturation: str = "warn",
        variant: str | None = None,
    ) -> np.ndarray:
        """Words of one update: weight, quantised values, masks, in one pass over the update.

        Parameters
        ----------
        update : update
            Floating layers on the CPU: an array, or a list, tuple or dict of arrays. Send
            differences to the global model, not models: values are clipped.
        weight : float
            ``0 <= weight <= max_weight``, such as the number of examples.
        masks : sequence of Mask
            What `masks` returned. Without them the words are the plain integers.
        seed, round, client : int
            Name of the random stream of stochastic rounding, layers counted by its tensor word.
            The seed is the client's own, so `client` (below 2^32) matters in simulations only.
        saturation : {"warn", "raise", "ignore"}
            What values do whose weighted magnitude is above `clip` and was cut to it.
        variant : {"reference", "cpu"}, optional
            Which implementation runs.

        Returns
        -------
        (1 + numel,) uint32
            ``[q, z] + masks`` modulo ``2^modulus_bits``; `tobytes()` is what to send.

        Raises
        ------
        InvalidInputError
            A weight, seed or mask that cannot be used; values beyond `clip` with "raise".
        DTypeError
            A layer that is not floating, or not on the CPU.
        NonFiniteError
            The update holds a NaN or an infinity.
        """
        if saturation not in SATURATION:
            raise InvalidInputError(f"saturation: expected one of {SATURATION}, got {saturation!r}")
        q = self.integer_weight(weight)
        layout, layers = _updates.flatten(update)
        views = layout.views(layers, "update")
        names = [layout.label("update", i) for i in range(len(views))]
        for name, view in zip(names, views, strict=True):
            if view.device != "cpu":
                raise DTypeError(f"{name}: expected an array on the CPU, got {view.device}")
        words = np.empty(1 + sum(v.numel for v in views), np.uint32)
        words[0] = q
        mask_add(words[:1], masks, bits=self.modulus_bits, out=words[:1], variant=variant)
        clipped = quantize_layers(
            views,
            words[1:],
            scale=q / self.levels,
            clip=self.clip,
            levels=self.levels,
            rounding=self.rounding,
            stream=(seed, round, client),
            masks=masks,
            position=1,
            bits=self.modulus_bits,
            names=names,
            variant=variant,
        )
        if clipped and saturation != "ignore":
            text = (
                f"update: {clipped} of {words.size - 1} values times the weight {q / self.levels:g}"
                f" are beyond clip = {self.clip:g} and were cut to it"
            )
            if saturation == "raise":
                raise InvalidInputError(text)
            warnings.warn(text, stacklevel=2)
        return words

    def mask(
        self,
        words: np.ndarray,
        client: int,
        private_key: bytes,
        pair_keys: Mapping[int, bytes],
        *,
        round: int = 0,
    ) -> np.ndarray:
        """Mask words that `encode` made without masks; the same as ``encode(masks=...)``."""
        masks = self.masks(client, private_key, pair_keys, round=round)
        return mask_add(words, masks, bits=self.modulus_bits)

    # ---- the server ----------------------------------------------------------------------------

    def server(
        self,
        like: Any,
        clients: Iterable[int],
        *,
        neighbours: Mapping[int, Iterable[int]] | None = None,
        round: int = 0,
        variant: str | None = None,
    ) -> SecureRound:
        """Start the server's side of one round.

        Parameters
        ----------
        like : update
            Gives structure, shapes and dtypes of the mean; its values are not used.
        clients : iterable of int
            The numbers of the clients that may mask in this round.
        neighbours : mapping, optional
            For each client the neighbours it shares keys with, symmetric; by default every other
            client (the complete graph).
        round : int
            As the clients have it.
        variant : {"reference", "cpu"}, optional
            Which implementation runs.

        Raises
        ------
        InvalidInputError
            More clients than the modulus can hold; numbers that repeat; a graph that is not
            symmetric.
        DTypeError
            Layers that are not floating or not on the CPU.
        """
        return SecureRound(self, like, clients, neighbours=neighbours, round=round, variant=variant)
