"""The encoder: seeds, buffers, memory of codecs, state in bfloat16, and every form of feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from flcore.compression import (
    DGC,
    EF14,
    EF21,
    EControl,
    Encoder,
    Packet,
    Threshold,
    TopK,
    decode,
)
from flcore.compression._codec import Codec, Job
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.sparsify import sparsify

G = np.array([4, -3, 2, 1], np.float32)
FORMS = [None, EF14(), EF14(0.9), EF21(), EF21(momentum=0.25), EControl(), DGC(), DGC(0.5, False)]


@dataclass(frozen=True)
class Counting(Codec):
    """The largest entry of the update alone; counts its packets and keeps the last update."""

    name: ClassVar[str] = "counting"
    shared_seed: ClassVar[bool] = True
    fail_at: int = -1

    def eta(self, numel):
        return 0.125

    def check(self, shapes):
        if any(len(shape) > 2 for shape in shapes):
            raise InvalidInputError("Counting: expected layers of at most two dimensions")

    def norm(self, job):
        return np.float32([np.abs(job.update).max(), job.client])

    def encode(self, job: Job):
        count = job.memory.get("count", 0) + 1
        if count == self.fail_at:
            raise NonFiniteError("update: not finite, says this codec")
        job.memory["count"] = count
        job.memory["last"] = np.array(job.update)
        factor = job.options.get("norm", 1.0)
        return sparsify(np.float32(factor) * job.update, k=1, **job.header)


# ---- seeds -------------------------------------------------------------------------------------


def test_seed_of_a_client_is_a_number_of_its_splitmix_sequence():
    """The first numbers of SplitMix64 from seed 0, as published with the generator."""
    for client, want in ((0, 0xE220A8397B1DCDAF), (1, 0x6E789E6AA1B965F4), (2, 0x06C45D188009454F)):
        packet = Encoder(TopK(k=1), like=G, client=client).encode(G)
        assert packet.header.seed == want
    assert Encoder(TopK(k=1), like=G).encode(G, seed=7).header.seed == 7
    assert Encoder(TopK(k=1), like=G, client=2**64 - 1).encode(G, seed=7).header.seed != 7
    assert Encoder(Counting(), like=G, client=3).encode(G, seed=7).header.seed == 7
    for wrong in (-1, 2**64, 1.0, True):
        with pytest.raises(InvalidInputError, match="client: expected an integer"):
            Encoder(TopK(k=1), like=G, client=wrong)
    for name in ("round", "seed"):
        for wrong in (-1, 2**64):
            with pytest.raises(InvalidInputError, match=f"{name}: expected 0 <= {name}"):
                Encoder(TopK(k=1), like=G).encode(G, **{name: wrong})


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("feedback", FORMS, ids=repr)
def test_in_place_makes_no_difference_but_memory(feedback, state_dtype, rng):
    d = 3000
    encoders = [
        Encoder(
            TopK(ratio=0.02, values="bfloat16"),
            feedback,
            like=np.zeros(d, np.float32),
            state_dtype=state_dtype,
            in_place=in_place,
        )
        for in_place in (False, True)
    ]
    assert not encoders[0]._state.spare  # not before the first packet
    for t in range(6):
        g = rng.standard_normal(d).astype(np.float32)
        one, two = (x.encode(g, round=t, seed=5) for x in encoders)
        assert one == two
        assert t or not encoders[0]._state.spare  # nor before there is a threshold to start from
        bad = g.copy()
        bad[d - 1] = np.inf
        for x in encoders:
            before = x.state_dict()
            with pytest.raises(NonFiniteError):
                x.encode(bad, round=t)
            after = x.state_dict()
            assert all(np.array_equal(before[k], after[k]) for k in before)
    kept = feedback.kept if feedback else ()
    assert encoders[1]._state.spare == {}
    assert set(encoders[0]._state.spare) <= set(kept) - {"h"}
    for name in ("e", "h", "v"):
        one, two = (getattr(x, name) for x in encoders)
        assert (one is None) == (two is None) == (name not in kept)
        assert one is None or (one.dtype == np.float32 and one.tobytes() == two.tobytes())


@pytest.mark.parametrize("feedback", [EF14(), EControl(), DGC(), EF21(momentum=0.5)], ids=repr)
def test_state_in_bfloat16(feedback, rng, tmp_path):
    """e and v take two bytes; saved as bits; what their rounding loses averages out."""
    d = 20_000
    encoder = Encoder(TopK(ratio=0.1), feedback, like=np.zeros(d), state_dtype="bfloat16")
    exact = Encoder(TopK(ratio=0.1), feedback, like=np.zeros(d))
    g = rng.standard_normal(d)
    encoder.encode(g, round=0, seed=1)
    exact.encode(g, round=0, seed=1)
    state = encoder.state_dict()
    for name in set(feedback.kept) - {"h"}:
        assert state[name].dtype == np.uint16
        error = getattr(encoder, name) - getattr(exact, name)
        assert 0 < np.abs(error).max() <= 2.0**-7 * np.abs(g).max()
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(np.count_nonzero(error))
    other = Encoder(TopK(ratio=0.1), feedback, like=np.zeros(d), state_dtype="bfloat16")
    other.load_state_dict(state)
    assert other.encode(g, round=1, seed=1) == encoder.encode(g, round=1, seed=1)
    with pytest.raises(InvalidInputError, match=r"expected float32|expected uint16"):
        exact.load_state_dict(state)
    before = {name: getattr(encoder, name).copy() for name in feedback.kept}
    encoder.rescale(0.3)
    for name, x in before.items():
        error = np.abs(getattr(encoder, name) - 0.3 * x.astype(np.float64))
        assert (error <= 2.0 ** (-23 if name == "h" else -8) * np.abs(0.3 * x) * 1.01).all()


def test_what_a_codec_remembers_is_saved_and_kept_apart():
    encoder = Encoder(Counting(), EF14(), like=G)
    encoder.encode(G)
    encoder.encode(2 * G)
    state = encoder.state_dict()
    assert state["codec.counting.count"] == 2
    assert np.array_equal(state["codec.counting.last"], 2 * G)
    encoder.encode(G, codec=TopK(k=2))
    assert encoder.state_dict()["codec.counting.count"] == 2
    encoder.encode(3 * G)
    assert np.array_equal(state["codec.counting.last"], 2 * G)  # a copy
    other = Encoder(Counting(), EF14(), like=G)
    other.load_state_dict(state)
    other.encode(G)
    assert other.state_dict()["codec.counting.count"] == 3
    with pytest.raises(InvalidInputError, match=r"codec.counting.last'\]: expected finite"):
        other.load_state_dict(state | {"codec.counting.last": np.full(4, np.nan)})
    other.reset()
    assert "codec.counting.count" not in other.state_dict() and other.epoch == 0


def test_failing_codec_changes_nothing():
    for policy in ("raise", "skip"):
        encoder = Encoder(Counting(fail_at=2), EF14(), like=G, nonfinite=policy)
        encoder.encode(G)
        before = encoder.state_dict()
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="says this codec"):
                encoder.encode(G)
        else:
            packet = Packet.from_bytes(bytes(encoder.encode(G, round=3)))
            assert packet.header.nonfinite and packet.header.round == 3
            assert not decode(packet).any()
        after = encoder.state_dict()
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[k], after[k]) for k in before)


def test_codec_that_cannot_take_these_shapes():
    with pytest.raises(InvalidInputError, match="at most two dimensions"):
        Encoder(Counting(), like=np.zeros((1, 2, 3)))
    encoder = Encoder(TopK(k=1), like=np.zeros((1, 2, 3)))
    with pytest.raises(InvalidInputError, match="at most two dimensions"):
        encoder.encode(np.zeros((1, 2, 3)), codec=Counting())
    with pytest.raises(DTypeError, match="codec: expected a codec such as TopK, got str"):
        encoder.encode(np.zeros((1, 2, 3)), codec="topk")
    assert encoder.epoch == 0


def test_agreeing_on_a_norm_before_encoding():
    encoder = Encoder(Counting(), like=G, client=9)
    assert encoder.norm(G).tolist() == [4, 9] and encoder.epoch == 0
    assert decode(encoder.encode(G, norm=2.0)).tolist() == [8, 0, 0, 0]
    with pytest.raises(InvalidInputError, match="TopK has no norm"):
        Encoder(TopK(k=1), like=G).norm(G)


# ---- starting, resuming, rescaling -------------------------------------------------------------


def test_start_from_what_the_receiver_has():
    encoder = Encoder(TopK(k=1), EF21(), like=G)
    encoder.encode(-G)
    encoder.start_at(G)
    assert encoder.epoch == 0
    assert decode(encoder.encode(G + np.float32([0, 0, 0.5, 1]))).tolist() == [0, 0, 0, 1]
    assert encoder.h.tolist() == [4, -3, 2, 2]
    with pytest.raises(NonFiniteError, match="values: expected finite"):
        encoder.start_at(np.full(4, np.nan, np.float32))
    assert encoder.epoch == 1 and encoder.h.tolist() == [4, -3, 2, 2]
    for feedback in (None, EF14(), DGC()):
        with pytest.raises(InvalidInputError, match="only EControl and EF21 keep an h"):
            Encoder(TopK(k=1), feedback, like=G).start_at(G)
        with pytest.raises(InvalidInputError, match="only EControl and EF21 keep"):
            Encoder(TopK(k=1), feedback, like=G, start="dense")
        with pytest.raises(InvalidInputError, match="only EControl and EF21 keep an h"):
            Encoder(TopK(k=1), feedback, like=G).resync()


def test_resync_is_the_estimate_and_changes_nothing():
    encoder = Encoder(TopK(k=2), EControl(), like=G, client=4)
    encoder.encode(G)
    before = encoder.state_dict()
    packet = Packet.from_bytes(bytes(encoder.resync(round=8)))
    assert np.array_equal(decode(packet), encoder.h)
    assert (packet.header.epoch, packet.header.round, packet.header.increment) == (0, 8, False)
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("feedback", [f for f in FORMS if f], ids=repr)
def test_rescaling_all_state(feedback, rng):
    """Halving the unit of updates halves every packet from then on, bit for bit."""
    plain, scaled = (Encoder(TopK(k=5), feedback, like=np.zeros(60)) for _ in range(2))
    for t in range(8):
        g = rng.standard_normal(60)
        if t == 4:
            scaled.rescale(0.5)
        one, two = plain.encode(g, round=t), scaled.encode(g if t < 4 else g / 2, round=t)
        assert np.array_equal(decode(one) * (1 if t < 4 else 0.5), decode(two))
    before = scaled.state_dict()
    with pytest.raises(NonFiniteError, match="overflows float32"):
        scaled.rescale(3e38)
        scaled.rescale(3e38)
    scaled.load_state_dict(before)
    for wrong in (0.0, -2.0, float("nan"), None, 1e-60):
        with pytest.raises(InvalidInputError, match="factor: expected a positive finite"):
            scaled.rescale(wrong)


def test_econtrol_asks_the_codec_for_its_strength():
    encoder = Encoder(TopK(k=3), EControl(), like=np.zeros(12))
    encoder.encode(np.ones(12))
    assert encoder._state.a == 0.25
    encoder.encode(np.ones(12), codec=TopK(k=6))
    assert encoder._state.a == 0.5
    encoder = Encoder(Counting(), EControl(), like=G)
    encoder.encode(G)
    assert encoder._state.a == 0.125
    with pytest.raises(InvalidInputError, match='"auto" needs the share that is sent'):
        Encoder(Threshold(tau=0.5), EControl(), like=G)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Encoder(TopK(k=1), like=G, start="warm"), "start: expected zero or dense"),
        (lambda: Encoder(TopK(k=1), like=G, state_dtype="float16"), "state_dtype: expected"),
    ],
)
def test_settings_that_cannot_be_used(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()
