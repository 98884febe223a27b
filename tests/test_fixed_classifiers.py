"""Fixed classifiers: geometry of the matrices, fast forms against the products, training."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore import nn
from flcore.errors import FlcoreError, InvalidInputError
from flcore.losses import balanced_softmax_cross_entropy


def gram_of_a_simplex(classes):
    return classes / (classes - 1) * (np.eye(classes) - 1 / classes)


@pytest.mark.parametrize(("classes", "features"), [(2, 2), (5, 5), (10, 64), (100, 128)])
def test_frame(classes, features):
    m = nn.simplex_etf(classes, features, seed=3)
    assert m.shape == (features, classes) and m.dtype == np.float64
    np.testing.assert_allclose(m.T @ m, gram_of_a_simplex(classes), atol=1e-12)
    np.testing.assert_allclose(m.sum(1), 0, atol=1e-12)
    assert np.array_equal(m, nn.simplex_etf(classes, features, seed=3))
    assert not np.allclose(m, nn.simplex_etf(classes, features, seed=4))


@pytest.mark.parametrize(("classes", "features"), [(2, 2), (3, 11), (10, 64)])
@pytest.mark.parametrize("normalize", [True, False])
def test_sparse_frame(classes, features, normalize):
    head = nn.SimplexETF(features, classes, sparse=True, seed=5, scale=2.0, normalize=normalize)
    m = head.matrix.double().numpy()
    np.testing.assert_allclose(m.T @ m, gram_of_a_simplex(classes), atol=1e-6)
    h = torch.randn(7, features, dtype=torch.float64, requires_grad=True)
    z = torch.nn.functional.normalize(h, dim=1) if normalize else h
    torch.testing.assert_close(head(h), 2.0 * z @ head.matrix.double(), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(head, h)


@pytest.mark.parametrize("classes", [2, 3, 4, 17])
def test_simplex(classes):
    w = nn.d_simplex(classes)
    np.testing.assert_allclose(w @ w.T, gram_of_a_simplex(classes), atol=1e-12)
    head = nn.DSimplex(classes, normalize=False)
    h = torch.randn(6, classes - 1, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(head(h), h @ torch.from_numpy(w).T, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(head, h)
    assert not list(head.parameters()) and not head.state_dict()


def test_simplex_by_hand():
    expected = [[0.96225, -0.19245, -0.19245], [-0.57735] * 3]
    np.testing.assert_allclose(nn.d_simplex(4)[[0, 3]], expected, atol=1e-5)
    expected = [[0.9659258263, -0.2588190451], [-0.2588190451, 0.9659258263], [-0.7071067812] * 2]
    np.testing.assert_allclose(nn.d_simplex(3), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "bound"), [(100, 0.09492), (300, 0.04833), (500, 0.03164), (1000, 0), (2000, 0)]
)
def test_welch_bound(features, bound):
    assert nn.welch_bound(1000, features) == pytest.approx(bound, abs=5e-6)


@pytest.mark.parametrize("slice_rows", [130, 7])
def test_equiangular_vectors(slice_rows):
    seen = []
    b = nn.equiangular_basis_vectors(
        40, 20, 0.26, lr=0.01, slice_rows=slice_rows, progress=lambda *state: seen.append(state)
    )
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, atol=1e-12)
    largest = np.abs(b @ b.T - np.eye(40)).max()
    assert nn.welch_bound(40, 20) <= largest <= 0.26 + 1e-4
    assert seen[-1] == (len(seen) - 1, pytest.approx(largest)) and seen[0][1] > 0.4
    head = nn.EquiangularClassifier(b)
    z = torch.from_numpy(b)
    assert torch.equal(head(3 * z).argmax(1), torch.arange(40))
    torch.testing.assert_close(head(z).diagonal(), torch.full((40,), 1 / 0.07).double())


def test_equiangular_errors():
    with pytest.raises(InvalidInputError, match="Welch"):
        nn.equiangular_basis_vectors(1000, 100, 0.09)
    with pytest.raises(FlcoreError, match="after 3 steps"):
        nn.equiangular_basis_vectors(40, 20, 0.2, steps=3)


def test_fedetf_head():
    head = nn.FedETFHead(12, 4)
    assert {n for n, p in head.named_parameters()} == {
        "projection.weight",
        "projection.bias",
        "classifier.scale",
    }
    assert set(head.state_dict()) == set(dict(head.named_parameters()))
    before = head.classifier.matrix.clone()
    head(torch.randn(5, 12)).sum().backward()
    assert torch.equal(head.classifier.matrix, before)
    twin = nn.FedETFHead(12, 4)
    assert torch.equal(twin.classifier.matrix, before)
    assert float(head(torch.zeros(1, 12)).detach().abs().max()) < math.inf


@pytest.mark.parametrize("sparse", [False, True])
def test_personal_frame(sparse):
    head = nn.FedETFHead(12, 4, sparse=sparse)
    x = torch.randn(9, 12)
    before = head(x).detach()
    frame = head.personal_frame()
    torch.testing.assert_close(head(x).detach(), before, rtol=1e-5, atol=1e-5)
    head(x)[:, 0].sum().backward()
    assert frame.grad is not None and frame.grad.shape == (12, 4)
    assert torch.equal(copy.deepcopy(head).classifier.matrix, frame)


def test_modules_follow_dtype_and_have_a_scale():
    head = nn.SimplexETF(8, 4, scale=3.0, learn_scale=True)
    h = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert head(h).shape == (2, 3, 4) and head(h).dtype == torch.bfloat16
    assert list(head.state_dict()) == ["scale"]
    assert not nn.SimplexETF(8, 4).state_dict()


def test_features_find_their_vectors():
    """Balanced data, free features on the sphere: the optimum is h_y = m_y."""
    for head, size in ((nn.SimplexETF(16, 5, scale=4.0), 16), (nn.DSimplex(5, scale=4.0), 4)):
        torch.manual_seed(0)
        h = torch.randn(5, size, requires_grad=True)
        optimizer = torch.optim.Adam([h], 0.05)
        for _ in range(900):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(h), torch.arange(5)).backward()
            optimizer.step()
        m = head.matrix.T if size == 16 else head.matrix
        cosines = (torch.nn.functional.normalize(h.detach(), dim=1) * m).sum(1)
        assert float(cosines.min()) > 0.995


def test_dot_regression():
    frame = nn.SimplexETF(6, 3).matrix
    y = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(
        nn.dot_regression_loss(5 * frame.T[y], y, frame), torch.tensor(0.0), atol=1e-6, rtol=0
    )
    h = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    rows = nn.dot_regression_loss(h, y, frame, reduction="none")
    z = torch.nn.functional.normalize(h, dim=1)
    expected = 0.5 * ((z @ frame.double()).gather(1, y[:, None])[:, 0] - 1) ** 2
    torch.testing.assert_close(rows, expected)
    total = nn.dot_regression_loss(h, y, frame, reduction="sum")
    torch.testing.assert_close(total, expected.sum())


def test_a_fixed_head_and_balanced_softmax_learn_a_long_tail():
    torch.manual_seed(0)
    centres = torch.randn(4, 8)
    y = torch.cat([torch.full((n,), k) for k, n in enumerate((400, 100, 25, 10))])
    x = centres[y] + 0.7 * torch.randn(len(y), 8)
    net = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), nn.FedETFHead(16, 4, scale=10.0)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        balanced_softmax_cross_entropy(net(x), y, torch.bincount(y)).backward()
        optimizer.step()
    y_test = torch.arange(4).repeat(200)
    x_test = centres[y_test] + 0.7 * torch.randn(800, 8)
    assert float((net(x_test).argmax(1) == y_test).double().mean()) > 0.8


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.simplex_etf(5, 4),
        lambda: nn.simplex_etf(1, 4),
        lambda: nn.d_simplex(1),
        lambda: nn.DSimplex(1),
        lambda: nn.DSimplex(4)(torch.ones(2, 4)),
        lambda: nn.SimplexETF(4, 3, scale=0.0),
        lambda: nn.SimplexETF(2, 3, sparse=True),
        lambda: nn.EquiangularClassifier(torch.ones(3)),
        lambda: nn.EquiangularClassifier(torch.ones(3, 3), temperature=0.0),
        lambda: nn.dot_regression_loss(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(4, 2)),
        lambda: nn.dot_regression_loss(
            torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(3, 2), reduction="all"
        ),
    ],
)
def test_errors(make):
    with pytest.raises(InvalidInputError):
        make()
