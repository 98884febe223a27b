"""Valid packets of every codec to fuzz from: `python tests/fuzz/seeds.py FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flcore.compression import CODECS, EControl, Encoder, from_text

CODEC_TEXTS = (
    *(f"topk:k=5,values={v},index={i}" for v in ("float32", "float16", "bfloat16", "int8")
      for i in ("tile16", "bitmask", "bitpack", "rice")),
    "threshold:tau=1.0",
    "randk:k=7",
    "randk:ratio=0.3,values=int8,scaled=True",
    "dense:values=float32",
    "dense:values=float16",
    "dense:values=bfloat16",
    "sign:bucket=3",
    "sign:bucket=512",
    "ternary:bucket=10",
    *(f"absmax:bits={bits},bucket=20" for bits in range(2, 9)),
    "uniform:levels=7,bucket=64",
    *(f"affine:bits={bits},bucket=33" for bits in (1, 3, 4, 8)),
    "natural:bits=8",
    "natural:bits=9",
    "nf4",
    "fp8:format=e4m3",
    "fp8:format=e5m2",
    *(f"mx:format={e}" for e in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")),
    *(f"rotated:bits={bits},block=256" for bits in (1, 2, 3, 4)),
    "low_rank:rank=2",
    "sketch:rows=3,columns=16",
    "thc",
)  # fmt: skip


def packets(texts: tuple[str, ...] = CODEC_TEXTS) -> Iterator[tuple[str, bytes]]:
    """Give a name and the bytes of a packet for every codec at a few sizes."""
    rng = np.random.default_rng(3)
    for text in texts:
        for shapes in ([(1,)], [(17,)], [(30, 20), (9,)], [(1200,)]):
            codec = from_text(CODECS, text)
            update = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
            feedback = EControl(eta=0.1) if len(shapes) > 1 and codec.name != "sketch" else None
            encoder = Encoder(codec, feedback, like=update, tensor_table=len(shapes) > 1)
            for round in range(2):
                options = {}
                if hasattr(codec, "norm"):
                    options["norm"] = encoder.norm(update, round=round, seed=5)
                packet = encoder.encode(update, round=round, seed=5, **options)
                name = text.replace(":", "-").replace(",", "-")
                yield f"{name}-{packet.header.numel}-{round}", bytes(packet)


def write(folder: str | Path) -> int:
    """Write every packet into a file of its own; return how many."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, data in packets():
        (folder / name).write_bytes(data)
        count += 1
    return count


if __name__ == "__main__":
    print(write(sys.argv[1]), "packets")
