"""Streaming with norm bounding and about a centre; results into given memory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from flcore.aggregation import ARC, Accumulator, CenteredClipping, Clipping, Krum, Mean
from flcore.compression import Encoder, TopK, decode
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from support import EPS, HAS_TORCH

ACCUMULATE = ("float32", "float64", "reproducible")
WEIGHTS = [3.0, 1.0, 0.5, 7.0, 2.0, 4.0]


def clients(rng, dtype=np.float32) -> list[dict]:
    """Six updates with norms around 5 and one of 5000, a step counter with each."""
    return [
        {
            "w": (rng.standard_normal((20, 31)) * (200.0 if i == 3 else 0.2)).astype(dtype),
            "b": (0.1 + rng.standard_normal(17) / 5).astype(dtype),
            "steps": np.array([10 * i, 1]),
        }
        for i in range(6)
    ]


def close(got, want, eps: float) -> None:
    for k, x in want.items():
        assert got[k].dtype == x.dtype and got[k].shape == x.shape
        scale = np.abs(x.astype(np.float64)).max() + 1
        assert np.abs(got[k].astype(np.float64) - x.astype(np.float64)).max() <= eps * scale, k


def stream(updates, weights=None, **options) -> Accumulator:
    total = Accumulator(updates[0], **options)
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        total.add(update, weight)
    return total


def test_norm_bounding_by_hand():
    total = Accumulator(np.zeros(2, np.float32), before=Clipping(5.0))
    total.add(np.float32([3, 4])).add(np.float32([300, 400]))
    np.testing.assert_array_equal(total.result(), np.float32([3, 4]))
    about = Accumulator(np.zeros(2), before=Clipping(5.0), center=np.array([1.0, 1.0]))
    about.add(np.array([4.0, 5.0]), 1).add(np.array([61.0, 81.0]), 3)  # 3, 4 and 60, 80 away
    np.testing.assert_allclose(about.result(), [4.0, 5.0], rtol=1e-15)
    assert about.total_weight == 4 and about.count == 2


@pytest.mark.parametrize("dtype", ACCUMULATE)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_norm_bounding_is_clipping_before_the_mean(dtype, weights, rng):
    updates = clients(rng)
    got = stream(updates, weights, dtype=dtype, before=Clipping(4.0)).result()
    want = (Clipping(4.0) >> Mean(accumulate=dtype))(updates, weights)
    close(got, want, 8 * EPS["float32"])
    unbounded = stream(updates, weights, dtype=dtype).result()
    assert np.abs(unbounded["w"] - want["w"]).max() > 1


@pytest.mark.parametrize("dtype", ACCUMULATE)
def test_about_a_centre_is_one_step_of_centred_clipping(dtype, rng):
    updates = clients(rng)
    center = {k: x + 1 for k, x in clients(rng)[0].items()}
    rule = CenteredClipping(radius=6.0, accumulate=dtype)
    options = dict(dtype=dtype, before=Clipping(6.0), center=center)
    close(
        stream(updates, WEIGHTS, **options).result(),
        rule(updates, WEIGHTS, center=center),
        8 * EPS["float32"],
    )
    parts = [
        stream(updates[:2], WEIGHTS[:2], **options),
        stream(updates[2:], WEIGHTS[2:], **options),
    ]
    parts[1] = pickle.loads(pickle.dumps(parts[1]))  # from another process
    close(
        parts[0].merge(parts[1]).result(),
        rule(updates, WEIGHTS, center=center),
        8 * EPS["float32"],
    )
    assert parts[0].total_weight == sum(WEIGHTS)


def test_a_centre_has_no_part_in_the_mean_while_nothing_is_clipped(rng):
    updates = clients(rng)
    center = {k: x * 0 + 1000 for k, x in updates[0].items()}
    total = stream(updates, WEIGHTS, before=Clipping(1e9), center=center)
    want = stream(updates, WEIGHTS).result()
    for k, x in total.result().items():
        assert x.tobytes() == want[k].tobytes()


def test_a_divisor_counts_from_the_centre():
    center = np.array([10.0, 0.0])
    total = Accumulator(center, before=Clipping(2.0), center=center)
    total.add(np.array([14.0, 0.0])).add(np.array([10.0, 1.0]))
    np.testing.assert_allclose(total.result(divisor=4), [10.5, 0.25], rtol=1e-15)
    np.testing.assert_allclose(total.result(), [11.0, 0.5], rtol=1e-15)


def test_reproducible_bounded_sums_ignore_the_order(rng):
    updates = clients(rng)
    results = set()
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 2, 1, 4]):
        total = stream(
            [updates[i] for i in order],
            [WEIGHTS[i] for i in order],
            dtype="reproducible",
            before=Clipping(4.0),
            center=updates[2],
        )
        results.add(total.result()["w"].tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("dtype", ACCUMULATE)
def test_a_nonfinite_update_is_not_added(dtype, rng):
    updates = clients(rng)
    bad = {**updates[0], "w": updates[0]["w"].copy()}
    bad["w"][19, 30] = np.nan
    want = stream(updates, dtype=dtype, before=Clipping(4.0)).result()
    total = stream(updates, dtype=dtype, before=Clipping(4.0))
    with pytest.raises(NonFiniteError, match=r"update 6 \(counted from 0\)"):
        total.add(bad)
    assert total.count == 6
    for policy in ("exclude", "propagate"):  # an update without a norm cannot be clipped
        lenient = stream([*updates, bad], dtype=dtype, before=Clipping(4.0), nonfinite=policy)
        assert (lenient.count, lenient.excluded) == (6, 1)
        assert lenient.result()["w"].tobytes() == want["w"].tobytes()
    assert total.result()["w"].tobytes() == want["w"].tobytes()


def test_huge_finite_updates_are_clipped():
    total = Accumulator(np.zeros(4, np.float32), before=Clipping(1.0))
    total.add(np.float32([3e38, 0, 3e38, 0]))  # their squares overflow float32
    np.testing.assert_allclose(total.result(), np.sqrt([0.5, 0, 0.5, 0]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ACCUMULATE)
def test_packets_are_clipped_like_what_they_hold(dtype, rng):
    x = {"w": rng.standard_normal((40, 50)).astype(np.float32), "b": np.ones(9, np.float32)}
    packet = Encoder(TopK(k=50), like=x).encode(x, round=0)
    flat = np.asarray(decode(packet)).ravel()
    held = {"w": flat[:2000].reshape(40, 50), "b": flat[2000:]}
    total = Accumulator(x, dtype, before=Clipping(3.0)).add(packet, 2.0).add(bytes(packet), 1.0)
    got = total.result()
    close(got, stream([held, held], [2.0, 1.0], dtype=dtype, before=Clipping(3.0)).result(), 1e-7)
    assert abs(np.sqrt(sum((v.astype(float) ** 2).sum() for v in got.values())) - 3) < 1e-5


def test_what_needs_all_updates_cannot_come_before(rng):
    x = np.zeros(3, np.float32)
    for before in (ARC(1), Krum(1), 2.0):
        with pytest.raises(InvalidInputError, match="need all updates at once"):
            Accumulator(x, before=before)
    with pytest.raises(InvalidInputError, match="center"):
        Accumulator(x, center=x)
    with pytest.raises(InvalidInputError, match="center: expected shape"):
        Accumulator(x, before=Clipping(1.0), center=np.zeros(4, np.float32))
    with pytest.raises(NonFiniteError, match="center"):
        Accumulator(x, before=Clipping(1.0), center=np.float32([1, np.inf, 0]))


def test_accumulators_that_clip_differently_cannot_be_merged():
    x, v = np.zeros(3, np.float32), np.ones(3, np.float32)
    for one, two in (
        ({}, {"before": Clipping(1.0)}),
        ({"before": Clipping(1.0)}, {"before": Clipping(2.0)}),
        ({"before": Clipping(1.0)}, {"before": Clipping(1.0), "center": v}),
        ({"before": Clipping(1.0), "center": x}, {"before": Clipping(1.0), "center": v}),
    ):
        with pytest.raises(InvalidInputError, match="same clipping"):
            Accumulator(x, **one).merge(Accumulator(x, **two).add(v))
    same = {"before": Clipping(1.0), "center": v}
    Accumulator(x, **same).merge(Accumulator(x, **{**same, "center": v.copy()}).add(v))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ACCUMULATE)
def test_the_result_may_go_into_given_memory(dtype, rng):
    updates = clients(rng)
    total = stream(updates, WEIGHTS, dtype=dtype)
    want = total.result()
    out = {k: np.full_like(x, 7) for k, x in updates[0].items()}
    assert total.result(out=out) is out
    strided = {**out, "w": np.full((20, 62), 7, np.float32)[:, ::2]}
    total.result(out=strided)
    last = updates[-1]
    total.result(out=last)
    for k, x in want.items():
        for got in (out, strided, last):
            assert got[k].tobytes() == x.tobytes(), k


def test_a_result_does_not_go_where_it_does_not_fit():
    x = np.zeros(3, np.float32)
    total = Accumulator(x).add(x)
    with pytest.raises(InvalidInputError, match="out: expected shape"):
        total.result(out=np.zeros(4, np.float32))
    with pytest.raises(DTypeError, match="out"):
        total.result(out=np.zeros(3))
    frozen = np.zeros(3, np.float32)
    frozen.setflags(write=False)
    with pytest.raises(InvalidInputError, match="read-only"):
        total.result(out=frozen)
    with pytest.raises(InvalidInputError, match="nothing of positive weight"):
        Accumulator(x).result(out=x)


def test_an_accumulator_holds_nothing_of_the_update_it_was_made_from():
    x = np.zeros(100_000, np.float16)
    total = Accumulator(x).add(x)
    assert total.nbytes == 400_000
    assert len(pickle.dumps(total)) < 410_000


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_updates_stream_about_a_centre(rng):
    import torch

    updates = [torch.from_numpy(u["w"]).to(torch.bfloat16) for u in clients(rng)]
    center = torch.full((20, 31), 0.25, dtype=torch.bfloat16)
    total = stream(updates, WEIGHTS, before=Clipping(4.0), center=center)
    got = total.result(out=torch.empty_like(center))
    want = CenteredClipping(radius=4.0)(updates, WEIGHTS, center=center)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want.float()).abs().max() <= EPS["bfloat16"]
