"""What is recorded for two and three clients runs for any number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.algorithms import DataView
from flcore.simulation._minibatches import blocks, round_up
from flcore.simulation._replay import Replay
from flcore.simulation._trace import UntraceableError, record

Shapes = Callable[[int], list[tuple[int, ...]]]


def check(function: Callable[..., Any], shapes: Shapes, into: tuple[int, ...] = ()) -> Replay:
    """Replay a function for several numbers of clients, twice with other values in place."""
    trace = record(function, lambda n: [torch.zeros(shape) for shape in shapes(n)])
    for n in (1, 2, 5):
        inputs = [torch.randn(shape) for shape in shapes(n)]
        outputs = [tensor.clone() for tensor in function(*inputs)]
        places = {i: torch.full_like(outputs[i], 7.0) for i in into}
        replay = Replay(trace, n, inputs, places)
        for i, place in places.items():
            assert replay.outputs[i].data_ptr() == place.data_ptr()
        for _ in range(2):
            for place in inputs:
                place.copy_(torch.randn(place.shape))
            for call in replay.early + replay.late:
                call()
            for found, expected in zip(replay.outputs, function(*inputs), strict=True):
                torch.testing.assert_close(found, expected)
    return replay


def test_a_product_and_its_bias():
    def function(w, b, x):
        return [torch.bmm(x, w.transpose(1, 2)) + b[:, None]]

    replay = check(function, lambda n: [(n, 3, 4), (n, 3), (n, 5, 4)])
    assert len(replay.early) == 2  # views are taken once


def test_outputs_are_written_where_they_belong():
    def function(x, y):
        return [torch.bmm(x, y).transpose(1, 2).reshape(len(x), -1), x.sum(1)]

    replay = check(function, lambda n: [(n, 3, 4), (n, 4, 2)], into=(1,))
    assert len(replay.early + replay.late) == 3
    replay = check(
        lambda x, y: [torch.bmm(x, y).mT, x * 2], lambda n: [(n, 3, 4), (n, 4, 2)], (0, 1)
    )
    assert len(replay.early + replay.late) == 2


def test_an_output_that_is_an_input_or_constant():
    check(lambda x: [x, torch.ones_like(x), x.mT, x.mT], lambda n: [(n, 2, 3)], into=(0, 1, 2, 3))


def test_the_same_is_computed_once():
    def function(x):
        return [x.exp() + x.exp() * 1.0, x.exp()]

    assert len(check(function, lambda n: [(n, 3)]).early) == 3


def test_numbers_of_clients_in_the_arguments():
    def function(x):
        n, k = x.shape
        return [x.new_zeros(3 * n + 1, k).sum() + x.reshape(n * k).cumsum(0)]

    check(function, lambda n: [(n, 3)])


def test_writing_to_own_tensors():
    def function(x, y):
        made = torch.zeros_like(x)
        made[:, 1:].add_(y[:, 1:])
        before = made.exp()
        made.mul_(x).relu_()
        return [made + before, before]

    check(function, lambda n: [(n, 3), (n, 3)], into=(0, 1))


def test_operators_with_several_results():
    def function(x):
        values, index = x.max(1)
        parts = x.split([1, 2], 1)
        return [values, index.float(), parts[1] * 2, parts[0]]

    check(function, lambda n: [(n, 3)], into=(0, 2))


def test_what_comes_late():
    def function(late, x):
        y = x * 2
        return [y, late + y, x.exp() * late]

    trace = record(function, lambda n: [torch.zeros(n, 3)] * 1 + [torch.zeros(n, 3)])
    late, x = torch.zeros(4, 3), torch.randn(4, 3)
    replay = Replay(trace, 4, [late, x], {}, late=trace.inputs[0])
    for call in replay.early:
        call()
    late.copy_(replay.outputs[0])
    for call in replay.late:
        call()
    torch.testing.assert_close(replay.outputs[1], 4 * x)
    assert (len(replay.early), len(replay.late)) == (2, 2)


WEIGHT = torch.ones(3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: [x + torch.randn(3)], "random numbers"),
        (lambda x: [x if x.sum() > 0 else -x], "values"),
        (lambda x: [x * float(x.max())], "values"),
        (lambda x: [x.add_(1)], "did not make"),
        (lambda x: [x * WEIGHT.add_(1)], "did not make"),
        (lambda x: [x[x > 0]], "shapes in it depend"),
        (lambda x: [x * (1.0 / len(x))], "depends on the number of clients"),
        (lambda x: [sum(x.unbind())], "different"),
        (lambda x: [x.exp() if len(x) > 2 else x.log()], "different"),
        (lambda x: [x.no_such_thing()], "no_such_thing"),
    ],
)
def test_what_cannot_be_recorded(function, message):
    with pytest.raises(UntraceableError, match=message):
        record(function, lambda n: [torch.zeros(n, 3)])


# ---- mini-batches ------------------------------------------------------------------------------


def test_sizes_are_rounded_up_by_little():
    rounded = [round_up(n) for n in range(1, 5000)]
    assert rounded == sorted(rounded)
    assert all(n <= r <= max(n + 1, 1.34 * n) for n, r in enumerate(rounded, 1))
    assert len(set(rounded)) < 45
    assert all(round_up(n) == n for n in (1, 10, 16, 20, 32, 50, 64, 128))


@pytest.mark.parametrize("longest", [1, 300, 1 << 21])
def test_blocks_hold_all_batches(longest, monkeypatch):
    monkeypatch.setattr("flcore.simulation._minibatches.LONGEST", longest)
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(1, 60, 12).tolist(), reverse=True)
    views = [DataView.epochs(np.arange(n), 3, 10, rng) for n in lengths]
    views.sort(key=lambda view: -len(view.sizes))
    begins = np.cumsum([0, *(len(view.order) for view in views)])
    seen: list[list[int]] = [[] for _ in views]
    sizes: list[list[int]] = [[] for _ in views]
    step = 0
    for block in blocks(views):
        assert block.first == step
        step += len(block.index)
        assert block.index.shape == block.weight.shape
        assert block.index.min() >= 0 and block.index.max() < begins[-1]
        for index, weight in zip(block.index, block.weight, strict=True):
            for i, (row, share) in enumerate(zip(index, weight, strict=True)):
                count = int((share > 0).sum())
                if count:
                    np.testing.assert_allclose(share[:count], 1 / count, rtol=1e-6)
                    seen[i] += row[:count].tolist()
                    sizes[i].append(count)
    assert step == len(views[0].sizes)
    for i, view in enumerate(views):
        assert seen[i] == list(range(begins[i], begins[i + 1]))
        assert sizes[i] == view.sizes
