"""The importance scores BiP is compared with."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tenfold_bip import (
    create_model,
    fix_masks,
    get_masks,
    grasp_importance,
    imp_keep_schedule,
    importance_masks,
    kept_per_layer,
    magnitude_importance,
    mask_iou,
    random_importance,
    snip_importance,
    synflow_masks,
)
from tenfold_bip.projections import keep_count


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (9,), generator=generator)


def loss_of(model: nn.Module, name: str, index: tuple[int, int], value: float, temperature: float = 1.0) -> float:
    model = copy.deepcopy(model)
    with torch.no_grad():
        dict(model.named_parameters())[name][index] = value
        x, y = batch()
        return float(cross_entropy(model(x) / temperature, y))


def test_random_is_uniform_and_seeded() -> None:
    model = create_model("digits_cnn")
    a, b = (importance_masks(random_importance(model, torch.Generator().manual_seed(s)), 0.3) for s in (0, 0))
    c = importance_masks(random_importance(model, torch.Generator().manual_seed(1)), 0.3)
    assert mask_iou(a, b) == 1.0
    assert mask_iou(a, c) == pytest.approx(0.3 / 1.7, abs=0.02)


def test_magnitude_keeps_what_is_pruned_pruned() -> None:
    model = net()
    importances = magnitude_importance(model)
    assert torch.equal(importances["0.weight"], model[0].weight.detach().abs())
    first = importance_masks(importances, 0.5)
    fix_masks(model, first)
    with torch.no_grad():
        model[0].parametrizations["weight"].original.add_(10.0)  # theta of pruned weights may be anything
    second = importance_masks(magnitude_importance(model), 0.3)
    assert all((second[name] <= first[name]).all() for name in first)


def test_rounds_of_iterative_pruning() -> None:
    assert imp_keep_schedule(0.5) == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert imp_keep_schedule(0.64) == pytest.approx([0.8, 0.64])
    assert imp_keep_schedule(1.0) == [1.0]
    assert len(imp_keep_schedule(0.1)) == 11
    assert imp_keep_schedule(0.985, 0.01) == pytest.approx([0.99, 0.985])
    with pytest.raises(ValueError, match="remains"):
        imp_keep_schedule(0.0)
    with pytest.raises(ValueError, match="pruning rate"):
        imp_keep_schedule(0.5, 1.0)


PAPER_GRID = (0.8, 0.64, 0.512, 0.41, 0.328, 0.262, 0.2097, 0.1678, 0.1342, 0.1074, 0.0859, 0.0687, 0.055, 0.044, 0.035)
PAPER_GRID += (0.028, 0.0225, 0.018, 0.0144, 0.0115, 0.0092)


def test_the_papers_ratios_take_no_round_for_their_rounding() -> None:
    for number, keep in enumerate(PAPER_GRID, 1):
        assert len(imp_keep_schedule(keep)) == number
        assert imp_keep_schedule(keep)[-1] == keep


def test_snip_is_the_derivative_in_the_mask() -> None:
    model = net()
    importances = snip_importance(model, [batch()])
    for name, index in (("0.weight", (2, 1)), ("2.weight", (0, 5))):
        theta = float(dict(model.named_parameters())[name].detach()[index])
        up, down = (loss_of(model, name, index, theta * m) for m in (1 + 1e-6, 1 - 1e-6))
        assert float(importances[name][index]) == pytest.approx(abs(up - down) / 2e-6, rel=1e-5)


def test_snip_adds_batches_before_the_magnitude() -> None:
    model = net()
    x, y = batch()
    both = snip_importance(model, [(x[:3], y[:3]), (x[3:6], y[3:6])])
    joint = snip_importance(model, [(x[:6], y[:6])])
    torch.testing.assert_close(both["0.weight"], 2 * joint["0.weight"])


def test_grasp_against_the_full_hessian() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    x, y = batch()

    def loss(*weights: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)) / 200, y)

    weights = tuple(dict(model.named_parameters())[name].detach() for name in names)
    gradients = torch.func.grad(loss, argnums=(0, 1))(*weights)
    hessian = torch.func.hessian(loss, argnums=(0, 1))(*weights)
    importances = grasp_importance(model, [(x, y)])
    for i, name in enumerate(names):
        product = sum(torch.einsum("abcd,cd->ab", hessian[i][j], gradients[j]) for j in (0, 1))
        torch.testing.assert_close(importances[name], weights[i] * product, rtol=1e-8, atol=1e-18)
    keep = importance_masks(importances, 0.25)
    signed = torch.cat([importances[name].flatten() for name in names])
    kept = torch.cat([keep[name].flatten() for name in names]).bool()
    assert signed[kept].min() > signed[~kept].max()  # the largest, with their sign


def test_synflow_one_round_by_hand() -> None:
    model = net()[::2]  # two linear layers: R = sum over paths of |w2| |w1|, plus biases
    first, second = (model[i].weight.detach().abs() for i in (0, 1))
    bias = model[0].bias.detach().abs()
    through = second.sum(0)
    expected = {"0.weight": first * through[:, None], "2.weight": second * (first.sum(1) + bias)}
    assert mask_iou(synflow_masks(model, 0.4, (4,), iterations=1), importance_masks(expected, 0.4)) == 1.0


def test_synflow_reaches_the_ratio_without_losing_a_layer() -> None:
    model = create_model("digits_cnn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = synflow_masks(model, 0.02, (1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = kept_per_layer(fix_masks(model, masks))
    assert sum(k for k, _ in kept.values()) == keep_count(0.02, 14288)
    assert all(k > 0 for k, _ in kept.values())
    model = create_model("digits_cnn")
    spared = kept_per_layer(fix_masks(model, synflow_masks(model, 0.02, (1, 8, 8), iterations=3, min_keep=70)))
    assert sum(k for k, _ in spared.values()) == keep_count(0.02, 14288)
    assert all(k >= 70 for k, _ in spared.values())


@pytest.mark.parametrize("structure", ["filter", "channel"])
def test_structured_variants(structure: str) -> None:
    model = create_model("digits_cnn")
    images = torch.randn(8, 1, 8, 8), torch.arange(8)
    for importances in (magnitude_importance(model), snip_importance(model, [images])):
        masks = importance_masks(importances, 0.5, structure)
        assert len(masks) == 3
        assert {
            tuple(
                get_masks(fix_masks(copy.deepcopy(model), masks))["3.weight"]
                .flatten(2)
                .float()
                .mean(2)
                .unique()
                .tolist()
            )
        } == {(0.0, 1.0)}
    with pytest.raises(ValueError, match="norms"):
        importance_masks(grasp_importance(model, [images]), 0.5, structure)


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = create_model("digits_cnn").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(8, 1, 8, 8), torch.arange(8)
    snip_importance(model, [images])
    grasp_importance(model, [images])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no prunable layer"):
        magnitude_importance(nn.ReLU())
    with pytest.raises(ValueError, match="finds no layer"):
        importance_masks(magnitude_importance(net()), 0.5, "filter")
