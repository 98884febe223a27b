"""Variant `cuda` of decode: kernels/decode.cu, queued on torch's current stream.

Packets are checked and stay in CPU memory. What the kernel reads of them is copied to the device
in one piece, through page-locked memory.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flcore import _arrays, _native
from flcore._arrays import View

if TYPE_CHECKING:
    from flcore.ops.decode import ParsedPacket

__all__ = ["decode"]

log = logging.getLogger("flcore")


def decode(
    packets: Sequence[ParsedPacket], weights: Sequence[float], out: Sequence[View], add: bool
) -> None:
    """Arguments as of the other variants of decode; does not wait for the device.

    Rotated, homomorphic, low-rank and sketched packets are decoded on the CPU and travel as float32
    values: the same bits, 4 bytes a coordinate to copy.
    """
    layers = [v for v in out if v.numel]
    if not layers or (add and not packets):
        return
    where, numel = layers[0].device, sum(v.numel for v in layers)
    device, stream = _arrays.queue(where)
    image = _native.core.PacketImage(
        [p.view for p in packets], list(weights), numel, _native.threads_for(numel)
    )
    if image.decoded:
        log.debug("decode on %s: %d packets are decoded on the CPU", where, image.decoded)
    data = _upload(image, where)
    _native.cuda.decode(
        _arrays.address(data),
        len(packets),
        [v.ptr for v in layers],
        [v.numel for v in layers],
        [v.code for v in layers],
        add,
        device,
        stream,
    )


def _upload(image: Any, where: str) -> Any:
    """Return the image as a tensor on the device, its bytes on their way."""
    torch = sys.modules["torch"]
    on_device = torch.empty(image.nbytes, dtype=torch.uint8, device=where)
    pinned = on_device.device.type == "cuda"
    host = torch.empty(image.nbytes, dtype=torch.uint8, pin_memory=pinned)
    image.write(_arrays.address(host), _arrays.address(on_device))
    # torch keeps page-locked memory until the copy is done
    on_device.copy_(host, non_blocking=True)
    return on_device
