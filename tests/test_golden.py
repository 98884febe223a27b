"""Golden packets of every codec: made from settings and decoded to values, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from flcore.compression import CODECS, Packet, decode
from flcore.reference import decode as reference
from flcore.reference import wire

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make

GOLDEN = json.loads(make.FILE.read_text())


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["codec"])
def test_golden_packets(entry):
    data = bytes.fromhex(entry["packet"])
    want = np.frombuffer(bytes.fromhex(entry["float32"]), "<f4")
    assert decode(Packet.from_bytes(data)).tobytes() == want.tobytes()
    assert reference.dense(*wire.parse(data)).tobytes() == want.tobytes()
    assert make.encode(entry["codec"], entry["error_control"]) == data


def test_every_codec_has_one():
    assert {entry["codec"].partition(":")[0] for entry in GOLDEN} == set(CODECS)
    assert [entry["codec"] for entry in GOLDEN] == list(make.TEXTS)
