"""Curvature, operations and zeros against values known otherwise."""

import pytest
import torch

from tenfold_tost.analysis import loss_gradient_norm, loss_slice, top_eigenvalue
from tenfold_tost.evaluate import operations, zero_rates


def test_curvature_against_the_full_hessian() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 1, 2, 2, dtype=torch.float64), torch.randint(0, 3, (20,))
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    value, vector = top_eigenvalue(model, x, y, iterations=200)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(hessian).max()), rel=1e-4)
    assert loss_gradient_norm(model, x, y) == pytest.approx(float(gradient.detach().norm()))
    down, here, up = loss_slice(model, x, y, vector, [-1e-3, 0.0, 1e-3])
    assert here == pytest.approx(float(loss))
    assert (down - 2 * here + up) / 1e-6 == pytest.approx(value, rel=1e-2)


def test_operations_and_zeros() -> None:
    """A 3x3 convolution of 2 x 1 channels on 4x4 pixels and a linear layer, by hand."""
    conv = torch.nn.Conv2d(1, 2, 3, padding=1, bias=False)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3))
    with torch.no_grad():
        conv.weight.fill_(-1.0)
        conv.weight[0, 0, 0] = 0.0
    counted = operations(model, torch.zeros(5, 1, 4, 4))
    assert counted["flops_dense"] == 2 * (18 * 16 + 96)
    assert counted["flops_sparse"] == 2 * 18 * 16 * 15 // 18 + 2 * 96
    assert zero_rates(model, torch.ones(2, 1, 4, 4)) == {"1": 1.0}
