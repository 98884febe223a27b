"""Compressed updates: codecs, error control, the encoder, and the packet that goes on the wire."""

from flcore.compression._control import ControlledSum
from flcore.compression._encoder import Encoder
from flcore.compression._feedback import DGC, EF14, EF21, EControl
from flcore.compression._packet import Packet, decode, decode_add, peek
from flcore.compression._topk import TopK
from flcore.errors import EpochError, PacketError
from flcore.reference.wire import Header, Limits, TensorEntry

CODECS = {codec.name: codec for codec in (TopK,)}
"""Codec classes by the name that `to_dict` gives."""

FEEDBACKS = {feedback.name: feedback for feedback in (EF14, EF21, EControl, DGC)}
"""Error controls by the name that `to_dict` gives."""

__all__ = [
    "CODECS",
    "DGC",
    "EF14",
    "EF21",
    "FEEDBACKS",
    "ControlledSum",
    "EControl",
    "Encoder",
    "EpochError",
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
