"""A sparse packet of given entries: for servers, whose selection is not the one of an encoder."""

from __future__ import annotations

import numpy as np

from flcore import _arrays, _native
from flcore.reference import wire_frame as frame
from flcore.reference import wire_sparse

__all__ = ["sparse_packet"]


def sparse_packet(
    index: np.ndarray,
    values: np.ndarray,
    numel: int,
    *,
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
) -> np.ndarray:
    """Return the packet, (nbytes,) uint8, of float32 `values` at increasing coordinates `index`."""
    tiles = wire_sparse.tiles(numel)
    bodies = {
        frame.COUNTS: np.bincount(index // frame.TILE, minlength=tiles).astype("<u4"),
        frame.INDICES: (index % frame.TILE).astype("<u2"),
        frame.VALUES: np.ascontiguousarray(values, "<f4"),
    }
    made = _native.core.PacketFrame(
        codec=frame.CODECS["sparse"],
        numel=numel,
        value_dtype=frame.VALUE_CODES["float32"],
        form=wire_sparse.INDEX_CODINGS["tile16"],
        bits=32,
        tile=frame.TILE,
        source_dtype=frame.SOURCE_DTYPES["float32"],
        flags=flags,
        round=round,
        seed=seed,
        epoch=epoch,
        sections=[(kind, x.itemsize, x.nbytes) for kind, x in bodies.items()],
        tensors=tensors,
    )
    packet = np.empty(made.nbytes, np.uint8)
    for kind, x in bodies.items():
        at = made.offset(kind)
        packet[at : at + x.nbytes] = x.view(np.uint8)
    made.seal(_arrays.address(packet))
    return packet
