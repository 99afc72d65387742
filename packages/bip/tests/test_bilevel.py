"""The implicit gradient and the two steps."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from tenfold_bip import (
    bilevel_iteration,
    create_model,
    get_masks,
    implicit_gradient,
    implicit_gradient_hessian,
    m_step,
    mask_iou,
    prune_parametrize,
    split_parameters,
    theta_step,
)
from tenfold_bip.bilevel import add_implicit_term_
from tenfold_bip.masking import masked_layers
from tenfold_bip.released import (
    hydra_step,
    released_accelerate_step,
    released_bilevel_step,
    released_optimizer,
)
from tenfold_bip.schedules import cosine, mask_step, step


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (10,), generator=generator)


def optimizers(model: nn.Module, decay: float = 0.0) -> tuple[SGD, SGD]:
    theta, scores = split_parameters(model)
    return SGD(theta, 0.1, 0.9, weight_decay=decay), SGD(scores, 0.1, 0.9, weight_decay=decay)


def snapshot(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


# -- the implicit gradient --------------------------------------------------------------------------------------------


def test_exact_where_the_loss_is_linear() -> None:
    g0, gamma = torch.randn(50, dtype=torch.float64), 0.7
    mask = (torch.rand(50) < 0.5).double()
    theta = -mask * g0 / gamma  # the lower level's solution
    expected = -2 * mask * g0**2 / gamma
    torch.testing.assert_close(implicit_gradient(theta, mask, g0, gamma), expected, rtol=0, atol=1e-12)
    (with_hessian,) = implicit_gradient_hessian(
        lambda z: (g0 * z[0]).sum() + 0.0 * z[0].square().sum(), lambda z: (g0 * z[0]).sum(), [theta], [mask], gamma
    )
    torch.testing.assert_close(with_hessian, expected, rtol=0, atol=1e-12)


def test_kept_weights_never_lose_by_the_implicit_term() -> None:
    theta, g = torch.randn(40), torch.randn(40)
    mask = (torch.rand(40) < 0.5).float()
    correction = implicit_gradient(theta, mask, g, 0.5) - theta * g
    assert (correction[mask == 1] < 0).all()
    assert (correction[mask == 0] == 0).all()


class TwoLayers:
    """A 2-layer ReLU network whose first layer is pruned; the exact bi-level objective by gradient descent."""

    def __init__(self, gamma: float) -> None:
        generator = torch.Generator().manual_seed(0)
        options = {"generator": generator, "dtype": torch.float64}
        self.gamma = gamma
        self.data = [(torch.randn(12, 5, **options), torch.randint(0, 3, (12,), generator=generator)) for _ in range(2)]
        self.bias = torch.randn(7, **options)
        self.head = torch.randn(3, 7, **options)
        self.mask = (torch.rand(7, 5, **options) < 0.5).double()

    def loss(self, z: list[Tensor], level: int) -> Tensor:
        x, y = self.data[level]
        return cross_entropy(torch.relu(x @ z[0].T + self.bias) @ self.head.T, y)

    def grad_z(self, z: Tensor, level: int) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(self.loss([z], level), z)[0]

    def solve(self, mask: Tensor) -> Tensor:
        """theta*(m): a contraction for large gamma, iterated until it no longer moves."""
        theta = torch.zeros_like(mask)
        for _ in range(25):
            theta = -mask * self.grad_z(mask * theta, 0) / self.gamma
        return theta

    def objective(self, mask: Tensor) -> float:
        return float(self.loss([mask * self.solve(mask)], 1))

    def finite_differences(self) -> Tensor:
        gradient = torch.zeros_like(self.mask)
        for i in range(gradient.numel()):
            shift = torch.zeros_like(self.mask).flatten()
            shift[i] = 1e-5
            shift = shift.view_as(self.mask)
            gradient.view(-1)[i] = (self.objective(self.mask + shift) - self.objective(self.mask - shift)) / 2e-5
        return gradient

    def closed_form(self) -> Tensor:
        """The Hessian-free gradient at theta*, with a batch for each level."""
        theta = self.solve(self.mask)
        lower, upper = (self.grad_z(self.mask * theta, level) for level in (0, 1))
        return theta * upper - lower * self.mask * upper / self.gamma


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_hessian_gradient_is_the_derivative_of_the_bilevel_objective() -> None:
    case = TwoLayers(20.0)
    theta = case.solve(case.mask)
    (gradient,) = implicit_gradient_hessian(
        lambda z: case.loss(z, 0), lambda z: case.loss(z, 1), [theta], [case.mask], case.gamma
    )
    assert relative(gradient, case.finite_differences()) < 1e-6


def test_hessian_free_gradient_approaches_it_for_large_gamma() -> None:
    errors = {}
    for gamma in (100.0, 1000.0):
        case = TwoLayers(gamma)
        errors[gamma] = relative(case.closed_form(), case.finite_differences())
    assert errors[1000.0] < 0.01
    assert errors[1000.0] < errors[100.0] / 5  # first order in 1 / gamma


def test_one_batch_form_equals_two_batch_form() -> None:
    case = TwoLayers(50.0)
    case.data[1] = case.data[0]
    theta = case.solve(case.mask)
    g = case.grad_z(case.mask * theta, 0)
    torch.testing.assert_close(implicit_gradient(theta, case.mask, g, 50.0), case.closed_form())


# -- the steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ig", ["closed_form", "released", "none"])
def test_score_gradient_of_the_m_step(ig: str) -> None:
    model = prune_parametrize(net(), 0.5, scores_init="random")
    reference = copy.deepcopy(model)
    expected = []
    x, y = batch(1)
    cross_entropy(reference(x), y).backward()
    for layer in masked_layers(reference):
        theta, s, m = layer.theta.detach(), layer.masking.scores.detach(), layer.masking.mask
        upstream = layer.masking.scores.grad / (s.sign() * theta)  # g, from the tested straight-through rule
        partial = s.sign() * theta * upstream
        terms = {"closed_form": s.sign() * m * upstream**2 / 0.5, "released": 0.3 * partial**2, "none": 0.0}
        expected.append(s - 0.1 * (partial - terms[ig]))
    m_step(model, (x, y), optimizers(model)[1], gamma=0.5, ig=ig, lr2=0.3)
    for layer, scores in zip(masked_layers(model), expected, strict=True):
        torch.testing.assert_close(layer.masking.scores.detach(), scores, rtol=1e-9, atol=1e-12)


def test_m_step_leaves_everything_but_scores_and_masks() -> None:
    model = prune_parametrize(net(), 0.3)
    theta_optimizer, score_optimizer = optimizers(model, decay=0.1)
    theta_step(model, batch(0), theta_optimizer)  # builds up momentum that must not act in the m-step
    theta, scores = split_parameters(model)
    before, scores_before, masks = snapshot(theta), snapshot(scores), get_masks(model)
    for i in range(5):
        m_step(model, batch(i), score_optimizer, gamma=0.1)
    assert all(torch.equal(a, b) for a, b in zip(theta, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(scores, scores_before, strict=True))
    assert mask_iou(get_masks(model), masks) < 1.0


def test_theta_step_leaves_scores_and_masks() -> None:
    model = prune_parametrize(net(), 0.3)
    theta_optimizer, score_optimizer = optimizers(model, decay=0.1)
    m_step(model, batch(0), score_optimizer)
    scores, masks = snapshot(split_parameters(model)[1]), get_masks(model)
    theta_step(model, batch(1), theta_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(split_parameters(model)[1], scores, strict=True))
    assert mask_iou(get_masks(model), masks) == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_pruned_weights_change_by_decay_alone(decay: float) -> None:
    model = prune_parametrize(net(), 0.3)
    layer = masked_layers(model)[0]
    before, pruned = layer.theta.detach().clone(), layer.masking.mask == 0
    theta_step(model, batch(0), optimizers(model, decay)[0])
    torch.testing.assert_close(layer.theta[pruned], before[pruned] * (1 - 0.1 * decay), rtol=1e-12, atol=0)
    assert not torch.equal(layer.theta[~pruned], before[~pruned] * (1 - 0.1 * decay))


def test_biases_of_masked_layers_train() -> None:
    model = prune_parametrize(net(), 0.3)
    bias = model[3].bias.detach().clone()
    theta_step(model, batch(0), optimizers(model)[0])
    assert (model[3].bias != bias).all()


def test_an_iteration_is_n_lower_steps_and_one_upper_step() -> None:
    model = prune_parametrize(net(), 0.3)
    other = copy.deepcopy(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    bilevel_iteration(model, [batch(0), batch(1)], batch(2), *optimizers(model))
    assert len(calls) == 3
    theta_optimizer, score_optimizer = optimizers(other)
    for i in (0, 1):
        theta_step(other, batch(i), theta_optimizer)
    m_step(other, batch(2), score_optimizer)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_implicit_term_on_averaged_gradients_is_that_of_the_whole_batch() -> None:
    """Two processes with half of the batch each average gradients; the term must follow the average, not precede it."""
    model = prune_parametrize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(), 0.5)
    x, y = batch(0)
    cross_entropy(model(x), y).backward()
    add_implicit_term_(model, 0.5)
    whole = snapshot([s.grad for s in split_parameters(model)[1]])
    model.zero_grad()
    for half in (slice(0, 5), slice(5, 10)):
        (cross_entropy(model(x[half]), y[half]) / 2).backward()
    add_implicit_term_(model, 0.5)
    for s, expected in zip(split_parameters(model)[1], whole, strict=True):
        torch.testing.assert_close(s.grad, expected)


def test_refusals() -> None:
    model = prune_parametrize(net(), 0.3)
    score_optimizer = optimizers(model)[1]
    with pytest.raises(ValueError, match="gamma"):
        m_step(model, batch(0), score_optimizer, gamma=0.0)
    with pytest.raises((ValueError, TypeError), match="closed_form"):  # a TypeError where types are checked at run time
        m_step(model, batch(0), score_optimizer, ig="exact")
    with pytest.raises(ValueError, match="lacks the gradients"):
        add_implicit_term_(model, 1.0)


def test_a_layer_that_is_not_called_keeps_its_scores() -> None:
    model = net()
    model[0].spare = nn.Linear(6, 6).double()
    score_optimizer = optimizers(prune_parametrize(model, 0.5))[1]
    layers = {layer.name: layer.masking.scores for layer in masked_layers(model)}
    before = {name: scores.detach().clone() for name, scores in layers.items()}
    m_step(model, batch(0), score_optimizer)
    unchanged = [name for name, scores in layers.items() if torch.equal(scores, before[name])]
    assert unchanged == ["0.spare.weight"]


def test_it_learns() -> None:
    """A planted sparse linear teacher: BiP at 20 % must classify far above chance (1/3)."""
    torch.manual_seed(0)
    teacher = torch.randn(3, 20) * (torch.rand(3, 20) < 0.2)
    x = torch.randn(600, 20)
    y = (x @ teacher.T).argmax(1)
    model = prune_parametrize(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)), 0.2)
    theta, scores = split_parameters(model)
    theta_optimizer, score_optimizer = SGD(theta, 0.05, 0.9), SGD(scores, 0.05, 0.9)
    for _ in range(150):
        lower, upper = torch.randint(0, 500, (2, 64))
        bilevel_iteration(model, [(x[lower], y[lower])], (x[upper], y[upper]), theta_optimizer, score_optimizer)
    assert (model(x[500:]).argmax(1) == y[500:]).float().mean() > 0.75


# -- the released trainers --------------------------------------------------------------------------------------------


def released(tied: bool = False) -> tuple[nn.Module, SGD, SGD]:
    model = prune_parametrize(net(), 0.5, tie_scores=tied)
    return model, released_optimizer(model, 0.1, weight_decay=0.01), released_optimizer(model, 0.1, weight_decay=0.01)


def test_released_crosstalk_decays_what_is_frozen() -> None:
    model, weight_optimizer, mask_optimizer = released()
    for optimizer in (weight_optimizer, mask_optimizer):  # no gradients, no rate of their own: decay and momentum only
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    weight_optimizer.param_groups[0]["lr"] = 0.0
    theta = masked_layers(model)[0].theta
    before = theta.detach().clone()
    released_bilevel_step(model, batch(0), batch(1), weight_optimizer, mask_optimizer, lr2=0.0)
    torch.testing.assert_close(theta.detach(), before * (1 - 0.1 * 0.01))  # the mask's optimiser decayed the weights


def test_released_iteration_runs_four_forward_passes() -> None:
    model, *both = released()
    released_bilevel_step(model, batch(0), batch(1), *both)
    assert int(model[1].num_batches_tracked) == 4
    model, *both = released()
    released_accelerate_step(model, batch(0), batch(1), *both)
    assert int(model[1].num_batches_tracked) == 2
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_released_term_squares_the_score_gradient() -> None:
    results = []
    for lr2 in (0.0, 0.5):
        model, weight_optimizer, mask_optimizer = released()
        weight_optimizer.param_groups[0]["lr"] = 0.0
        reference = copy.deepcopy(model)
        released_bilevel_step(model, batch(0), batch(1), weight_optimizer, mask_optimizer, lr2=lr2)
        results.append(masked_layers(model)[0].masking.scores.detach())
    cross_entropy(reference(batch(0)[0]), batch(0)[1]).backward()
    squared = masked_layers(reference)[0].masking.scores.grad ** 2
    torch.testing.assert_close(results[1] - results[0], 0.1 * 0.5 * squared)


def test_unused_layers_do_not_stop_the_released_trainer() -> None:
    model = prune_parametrize(create_model("wrn_28_1", 10, legacy_sub_block=True), 0.5)
    optimizer = released_optimizer(model, 0.01)
    pictures = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    released_bilevel_step(model, pictures, pictures, optimizer, released_optimizer(model, 0.01))


def test_hydra_never_touches_weights() -> None:
    model, optimizer, _ = released()
    weights = [layer.theta for layer in masked_layers(model)] + [model[0].bias, model[3].bias]
    before, norm = snapshot(weights), model[1].weight.detach().clone()
    for i in range(3):
        hydra_step(model, batch(i), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert not torch.equal(model[1].weight, norm)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert cosine(0, 0.1, 100) == cosine(2, 0.1, 100) < cosine(1, 0.1, 100) == 0.1
    assert [cosine(e, 0.1, 10, 2, 0.03) for e in (0, 1, 3)] == [0.03, 0.03, 0.1]
    assert [round(step(e, 1.0, 100), 3) for e in (49, 50, 74, 75, 99)] == [1.0, 0.1, 0.1, 0.01, 0.01]
    assert [round(mask_step(e, 1.0, 100), 3) for e in (74, 75, 89, 90)] == [1.0, 0.1, 0.1, 0.01]
