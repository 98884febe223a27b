"""The loss of Hierarchical Reasoning Model and Tiny Recursive Models: same call, same training."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flcore.integrations.hrm import softmax_cross_entropy, stablemax_cross_entropy

VOCABULARY, LENGTH, BATCH = 11, 81, 8  # Sudoku
X = [[[2.0, 0, -1, -3], [0, 0, 0, 0], [1, -1, 5, 0.5]]]
Y = [[0, -100, 2]]


def eager(logits, labels, ignore_index=-100, valid_mask=None):
    """The projects' contract in float64 eager code."""
    x = logits.to(torch.float64)
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    log_p = torch.log(s / s.sum(dim=-1, keepdim=True))
    if valid_mask is None:
        valid_mask = labels != ignore_index
    index = torch.where(valid_mask, labels, 0).to(torch.long).unsqueeze(-1)
    rows = torch.gather(log_p, index=index, dim=-1).squeeze(-1)
    return -torch.where(valid_mask, rows, 0)


def sequence_loss(loss, logits, labels):
    """Mean of a sequence over its valid tokens, sum over the batch: what both projects do next."""
    count = (labels != -100).sum(-1)
    per_token = loss(logits, labels, ignore_index=-100)
    return (per_token / count.clamp_min(1).unsqueeze(-1)).sum()


def test_the_contract_by_hand():
    logits = torch.tensor(X, requires_grad=True)
    for kind in (torch.int32, torch.int64):
        labels = torch.tensor(Y, dtype=kind)
        loss = stablemax_cross_entropy(logits, labels)
        assert loss.dtype == torch.float64 and loss.shape == labels.shape
        want = torch.tensor([[0.45953232937844, 0, 0.510825623765991]], dtype=torch.float64)
        torch.testing.assert_close(loss, want, rtol=5e-7, atol=0)
        total = sequence_loss(stablemax_cross_entropy, logits, labels)
        assert total.item() == pytest.approx(0.485178976772216, rel=5e-7)
        (grad,) = torch.autograd.grad(total, logits)
        assert (grad[0, 1] == 0).all()
    assert stablemax_cross_entropy(logits, labels, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_of_the_eager_code(dtype):
    torch.manual_seed(1)
    whole = (300 * torch.randn(BATCH, LENGTH + 3, VOCABULARY)).to(dtype)
    whole[:, :, 0] = 1  # NaN gradients in eager bfloat16
    logits = whole[:, 3:].detach().requires_grad_()  # without a prefix, as HRM: strides of `whole`
    assert not logits.is_contiguous()
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), dtype=torch.int32)
    mask = torch.rand(BATCH, LENGTH) < 0.7
    masked = torch.where(mask, labels, -100)
    upstream = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    wide = logits.detach().double().requires_grad_()
    want = eager(wide, masked)
    (slope,) = torch.autograd.grad(want, wide, upstream)
    for target, valid in ((masked, None), (labels, mask), (masked.t().contiguous().t(), None)):
        got = stablemax_cross_entropy(logits, target, valid_mask=valid)
        torch.testing.assert_close(got, want, rtol=5e-7, atol=0)
        (grad,) = torch.autograd.grad(got, logits, upstream)
        assert grad.dtype == dtype
        unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(grad.double(), slope, rtol=1e-6 + unit, atol=1e-30)
    before = whole.clone()
    stablemax_cross_entropy(logits, masked).sum().backward()
    assert torch.equal(whole, before)  # the caller reads its logits afterwards


def test_softmax_of_the_configuration():
    logits, labels = torch.randn(3, 5, 7).bfloat16(), torch.randint(0, 7, (3, 5), dtype=torch.int32)
    labels[0, 2] = -100
    want = torch.nn.functional.cross_entropy(
        logits.float().view(-1, 7), labels.long().view(-1), reduction="none"
    ).view(3, 5)
    got = softmax_cross_entropy(logits, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


class Model(torch.nn.Module):
    """Two transformer layers over tokens of a puzzle, and a halting value a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 32)
        self.places = torch.nn.Parameter(0.02 * torch.randn(LENGTH, 32))
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.halt = torch.nn.Linear(32, VOCABULARY), torch.nn.Linear(32, 1)

    def forward(self, inputs):
        state = self.body(self.tokens(inputs) + self.places)
        return self.head(state), self.halt(state[:, 0]).squeeze(-1)


def head(loss, model, inputs, labels):
    """Loss head of the projects: tokens, halting target from the argmax of the same logits."""
    logits, halt = model(inputs)
    with torch.no_grad():
        valid = labels != -100
        right = (valid & (logits.argmax(-1) == labels)).sum(-1) == valid.sum(-1)
    halting = torch.nn.functional.binary_cross_entropy_with_logits(
        halt, right.to(halt.dtype), reduction="sum"
    )
    return (sequence_loss(loss, logits, labels) + 0.5 * halting) / BATCH


def batches(steps: int):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        solution = torch.randint(2, VOCABULARY, (BATCH, LENGTH), generator=generator)
        given = torch.rand(BATCH, LENGTH, generator=generator) < 0.4
        yield torch.where(given, solution, 1), torch.where(given, -100, solution).to(torch.int32)


def curve(loss, compiled: bool = False) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
    values = []
    for inputs, labels in batches(20):
        optimizer.zero_grad()
        value = step(loss, model, inputs, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


@pytest.fixture
def one_thread():
    """A model this small is slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_twenty_steps_have_the_loss_curve_of_the_eager_code():
    want = curve(eager)
    assert want[-1] < 0.9 * want[0]
    assert curve(stablemax_cross_entropy) == pytest.approx(want, rel=1e-5)
    assert curve(stablemax_cross_entropy, compiled=True) == pytest.approx(want, rel=1e-5)
