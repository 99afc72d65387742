"""Attacks: the ball, the ascent, and what an attack must not touch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from tenfold_shared.attacks import (
    apgd,
    apgd_checkpoints,
    held,
    input_gradient,
    pgd,
    project,
    targeted_dlr,
    uniform_start,
)

EPS = 8 / 255


def images(seed: int = 0, n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.floats(0.0, 0.5), st.floats(0.0, 1.0), st.integers(0, 4))
def test_a_perturbation_stays_in_the_ball_and_the_image_in_its_range(seed, eps, step_size, steps) -> None:
    x = images(seed)
    weights = torch.randn(x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    delta = pgd(lambda a: (a * weights).sum(), x, eps=eps, step_size=step_size, steps=steps)
    assert delta.abs().max() <= eps + 1e-12
    assert (x + delta).min() >= 0
    assert (x + delta).max() <= 1 + 1e-12


def test_a_linear_loss_is_raised_to_its_maximum() -> None:
    """Where the gradient is constant, the corner of ball and range is the worst case."""
    x, weights = images(), torch.randn(3, 6, 6, dtype=torch.float64)
    weights[0, 0, 0] = 0.0
    delta = pgd(lambda a: (a * weights).sum(), x, eps=EPS, step_size=EPS / 2, steps=4, random_start=False)
    torch.testing.assert_close(delta, project(x, EPS * weights.sign().expand_as(x), EPS))
    assert (delta[:, 0, 0, 0] == 0).all()  # sign(0) is 0


def test_values_a_sample_attack_each_sample_alone() -> None:
    model, x, y = network().eval(), images(), torch.tensor([0, 1, 2, 0])
    start = uniform_start(x, EPS)
    sizes = {"eps": EPS, "step_size": EPS / 4, "steps": 3}
    together = pgd(lambda a: cross_entropy(model(a), y, reduction="none"), x, start=start, **sizes)
    for i in range(4):
        own = slice(i, i + 1)
        alone = pgd(lambda a, own=own: cross_entropy(model(a), y[own]), x[own], start=start[own], **sizes)
        torch.testing.assert_close(alone, together[own])


def test_one_step_is_the_sign_of_the_gradient() -> None:
    model, x, y = network().eval(), images(), torch.tensor([0, 1, 2, 0])

    def loss(a: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(a), y)

    expected = project(x, EPS * input_gradient(loss, x).sign(), EPS)
    one = pgd(loss, x, eps=EPS, step_size=EPS, steps=1, random_start=False)
    torch.testing.assert_close(one, expected)
    assert loss(x + expected) > loss(x)


def test_a_given_start_is_taken_as_it_is() -> None:
    start = torch.full((4, 3, 6, 6), 3.0, dtype=torch.float64)
    assert torch.equal(pgd(lambda a: a.sum(), images(), eps=EPS, step_size=EPS, steps=0, start=start), start)


def test_the_generator_decides_the_start() -> None:
    draw = [uniform_start(images(), EPS, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_an_attack_leaves_the_model_as_it_was() -> None:
    """Statistics, gradients, modes and what is trainable; a frozen layer in eval mode stays so."""
    model = network().train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with held(model):
        pgd(lambda a: cross_entropy(model(a), torch.tensor([0, 1, 2, 0])), images(), eps=EPS, step_size=EPS, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model[1].training
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]


def test_it_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        delta = pgd(lambda a: a.square().sum(), images(), eps=EPS, step_size=EPS, steps=1, random_start=False)
    assert (delta > 0).any()


@pytest.mark.parametrize("changes", [{"eps": -0.1}, {"step_size": -1.0}, {"steps": -1}, {"clip": (1.0, 0.0)}])
def test_sizes_that_are_none_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"negative|below"):
        pgd(lambda a: a.sum(), images(), **{"eps": EPS, "step_size": EPS, "steps": 1, **changes})


# -- Auto-PGD -------------------------------------------------------------------------------------------------------------


def test_auto_pgd_looks_back_where_its_paper_does() -> None:
    assert sorted(apgd_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert apgd_checkpoints(1) == {1}


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.floats(0.0, 0.5), st.integers(0, 9))
def test_auto_pgd_stays_in_the_ball_and_returns_the_best_it_met(seed, eps, steps) -> None:
    x, met = images(seed), []

    def loss(a: torch.Tensor) -> torch.Tensor:
        met.append((5 * a).sin().flatten(1).sum(1))
        return met[-1]

    found, value = apgd(loss, x, eps=eps, steps=steps, generator=torch.Generator().manual_seed(seed))
    assert len(met) == steps + 1  # one gradient a step, and one at the start
    torch.testing.assert_close(value, torch.stack(met).detach().amax(0))
    torch.testing.assert_close((5 * found).sin().flatten(1).sum(1), value)
    assert (found - x).abs().max() <= eps + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-12


def test_auto_pgd_reaches_the_corner_of_a_linear_loss() -> None:
    x, weights = images(), torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = apgd(lambda a: (a * weights).flatten(1).sum(1), x, eps=EPS, steps=4)
    torch.testing.assert_close(found, x + project(x, EPS * weights.sign().expand_as(x), EPS))


def test_auto_pgd_climbs_narrow_hills_that_fixed_steps_jump_over() -> None:
    """The distance to a point inside the ball: steps of a fixed size end a step away from it, halved ones do not."""
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    peak = x + 0.0123

    def loss(a: torch.Tensor) -> torch.Tensor:
        return -(a - peak).square().flatten(1).sum(1)

    fixed = pgd(loss, x, eps=0.1, step_size=0.05, steps=40, random_start=False)
    _, value = apgd(loss, x, eps=0.1, steps=40, start=torch.zeros_like(x))
    assert (value > loss(x + fixed)).all()
    assert (value > -1e-4).all()


def test_the_targeted_ratio_is_that_of_a_loop_and_scales_out() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, targets = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 4])
    found = targeted_dlr(logits, labels, targets)
    for i, row in enumerate(logits.tolist()):
        first, _, third, fourth, *_ = sorted(row, reverse=True)
        expected = -(row[labels[i]] - row[targets[i]]) / (first - (third + fourth) / 2)
        assert found[i].item() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(targeted_dlr(7 * logits, labels, targets), found)
    assert torch.isfinite(targeted_dlr(logits[:, :2], labels % 2, 1 - labels % 2)).all()
    four, few = torch.tensor([[4.0, 3.0, 2.0, 0.0]]), torch.tensor([[4.0, 3.0, 0.0]])  # the third and fourth; the last
    ratios = [targeted_dlr(row, torch.tensor([0]), torch.tensor([1])).item() for row in (four, few)]
    assert ratios == pytest.approx([-1 / 3, -1 / 4])
