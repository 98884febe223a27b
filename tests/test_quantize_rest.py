"""The short way for clients that keep e alone gives the bits of the reference, at any size."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.errors import NonFiniteError
from flcore.ops.quantize import quantize
from support import ROOT, outputs_per_level, unaligned

# Codecs of one scale: from the largest magnitude, from a sum, from both.
CODECS = {
    "sign": {"codec": "sign", "bits": 1},
    "sign l2": {"codec": "sign", "bits": 1, "measure": "l2"},
    "absmax 8": {"codec": "uniform", "bits": 8},
    "absmax 4": {"codec": "uniform", "bits": 4},
    "absmax 3": {"codec": "uniform", "bits": 3},
    "qsgd": {"codec": "uniform", "bits": 4, "measure": "l2", "levels": 5, "rounding": "stochastic"},
    "absmax random": {"codec": "uniform", "bits": 8, "rounding": "stochastic"},
    "ternary": {"codec": "ternary", "bits": 2},
    "trits": {"codec": "ternary", "bits": 2, "form": 1, "rounding": "stochastic", "clip": 2.5},
    "sign, clip unused": {"codec": "sign", "bits": 1, "clip": 2.5},
}
# Before, at and after a block of 16, two of them, and a group of buckets.
BUCKETS = (1, 7, 15, 16, 17, 31, 32, 33, 500, 2048)


def floats(rng, numel):
    return rng.standard_normal(numel).astype(np.float32)


def run(variant, g, *, decay=1.0, spare=True, rounds=2, offset=0, **options):
    """Packets and memory after some rounds; memory starts `offset` bytes after a multiple of 64."""
    start = 0.1 * floats(np.random.default_rng(3), g.size)
    state = State(e=unaligned(start, offset), a=decay, b=decay)
    if spare:
        state.spare = {"e": unaligned(np.full_like(start, 7), offset)}
    packets = [
        quantize(g, state=state, round=i, seed=5, variant=variant, **options).tobytes()
        for i in range(rounds)
    ]
    return packets, state.e.tobytes()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_equals_the_reference(name, bucket, rng):
    for i, numel in enumerate((1, 15, 16, 17, 501, 2049)):
        options = {
            "bucket": bucket,
            "decay": (1.0, 0.9)[i % 2],
            "values": ("float32", "bfloat16")[bucket > 1 and i % 3 == 1],
            **CODECS[name],
        }
        g = floats(rng, numel)
        want = run("reference", g, **options)
        assert run("cpu", g, **options) == want
        assert run("cpu", g, spare=False, **options) == want
        assert run("cpu", unaligned(g, 4), offset=12, **options) == want


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -3e38, 2.0**-126])
def test_buckets_at_the_ends_of_the_range(value):
    g = np.full(40, value, np.float32)
    g[::3] *= -1
    for codec in CODECS.values():
        want = run("reference", g, bucket=20, rounds=1, **codec)
        assert run("cpu", g, bucket=20, rounds=1, **codec) == want


DIGESTS = """
import hashlib, numpy as np
from test_quantize_rest import CODECS, run
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (17, 1025, 70_001):
    for codec in CODECS.values():
        for bucket in (15, 37, 500, 4096):
            g = rng.standard_normal(numel).astype(np.float32)
            packets, state = run("cpu", g, bucket=bucket, **codec)
            digest.update(b"".join(packets) + state)
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    g = floats(rng, 700_001)
    before = flcore.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            flcore.set_num_threads(threads)
            found.append([run("cpu", g, bucket=500, **CODECS[n]) for n in ("sign", "absmax 8")])
        assert found[0] == found[1] == found[2]
    finally:
        flcore.set_num_threads(before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spare", [True, False])
def test_nothing_changes_when_a_value_is_not_finite(bad, spare, rng):
    for at in (0, 15, 16, 499, 500, 3000):  # in a block of 16, in what is left of a bucket, alone
        for place in ("update", "e"):
            g = floats(rng, 3001)
            e = floats(rng, 3001)
            state = State(e=e, spare={"e": np.empty_like(e)} if spare else {})
            (g if place == "update" else e)[at] = bad
            before = e.tobytes()
            for name in ("sign", "absmax 8", "trits"):
                with pytest.raises(NonFiniteError, match="no state changed"):
                    quantize(g, bucket=500, state=state, variant="cpu", **CODECS[name])
            assert state.e is e and e.tobytes() == before


def test_overflow_counts_as_not_finite():
    e = np.full(20, 3e38, np.float32)
    state = State(e=e.copy(), spare={"e": np.empty_like(e)})
    with pytest.raises(NonFiniteError, match="overflows float32"):
        quantize(e, bucket=8, state=state, variant="cpu", **CODECS["sign"])
    assert np.array_equal(state.e, e)
