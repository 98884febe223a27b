"""Compressed updates: codecs, error control, the encoder, and the packet that goes on the wire."""

from flcore.compression._encoder import Encoder
from flcore.compression._feedback import EF14, EControl
from flcore.compression._packet import Packet, decode, decode_add, peek
from flcore.compression._topk import TopK
from flcore.errors import PacketError
from flcore.reference.wire import Header, Limits, TensorEntry

__all__ = [
    "EF14",
    "EControl",
    "Encoder",
    "Header",
    "Limits",
    "Packet",
    "PacketError",
    "TensorEntry",
    "TopK",
    "decode",
    "decode_add",
    "peek",
]
