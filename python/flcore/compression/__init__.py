"""Compressed updates: codecs, error control, the encoder, and the packet that goes on the wire."""

from flcore.compression._control import ControlledSum
from flcore.compression._encoder import Encoder
from flcore.compression._feedback import DGC, EF14, EF21, EControl
from flcore.compression._floats import FP8, MX, NF4, Dense, Natural
from flcore.compression._linear import AbsMax, Affine, Sign, Ternary, Uniform
from flcore.compression._low_rank import LowRank
from flcore.compression._one_bit_adam import OneBitAdam, OneBitServer
from flcore.compression._packet import Packet, decode, decode_add, peek
from flcore.compression._powersgd import PowerSGD, PowerSGDClient
from flcore.compression._randk import RandK
from flcore.compression._reader import PacketReader, split
from flcore.compression._rotated import Rotated
from flcore.compression._settings import from_text
from flcore.compression._should_compress import (
    Costs,
    Prediction,
    measure_costs,
    should_compress,
)
from flcore.compression._sketch import FetchSGD, Sketch, SketchStep, sum_sketches
from flcore.compression._thc import THC, agree_norms, decode_sum, thc_sum
from flcore.compression._threshold import Threshold
from flcore.compression._topk import TopK
from flcore.compression._two_way import Downlink, Replica
from flcore.errors import EpochError, PacketError
from flcore.reference.wire import Header, Limits, TensorEntry

CODECS = {
    codec.name: codec
    for codec in (
        TopK,
        Threshold,
        RandK,
        Rotated,
        THC,
        Sign,
        Ternary,
        AbsMax,
        Uniform,
        Affine,
        LowRank,
        Sketch,
        Dense,
        Natural,
        FP8,
        MX,
        NF4,
    )
}
"""Codec classes by the name that `to_dict` gives."""

FEEDBACKS = {feedback.name: feedback for feedback in (EF14, EF21, EControl, DGC)}
"""Error controls by the name that `to_dict` gives."""

__all__ = [
    "CODECS",
    "DGC",
    "EF14",
    "EF21",
    "FEEDBACKS",
    "FP8",
    "MX",
    "NF4",
    "THC",
    "AbsMax",
    "Affine",
    "ControlledSum",
    "Costs",
    "Dense",
    "Downlink",
    "EControl",
    "Encoder",
    "EpochError",
    "FetchSGD",
    "Header",
    "Limits",
    "LowRank",
    "Natural",
    "OneBitAdam",
    "OneBitServer",
    "Packet",
    "PacketError",
    "PacketReader",
    "PowerSGD",
    "PowerSGDClient",
    "Prediction",
    "RandK",
    "Replica",
    "Rotated",
    "Sign",
    "Sketch",
    "SketchStep",
    "TensorEntry",
    "Ternary",
    "Threshold",
    "TopK",
    "Uniform",
    "agree_norms",
    "decode",
    "decode_add",
    "decode_sum",
    "from_text",
    "measure_costs",
    "peek",
    "should_compress",
    "split",
    "sum_sketches",
    "thc_sum",
]
