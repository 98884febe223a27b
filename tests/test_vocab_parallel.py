"""Losses whose classes are divided among two processes against those of one."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")
distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.losses import (
    cross_entropy,
    linear_cross_entropy,
    stablemax_cross_entropy,
    stablemax_linear_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_stablemax_cross_entropy,
)

F = torch.nn.functional
LOSSES = {  # of a linear layer, of whole logits, of a part of them; name of the prior
    "stablemax": (
        stablemax_linear_cross_entropy,
        stablemax_cross_entropy,
        vocab_parallel_stablemax_cross_entropy,
        "prior",
    ),
    "softmax": (
        linear_cross_entropy,
        cross_entropy,
        vocab_parallel_cross_entropy,
        "log_prior",
    ),
}
KINDS = [(torch.float32, kind) for kind in ("even", "uneven", "masked", "far")]
KINDS += [(torch.float64, "uneven"), (torch.bfloat16, "even")]
CASES = [
    (name, reduction, *kind)
    for name, reduction, kind in itertools.product(LOSSES, ("mean", "sum", "none"), KINDS)
]
CLASSES, WIDTH, ROWS = 36, 16, (3, 30)


def problem(name, dtype, kind):
    """Tensors that every process makes alike, and where the second part begins."""
    torch.manual_seed(20240229)
    h, w, b = torch.randn(*ROWS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    y = torch.randint(0, CLASSES, ROWS)
    y[torch.rand(ROWS) < 0.3] = -100
    prior = torch.rand(CLASSES) + 0.1
    cut = 13 if kind == "uneven" else CLASSES // 2
    if kind == "masked":  # one part has no class that counts
        prior[:cut] = 0
        y = torch.where(y < 0, y, y % cut + cut)
    if kind == "far":  # the target's term is no float32 beside the other part's
        b[:cut] += 300
        y = torch.where(y < 0, y, y % cut + cut)
    if name == "softmax":
        prior = prior.log()
    return [t.to(dtype) for t in (h, w, b)], y, prior, cut


def results(name, reduction, dtype, kind, part=None):
    """Losses and gradients of hidden states, classifier, bias and logits."""
    linear, whole, divided, key = LOSSES[name]
    tensors, y, prior, cut = problem(name, dtype, kind)
    options = {"reduction": reduction, "z_loss": 0.01, "logit_scale": 0.8}
    z = F.linear(*tensors)
    h, w, b = tensors
    if part is None:
        h, w, b, z = (t.detach().requires_grad_() for t in (h, w, b, z))
        loss = linear(h, w, y, linear_bias=b, **{key: prior}, **options)
        other = whole(z, y, class_dim=-1, **{key: prior}, **options)
    else:
        here = slice(cut) if part == 0 else slice(cut, None)
        h, w, b, z = (t.detach().requires_grad_() for t in (h, w[here], b[here], z[..., here]))
        options.update({key: prior[here], "process_group": distributed.group.WORLD})
        if kind == "uneven":
            options["label_offset"] = cut * part
        loss = linear(h, w, y, linear_bias=b, chunk_rows=31, **options)
        other = divided(z, y, **options)
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
    if reduction != "none":
        upstream = torch.full_like(loss, 2.0)  # nothing is rounded by it
    return [
        loss.detach(),
        *torch.autograd.grad(loss, (h, w, b), upstream),
        other.detach(),
        *torch.autograd.grad(other, z, upstream),
    ]


def mistakes(part):
    """What a process says to labels that no part, or both, have."""
    (h, w, _), y, _, cut = problem("softmax", torch.float32, "even")
    group = distributed.group.WORLD
    said = []
    bad = y.clone()
    bad[1, 7] = CLASSES
    w, z = w[:cut], torch.randn(*ROWS, cut)
    for call in (
        lambda: stablemax_linear_cross_entropy(h, w, bad, process_group=group, chunk_rows=16),
        lambda: vocab_parallel_cross_entropy(z, bad, process_group=group),
        lambda: linear_cross_entropy(h, w, y.clamp(0, 1), process_group=group, label_offset=0),
        lambda: vocab_parallel_stablemax_cross_entropy(
            z, y.clamp(0, 1), process_group=group, prior=torch.zeros(cut)
        ),
    ):
        try:
            call()
            said.append(None)
        except LabelError as error:
            said.append((error.row, str(error)))
    return said


def work(part, folder):
    """Run everything in one of two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=part, world_size=2
    )
    found = {case: results(*case, part) for case in CASES}
    torch.save((found, mistakes(part)), f"{folder}/{part}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("parts"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{part}.pt", weights_only=False) for part in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c))
def test_equals_one_process(parts, case):
    dtype = case[2]
    first, second = (found[case] for found, _ in parts)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(first[4], second[4])
    joined = [
        first[0],
        first[1],
        torch.cat([first[2], second[2]]),
        torch.cat([first[3], second[3]]),
        first[4],
        torch.cat([first[5], second[5]], -1),
    ]
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    exact = 1e-14 if dtype == torch.float64 else 1e-6
    tolerances = (exact, rounding, rounding, rounding, exact, rounding)
    for got, want, tolerance in zip(joined, results(*case), tolerances, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.isfinite(want).all()
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error <= tolerance, float(error)


def test_labels_of_no_part_are_named_in_all_processes(parts):
    (_, first), (_, second) = parts
    for (row, message), (other, _) in zip(first, second, strict=True):
        assert row == other and f"target: row {row} has label" in message
    assert first[0][0] == first[1][0] == 37


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    init = f"file://{tmp_path}/alone"
    distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", LOSSES)
def test_one_part_and_bad_input(alone, name):
    (h, w, _), y, _, _ = problem("softmax", torch.float32, "even")
    prior = torch.rand(CLASSES, requires_grad=True)
    linear, whole, divided, key = LOSSES[name]
    z = (h @ w.T).requires_grad_()
    want = whole(z, y, class_dim=-1)
    got = divided(z, y, process_group=alone)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(linear(h, w, y, process_group=alone), want)
    (once,) = torch.autograd.grad(got, z, create_graph=True)
    torch.testing.assert_close(once, torch.autograd.grad(want, z)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        once.sum().backward()
    for message, options in (
        ("weight: not with", {"weight": torch.rand(CLASSES)}),
        ("label_smoothing: not with", {"label_smoothing": 0.1}),
        ("reduction: expected", {"reduction": "avg"}),
    ):
        with pytest.raises(InvalidInputError, match=message):
            linear(h, w, y, process_group=alone, **options)
    soft = torch.softmax(z.detach(), -1)
    for call in (
        lambda: linear(h, w, soft, process_group=alone),
        lambda: divided(z, soft, process_group=alone),
    ):
        with pytest.raises(InvalidInputError, match="target: expected labels"):
            call()
    for error, message, call in (
        (DTypeError, "logits: expected", lambda: divided([1.0], y, process_group=alone)),
        (
            InvalidInputError,
            "target: expected labels of shape",
            lambda: divided(z, y[0], process_group=alone),
        ),
        (
            InvalidInputError,
            "prior: this loss",
            lambda: divided(z, y, process_group=alone, **{key: prior}),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    empty = divided(z[:0], y[:0], process_group=alone, reduction="sum")
    assert not empty
