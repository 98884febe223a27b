"""Variant `cuda` of sparsify: the passes of kernels/sparsify.cu, queued on torch's current stream.

With thresholds of the last call and spares for e and v, one pass over memory. Otherwise one or more
passes look for the thresholds first; state without spares is written in a pass of its own, when all
of the update is known to be finite. Values are encoded and the state is corrected on the device;
indices are coded, and the checksum computed, from a copy in CPU memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore._arrays import View
from flcore._state import State
from flcore.errors import VariantUnavailableError
from flcore.ops.sparsify import packet_fields
from flcore.reference import wire, wire_frame, wire_writer

__all__ = ["sparsify"]

LEVELS = ((20, 11), (9, 11), (0, 9))  # shift and width of a digit: SPARSIFY_* in csrc/api.h
BINS = 2048
TILE = 65536
FEW = 4096  # candidates that are always few enough, as in csrc/sparsify.cpp
TOP = 0x7F7FFFFF  # key of the largest finite number


def sparsify(
    views: Sequence[View],
    *,
    state: State,
    starts: np.ndarray,
    k: np.ndarray,
    floor: int,
    rank: int,
    tau: np.ndarray | None,
    slack: float,
    values: str,
    index: str,
    tensors: bytes,
    fields: dict[str, Any],
) -> np.ndarray | None:
    """Arguments and packet as of the other variants; waits for the device.

    Raises
    ------
    VariantUnavailableError
        2^32 coordinates or more.
    """
    numel = int(starts[-1])
    if numel >= 2**32:
        raise VariantUnavailableError(
            "sparsify: variant cuda cannot do this: it takes less than 2^32 coordinates, not "
            f"{numel}"
        )
    host: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
    if numel == 0:
        host = np.zeros(1, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint8), None
        found = np.zeros(k.size, np.uint32)
    else:
        call = _Call(views, state, starts, k, floor, fields)
        if not call.select(tau, slack):
            return None
        found = call.thresholds(rank)
        host = call.entries(values)
    packet = _pack(numel, host, values, index, tensors, fields)
    if tau is not None:
        tau[:] = found
    state.commit()
    return packet


class _Call:
    """One update on its way: tables and lists on the device."""

    def __init__(
        self,
        views: Sequence[View],
        state: State,
        starts: np.ndarray,
        k: np.ndarray,
        floor: int,
        fields: dict[str, Any],
    ) -> None:
        layers = [v for v in views if v.numel]
        self.torch, self.where = sys.modules["torch"], layers[0].device
        self.state, self.k, self.floor, self.numel = state, k.copy(), floor, int(starts[-1])
        self.written = False
        self.candidates: Any = None
        firsts = np.cumsum([0, *(v.numel for v in layers)], dtype=np.int64)
        parts = _parts(firsts, starts)
        self.first_part = np.searchsorted(parts[:, 2], np.arange(k.size + 1))
        table = (
            firsts,
            np.array([v.code for v in layers], np.int32),
            np.array([v.ptr for v in layers], np.uint64).view(np.int64),
            parts,
        )
        self.table = [self.upload(x) for x in table]
        self.count = len(parts)
        self.flags = self.zeros(1)
        device, stream = _arrays.queue(self.where)
        self.passes = _native.cuda.SparsifyPasses(
            numel=self.numel,
            layers=len(layers),
            table=[_arrays.address(x) for x in self.table[:3]],
            state=state.native(),
            seed=fields["seed"],
            round=fields["round"],
            parts=_arrays.address(self.table[3]),
            count=self.count,
            segments=k.size,
            device=device,
            stream=stream,
        )

    # ---- memory of the device

    def upload(self, x: np.ndarray) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.where)

    def zeros(self, *shape: int, dtype: str = "int32") -> Any:
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=self.where)

    def empty(self, *shape: int, dtype: str = "int32") -> Any:
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.where)

    def lists(self, starts: Any, size: int) -> list[Any]:
        """Return starts, local, u, t of `size` entries."""
        kept = self.state.e is not None
        return [
            starts,
            self.empty(size, dtype="int16"),
            self.empty(size, dtype="float32"),
            self.empty(size, dtype="float32") if kept else None,
        ]

    # ---- candidates

    @property
    def in_place(self) -> bool:
        """Whether e or v has no spare, and must be read before it is written."""
        kept = self.state.buffers()
        return any(name in kept and name not in self.state.spare for name in ("e", "v"))

    def select(self, tau: np.ndarray | None, slack: float) -> bool:
        """Gather candidates, write the new state; False when a value is not finite."""
        guess = None if self.in_place else self.guess(tau, slack)
        if guess is not None:
            if not self.mark(guess, write=True, guessed=True):
                return False
            if self.candidates is not None:
                self.level, self.known = 0, _unknown(self.k)
                return True
        return self.search()

    def guess(self, tau: np.ndarray | None, slack: float) -> np.ndarray | None:
        """Return cuts that one pass may do with, None where there are none."""
        length = np.bincount(self.segments_of_parts(), minlength=self.k.size) > 0
        if self.floor:
            return np.array([self.floor], np.uint32)
        if tau is None or (tau[length] == 0).any():
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (tau.view(np.float32) * np.float32(slack)).view(np.uint32)
        cut = np.minimum(scaled & 0x7FFFFFFF, TOP).astype(np.uint32)
        return None if (cut[length] == 0).any() else cut

    def segments_of_parts(self) -> np.ndarray:
        return np.repeat(np.arange(self.k.size), np.diff(self.first_part))

    def enough(self, found: np.ndarray) -> bool:
        """Whether each segment has its entries among the candidates, and not many more."""
        few = found <= 4 * self.k + FEW
        return bool((few & ((found >= self.k) | bool(self.floor))).all())

    def mark(self, cut: np.ndarray, *, write: bool, guessed: bool = False) -> bool:
        """Gather what reaches the cuts unless a guess was wrong; False: not finite."""
        words = _native.cuda.SPARSE_PART // 32
        mask, found = self.empty(self.count, words), self.zeros(self.count)
        cuts = self.upload(cut.view(np.int32))
        addresses = [_arrays.address(x) for x in (mask, found, self.flags)]
        self.passes.sweep(_arrays.address(cuts), write, *addresses)
        ends = self.torch.cumsum(found, 0, dtype=self.torch.int64)
        starts = self.torch.cat([self.zeros(1, dtype="int64"), ends])
        picked = starts[self.upload(self.first_part)]
        *borders, flag = self.torch.cat([picked, self.flags.to(self.torch.int64)]).tolist()
        if flag:
            return False
        self.written = self.written or write
        if not guessed or self.enough(np.diff(np.array(borders, np.int64))):
            self.candidates = self.lists(starts, max(borders[-1], 1))
            self.passes.gather(addresses[0], _addresses(self.candidates))
        return True

    def search(self) -> bool:
        """Look for the cuts digit by digit, until the candidates are few."""
        select = self.upload(_unknown(self.k))
        counts = self.zeros(self.k.size, BINS)
        where = [_arrays.address(x) for x in (select, counts, self.flags)]
        for level in range(len(LEVELS)):
            self.passes.histogram(level, *where)
            *rows, flag = self.torch.cat([select.reshape(-1), self.flags]).tolist()
            if flag:
                return False
            self.known, self.level = np.array(rows, np.int64).reshape(-1, 4), level + 1
            reach = self.known[:, 1] + self.known[:, 2]
            if (reach <= 2 * self.k + FEW).all():
                break
        bins = self.known[:, 3] << LEVELS[self.level - 1][0]
        cut = np.maximum(bins, self.floor).astype(np.uint32)
        if not self.mark(cut, write=not self.in_place and not self.written):
            return False
        if self.in_place:
            self.passes.sweep(0, True, 0, 0, _arrays.address(self.flags))
        return True

    # ---- the k-th of them

    def thresholds(self, rank: int) -> np.ndarray:
        """Find the k-th key of each segment; return the keys of the entries `rank`, 0 without."""
        rank = rank or int(self.k[0])
        found = int(self.candidates[0][-1].item()) if self.floor else rank
        if self.floor and found < self.k[0]:  # the digits that are known are of smaller keys
            self.k[0] = found
            self.level, self.known = 0, _unknown(self.k)
        self.chosen = known = self.descend(self.known, self.level)
        if found < rank:
            return np.zeros(1, np.uint32)
        if self.k.size == 1 and rank != self.k[0]:
            known = self.descend(_unknown(np.array([rank])), 0)
        last = known[:, 3].cpu().numpy().astype(np.uint32)
        last[np.diff(self.first_part) == 0] = 0
        return last

    def descend(self, known: np.ndarray, level: int) -> Any:
        """Return the select table of the candidates, down to the last digit."""
        select, counts = self.upload(known), self.zeros(self.k.size, BINS)
        where = _arrays.address(select), _arrays.address(counts)
        for at in range(level, len(LEVELS)):
            self.passes.recount(at, _addresses(self.candidates), *where)
        return select

    # ---- what is sent

    def entries(self, values: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Choose and encode the entries; return starts, local indices, values, scales (CPU)."""
        torch, total = self.torch, int(self.k.sum())
        tiles = -(-self.numel // TILE)
        place, counts = self.zeros(self.count, 2, dtype="int64"), self.zeros(tiles)
        at = self.upload(np.cumsum([0, *self.k], dtype=np.int64))
        first_part = self.upload(self.first_part)
        chosen = self.lists(None, max(total, 1))
        self.passes.choose(
            _arrays.address(self.chosen),
            _addresses(self.candidates),
            *(_arrays.address(x) for x in (first_part, at, place, counts)),
            _addresses(chosen),
        )
        ends = torch.cumsum(counts, 0, dtype=torch.int64)
        chosen[0] = torch.cat([self.zeros(1, dtype="int64"), ends])
        width = wire_frame.VALUE_BYTES[wire_frame.VALUE_CODES[values]]
        sent = self.empty(max(total * width, 1), dtype="uint8")
        scales = self.empty(tiles if values == "int8" else 1, dtype="float32")
        self.passes.emit(
            _addresses(chosen),
            wire.VALUE_DTYPES[values],
            _arrays.address(scales),
            _arrays.address(sent),
        )
        starts, local, data, steps = (x.cpu().numpy() for x in (*chosen[:2], sent, scales))
        return starts, local[:total], data[: total * width], steps if values == "int8" else None


def _parts(firsts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Cut coordinates into parts: rows of begin, end, segment, layer."""
    part, numel = _native.cuda.SPARSE_PART, int(starts[-1])
    cuts = np.unique(np.concatenate([firsts, starts, np.arange(0, numel, part)]))
    begin = cuts[:-1]
    segment = np.searchsorted(starts, begin, side="right") - 1
    layer = np.searchsorted(firsts, begin, side="right") - 1
    return np.stack([begin, cuts[1:], segment, layer], axis=1).astype(np.int64)


def _unknown(k: np.ndarray) -> np.ndarray:
    """Return what is known of each segment before the first digit: need, above, within, prefix."""
    known = np.zeros((k.size, 4), np.int64)
    known[:, 0] = k
    return known


def _addresses(entries: Sequence[Any]) -> list[int]:
    return [0 if x is None else _arrays.address(x) for x in entries]


def _pack(
    numel: int,
    host: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None],
    values: str,
    index: str,
    tensors: bytes,
    fields: dict[str, Any],
) -> np.ndarray:
    starts, local, data, scales = host
    rows = np.frombuffer(tensors, np.uint8)
    capacity = wire_writer.packet_nbytes(numel, int(starts[-1]), index, values, rows.size // 64)
    out = np.empty(capacity, np.uint8)
    nbytes = _native.core.sparse_pack(
        numel=numel,
        starts=_arrays.address(starts),
        local=_arrays.address(local),
        values=_arrays.address(data),
        scales=0 if scales is None else _arrays.address(scales),
        packet=packet_fields(fields, values, index, rows, out),
        threads=_native.threads_for(numel),
    )
    return out if nbytes == capacity else out[:nbytes].copy()
