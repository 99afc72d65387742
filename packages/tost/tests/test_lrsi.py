"""The learned scales, against finite differences and a loop per tensor."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tenfold_tost import Ghosts, Lrsi, ScaleAdam, SparseRecipe, apply_masks, create_model, erk_masks, learn_scales
from tenfold_tost.lrsi import _iteration, _Scales, batch_statistics, gradient_norm, scalable_parameters


def net() -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double()


def stream(seed: int = 0, size: int = 6):
    draws = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(size, 1, 4, 4, generator=draws, dtype=torch.float64)
        yield x, torch.randint(0, 3, (size,), generator=draws)


def value(model: nn.Module, state: _Scales, alpha: torch.Tensor, source, settings: Lrsi, step) -> float:
    """What an iteration minimises, written out: the gradient's norm, or the loss at a constant step from p."""
    (x0, y0), (x1, y1) = next(source), next(source)
    p = {name: t.detach().requires_grad_() for name, t in state.parameters(alpha).items()}
    loss = cross_entropy(functional_call(model, p, (torch.cat([x0, x1]),)), torch.cat([y0, y1]))
    gradients = torch.autograd.grad(loss, list(p.values()))
    if step is None:
        return float(gradient_norm(gradients, settings.target))
    x2, y2 = next(source)
    if settings.no_overlap:
        x0, y0 = next(source)
    moved = {name: p[name].detach() - step[name] for name in p}
    joined = functional_call(model, moved, (torch.cat([x0, x2]),))
    return float(cross_entropy(joined, torch.cat([y0, y2]))) / settings.eta


