"""The server's end of controlled errors: the sum of the clients' estimates, kept in step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.compression._client_state import read_array, scale_factor, unflatten
from flcore.compression._control_clients import Client, positive, read_client
from flcore.compression._packet import Packet
from flcore.errors import DTypeError, EpochError, InvalidInputError, PacketError
from flcore.ops.decode import ParsedPacket, decode_add_into, decode_into
from flcore.reference import wire

__all__ = ["ControlledSum"]

_DTYPES = {"float32": np.float32, "float64": np.float64}


class ControlledSum:
    """``H = sum_i w_i h_i / sum_i w_i``, kept by adding the increments of `EControl` and `EF21`.

    A client that is absent in a round sends nothing, and its last h stays in H: the divisor is the
    weight of all clients, present or not. Memory is one vector, however many clients there are.

    Both ends must have added the same packets. Each packet says how many its sender's state had
    produced before; where that is not the number that was taken, `EpochError` is raised and nothing
    is added:

    ======================================  ====================================================
    what happened                           what to do
    ======================================  ====================================================
    a packet was lost on its way            if the client kept it, add it, and then those that
                                            were refused; or resynchronise the client
    the client started anew (epoch 0)       with `keep_h`, `forget` the client and add its packet
                                            again; without, resynchronise everybody
    the client took an old state            resynchronise the client
    ======================================  ====================================================

    A client whose count fell back is refused from then on, until one of these is done, so that it
    cannot count its way up to where it was. To resynchronise a client, `add` the packet of its
    `Encoder.resync`, which holds h in full. The old h has to be taken out of the sum for that, so
    it needs `keep_h`; without, `forget` everybody and add a resync packet of each client as it
    comes. A packet that was added before is recognised by its epoch and checksum among the last 16
    of its client, and not added again.

    Parameters
    ----------
    like : update
        Gives structure, shapes, dtypes and device of `result`; its values are not used.
    total_weight : float
        Sum of the weights of all clients, also of those that have not been heard: their number if
        all count alike.
    keep_h : bool or path
        Keep h of every client, 4 bytes a coordinate each: in memory, or in a folder of files that
        are mapped into memory.
    dtype : {"float64", "float32"}
        Type of the sum. In float32 H drifts from the mean of the h_i by a rounding a packet.
    limits : Limits, optional
        What packets to accept when they come as bytes.

    Notes
    -----
    A warm start (``Encoder(start="dense")``) begins with a resync packet, which every ControlledSum
    takes as the first of a client. EF21-PP is EF21 where only some clients report; heavy ball
    (EF21-HB) is ``FedAvgM(momentum=eta).step(model, [H])``, where clients send updates and not
    gradients; compressing H for the way back (EF21-BC) is `Downlink`. Calls must not overlap in
    time.

    References
    ----------
    Gao, Islamov, Stich, "EControl", ICLR 2024, arXiv 2311.05645. Fatkhullin et al., "EF21 with
    Bells & Whistles", arXiv 2110.03294.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import ControlledSum, EF21, Encoder, TopK
    >>> g = np.array([4.0, -3.0, 2.0, 1.0], np.float32)
    >>> clients = [Encoder(TopK(k=1), EF21(), like=g) for _ in range(2)]
    >>> server = ControlledSum(like=g, total_weight=2)
    >>> for i, encoder in enumerate(clients):
    ...     _ = server.add(i, encoder.encode((i + 1) * g))
    >>> server.result()
    array([6., 0., 0., 0.], dtype=float32)
    >>> _ = server.add(1, clients[1].encode(2 * g))  # only one of the two reports
    >>> server.result()
    array([ 6., -3.,  0.,  0.], dtype=float32)
    """

    def __init__(
        self,
        like: Any,
        total_weight: float,
        *,
        keep_h: bool | str | Path = False,
        dtype: str = "float64",
        limits: wire.Limits | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise InvalidInputError(f"dtype: expected float64 or float32, got {dtype!r}")
        self._layout, layers = _updates.flatten(like, "like")
        for i, x in enumerate(layers):
            if not _arrays.is_float(x):
                label = self._layout.label("like", i)
                raise DTypeError(f"{label}: expected {_arrays.FLOATS}, got {_arrays.dtype_name(x)}")
        self._like = [_arrays.empty_like(x) for x in layers]
        self.numel = sum(_arrays.numel(x) for x in layers)
        self.total_weight = positive(total_weight, "total_weight")
        self._sum = np.zeros(self.numel, _DTYPES[dtype])
        self._clients: dict[Hashable, Client] = {}
        self._keep = keep_h is not False
        self._folder = None if isinstance(keep_h, bool) else Path(keep_h)
        self._limits = limits or wire.Limits(max_numel=max(self.numel, 1))
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def waiting(self) -> list[Any]:
        """Clients whose increments are refused until they resynchronise."""
        return [client for client, known in self._clients.items() if known.waiting]

    def h(self, client: Hashable) -> np.ndarray:
        """Return what the server has as a client's h, (d,) float32, read-only; needs `keep_h`.

        Zeros for a client that was not heard yet.
        """
        if not self._keep:
            raise InvalidInputError("h: made without keep_h, this object holds the sum only")
        known = self._clients.get(client)
        if known is None or known.h is None:
            return np.zeros(self.numel, np.float32)
        view = known.h.view()
        view.flags.writeable = False
        return view

    def add(self, client: Hashable, packet: Any, weight: float | None = None) -> bool:
        """Add the packet of a client.

        Parameters
        ----------
        client : hashable
            Who sent it; an int or a str where `state_dict` is to be saved as JSON.
        packet : Packet or bytes
            From an encoder with `EControl` or `EF21`. Bytes are checked as `Packet.from_bytes`
            does.
        weight : float, optional
            w_i > 0, 1 by default, and at later packets what it was. Another one than before needs
            `keep_h`, and changes the total weight by the difference.

        Returns
        -------
        bool
            Whether something was added: not for a packet that was added before, nor for one that
            its sender left empty because its update was not finite.

        Raises
        ------
        EpochError
            The packet does not follow the last one of this client; see the class.
        PacketError
            The bytes are not a packet, or one that does not belong into this sum.
        InvalidInputError
            The weight cannot be used, or a resync needs the old h, which is not kept.

        In each case nothing was added.
        """
        parsed = self._parse(packet, client)
        header = parsed.header
        known = self._clients.get(client)
        fresh = known is None
        if known is None:
            known = Client(positive(1.0 if weight is None else weight, "weight"))
            taken = math.fsum(c.weight for c in self._clients.values()) + known.weight
            if taken > self.total_weight * (1 + 1e-9):
                raise InvalidInputError(
                    f"weight: with client {client!r} the weights sum to {taken}, more than the "
                    f"total_weight {self.total_weight}"
                )
        resync = bool(header.flags & wire.FLAG_RESYNC)
        checked = bool(header.flags & wire.FLAG_CHECKSUM)
        again = checked and (header.epoch, header.crc) in known.recent
        if again and not (resync and known.waiting):
            return False
        if resync and not (known.empty or self._keep):
            raise InvalidInputError(
                f"packet of client {client!r}: a resync replaces the h that this client has in the "
                "sum, which is known only with keep_h; or forget() all clients and take a resync "
                "packet from each"
            )
        if not resync:
            self._check_epoch(client, known, header)
        if header.nonfinite:
            return False
        if weight is not None and not fresh:
            self._reweigh(client, known, positive(weight, "weight"))
        if fresh:
            self._clients[client] = known
        if self._keep and known.h is None:
            known.h = self._memory(len(self._clients) - 1)
        if resync and known.h is not None and not known.empty:
            self._add_h(known, -known.weight)
        decode_add_into([parsed], [known.weight], [self._sum])
        if known.h is not None and resync:
            decode_into(parsed, [known.h])
        elif known.h is not None:
            decode_add_into([parsed], [1.0], [known.h])
        known.remember(header)
        return True

    def forget(self, client: Hashable | None = None) -> None:
        """Take a client's h out of the sum, or those of all: its next packet is its first.

        For a client that started anew, or left; and, for all, to resynchronise without `keep_h`.
        The weight stays in the total.

        Raises
        ------
        InvalidInputError
            The client's h is in the sum but not kept.
        """
        if client is None:
            self._sum.fill(0)
            gone = list(self._clients.values())
        elif (known := self._clients.get(client)) is None:
            return
        elif known.empty:
            gone = [known]
        elif known.h is None:
            raise InvalidInputError(
                f"client {client!r}: its h is part of the sum and not known without keep_h; "
                "forget() all clients instead"
            )
        else:
            self._add_h(known, -known.weight)
            gone = [known]
        for known in gone:
            known.packets, known.recent = 0, []
            known.empty, known.waiting = True, False
            if known.h is not None:
                known.h.fill(0)

    def refresh(self) -> None:
        """Sum the kept h anew, in the order in which clients were first heard; needs `keep_h`.

        A client rounds ``h + D`` to float32, a float64 sum of the D does not: H drifts from the
        mean of the h_i by such roundings, about 6e-8 of h times the root of the number of packets.
        """
        if not self._keep:
            raise InvalidInputError("refresh: made without keep_h, this object holds the sum only")
        self._sum.fill(0)
        for known in self._clients.values():
            self._add_h(known, known.weight)

    def rescale(self, factor: float) -> None:
        """Multiply H, and h where kept, by a factor: see `Encoder.rescale`."""
        scale = scale_factor(factor)
        self._sum *= self._sum.dtype.type(scale)
        for known in self._clients.values():
            if known.h is not None:
                known.h *= scale

    def result(self, out: Any = None) -> Any:
        """Return H, of the structure, dtype and device of `like`; into `out` if given."""
        mean = self._sum / self.total_weight
        if out is None:
            return unflatten(self._layout, [_arrays.empty_like(x) for x in self._like], mean)
        unflatten(self._layout, self._layout.layers(out, "out"), mean)
        return out

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: the array "sum", "h.<i>" where kept, and plain values."""
        clients = [
            {
                "client": client,
                "weight": known.weight,
                "packets": known.packets,
                "waiting": known.waiting,
                "empty": known.empty,
                "recent": [list(pair) for pair in known.recent],
            }
            for client, known in self._clients.items()
        ]
        kept = {f"h.{i}": known.h for i, known in enumerate(self._clients.values())}
        return {
            "numel": self.numel,
            "total_weight": self.total_weight,
            "clients": clients,
            "sum": self._sum.copy(),
            **{name: np.array(h) for name, h in kept.items() if h is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises
        ------
        InvalidInputError
            It is of another size or sum type, lacks the h that this object keeps, or holds values
            that are not finite; nothing has changed then.
        """
        wanted = {"numel", "total_weight", "clients", "sum"}
        if self._keep:
            wanted |= {f"h.{i}" for i in range(len(state.get("clients", ())))}
        if set(state) != wanted:
            raise InvalidInputError(f"state: expected {sorted(wanted)}, got {sorted(state)}")
        if state["numel"] != self.numel:
            raise InvalidInputError(
                f"state['numel']: expected {self.numel}, got {state['numel']!r}"
            )
        total = positive(state["total_weight"], "state['total_weight']")
        arrays = {}
        for name in wanted - {"numel", "total_weight", "clients"}:
            dtype = self._sum.dtype if name == "sum" else np.dtype(np.float32)
            arrays[name] = read_array(state, name, dtype, (self.numel,))
        try:
            clients = {facts["client"]: read_client(facts) for facts in state["clients"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"state['clients']: cannot be read: {error!r}") from None
        for i, known in enumerate(clients.values()):
            if self._keep:
                known.h = self._memory(i)
                known.h[:] = arrays[f"h.{i}"]
        self._clients, self.total_weight = clients, total
        np.copyto(self._sum, arrays["sum"])

    # ---- internals -----------------------------------------------------------------------------

    def _parse(self, packet: Any, client: Hashable) -> ParsedPacket:
        own = isinstance(packet, ParsedPacket)
        parsed = packet if own else Packet.from_bytes(packet, self._limits)
        header = parsed.header
        if header.numel != self.numel:
            raise PacketError(
                f"packet of client {client!r}: expected {self.numel} values, got {header.numel}"
            )
        if not header.flags & (wire.FLAG_INCREMENT | wire.FLAG_RESYNC):
            raise PacketError(
                f"packet of client {client!r}: expected an increment or a resync, got a packet "
                "that stands for itself; its encoder needs EControl or EF21"
            )
        _ = parsed.view  # reads the packet: what is wrong with it must show before anything changes
        return parsed

    def _check_epoch(self, client: Hashable, known: Client, header: wire.Header) -> None:
        if not known.waiting and header.epoch == known.packets:
            return
        gap = header.epoch - known.packets
        todo = "add its Encoder.resync()"
        if gap < 0:
            known.waiting = True
            what = "it started anew" if header.epoch == 0 else "it took an old state"
            todo = "forget() it and add this again" if header.epoch == 0 else todo
        elif known.waiting:
            what = "its count fell back before, and it was not resynchronised since"
        else:
            what, todo = f"{gap} before it were not added", f"add those first, or {todo}"
        raise EpochError(
            f"packet of client {client!r}: expected epoch {known.packets}, got {header.epoch}: "
            f"{what}; {todo}",
            client,
            known.packets,
            header.epoch,
        )

    def _reweigh(self, client: Hashable, known: Client, weight: float) -> None:
        if weight == known.weight:
            return
        if known.h is None and not known.empty:
            raise InvalidInputError(
                f"weight: expected {known.weight} as before for client {client!r}, got {weight}; "
                "weights can change only with keep_h"
            )
        if not known.empty:
            self._add_h(known, weight - known.weight)
        self.total_weight += weight - known.weight
        known.weight = weight

    def _add_h(self, known: Client, weight: float) -> None:
        assert known.h is not None
        self._sum += self._sum.dtype.type(weight) * known.h

    def _memory(self, index: int) -> np.ndarray:
        if self._folder is None or not self.numel:
            return np.zeros(self.numel, np.float32)
        path = self._folder / f"h{index}.float32"
        return np.memmap(path, np.float32, "w+", shape=(self.numel,))
