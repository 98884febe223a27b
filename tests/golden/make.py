"""Write the golden packets of every codec: `python tests/golden/make.py`.

They never change within major version 1 of the format: run this to add codecs, not to change what
is there. A line of packets.json is a packet in hexadecimal with the settings that made it and the
float32 values that it decodes to, as bit patterns; enough to test a decoder written elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flcore.compression import CODECS, FEEDBACKS, Encoder, from_text
from flcore.reference import decode as reference
from flcore.reference import wire

FILE = Path(__file__).parent / "packets.json"
SHAPES = ((7, 5), (9,))
TEXTS = (
    *(f"topk:k=6,values={values}" for values in ("float32", "float16", "bfloat16", "int8")),
    *(f"topk:k=6,index={index}" for index in ("bitmask", "bitpack", "rice")),
    "threshold:tau=1.5",
    "randk:k=6",
    *(f"dense:values={values}" for values in ("float32", "float16", "bfloat16")),
    "sign:bucket=20",
    "ternary:bucket=20,packing=trits",
    "ternary:bucket=20,packing=bits",
    *(f"absmax:bits={bits},bucket=20" for bits in range(2, 9)),
    "absmax:bits=4,bucket=20,scale_dtype=bfloat16",
    "uniform:levels=7,bucket=20",
    *(f"affine:bits={bits},bucket=20" for bits in (1, 4, 8)),
    "natural:bits=8",
    "natural:bits=9",
    "nf4",
    "fp8:format=e4m3",
    "fp8:format=e5m2",
    *(f"mx:format={name}" for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")),
    *(f"rotated:bits={bits},block=256" for bits in (1, 2, 3, 4)),
    "low_rank:rank=1",
    "sketch:rows=3,columns=8",
    "thc",
)


def update() -> list[np.ndarray]:
    """Give the numbers that are encoded: a closed form, the same everywhere."""
    flat = np.array([(37 * i % 101 - 50) / 16 for i in range(44)], np.float32)
    return [flat[:35].reshape(SHAPES[0]), flat[35:]]


def encode(text: str, control: str) -> bytes:
    """Give the second packet of an encoder with these settings."""
    codec = from_text(CODECS, text)
    feedback = None if control == "none" else from_text(FEEDBACKS, control)
    encoder = Encoder(codec, feedback, like=update(), tensor_table=True)
    for round in (1, 2):
        options: dict[str, Any] = {}
        if hasattr(codec, "norm"):
            options["norm"] = encoder.norm(update(), round=round, seed=11)
        packet = encoder.encode(update(), round=round, seed=11, **options)
    return bytes(packet)


def entries() -> list[dict[str, str]]:
    """Give the content of the file."""
    made = []
    for text in TEXTS:
        control = "none" if text.startswith("sketch") else "ef14"
        data = encode(text, control)
        values = reference.dense(*wire.parse(data))
        made.append(
            {
                "codec": text,
                "error_control": control,
                "packet": data.hex(),
                "float32": values.astype("<f4").tobytes().hex(),
            }
        )
    return made


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries()) + "\n]\n")
    print(len(TEXTS), "packets,", FILE.stat().st_size, "bytes")