@pytest.mark.parametrize("target", ["sgd", "adam"])
@pytest.mark.parametrize("no_overlap", [False, True])
@pytest.mark.parametrize("bound", [True, False])
def test_the_derivative_of_both_steps(target: str, no_overlap: bool, bound: bool) -> None:
    """Finite differences in every factor; the lookahead's step is held constant."""
    model = net()
    chosen = Lrsi(gamma=1e-6 if bound else 1e6, target=target, no_overlap=no_overlap)
    start = {name: p.detach().clone() for name, p in scalable_parameters(model).items()}
    state = _Scales(start, chosen)
    state.adam.alpha = torch.linspace(0.7, 1.3, len(start), dtype=torch.float64)
    with batch_statistics(model):
        ours, is_constraint, _ = _iteration(model, state, stream(), chosen, {}, cross_entropy)
        assert is_constraint == bound
        step = None
        if not bound:
            source = stream()
            (x0, y0), (x1, y1) = next(source), next(source)
            p = {name: t.detach().requires_grad_() for name, t in state.parameters().items()}
            loss = cross_entropy(functional_call(model, p, (torch.cat([x0, x1]),)), torch.cat([y0, y1]))
            g = torch.autograd.grad(loss, list(p.values()))
            norm = gradient_norm(g, target)
            steps = [part.sign() if target == "adam" else part / norm for part in g]
            step = {name: chosen.eta * part for name, part in zip(p, steps, strict=True)}
        h = 1e-5
        for j in range(len(start)):
            up, down = state.adam.alpha.clone(), state.adam.alpha.clone()
            up[j] += h
            down[j] -= h
            slope = (
                value(model, state, up, stream(), chosen, step) - value(model, state, down, stream(), chosen, step)
            ) / (2 * h)
            assert float(ours[j]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@given(seed=st.integers(0, 100), clip=st.sampled_from([0.0, 0.5]))
@settings(max_examples=15, deadline=None)
def test_scale_adam_against_a_loop(seed: int, clip: float) -> None:
    """Two first moments with a counter each, one second moment with both counters, written tensor by tensor."""
    draws = torch.Generator().manual_seed(seed)
    n = 4
    lr, floor = torch.full((n,), 0.3, dtype=torch.float64), torch.tensor([0.01, 0.0, 0.5, 0.0], dtype=torch.float64)
    alive = torch.tensor([True, True, True, False])
    adam = ScaleAdam(alive, lr, floor, clip)
    alpha, m, v, counts = [1.0] * n, [[0.0] * n for _ in range(2)], [0.0] * n, [[0] * n for _ in range(2)]
    for _ in range(12):
        kind = int(torch.randint(2, (), generator=draws))
        gradient = torch.randn(n, generator=draws, dtype=torch.float64)
        adam.step(gradient, bool(kind))
        for j in range(n):
            if not alive[j] or alpha[j] == 0:
                continue
            d = float(gradient[j])
            d = max(-clip, min(clip, d)) if clip else d
            counts[kind][j] += 1
            m[kind][j] = 0.9 * m[kind][j] + 0.1 * d
            v[j] = 0.999 * v[j] + 0.001 * d * d
            spread = math.sqrt(v[j] / (1 - 0.999 ** (counts[0][j] + counts[1][j]))) + 1e-8
            alpha[j] = max(alpha[j] - 0.3 / (1 - 0.9 ** counts[kind][j]) * m[kind][j] / spread, float(floor[j]))
    assert adam.alpha.tolist() == pytest.approx(alpha, rel=1e-9)
    assert alpha[3] == 1.0


@pytest.mark.parametrize(("gamma", "no_overlap", "taken"), [(1e-9, False, 2), (1e9, False, 3), (1e9, True, 4)])
def test_batches_an_iteration_takes(gamma: float, no_overlap: bool, taken: int) -> None:
    given_out = itertools.count()
    source = (batch for batch in stream() if next(given_out) >= 0)
    report = learn_scales(net(), source, Lrsi(iters=3, gamma=gamma, no_overlap=no_overlap))
    assert next(given_out) == 3 * taken
    assert report.constrained == [gamma < 1] * 3


def test_masks_and_running_statistics_survive() -> None:
    """Whole tensors are scaled: zeros stay, running statistics and modes too, and every factor keeps its bound."""
    torch.manual_seed(0)
    model = create_model("digits_net").train()
    masks = erk_masks(model, 0.1)
    apply_masks(model, masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = iter(lambda: (torch.randn(8, 1, 8, 8), torch.arange(8)), None)
    report = learn_scales(model, source, Lrsi(iters=4, lr=0.2), masks)
    assert model.training
    assert all(module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    for name, tensor in model.state_dict().items():
        if name in report.scales:
            torch.testing.assert_close(tensor, before[name] * report.scales[name])
        else:
            assert torch.equal(tensor, before[name]), name
    assert all(scale >= 0.01 for name, scale in report.scales.items() if "weight" in name)
    assert any(scale != 1.0 for scale in report.scales.values())


def test_a_masked_lookahead_has_a_smaller_norm() -> None:
    """Gradients of pruned weights count in the release's norm and not in ours."""
    torch.manual_seed(0)
    model = create_model("digits_net")
    masks = erk_masks(model, 0.05)
    apply_masks(model, masks)
    norms = {}
    for masked in (True, False):
        torch.manual_seed(1)
        batch = torch.randn(8, 1, 8, 8), torch.arange(8)
        chosen = Lrsi(iters=1, mask_lookahead=masked)
        norms[masked] = learn_scales(model, itertools.repeat(batch), chosen, masks).norms[0]
    assert norms[True] < norms[False]


def test_ghost_skips_are_scaled_too() -> None:
    model = create_model("digits_net")
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    Ghosts(model, SparseRecipe(smoothing=None), batch[0])
    report = learn_scales(model, itertools.repeat(batch), Lrsi(iters=1))
    assert "0.ghost_skip.jump.weight" in report.scales


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match="ended"):
        learn_scales(net(), itertools.islice(stream(), 3), Lrsi(iters=2))
    with pytest.raises(ValueError, match="no convolution"):
        learn_scales(nn.ReLU(), stream())
    with pytest.raises(ValueError, match="eta"):
        Lrsi(eta=0.0)
