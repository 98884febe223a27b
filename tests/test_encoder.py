"""The encoder: seeds, buffers, memory of codecs, state in bfloat16, and every form of feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from flcore.compression import (
    CODECS,
    DGC,
    EF14,
    EF21,
    FEEDBACKS,
    EControl,
    Encoder,
    Packet,
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


# ---- forms -------------------------------------------------------------------------------------


def test_tables_of_settings():
    assert CODECS["topk"] is TopK and all(issubclass(c, Codec) for c in CODECS.values())
    assert all(CODECS[name].name == name for name in CODECS)
    for feedback in (EF14(0.9, reset_every=5), EF21(0.1), EF21(), EControl(), DGC(0.8, False)):
        described = feedback.to_dict()
        assert FEEDBACKS[described["feedback"]].from_dict(described) == feedback


def test_loco_decays_and_forgets():
    encoder = Encoder(TopK(k=1), EF14(decay=0.5, reset_every=2), like=G)
    for sent, e in (
        ([4, 0, 0, 0], [0, -3, 2, 1]),
        ([0, -4.5, 0, 0], [4, 0, 3, 1.5]),
        ([4, 0, 0, 0], [0, -3, 2, 1]),  # as the first: e was forgotten
        ([0, -4.5, 0, 0], [4, 0, 3, 1.5]),
    ):
        assert decode(encoder.encode(G)).tolist() == sent and encoder.e.tolist() == e


def test_ef21_worked_example():
    encoder = Encoder(TopK(k=1), EF21(), like=G)
    for at, value in ((0, 4), (1, -3), (2, 2), (3, 1)):
        packet = encoder.encode(G)
        assert packet.header.increment
        assert packet.body().indices.tolist() == [at] and packet.body().values.tolist() == [value]
    assert encoder.h.tolist() == G.tolist()
    assert not decode(encoder.encode(G)).any()


def test_ef21_momentum_worked_example():
    encoder = Encoder(TopK(k=1), EF21(momentum=0.5), like=G)
    for v, at, value in (
        ([2, -1.5, 1, 0.5], 0, 2),
        ([3, -2.25, 1.5, 0.75], 1, -2.25),
        ([3.5, -2.625, 1.75, 0.875], 2, 1.75),
    ):
        packet = encoder.encode(G)
        assert encoder.v.tolist() == v
        assert packet.body().indices.tolist() == [at] and packet.body().values.tolist() == [value]


def test_ef21_without_compression_is_the_update(rng):
    """h = g; with momentum, its running mean."""
    plain = Encoder(TopK(ratio=1.0), EF21(), like=np.zeros(50, np.float32))
    mean = Encoder(TopK(ratio=1.0), EF21(momentum=0.25), like=np.zeros(50, np.float32))
    v = np.zeros(50)
    for _ in range(4):
        g = rng.integers(-8, 9, 50).astype(np.float32)  # sums in float32 are exact
        plain.encode(g)
        mean.encode(g)
        v = 0.75 * v + 0.25 * g
        assert np.array_equal(plain.h, g) and np.array_equal(mean.h, v)


def test_ef21_with_all_the_momentum_is_ef21(rng):
    plain, one = (Encoder(TopK(k=6), f, like=np.zeros(60)) for f in (EF21(), EF21(momentum=1.0)))
    for t in range(10):
        g = rng.standard_normal(60)
        assert plain.encode(g, round=t) == one.encode(g, round=t)


def test_ef21_contracts_and_recovers_a_fixed_update(rng):
    """||g - h'||^2 <= (1 - k/d) ||g - h||^2, and exact after d/k rounds."""
    d, k = 60, 7
    g = rng.standard_normal(d).astype(np.float32)
    encoder = Encoder(TopK(k=k), EF21(), like=g)
    gap = np.sum(g.astype(float) ** 2)
    for _ in range(-(-d // k)):
        encoder.encode(g)
        left = np.sum((g.astype(float) - encoder.h) ** 2)
        assert left <= (1 - k / d) * gap
        gap = left
    assert np.array_equal(encoder.h, g)


def test_econtrol_without_memory_is_ef21_bit_for_bit(rng):
    one, two = (Encoder(TopK(k=6), f, like=np.zeros(60)) for f in (EControl(0.0), EF21()))
    for t in range(20):
        g = rng.standard_normal(60)
        assert one.encode(g, round=t) == two.encode(g, round=t)
        assert one.h.tobytes() == two.h.tobytes()


def test_econtrol_asks_the_codec_for_its_strength():
    encoder = Encoder(TopK(k=3), EControl(), like=np.zeros(12))
    encoder.encode(np.ones(12))
    assert encoder._state.a == 0.25
    encoder.encode(np.ones(12), codec=TopK(k=6))
    assert encoder._state.a == 0.5
    encoder = Encoder(Counting(), EControl(), like=G)
    encoder.encode(G)
    assert encoder._state.a == 0.125


def test_dgc_worked_example():
    g = G
    encoder = Encoder(TopK(k=1), DGC(momentum=0.9), like=g)
    for m, e, at, value in (
        ([0, -3, 2, 1], [0, -3, 2, 1], 0, 4),
        ([4, 0, 3.8, 1.9], [4, 0, 5.8, 2.9], 1, -8.7),
    ):
        packet = encoder.encode(g)
        assert packet.body().indices.tolist() == [at]
        assert np.allclose(packet.body().values, value)
        assert np.allclose(encoder.v, m) and np.allclose(encoder.e, e)
        assert not packet.header.increment
    packet = encoder.encode(g)
    assert packet.body().indices.tolist() == [0] and np.allclose(packet.body().values, 11.6)


def test_dgc_without_compression_is_momentum(rng):
    encoder = Encoder(TopK(ratio=1.0), DGC(0.5, masking=False), like=np.zeros(40, np.float32))
    m = np.zeros(40)
    for _ in range(5):
        g = rng.integers(-8, 9, 40).astype(np.float32)
        m = 0.5 * m + g
        assert np.array_equal(decode(encoder.encode(g)), m)
        assert not encoder.e.any() and np.array_equal(encoder.v, m)


def test_density_of_the_warm_up():
    assert [DGC.density(epoch) for epoch in range(6)] == [0.25, 1 / 16, 1 / 64, 1 / 256, 1e-3, 1e-3]
    assert DGC.density(1, target=0.1) == 0.1
    encoder = Encoder(TopK(ratio=0.001), DGC(), like=np.zeros(1000))
    for epoch, k in ((0, 250), (1, 63), (4, 1)):
        codec = TopK(ratio=DGC.density(epoch))
        assert encoder.encode(np.ones(1000), codec=codec).k == k
    for arguments in ((-1,), (0.5,), (True,), (0, 0.0), (0, 2)):
        with pytest.raises(InvalidInputError, match=r"epoch: expected|target: expected"):
            DGC.density(*arguments)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EF14(reset_every=0), "reset_every: expected at least 1"),
        (lambda: EF14(reset_every=1.5), "reset_every: expected a whole number"),
        (lambda: EF21(momentum=0.0), "momentum: expected a number above 0"),
        (lambda: EF21(momentum=2), "momentum: expected a number above 0"),
        (lambda: DGC(momentum=-0.1), "momentum: expected a number from 0 to 1"),
        (lambda: DGC(masking=1), "masking: expected True or False"),
        (lambda: Encoder(TopK(k=1), like=G, start="warm"), "start: expected zero or dense"),
        (lambda: Encoder(TopK(k=1), like=G, state_dtype="float16"), "state_dtype: expected"),
    ],
)
def test_settings_that_cannot_be_used(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()
